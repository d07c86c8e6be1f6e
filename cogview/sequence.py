"""Token ids, sequence layouts and batches: the one definition that training, generation and CapLoss share.

Ids (CogView paper, section 2.2): image codes first, then text, then the 27 commands, padded to a multiple
of 128. Layouts:

    text2image   [ROI1] text [BASE] [BOI1] image [EOI1] [PAD]...
    fixed_text   [ROI1] text [BASE] [PAD]... [BOI1] image    every image at the same place, as in DALL-E
    caption      [BASE] [BOI1] image [EOI1] [ROI1] text [SEP] [PAD]...      [SEP]: nothing follows
    magnified    [ROI1] text [BASE] [BOI1] small image [EOI1] [ROI2] [POS0] [BASE] [BOI2] large image [EOI2] [PAD]...

Captions come as raw text ids padded with -1, images as raw codes; layouts check them and add the offsets. Shapes: B
batch, S tokens, L layers, P pivots, T longest text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COMMANDS = (
    *("PAD", "BOI1", "BOI2", "BOI3", "EOI1", "EOI2", "EOI3", "ROI1", "ROI2", "ROI3", "SEP", "MASK", "CLS"),
    *("ENC", "TINY", "SMALL", "BASE", "BIG", *(f"POS{i}" for i in range(9))),
)


@dataclass(frozen=True)
class Vocabulary:
    """Ids of image codes, text tokens and commands; `vocab["BOI1"]` is the id of a command."""

    image_size: int
    text_size: int
    paddings: int = field(default=0, kw_only=True)
    """Ids behind the commands: a token of its own for each place of padding in `fixed_text`, instead of [PAD]."""

    def __getitem__(self, command: str) -> int:
        return self.image_size + self.text_size + COMMANDS.index(command)

    @property
    def commands(self) -> dict[int, str]:
        """Their names by their ids."""
        return {self[name]: name for name in COMMANDS}

    @property
    def size(self) -> int:
        """Rows of the embedding: all ids, padded to a multiple of 128."""
        return -(-(self.first_padding + self.paddings) // 128) * 128

    @property
    def first_padding(self) -> int:
        return self.image_size + self.text_size + len(COMMANDS)

    def is_image(self, tokens: Tensor) -> Tensor:
        return tokens < self.image_size

    def is_caption(self, tokens: Tensor) -> Tensor:
        """Text tokens, no commands."""
        return (tokens >= self.image_size) & (tokens < self.image_size + self.text_size)

    def is_text(self, tokens: Tensor) -> Tensor:
        """Text and command tokens, except padding."""
        return (tokens >= self.image_size) & (tokens != self["PAD"]) & (tokens < self.first_padding)

    def allowed_after(self, command: str) -> Tensor:
        """bool [size]: what may be drawn after a command: image codes after [BOI], text after [ROI]."""
        if command[:3] not in ("BOI", "ROI"):
            raise ValueError(f"command: expected BOI1 to BOI3 or ROI1 to ROI3, got {command!r}")
        ids = torch.arange(self.size)
        if command.startswith("BOI"):
            return self.is_image(ids)
        return self.is_caption(ids)

    def loss_weights(self, labels: Tensor, text: float = 1.0, image: float = 1.0) -> Tensor:
        """float32 weight of each label by its own kind: image codes, text and commands, [PAD] 0."""
        return text * self.is_text(labels).float() + image * self.is_image(labels).float()

    def text2image(self, text: Tensor, codes: Tensor, length: int) -> Tensor:
        """Stored sequences int64 [B, length] of text [B, T] (-1 padded) and codes [B, N]."""
        return self._pack(["ROI1", text, "BASE", "BOI1", codes, "EOI1"], text, [codes], length)

    def caption(self, text: Tensor, codes: Tensor, length: int, *, stop: bool = True) -> Tensor:
        """As text2image, with the image before its text, and a token that ends it; the released weights know none."""
        parts: list[str | Tensor] = ["BASE", "BOI1", codes, "EOI1", "ROI1", text]
        return self._pack([*parts, "SEP"] if stop else parts, text, [codes], length)

    def fixed_text(self, text: Tensor, codes: Tensor, max_text: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, max_text + 3 + N], with the image's codes [B, N] from place max_text + 3 on
        whatever the length of the text [B, T]. The holes before [BOI1], of which `paddings` has a token each, predict
        nothing: their targets are [PAD]."""
        self.check(text, [codes], max_text + codes.shape[1] + 4)
        codes = codes.long()
        left = self.join(["ROI1", text, "BASE"], text, max_text + 2)
        if self.paddings:
            own = self.first_padding + torch.arange(max_text + 2, device=left.device) - 2  # [ROI1] [BASE] come first
            left = torch.where(left == self["PAD"], own, left)
        following = self.join([text, "BASE", "BOI1"], text, max_text + 2)
        begin, end = (codes.new_full((len(codes), 1), self[name]) for name in ("BOI1", "EOI1"))
        return torch.cat([left, begin, codes], dim=1), torch.cat([following, codes, end], dim=1)

    def magnified(self, text: Tensor, small: Tensor, large: Tensor, length: int) -> Tensor:
        """A picture at two sizes, codes [B, N] and [B, M], behind its text."""
        first: list[str | Tensor] = ["ROI1", text, "BASE", "BOI1", small, "EOI1"]
        return self._pack([*first, "ROI2", "POS0", "BASE", "BOI2", large, "EOI2"], text, [small, large], length)

    def positions(self, tokens: Tensor, begins: Mapping[str, int], rows: int) -> Tensor:
        """Rows of a table of `rows`, int64 [B, S], for tokens [B, S]: one after the other, from 0 on, and from each of
        some commands on those from its row on. begins: these rows, by the commands' names."""
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        first, begun = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for name, row in begins.items():
            first, begun = first.masked_fill(tokens == self[name], row), begun | (tokens == self[name])
        begin = torch.where(begun, place, 0).cummax(dim=1).values
        return (place - begin + first.gather(1, begin)).clamp_max(rows - 1)

    def _pack(self, parts: list[str | Tensor], text: Tensor, images: list[Tensor], length: int) -> Tensor:
        self.check(text, images, length, sum(isinstance(part, str) for part in parts))
        return self.join(parts, text, length)

    def join(self, parts: list[str | Tensor], text: Tensor, length: int) -> Tensor:
        """Commands, text and codes one after the other, int64 [B, length], padded at the end."""
        rows = []
        for part in parts:
            if isinstance(part, str):
                rows.append(text.new_full((len(text), 1), self[part], dtype=torch.int64))
            else:
                rows.append(part + self.image_size * (part >= 0) if part is text else part)
        joined = torch.cat(rows, dim=1).long()
        # Holes (the padding of short captions) go to the end; the rest keeps its order.
        joined = joined.gather(1, (joined < 0).int().argsort(dim=1, stable=True))[:, :length]
        tokens = joined.new_full((len(joined), length), self["PAD"])
        tokens[:, : joined.shape[1]] = joined.where(joined >= 0, self["PAD"])
        return tokens

    def check(self, text: Tensor, images: list[Tensor], length: int, commands: int = 4) -> None:
        for codes in images:
            if text.ndim != 2 or codes.ndim != 2 or len(text) != len(codes):
                shapes = f"{list(text.shape)} and {list(codes.shape)}"
                raise ValueError(f"text, codes: expected [B, T] and [B, N], got {shapes}")
        for name, ids, size in (("text", text, self.text_size), *(("codes", c, self.image_size) for c in images)):
            low = -1 if name == "text" else 0
            if ids.numel() and not (low <= int(ids.min()) and int(ids.max()) < size):
                raise ValueError(f"{name}: expected ids {low} to {size - 1}, got {int(ids.min())} to {int(ids.max())}")
        if bool((text[:, 1:] > text[:, :-1]).logical_and(text[:, :-1] < 0).any()):
            raise ValueError("text: expected -1 at the end of a row only, got -1 before a token")
        count = sum(codes.shape[1] for codes in images)
        room = length - count - commands
        lengths = text_lengths(text)
        if bool((lengths > room).any()):
            row = int(lengths.argmax())
            raise ValueError(
                f"text: expected at most {room} tokens beside {count} image tokens in {length}, "
                f"got {int(lengths[row])} in caption {row}"
            )


