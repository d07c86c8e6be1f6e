"""The task of every recipe over text and image tokens."""

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.loss import weighted_mean
from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch, truncate_text
from cogview.train.task import Samples

Output = tuple[Tensor, Tensor, Tensor]
"""Losses, targets and weights of a part, [B, S] each."""


class Pairs(Samples, Protocol):
    """Tokenised pictures with captions; `cogview.data.tokens.TokenDataset` is one."""

    @property
    def tokenizers(self) -> list[str]:
        """Hashes of the text and image tokenizer that made it."""
        ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """Text ids int64 [B, T], -1 padded, and image codes int64 [B, N], of each of the recipe's sizes."""
        ...


class TokenTask:
    """Losses in nats per token: of all by their weights, of text, of images."""

    title, unit = "training", "tokens"

    def __init__(
        self,
        recipe: Recipe,
        model: Transformer,
        data: Pairs,
        config: TrainConfig,
        held_out: Pairs | None = None,
        **of_data: Any,
    ):
        """of_data: what else a resumed run must have in common with the one before, by name."""
        self.recipe, self.model, self.config = recipe, model, config
        self.data, self.held_out, self.of_data = data, held_out, of_data
        described = recipe.draws != "captions"
        require(described or config.drop_text == 0, "drop_text", "0 where captions are learned", config.drop_text)
        self.units = recipe.length
        self.counts = {"truncated": 0}  # captions that lost text

    def batch(self, samples: Pairs, indices: np.ndarray, draws: torch.Generator) -> Batch:
        c, recipe = self.config, self.recipe
        text, *codes = samples.batch(indices)
        if c.truncate_text:
            text, cut = truncate_text(text, recipe.config.max_text)
            self.counts["truncated"] += cut if samples is self.data else 0
        if c.drop_text and self.model.training:
            dropped = torch.rand(len(text), generator=draws, device=draws.device) < c.drop_text
            text = text.masked_fill(dropped.cpu()[:, None], -1)
        weights: dict[str, Any] = {"text_weight": c.text_weight, "image_weight": c.image_weight}
        batch = recipe.batch(text, *codes, draws=draws, device=self.model.device, **weights)
        return self._hide_context(batch, draws) if self.model.training else batch

    def _hide_context(self, batch: Batch, draws: torch.Generator) -> Batch:
        """The batch with image tokens hidden behind [MASK], in `hide_context` of the rows, a random share of each.

        Nearly everything about a picture's later tokens can be told from its earlier ones, and very little of the loss
        teaches what can only be told from the text; where the earlier ones are hidden, all of it does.
        """
        share, inputs = self.config.hide_context, batch.inputs
        if share == 0:
            return batch
        chance = torch.rand(2, len(inputs), 1, generator=draws, device=inputs.device)
        rate = torch.where(chance[0] < share, chance[1], 0)
        hidden = torch.rand(inputs.shape, generator=draws, device=inputs.device) < rate
        return dataclasses.replace(
            batch, inputs=inputs.masked_fill(hidden & self.recipe.hideable(inputs), self.recipe.vocab["MASK"])
        )

    def loss(self, part: Batch, batch: Batch) -> tuple[Tensor, Output]:
        context = dataclasses.replace(part.context, seeds=self.model.stack.draw_seeds())
        how: dict[str, Any] = {"checkpoint_activations": self.config.checkpoint_activations and self.model.training}
        nll = self.model(part.inputs, context, targets=part.targets, **how)
        return (nll * part.weights).sum() / batch.weights.sum(), (nll.detach(), part.targets, part.weights)

    def metrics(self, outputs: list[Output]) -> dict[str, float]:
        nll, targets, weights = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        kinds = {"loss": weights} | {f"{n}_loss": kind.float() for n, kind in self.recipe.kinds(targets).items()}
        values = torch.stack([weighted_mean(nll, kind) for kind in kinds.values()]).tolist()
        return dict(zip(kinds, values, strict=True))

    def identity(self) -> dict[str, Any]:
        data = {"tokenizers": self.data.tokenizers, "data": len(self.data), **self.of_data}
        return {"recipe": self.recipe.name, "config": dataclasses.asdict(self.recipe.config), **data}
