"""What a recipe is: a system or task on top of the shared parts, in one file.

It says what its sequences are (`layout`), what its tokens see (`attention`, `context`) and how it is decoded
(`prompt`). It has no training loop, no checkpoints, no command line.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig, require
from cogview.parts.attend import Attention
from cogview.parts.transformer import Transformer
from cogview.sequence import Batch, Context, Vocabulary

Draws = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: one stream, or one for each row, or torch's own."""


@dataclass(frozen=True)
class Prompt:
    """What generation starts from: whole sequences, with placeholders for what is drawn."""

    inputs: Tensor
    """int64 [B, S]."""
    context: Context
    """Of all of them."""
    drawn: Tensor
    """bool [B, S]: the places that are drawn, at least one of each row and never the first. What stands behind the last
    one does not matter."""
    allowed: Tensor
    """bool [V]: those that may be drawn."""
    stop: int | None = None
    """A token behind which nothing of a row is drawn any more."""
    same: Tensor | None = None
    """int64 [B]: a row whose states before its first drawn place are this one's, so that they are computed once."""

    @property
    def starts(self) -> Tensor:
        """int64 [B]: the place of each row's first drawn token."""
        return self.drawn.int().argmax(dim=1)

    @property
    def span(self) -> tuple[int, int]:
        """The first id that may be drawn, and the one behind the last."""
        ids = self.allowed.nonzero()
        return int(ids[0]), int(ids[-1]) + 1

    def beside(self, other: "Prompt") -> "Prompt":
        """The rows of both, of one recipe."""
        inputs, drawn = (torch.cat([getattr(p, name) for p in (self, other)]) for name in ("inputs", "drawn"))
        own, theirs = (torch.arange(len(p.inputs)) if p.same is None else p.same for p in (self, other))
        same = torch.cat([own, len(self.inputs) + theirs])
        return dataclasses.replace(
            self, inputs=inputs, drawn=drawn, same=same, context=self.context.beside(other.context, len(drawn) // 2)
        )


def first_alike(rows: Tensor) -> Tensor:
    """int64 [B]: for each of rows [B, n] the number of the first one that equals it."""
    _, group = torch.cat([rows.new_zeros(len(rows), 1), rows], dim=1).unique(
        dim=0, return_inverse=True
    )  # also without columns
    first = group.new_full((int(group.max()) + 1,), len(rows)) if len(rows) else group
    first.scatter_reduce_(0, group, torch.arange(len(rows)), "amin")
    return first[group]


class Recipe:
    """A recipe with the sizes of one model."""

    name: ClassVar[str]
    """Of the command line and of checkpoints."""
    Config: ClassVar[type[ModelConfig]] = ModelConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {}
    draws: ClassVar[str] = "pictures"
    """What it draws behind a prompt."""
    begins_from: ClassVar[tuple[str, ...]] = ()
    """Names of recipes whose weights a training may begin with, beside its own."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.vocab = Vocabulary(config.image_vocab, config.text_vocab)

    def attention(self, index: int) -> Attention:
        """Of layer `index`, counted from 0."""
        raise NotImplementedError

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, S], of text [B, T] (-1 padded) and codes [B, N]. [PAD] is no target."""
        raise NotImplementedError

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        """Positions, and what the attention takes, of inputs [B, S]."""
        c, positions = self.config, torch.arange(inputs.shape[1], device=inputs.device)
        if c.image_positions == "fixed":
            positions = self.vocab.fixed_positions(inputs, c.max_text, c.max_positions)
        return Context(positions)

    def prompt(self, text: Tensor, draws: Draws = None) -> Prompt:
        """To draw an image after each row of text [B, T]. All that is text is known, so what is drawn of the context is
        drawn once, and every step sees what a full forward would; no token of the text sees any of what is drawn."""
        inputs, _ = self.layout(text, text.new_zeros(len(text), self.config.image_tokens))
        starts = (inputs == self.vocab["BOI1"]).int().argmax(dim=1) + 1
        place = torch.arange(inputs.shape[1]) - starts[:, None]
        drawn = (place >= 0) & (place < self.config.image_tokens)
        allowed, same = self.vocab.allowed_after("BOI1"), first_alike(text)
        return Prompt(inputs, self.context(inputs, draws), drawn, allowed, same=same)

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """Of what is drawn for one prompt."""
        return (self.config.image_grid, self.config.image_grid)

    @classmethod
    def begun(cls, config: ModelConfig) -> Any:
        """The config of a model that begins with the weights of one of `begins_from` with this config."""
        return cls.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        """A config with image_grid, max_text, image_vocab and text_vocab of some data."""
        positions = sizes["image_grid"] ** 2 + 4 + sizes.pop("max_text")
        return dataclasses.replace(config, max_positions=positions, **sizes)

    def model(self) -> Transformer:
        """With new weights, from torch's random state."""
        layers = range(self.config.num_layers)
        return Transformer(self.config, self.vocab.size, (self.attention(i) for i in layers))

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        return self.config.max_positions - 1

    def batch(
        self,
        text: Tensor,
        codes: Tensor,
        *,
        draws: Draws = None,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """What the model is trained on, of text [B, T] (-1 padded) and codes [B, N]."""
        require(
            codes.shape[-1] == self.config.image_tokens,
            "codes",
            f"{self.config.image_tokens} of each image",
            codes.shape[-1],
        )
        inputs, targets = (tokens.to(device) for tokens in self.layout(text, codes))
        weights = self.vocab.loss_weights(targets, text_weight, image_weight)
        return Batch(inputs, targets, weights, self.context(inputs, draws))

    def kinds(self, targets: Tensor) -> dict[str, Tensor]:
        """bool like targets, by name: the kinds of tokens whose losses are told apart."""
        return {"text": self.vocab.is_text(targets), "image": self.vocab.is_image(targets)}
