"""The logit-Laplace distribution of a picture's values, by which DALL-E's image tokenizer learns (Ramesh et al., arXiv
2102.12092, appendix A): a Laplace distribution of logit(x), so that x lies in (0, 1) as pixels do.

    f(x | m, b) = 1 / (2 b x (1 - x)) exp(-|logit(x) - m| / b)

Pixels are mapped into (0, 1) before, x = (1 - 2 EPS) pixel + EPS, and back behind. The decoder gives m and b of every
value, so that it can say where it is not sure.
"""

import torch
from torch import Tensor

EPS = 0.1
LEAST = 4 * (1 - 2 * EPS) / 255
"""Of b: one of a pixel's 255 levels, in logits of mid grey. Pixels are whole levels, and where the decoder meets one
exactly, as in a flat ground, the likelihood would grow without end as b goes to 0."""


def negative_log_likelihood(decoded: Tensor, pictures: Tensor) -> Tensor:
    """-ln f of every value, float32 [B, 3, H, W]. decoded: [B, 6, H, W], m and ln(b - LEAST); pictures in [0, 1]."""
    m, of_b = decoded.chunk(2, dim=1)
    b = of_b.exp() + LEAST
    x = (1 - 2 * EPS) * pictures + EPS
    return (2 * b * x * (1 - x)).log() + (x.logit() - m).abs() / b


def pictures_of(decoded: Tensor) -> Tensor:
    """Pixels where x is at its median, sigmoid(m), [B, 3, H, W]; a little outside of [0, 1] where x is outside of
    [EPS, 1 - EPS]. decoded: [B, 6, H, W]."""
    return (torch.sigmoid(decoded.chunk(2, dim=1)[0]) - EPS) / (1 - 2 * EPS)
