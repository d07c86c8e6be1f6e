"""Ids and sequences of CogView2 (arXiv 2204.14217), in icetk's order: image codes, text, three commands.

Of the text the first hundred pieces are common, among them </s> and <pad>; English follows, then Chinese. Sequences:

    picture   text [SOI] context cells, drawn cells      without context: text to image; else completion of a picture
    caption   context cells, cells of patches [SOE] text      or [SOC]: start of English, or of Chinese
    spans     context pieces, pieces of spans

What stands first is context, which sees itself alone; behind it every token sees all before it. So a token sees the
first `sees` tokens of its sequence (`patterns.leading`), and all three objectives are decoded with a cache. Wherever
they stand, tokens keep their own positions: text from 0 on, [SOI] at `text_rows`, cell j at text_rows + 1 + j.

The released code pads differently and leaves pieces and cells in their places, under a mask for each sample; what
every token sees, and which are predicted, is the same (pretrain_coglm.py, comp_pipeline/base_completion.py), but for
text behind the last span, which is no context to anything there.

Shapes: B batch, S tokens, T longest text, N cells of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.sequence import Vocabulary, text_lengths

COMMANDS = ("SOI", "SOE", "SOC")
LANGUAGES = {"en": "SOE", "zh": "SOC"}
PIECES = {"EOS": 2, "PAD": 3}
"""Text ids that every vocabulary in icetk's order has."""
BYTES = range(4, 260)
"""Text ids of the bytes, which spell characters without a piece, of vocabularies that are trained here."""
ICETK = 63_823
"""Where Chinese begins in the released vocabulary, whose pieces are no bytes."""