@dataclass(frozen=True)
class Emphasis:
    """Textual attention (CogView2, arXiv 2204.14217): what is added to the scaled scores of some keys."""

    value: float
    keys: Tensor
    """bool [B, T]: those of text, of as many places as have some."""
    queries: Tensor
    """bool [B, S]: which of the prompt's tokens see it so; all that is drawn does."""

    @classmethod
    def of(cls, value: float, keys: Tensor, queries: Tensor) -> "Emphasis":
        """keys: bool [B, S]."""
        width = int(keys.any(dim=0).nonzero().max()) + 1 if bool(keys.any()) else 0
        return cls(value, keys[:, :width], queries)

    def rows(self, rows: slice | Tensor) -> "Emphasis":
        return dataclasses.replace(self, keys=self.keys[rows], queries=self.queries[rows])

    def beside(self, other: "Emphasis") -> "Emphasis":
        width = max(self.keys.shape[1], other.keys.shape[1])
        keys = [F.pad(e.keys, (0, width - e.keys.shape[1])) for e in (self, other)]
        return Emphasis(self.value, torch.cat(keys), torch.cat([self.queries, other.queries]))

    def to(self, device: torch.device | str) -> "Emphasis":
        return dataclasses.replace(self, keys=self.keys.to(device), queries=self.queries.to(device))


