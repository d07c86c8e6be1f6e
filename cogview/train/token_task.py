"""The task of every recipe over text and image tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.flops import model_flops
from cogview.parts.stack import seeds_a_row
from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch, pad_text, truncate_text
from cogview.train.ranks import ALONE, Ranks
from cogview.train.task import Samples
from cogview.train.watch import Inside

Output = tuple[Tensor, Batch]
"""Losses [B, S] of a part, and the part."""


class Pairs(Samples, Protocol):
    """Tokenised pictures with captions; `cogview.data.tokens.TokenDataset` is one."""

    @property
    def tokenizers(self) -> list[str]:
        """Hashes of the text and image tokenizer that made it."""
        ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """Text ids int64 [B, T], -1 padded, and image codes int64 [B, N], of each of the recipe's sizes."""
        ...


class Pieces(Protocol):
    """A text tokenizer; `cogview.tokenizers.text.TextTokenizer` is one."""

    sha256: str

    @property
    def is_bpe(self) -> bool: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def sample(self, text: str, dropout: float, seed: int) -> list[int]:
        """Ids with BPE dropout."""
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
        ranks: Ranks = ALONE,
        text: Pieces | None = None,
        **of_data: Any,
    ):
        """text: the tokenizer of the captions, which BPE dropout takes. of_data: what else a resumed run must have in
        common with the one before, by name."""
        self.recipe, self.model, self.config = recipe, model, config
        self.data, self.held_out, self.of_data, self.ranks = data, held_out, of_data, ranks
        described = recipe.draws != ("captions",)
        require(described or config.drop_text == 0, "drop_text", "0 where captions are learned", config.drop_text)
        self.text = text
        known = config.bpe_dropout == 0 or (text is not None and text.sha256 == data.tokenizers[0])
        require(known, "bpe_dropout", "0 without the text tokenizer that made the tokens", config.bpe_dropout)
        merges = config.bpe_dropout == 0 or text is None or text.is_bpe
        require(merges, "bpe_dropout", "0 with a text tokenizer that is not of byte-pair merges", config.bpe_dropout)
        self.units, self.flops = recipe.length, model_flops(recipe)
        self.inside = Inside(recipe, model, ranks)
        self.counts = {"truncated": 0}  # captions that lost text
        self._weighed: tuple[Batch, tuple[Tensor, Tensor | None]] | None = None

    def batch(
        self, samples: Pairs, indices: np.ndarray, draws: Sequence[torch.Generator], training: bool = True
    ) -> Batch:
        c, recipe, cut = self.config, self.recipe, 0
        text, *codes = samples.batch(indices)
        if training and self.text is not None and c.bpe_dropout:
            text = self._pieces_anew(text, draws)
        if c.truncate_text:
            text, cut = truncate_text(text, recipe.config.max_text)
        dropped = None
        if c.drop_text and training:
            dropped = torch.cat([torch.rand(1, generator=stream) for stream in draws]) < c.drop_text
        weights: dict[str, Any] = {"text_weight": c.text_weight, "image_weight": c.image_weight}
        batch = recipe.training_batch(text, *codes, draws=draws, dropped=dropped, **weights)
        if training:
            batch = self._dropped(self._hide_context(batch, draws), draws, cut)
        return batch.to(self.model.device)

    def _pieces_anew(self, text: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """The same captions cut into pieces with BPE dropout. As it was stays one that would have more than there is
        room for, unless it may be cut, and one whose text its ids do not tell, since the tokenizer lacks characters."""
        assert self.text is not None
        longest, rows = self.recipe.config.max_text, []
        for row, stream in zip(text, draws, strict=True):
            ids = row[row >= 0].tolist()
            seed = int(torch.randint(1, 2**31, (), generator=stream))
            caption = self.text.decode(ids)
            drawn = self.text.sample(caption, self.config.bpe_dropout, seed)
            fits = len(drawn) <= longest or self.config.truncate_text
            rows.append(drawn if fits and self.text.encode(caption) == ids else ids)
        return pad_text(rows)

    def _dropped(self, batch: Batch, draws: Sequence[torch.Generator], cut: int) -> Batch:
        """The batch with the seeds of its dropout, and how many of its captions were cut."""
        context = batch.context
        if self.recipe.config.dropout:
            count = seeds_a_row(self.recipe.config.num_layers)
            seeds = torch.stack([torch.randint(2**63 - 1, (count,), generator=stream) for stream in draws])
            context = dataclasses.replace(context, seeds=seeds)
        return dataclasses.replace(batch, context=context, cut=cut)

    def _hide_context(self, batch: Batch, draws: Sequence[torch.Generator]) -> Batch:
        """The batch with image tokens hidden behind [MASK], in `hide_context` of the rows, a random share of each.

        Nearly everything about a picture's later tokens can be told from its earlier ones, and very little of the loss
        teaches what can only be told from the text; where the earlier ones are hidden, all of it does.
        """
        share, inputs = self.config.hide_context, batch.inputs
        if share == 0:
            return batch
        drawn = torch.stack([torch.rand(2 + inputs.shape[1], generator=stream) for stream in draws])
        rate = torch.where(drawn[:, :1] < share, drawn[:, 1:2], 0)
        hidden = drawn[:, 2:] < rate
        return dataclasses.replace(
            batch, inputs=inputs.masked_fill(hidden & self.recipe.hideable(inputs), self.recipe.vocab["MASK"])
        )

    def loss(self, part: Batch, batch: Batch) -> tuple[Tensor, Output]:
        how: Any = {"recompute": self.config.checkpoint_activations if self.model.training else "none"}
        whole, ratios = self._whole(batch)
        weights = part.weights
        if ratios is not None:
            weights = weights * sum(n * kind for n, kind in zip(ratios, self._text_image(part), strict=True))
        total, nll = self.model(part.inputs, part.context, targets=part.targets, weights=weights, **how)
        return total / whole, (nll, part)

    def _text_image(self, part: Batch) -> list[Tensor]:
        """float32 [B, S] twice: which targets are text, and which are of images."""
        vocab = self.recipe.vocab
        return [vocab.is_text(part.targets).float(), vocab.is_image(part.targets).float()]

    def _whole(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the weighted sum of all losses, on all processes, is divided by. Where either kind has a mean of its
        own that is how many there are, and [2] by what the weights of each are multiplied before."""
        if self._weighed is None or self._weighed[0] is not batch:
            if self.config.loss_mean == "tokens":
                self._weighed = batch, (self.ranks.sum(batch.weights.sum()), None)
            else:
                counts = self.ranks.sum(torch.stack([kind.sum() for kind in self._text_image(batch)]))
                self._weighed = batch, (counts.sum(), counts.sum() / counts.clamp_min(1))
        return self._weighed[1]

    def metrics(self, outputs: list[Output]) -> dict[str, float]:
        """Means over the batches of all processes."""
        kinds = self.recipe.kinds(torch.zeros(1, 1, dtype=torch.int64))
        names = ["loss", *(f"{kind}_loss" for kind in kinds)]
        sums = torch.zeros(len(names) + 3, 2, dtype=torch.float64, device=self.model.device)
        for nll, part in outputs:
            for k, kind in enumerate((part.weights, *self.recipe.kinds(part.targets).values())):
                sums[k] += torch.stack([(nll * kind).sum(), kind.float().sum()])
            for k, kind in enumerate(self._text_image(part), len(names)):
                sums[k] += torch.stack([(nll * part.weights * kind).sum(), kind.sum()])
            sums[-1, 0] += part.cut
        *pairs, (cut, _) = self.ranks.sum(sums).tolist()
        self.counts["truncated"] += int(cut)
        means = [total / max(weight, 1e-30) for total, weight in pairs]
        if self.config.loss_mean == "kinds":
            means[0] = sum(means[len(names) :])
        return dict(zip(names, means, strict=False))

    def compile(self) -> None:
        for layer in self.model.stack.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True)  # what FSDP does around it stays as it is

    def identity(self) -> dict[str, Any]:
        data = {"tokenizers": self.data.tokenizers, "data": len(self.data), **self.of_data}
        return {"recipe": self.recipe.name, "config": dataclasses.asdict(self.recipe.config), **data}
