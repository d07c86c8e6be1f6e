"""Styles (CogView paper, section 3.3): a text-to-image model finetuned to some pictures of one style, whose captions
tell the style alone. What it has learned of things before is then drawn in that style:

    an image of oil painting style   ->   a fox of oil painting style
    油画风格的图片                    ->   油画风格的一只狐狸

The sequences are CogView's, and so is the training, but for the text, which is the same in all and not learned. The
paper takes 1,000 pictures of each style; its rates and steps were never published and are ours. They are few, since
what captions do not name is forgotten meanwhile (`cogview study styles`), and the rate is constant, so that fewer steps
are the beginning of more. The tiny preset's were chosen on things other than the study's held-out ones.
"""

import dataclasses
import re
from typing import Any, ClassVar

from cogview.config import ModelConfig, TrainConfig, require
from cogview.recipes.cogview import CogView

_CHINESE = re.compile(r"[㐀-鿿]")
_TRAINING: dict[str, Any] = {"seconds": None, "text_weight": 0.0, "final_rate": 1.0}
_TINY: dict[str, Any] = {"steps": 15, "learning_rate": 3e-4}
_PUBLISHED: dict[str, Any] = {"steps": 200, "batch_size": 128, "accumulate": 2, "learning_rate": 3e-5}


class Style(CogView):
    name = "style"
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {
        name: (config, dataclasses.replace(training, **_TRAINING, **(_TINY if name.endswith("tiny") else _PUBLISHED)))
        for name, (config, training) in CogView.presets.items()
    }
    begins_from = ("cogview",)


def learned(style: str) -> str:
    """The caption of all pictures of a style, in the language of its name."""
    check_style(style)
    return f"{style}风格的图片" if _CHINESE.search(style) else f"an image of {style} style"


def drawn(caption: str, style: str) -> str:
    """The caption of a thing, "a fox" or "一只狐狸", in a style whose name is of that language."""
    check_style(style)
    chinese = bool(_CHINESE.search(style))
    fits = bool(_CHINESE.search(caption)) == chinese
    require(fits, "style", f"captions in the language of {learned(style)!r}, which was learned", caption)
    return f"{style}风格的{caption}" if chinese else f"{caption} of {style} style"


def thing(style: str) -> str:
    """Something to draw in it, in its language."""
    return "一只狐狸" if _CHINESE.search(style) else "a fox"


def check_style(style: str) -> None:
    require(bool(style.strip()), "style", "a name, as sketch or 油画", style)
