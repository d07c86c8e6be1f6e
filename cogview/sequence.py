"""Token ids and sequence layouts: the one definition that training, generation and CapLoss share.

Ids (CogView paper, section 2.2): image codes first, then text, then the 27 commands, padded to a multiple
of 128. Layouts: text2image `[ROI1] text [BASE] [BOI1] image [EOI1] [PAD]...` and caption
`[BASE] [BOI1] image [EOI1] [ROI1] text [PAD]...`. Captions come as raw text ids padded with -1, images as
raw codes; layouts add the offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def __getitem__(self, command: str) -> int:
        return self.image_size + self.text_size + COMMANDS.index(command)

    @property
    def size(self) -> int:
        """Rows of the embedding: all ids, padded to a multiple of 128."""
        return -(-(self.image_size + self.text_size + len(COMMANDS)) // 128) * 128

    def is_image(self, tokens: Tensor) -> Tensor:
        return tokens < self.image_size

    def is_text(self, tokens: Tensor) -> Tensor:
        """Text and command tokens, except [PAD]."""
        return (tokens >= self.image_size) & (tokens != self["PAD"])

    def allowed_after(self, command: str, device: torch.device | str = "cpu") -> Tensor:
        """bool [size]: what may be drawn after a command: image codes after [BOI], text after [ROI]."""
        if command[:3] not in ("BOI", "ROI"):
            raise ValueError(f"command must be BOI1-3 or ROI1-3, got {command!r}")
        ids = torch.arange(self.size, device=device)
        if command.startswith("BOI"):
            return self.is_image(ids)
        return (ids >= self.image_size) & (ids < self.image_size + self.text_size)

    def loss_weights(self, labels: Tensor, text: float = 1.0, image: float = 1.0) -> Tensor:
        """float32 weight of each label by its own kind: image codes, text and commands, [PAD] 0."""
        return text * self.is_text(labels).float() + image * self.is_image(labels).float()

    def text2image(self, text: Tensor, codes: Tensor, length: int) -> Tensor:
        """Stored sequences int64 [B, length] of text [B, T] (-1 padded) and codes [B, N]."""
        return self._pack(["ROI1", text, "BASE", "BOI1", codes, "EOI1"], text, codes, length)

    def caption(self, text: Tensor, codes: Tensor, length: int) -> Tensor:
        """As text2image, with the image before its text."""
        return self._pack(["BASE", "BOI1", codes, "EOI1", "ROI1", text], text, codes, length)

    def _pack(self, parts: list[str | Tensor], text: Tensor, codes: Tensor, length: int) -> Tensor:
        self._check(text, codes, length)
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

    def _check(self, text: Tensor, codes: Tensor, length: int) -> None:
        if text.ndim != 2 or codes.ndim != 2 or len(text) != len(codes):
            raise ValueError(f"text and codes must be [B, T] and [B, N], got {list(text.shape)}, {list(codes.shape)}")
        for name, ids, size in (("text", text, self.text_size), ("codes", codes, self.image_size)):
            low = -1 if name == "text" else 0
            if ids.numel() and not (low <= int(ids.min()) and int(ids.max()) < size):
                raise ValueError(f"{name} ids must be in [{low}, {size - 1}], got {int(ids.min())} to {int(ids.max())}")
        if bool((text[:, 1:] > text[:, :-1]).logical_and(text[:, :-1] < 0).any()):
            raise ValueError("text must be padded with -1 at the end only, got -1 before a token")
        room = length - codes.shape[1] - 4
        lengths = text_lengths(text)
        if bool((lengths > room).any()):
            row = int(lengths.argmax())
            raise ValueError(
                f"caption {row} is too long: {int(lengths[row])} tokens, at most {room} fit beside "
                f"{codes.shape[1]} image tokens in {length}"
            )


def text_lengths(text: Tensor) -> Tensor:
    """int64 [B]: tokens of each -1 padded row of text [B, T]."""
    return (text >= 0).sum(dim=1)


def truncate_text(text: Tensor, room: int) -> tuple[Tensor, int]:
    """Text cut to `room` tokens a row, and how many rows lost something."""
    return text[:, :room], int((text_lengths(text) > room).sum())


def pad_text(captions: Sequence[Sequence[int]]) -> Tensor:
    """Lists of text ids as one int64 [B, T], padded with -1."""
    text = torch.full((len(captions), max(map(len, captions), default=0)), -1, dtype=torch.int64)
    for row, caption in zip(text, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption, dtype=torch.int64)
    return text