@dataclass(frozen=True)
class BilingualVocabulary(Vocabulary):
    """`vocab["SOI"]` is the id of a command. "MASK", a cell that is not told, is [SOI], as in the released
    super-resolution."""

    chinese_from: int
    """The text id from which on pieces are not English."""

    def __getitem__(self, command: str) -> int:
        if command in PIECES:
            return self.image_size + PIECES[command]
        return self.image_size + self.text_size + COMMANDS.index("SOI" if command == "MASK" else command)

    @property
    def commands(self) -> dict[int, str]:
        return {self[name]: name for name in (*COMMANDS, *PIECES)}

    @property
    def size(self) -> int:
        return -(-(self.image_size + self.text_size + len(COMMANDS)) // 128) * 128

    def is_caption(self, tokens: Tensor) -> Tensor:
        return super().is_caption(tokens) & (tokens != self["PAD"]) & (tokens != self["EOS"])

    def tags(self, text: Tensor) -> Tensor:
        """int64 [B, 1]: [SOC] of raw text [B, T] with any piece that is not English, or a Han character in bytes, else
        [SOE]."""
        other = (text >= self.chinese_from).any(dim=1, keepdim=True) | self._spells_han(text)
        return torch.where(other, self["SOC"], self["SOE"])

    def _spells_han(self, text: Tensor) -> Tensor:
        """bool [B, 1]: whether three bytes in a row are a character of U+3000 to U+9FFF, in UTF-8."""
        if not BYTES.stop <= self.chinese_from != ICETK:
            return text.new_zeros(len(text), 1, dtype=torch.bool)
        first, second, third = (text[:, n : n + max(0, text.shape[1] - 2)] - BYTES.start for n in range(3))
        spelled = (first >= 0xE3) & (first <= 0xE9) & (second >> 6 == 2) & (third >> 6 == 2)
        return spelled.any(dim=1, keepdim=True)

    def drawn_text(self, stop: bool) -> Tensor:
        """bool [size]: what may be drawn of a caption."""
        ids = torch.arange(self.size)
        return self.is_caption(ids) | (stop & (ids == self["EOS"]))


class Rows(NamedTuple):
    """Sequences, int64 [B, S] each; targets are [PAD] where nothing is predicted."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    sees: Tensor


@dataclass(frozen=True)
class Layout:
    vocab: BilingualVocabulary
    cells: int
    """Of a side of a picture."""
    max_text: int
    text_rows: int
    """Of the table of positions, before [SOI]'s."""

    @property
    def length(self) -> int:
        return self.cells**2 + self.max_text + 1

    def picture(self, text: Tensor, codes: Tensor, drawn: Tensor | None = None) -> tuple[Rows, Tensor]:
        """To draw the cells of a mask bool [B, N] (None: all) behind text [B, T], -1 padded, and the others; and where
        these stand, bool [B, S]. Each run of drawn cells in a row of the picture has its left neighbour before it,
        which is given, and no context to the others."""
        drawn = torch.ones_like(codes, dtype=torch.bool) if drawn is None else drawn
        last, order = drawn | self._leads(drawn), torch.arange(codes.shape[1]).expand(codes.shape)
        if not bool(last.all()):
            order = last.int().argsort(dim=1, stable=True)
        tokens = self._tokens([text, "SOI", codes.gather(1, order)], text, codes)
        inputs, following = tokens[:, :-1], tokens[:, 1:]
        place, count = torch.arange(inputs.shape[1]), text_lengths(text)[:, None]
        begun = count + 1 + (~last).sum(dim=1, keepdim=True)  # behind the context
        sees = torch.where(place < begun, begun, place + 1)
        sees = torch.where(place <= count, count + (place == count), sees)
        at = (place - count - 1).clamp(0, codes.shape[1] - 1)
        cell = (place > count) & (place <= count + codes.shape[1])
        positions = torch.where(place < count, place, self.text_rows + cell * (1 + order.gather(1, at)))
        is_drawn = cell & drawn.gather(1, order).gather(1, at)
        known = torch.cat([is_drawn[:, 1:], is_drawn.new_zeros(len(text), 1)], dim=1)
        return Rows(inputs, torch.where(known, following, self.vocab["PAD"]), positions, sees), is_drawn

    def caption(self, text: Tensor, codes: Tensor, patches: Tensor, predicted: Tensor, *, stop: bool) -> Rows:
        """A picture with patches, cells bool [B, N] that the others do not see, and its text. `predicted`, bool [B, N]:
        cells that predict their right neighbour; text is predicted too, and with stop the </s> behind it."""
        count, order = codes.shape[1], patches.int().argsort(dim=1, stable=True)
        parts = [codes.gather(1, order), self.vocab.tags(text), text]
        tokens = self._tokens([*parts, "EOS"] if stop else parts, text, codes)
        inputs, following = tokens[:, :-1], tokens[:, 1:]
        place, begun = torch.arange(inputs.shape[1]), count - patches.sum(dim=1, keepdim=True)
        at = place.clamp_max(count - 1).expand(inputs.shape)
        sees = torch.where(place < begun, begun, place + 1)
        positions = torch.where(place < count, self.text_rows + 1 + order.gather(1, at), place - count)
        right = codes.roll(-1, dims=1).gather(1, order).gather(1, at)
        right = right.where(predicted.gather(1, order).gather(1, at), self.vocab["PAD"])
        return Rows(inputs, torch.where(place < count, right, following), positions, sees)

    def spans(self, text: Tensor, drawn: Tensor, predicted: Tensor) -> Rows:
        """Text alone: pieces bool [B, T] of spans, and which of them predict the next piece."""
        order = (drawn.int() + 2 * (text < 0)).argsort(dim=1, stable=True)
        moved = text.gather(1, order)
        inputs = self._tokens([moved], moved, moved[:, :0])[:, :-1]
        place, begun = torch.arange(inputs.shape[1]), ((text >= 0) & ~drawn).sum(dim=1, keepdim=True)
        following = self.vocab.image_size + text.roll(-1, dims=1)
        following = following.where(predicted, self.vocab["PAD"]).gather(1, order)
        targets, positions = torch.full_like(inputs, self.vocab["PAD"]), place.repeat(len(text), 1)
        targets[:, : text.shape[1]], positions[:, : text.shape[1]] = following, order
        return Rows(inputs, targets, positions, torch.where(place < begun, begun, place + 1))

    def _leads(self, drawn: Tensor) -> Tensor:
        """Cells that stand left of a run of drawn ones, and are none."""
        grid = drawn.view(-1, self.cells, self.cells)
        right = torch.cat([grid[:, :, 1:], grid.new_zeros(len(grid), self.cells, 1)], dim=2)
        return (right & ~grid).flatten(1)

    def _tokens(self, parts: Sequence[str | Tensor], text: Tensor, codes: Tensor) -> Tensor:
        """int64 [B, S + 1], padded at the end."""
        self.vocab.check(text, [codes], self.cells**2 + self.max_text, commands=0)
        return self.vocab.join(list(parts), text, self.length + 1)


def sampled_patches(cells: int, side: int, count: int, stream: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """bool [N] twice: the cells of so many squares at different places, which may overlap, and those of them that
    predict their right neighbour: all columns but the last of each."""
    inside, predicted = torch.zeros(2, cells, cells, dtype=torch.bool)
    for corner in torch.randperm((cells - side) ** 2, generator=stream)[:count].tolist():
        y, x = divmod(corner, cells - side)
        inside[y : y + side, x : x + side] = True
        predicted[y : y + side, x : x + side - 1] = True
    return inside.flatten(), predicted.flatten()


def sampled_spans(
    length: int, stream: torch.Generator | None, *, rate: float = 3.0, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """bool [length] twice: pieces of spans and the one before each, which is given; and those that predict the next.

    Lengths are Poisson, at least 1; spans come to `share` of the text at most, but for one of the first piece that
    there always is (CogView2's code then has none)."""
    inside, predicted = torch.zeros(2, length, dtype=torch.bool)
    most = max(1, int(share * length))
    if length < 2:
        return inside, predicted
    lengths = torch.poisson(torch.full((most,), rate), generator=stream).clamp_min(1).long()
    lengths[0].clamp_(max=most)
    lengths = lengths[lengths.cumsum(dim=0) <= most]
    free = torch.randperm(length - int(lengths.sum()), generator=stream)[: len(lengths)].sort().values
    for first, count in zip((free + lengths.cumsum(dim=0) - lengths).tolist(), lengths.tolist(), strict=True):
        inside[first : first + count + 1] = True
        predicted[first : first + count] = True
    return inside, predicted
