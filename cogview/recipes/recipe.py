"""What a recipe is: a system or task on top of the shared parts, in one file.

It says what its sequences are (`layout`), what its tokens see (`attention`, `context`) and how it is decoded
(`prompt`). It has no training loop, no checkpoints, no command line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig
from cogview.parts.attend import Attention
from cogview.parts.transformer import Transformer
from cogview.sequence import Batch, Context, Emphasis, Vocabulary

POSITIONS = "embedding.positions.weight"
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
    draws: ClassVar[tuple[str, ...]] = ("pictures",)
    """What it draws: pictures, captions, larger pictures."""
    begins_from: ClassVar[tuple[str, ...]] = ()
    """Names of recipes whose weights a training may begin with, beside its own."""
    sizes: ClassVar[int] = 1
    """Of a picture in a sequence; 2: at half the size, then whole, as `cogview tokenize --pairs` makes them."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.vocab = Vocabulary(config.image_vocab, config.text_vocab)

    def attention(self, index: int) -> Attention:
        """Of layer `index`, counted from 0."""
        raise NotImplementedError

    def drawing(self, what: str) -> "Recipe | None":
        """The recipe that draws this with the same model, or None."""
        return self if what in self.draws else None

    def speaking(self, language: str) -> "Recipe":
        """The same, where it draws captions in a language that it is told: "en" or "zh"."""
        raise ValueError(f"language: expected none with recipe {self.name}, whose models choose it, got {language!r}")

    @property
    def stops(self) -> bool:
        """Whether what it draws may end before its longest."""
        return False

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, S], of text [B, T] (-1 padded) and codes [B, N], those of the smallest size
        first. [PAD] is no target."""
        raise NotImplementedError

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        """Positions, and what the attention takes, of inputs [B, S]."""
        if not (begins := self.begins):
            return Context(torch.arange(inputs.shape[1], device=inputs.device))
        return Context(self.vocab.positions(inputs, begins, self.config.max_positions))

    @property
    def begins(self) -> dict[str, int]:
        """Commands from which on positions begin anew, and at which row of the table."""
        c = self.config
        return {"ROI1": 0, "BOI1": c.max_text + 2} if c.image_positions == "fixed" else {}

    def prompt(self, text: Tensor, draws: Draws = None) -> Prompt:
        """To draw an image after each row of text [B, T]. All that is text is known, so what is drawn of the context is
        drawn once, and every step sees what a full forward would; no token of the text sees any of what is drawn."""
        inputs, _ = self.layout(text, text.new_zeros(len(text), self.config.image_tokens))
        starts = (inputs == self.vocab["BOI1"]).int().argmax(dim=1) + 1
        place = torch.arange(inputs.shape[1]) - starts[:, None]
        drawn = (place >= 0) & (place < self.config.image_tokens)
        allowed, same = self.vocab.allowed_after("BOI1"), first_alike(text)
        return Prompt(inputs, self.context(inputs, draws), drawn, allowed, same=same)

    def emphasis(self, inputs: Tensor, value: float) -> Emphasis:
        """Of the text of sequences [B, S] for what is drawn behind it (SwissArmyTransformer's CogView has it so)."""
        return Emphasis.of(value, self.vocab.is_caption(inputs), self.vocab.is_image(inputs))

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """Of what is drawn for one prompt."""
        return (self.config.image_grid, self.config.image_grid)

    @classmethod
    def begun(cls, config: Any) -> Any:
        """The config of a model that begins with the weights of one of `begins_from` with this config."""
        return cls.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        """A config with image_grid, max_text, image_vocab and text_vocab of some data; the recipes of CogView2 take
        chinese_from of bilingual text and small_grid of pictures at two sizes as well."""
        sizes = {name: value for name, value in sizes.items() if name not in ("chinese_from", "small_grid")}
        positions = sizes["image_grid"] ** 2 + 4 + sizes.pop("max_text")
        return dataclasses.replace(config, max_positions=positions, **sizes)

    def inherited(self, tensors: dict[str, Tensor], before: "Recipe", new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a model begins with of one of another recipe with these tensors. It may have room for longer text: rows
        of the position table that are new are as `new`, its own tensors, has them."""
        before_it, own = before.config, self.config
        if POSITIONS not in tensors or len(tensors[POSITIONS]) != before_it.max_positions:
            return tensors  # which do not fit, as is said then
        return tensors | {POSITIONS: grown(tensors[POSITIONS], before_it.text_end, own.text_end, new[POSITIONS])}

    def model(self) -> Transformer:
        """With new weights, from torch's random state."""
        layers = range(self.config.num_layers)
        longest = max(self.length, self.config.max_positions)
        return Transformer(self.config, self.vocab.size, (self.attention(i) for i in layers), longest)

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        return self.config.max_positions - 1

    @property
    def grids(self) -> tuple[int, ...]:
        """Tokens per side of the picture at each of its `sizes`."""
        return tuple(self.config.image_grid >> n for n in reversed(range(self.sizes)))

    def batch(self, text: Tensor, *codes: Tensor, draws: Draws = None, **weights: Any) -> Batch:
        """What the model is trained on, of text [B, T] (-1 padded) and codes [B, N] of each of the `sizes`."""
        self.check_codes(codes)
        return self.weighed(*self.laid_out(text, torch.cat(codes, dim=1), draws), **weights)

    def training_batch(
        self, text: Tensor, *codes: Tensor, draws: Draws = None, dropped: Tensor | None = None, **weights: Any
    ) -> Batch:
        """What a training step takes, where that is drawn, too. dropped: the rows that lose their text, bool [B]."""
        return self.batch(without(text, dropped), *codes, draws=draws, **weights)

    def laid_out(self, text: Tensor, codes: Tensor, draws: Draws = None) -> tuple[Tensor, Tensor, Context]:
        """`layout`, and the context, where that is not of the inputs alone."""
        inputs, targets = self.layout(text, codes)
        return inputs, targets, self.context(inputs, draws)

    def weighed(
        self,
        inputs: Tensor,
        targets: Tensor,
        context: Context,
        *,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
    ) -> Batch:
        return Batch(inputs, targets, self.vocab.loss_weights(targets, text_weight, image_weight), context)

    def check_codes(self, codes: Sequence[Tensor]) -> None:
        """ValueError unless there are those of each of the sizes."""
        wanted, got = [grid**2 for grid in self.grids], [rows.shape[-1] for rows in codes]
        if got != wanted:
            told = [" and ".join(map(str, counts)) for counts in (wanted, got)]
            raise ValueError(f"codes: expected {told[0]} of each image, got {told[1]}")

    def hideable(self, inputs: Tensor) -> Tensor:
        """bool [B, S]: what `hide_context` may hide, the image that is learned to be drawn."""
        return self.vocab.is_image(inputs)

    def kinds(self, targets: Tensor) -> dict[str, Tensor]:
        """bool like targets, by name: the kinds of tokens whose losses are told apart."""
        return {"text": self.vocab.is_text(targets), "image": self.vocab.is_image(targets)}

    def input_kinds(self, inputs: Tensor) -> dict[str, Tensor]:
        """The same of inputs, whose states are told apart; an image token that is hidden is of no kind."""
        shown = inputs != self.vocab["MASK"]
        return {kind: there & shown for kind, there in self.kinds(inputs).items()}

    def reach(self, context: Context) -> Tensor:
        """int64 [S] or [B, S]: of each token how many of the first ones have all that it may see among them."""
        places = context.positions
        return 1 + torch.arange(places.shape[-1], device=places.device)


def without(text: Tensor, dropped: Tensor | None) -> Tensor:
    """Text [B, T], none in the rows that are dropped, bool [B]; None: no row is."""
    return text if dropped is None else text.masked_fill(dropped[:, None], -1)


def grown(old: Tensor, end: int, new_end: int, new: Tensor) -> Tensor:
    """A position table of the size that `new` has, whose rows are new where there were none. Images at fixed places
    stand behind the longest text, so their rows, from `end` on, move to new_end and on."""
    by = new_end - end
    if by < 0 or len(old) > len(new):
        return old
    table = new.clone()
    table[:end], table[end + by : len(old) + by] = old[:end], old[end:]
    return table