@dataclass(frozen=True)
class Context:
    """What the layers take besides states."""

    positions: Tensor
    """int64 [S] or [B, S]: rows of the position table."""
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    """What the recipe's attention takes, by name, rows first: pivots int32 [B, L, P], text_mask bool [B, T]."""
    prompt: bool = False
    """With a cache: these tokens are all there is so far."""
    seeds: Tensor | None = None
    """int64 [B, 2 L + 1]: of dropout, for each row that of its embedding and of both branches of every layer; None:
    drawn by the model in training."""
    emphasis: Emphasis | None = None
    """With a cache, and in super-resolution."""
    only: Tensor | None = None
    """Of a layer behind which no others' states are asked for: the places int64 [B, n] of those that are."""

    def rows(self, rows: slice | Tensor) -> "Context":
        positions = self.positions if self.positions.ndim == 1 else self.positions[rows]
        attention = {name: values[rows] for name, values in self.attention.items()}
        seeds = None if self.seeds is None else self.seeds[rows]
        emphasis = None if self.emphasis is None else self.emphasis.rows(rows)
        return dataclasses.replace(self, positions=positions, attention=attention, seeds=seeds, emphasis=emphasis)

    def beside(self, other: "Context", rows: int) -> "Context":
        """Of the rows of both, `rows` each."""
        positions = torch.cat([p.expand(rows, -1) for p in (self.positions, other.positions)])
        attention = {name: torch.cat([values, other.attention[name]]) for name, values in self.attention.items()}
        emphasis = None
        if self.emphasis is not None and other.emphasis is not None:
            emphasis = self.emphasis.beside(other.emphasis)
        return dataclasses.replace(self, positions=positions, attention=attention, emphasis=emphasis)

    def to(self, device: torch.device | str) -> "Context":
        attention = {name: values.to(device) for name, values in self.attention.items()}
        seeds = None if self.seeds is None else self.seeds.to(device)
        emphasis = None if self.emphasis is None else self.emphasis.to(device)
        own: dict[str, Any] = {"attention": attention, "seeds": seeds, "emphasis": emphasis}
        return dataclasses.replace(self, positions=self.positions.to(device), **own)


@dataclass(frozen=True)
class Batch:
    """What a model is trained on: it predicts `targets` from `inputs`, both int64 [B, S]."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    """float32 [B, S]: of each target in the loss."""
    context: Context
    cut: int = 0
    """Captions that lost text."""

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> "Batch":
        inputs, targets, weights = (x.to(device) for x in (self.inputs, self.targets, self.weights))
        return Batch(inputs, targets, weights, self.context.to(device), self.cut)

    def chunk(self, count: int) -> list["Batch"]:
        """Its rows in `count` parts, or fewer where that is even."""
        size = -(-len(self) // count)
        parts = [slice(start, start + size) for start in range(0, len(self), size)]
        cut = [self.cut] + [0] * len(parts)  # counted once
        x, y, w, context = self.inputs, self.targets, self.weights, self.context
        return [Batch(x[p], y[p], w[p], context.rows(p), n) for p, n in zip(parts, cut, strict=False)]


def text_lengths(text: Tensor) -> Tensor:
    """int64 [B]: tokens of each -1 padded row of text [B, T]."""
    return (text >= 0).sum(dim=1)


def truncate_text(text: Tensor, room: int) -> tuple[Tensor, int]:
    """Text cut to `room` tokens a row, and how many rows lost something."""
    return text[:, :room], int((text_lengths(text) > room).sum())


def pad_text(captions: Sequence[Sequence[int]]) -> Tensor:
    """Lists of text ids as one int64 [B, T], padded with -1."""
    if isinstance(captions, str) or any(isinstance(caption, str) for caption in captions):
        raise ValueError("captions: expected lists of token ids, got text, which the methods of System take")
    text = torch.full((len(captions), max(map(len, captions), default=0)), -1, dtype=torch.int64)
    for row, caption in zip(text, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption, dtype=torch.int64)
    return text
