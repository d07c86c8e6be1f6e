"""Super-resolution (CogView paper, section 3.1): a picture's tokens at half its size, then at the whole.

    [ROI1] text [BASE] [BOI1] small image [EOI1] [ROI2] [POS0] [BASE] [BOI2] large image [EOI2]

A text-to-image model is finetuned on it; `cogview.magnify` slides it over a picture. Positions begin anew at [ROI2], so
that the table of the model that it begins with is long enough. The paper has no [POS0]; its code and weights do.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig, require
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Draws, Prompt

Restart = Literal["on", "behind"]


@dataclass(frozen=True)
class SuperResolutionConfig(CogViewConfig):
    restart: Restart = "on"
    """Where positions begin anew: on [ROI2], which is at 0 then, as the published weights were trained; or behind it,
    so that it stays where it is and [POS0] is at 1, as the published code draws."""

    def __post_init__(self):
        super().__post_init__()
        fits = self.image_grid % 4 == 0
        require(fits, "image_grid", "a multiple of 4, for windows to lie on the picture's grid", self.image_grid)
        require(self.restart in get_args(Restart), "restart", " or ".join(get_args(Restart)), self.restart)

    @property
    def always_pivots(self) -> int:
        """As well as text the small image: all of the large one follows it."""
        return self.max_text + 8 + self.image_tokens // 4


# A finetuning takes a day of a DGX-2 and 2 million crops, says the paper; rates and batches are ours.
_TINY: dict[str, Any] = {"seconds": 240.0, "learning_rate": 7e-4, "hide_context": 0.5, "validate_every": 100}
_PUBLISHED: dict[str, Any] = {"steps": 4000, "batch_size": 512, "accumulate": 16, "learning_rate": 1e-4}


class SuperResolution(CogView):
    name = "superresolution"
    draws = ("larger pictures",)
    Config = SuperResolutionConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {}
    """Those of CogView whose windows lie on its grid."""
    begins_from = ("cogview",)
    sizes = 2
    config: SuperResolutionConfig

    @property
    def length(self) -> int:
        """Without [EOI2], which is only predicted."""
        return self.config.max_text + 8 + sum(grid**2 for grid in self.grids)

    @property
    def begins(self) -> dict[str, int]:
        c = self.config
        images = {"BOI2": c.max_text + 2} if c.image_positions == "fixed" else {}
        return super().begins | images | ({"ROI2": 0} if c.restart == "on" else {"POS0": 1})

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        small, large = codes.split([grid**2 for grid in self.grids], dim=1)
        tokens = self.vocab.magnified(text, small, large, self.length + 1)
        return tokens[:, :-1], tokens[:, 1:]

    def is_large(self, tokens: Tensor) -> Tensor:
        """bool [B, S]: the codes behind [ROI2], of tokens [B, S]."""
        return self.vocab.is_image(tokens) & ((tokens == self.vocab["ROI2"]).cumsum(dim=1) > 0)

    def hideable(self, inputs: Tensor) -> Tensor:
        return self.is_large(inputs)

    def pivot_places(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        large = self.is_large(inputs)
        return ~large & (inputs != self.vocab["PAD"]), large

    def continued(self, text: Tensor, small: Tensor, large: Tensor, draws: Draws = None) -> Prompt:
        """To draw codes of the large image, those that are -1 in large [B, M]; all else is given."""
        inputs, _ = self.layout(text, torch.cat([small, large.clamp_min(0)], dim=1))
        drawn = torch.zeros_like(inputs, dtype=torch.bool).masked_scatter(self.is_large(inputs), large < 0)
        return Prompt(inputs, self.context(inputs, draws), drawn, self.vocab.allowed_after("BOI2"))

    def prompt(self, text: Tensor, draws: Draws = None) -> Prompt:
        raise ValueError("recipe: expected one that draws behind text alone, got superresolution: see cogview.magnify")

    def kinds(self, targets: Tensor) -> dict[str, Tensor]:
        large = self.is_large(targets)
        small = self.vocab.is_image(targets) & ~large
        return {"text": self.vocab.is_text(targets), "small": small, "image": large}


SuperResolution.presets |= {
    name: (
        SuperResolution.begun(config),
        dataclasses.replace(training, **(_TINY if name.endswith("tiny") else _PUBLISHED)),
    )
    for name, (config, training) in CogView.presets.items()
    if config.image_grid % 4 == 0
}
