"""Captioning, and CapLoss, by which pictures are ranked (CogView paper, section 3.2): the picture before its text.

    [BASE] [BOI1] image [EOI1] [ROI1] text [SEP]

A text-to-image model is finetuned on it. [SEP] ends the text; the original knows no end and always draws 20 tokens.

CapLoss(x, t) = 1/|t| sum_i -log p(t_i | x, t_<i) over the text's tokens, without [SEP]: how badly a captioning model
explains a text by a picture. The lowest wins (the released code sums log p, and takes the highest).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig, require
from cogview.loss import row_means
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Draws, Prompt, Recipe, first_alike
from cogview.sequence import pad_text


@dataclass(frozen=True)
class CaptionConfig(CogViewConfig):
    stop: bool = True
    """Whether [SEP] ends a text; the released weights know no end."""


# No image codes are learned: a model that draws pictures has learned those. A finetuning takes a day of a DGX-2, says
# the paper, which is 0.2 % of its pretraining, 1.5 million sequences; rates and batches are ours.
_TRAINING: dict[str, Any] = {"text_weight": 1.0, "image_weight": 0.0, "hide_context": 0.0}
_TINY: dict[str, Any] = {"seconds": 120.0, "learning_rate": 5e-4, "validate_every": 100}
_PUBLISHED: dict[str, Any] = {"steps": 3000, "batch_size": 512, "accumulate": 8, "learning_rate": 1e-4}


class Caption(CogView):
    name = "caption"
    draws = ("captions",)
    Config = CaptionConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {
        name: (
            CaptionConfig(**vars(config)),
            dataclasses.replace(training, **_TRAINING, **(_TINY if name.endswith("tiny") else _PUBLISHED)),
        )
        for name, (config, training) in CogView.presets.items()
    }
    begins_from = ("cogview",)
    config: CaptionConfig

    @property
    def stops(self) -> bool:
        return self.config.stop

    @property
    def length(self) -> int:
        """[SEP] is never fed, so that the longest text fits the table of positions that it has before an image."""
        return self.config.max_positions - 1 + self.config.stop

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vocab.caption(text, codes, self.length + 1, stop=self.config.stop)
        return tokens[:, :-1], tokens[:, 1:]

    def pivot_places(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """All places of the longest text: what is drawn has its pivots before its length is known, as in training."""
        image = self.vocab.is_image(inputs)
        return ~image, image

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        return (self.config.max_text,)

    def prompt(self, codes: Tensor, draws: Draws = None) -> Prompt:
        """To draw a text behind each picture of codes [B, N]."""
        c, vocab = self.config, self.vocab
        fits = codes.ndim == 2 and codes.shape[1] == c.image_tokens
        require(fits, "codes", f"{c.image_tokens} of each picture", list(codes.shape))
        tokens = vocab.caption(codes.new_zeros(len(codes), c.max_text), codes, c.max_positions, stop=False)
        drawn = (torch.arange(c.max_positions) >= c.image_tokens + 4).expand(tokens.shape)
        allowed = vocab.allowed_after("ROI1")
        allowed[vocab["SEP"]] = c.stop
        context = self.context(tokens, draws)
        before = torch.cat([codes, *(values.flatten(1) for values in context.attention.values())], dim=1)
        return Prompt(tokens, context, drawn, allowed, vocab["SEP"] if c.stop else None, first_alike(before))

    def kinds(self, targets: Tensor) -> dict[str, Tensor]:
        """ "text" has the mean that CapLoss is."""
        vocab = self.vocab
        return {"text": vocab.is_caption(targets), "stop": targets == vocab["SEP"], "image": vocab.is_image(targets)}


@torch.no_grad()
def caploss(
    recipe: Recipe,
    model: Transformer,
    codes: Tensor,
    captions: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> Tensor:
    """float32 [N], nats a text token, of codes int64 [N, h, w] and as many captions of raw text ids, by a recipe that
    draws captions; `batch_size` at once. The lower, the better the caption fits.

    Every pair draws its pivots from the same seed, so that a score does not depend on its batch, but for models of
    relax "tensor". ValueError where the logits are not finite.
    """
    text, grid = pad_text(captions), recipe.config.image_grid
    fits = codes.ndim == 3 and codes.shape[1:] == (grid, grid) and len(codes) == len(captions)
    require(fits, "codes", f"[{len(captions)}, {grid}, {grid}], one image a caption", list(codes.shape))
    require(all(map(len, captions)), "captions", "none that is empty", "one of 0 tokens")
    require(batch_size >= 1, "batch_size", "at least 1", batch_size)
    recipe.layout(text, codes.flatten(1).cpu())  # checks all ids before anything is computed
    scores = [torch.zeros(0)]
    with evaluating(model):
        for some, images in zip(text.split(batch_size), codes.flatten(1).cpu().split(batch_size), strict=True):
            streams = [torch.Generator().manual_seed(seed) for _ in some]
            batch = recipe.batch(some, images, draws=streams).to(model.device)
            nll = model(batch.inputs, batch.context, targets=batch.targets)
            scores.append(row_means(nll, recipe.vocab.is_caption(batch.targets)).cpu())
    return torch.cat(scores)
