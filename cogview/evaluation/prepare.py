"""Pictures as they are compared (CogView paper, section 4.1): what was drawn with more contrast, and all of them
blurred alike, so that a score at a radius tells nothing of finer details. uint8 [N, 3, H, W]."""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from cogview.config import require
from cogview.pictures import image_of


def blurred(pictures: Tensor, radius: float) -> Tensor:
    """Behind a Gaussian filter. radius: its standard deviation in pixels, which is what Pillow calls so (Pillow comes
    near the filter by three boxes); 0: as they are."""
    require(0 <= radius < math.inf, "radius", "a finite number of pixels that is not negative", radius)
    return pictures if radius == 0 else _each(pictures, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def contrasted(pictures: Tensor, factor: float) -> Tensor:
    """Each pixel's distance from its picture's mean grey times a factor, clipped, as Pillow's `ImageEnhance.Contrast`;
    1: as they are. The paper takes 1.5 for what was drawn."""
    require(0 < factor < math.inf, "contrast", "a positive and finite number", factor)
    return pictures if factor == 1 else _each(pictures, lambda image: ImageEnhance.Contrast(image).enhance(factor))


def _each(pictures: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = [torch.from_numpy(np.array(change(image_of(picture)))) for picture in pictures]
    return torch.stack(changed).permute(0, 3, 1, 2) if changed else pictures
