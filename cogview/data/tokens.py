"""Pairs as tokens, a folder: text.npy (int32 [N, T], -1 padded), codes.npy (int32 [N, h w]), meta.json.

A row is one picture with its caption in one language, so a picture with two captions gives two rows, next to
each other, pictures in the order of the shards. meta.json is written last: a folder without it is unfinished.
"""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogview.data.files import write_json, written_beside
from cogview.data.shuffle import permutation

VERSION = 1


class TokenWriter:
    """Writes the folder `out` row by row; its files appear under their names only when complete.

    Use as a context manager: `write` rows, then `finish`. settings: what the folder was made of, kept in meta.json.
    """

    def __init__(self, out: Path, settings: dict, grid: tuple[int, int]):
        self.out, self.settings, self.grid = out, settings, grid
        self._texts, self._lengths, self._stack = array("i"), array("i"), ExitStack()

    def __enter__(self) -> "TokenWriter":
        (self.out / "meta.json").unlink(missing_ok=True)  # from here on the folder is unfinished
        beside = self._stack.enter_context(written_beside(self.out / "codes.npy"))
        self._codes = self._stack.enter_context(open(beside, "wb"))
        self._write_header()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def __len__(self) -> int:
        return len(self._lengths)

    def write(self, text: Sequence[int], codes: np.ndarray) -> None:
        """One row: text ids, and codes int32 [h w]."""
        self._texts.extend(text)
        self._lengths.append(len(text))
        self._codes.write(codes.tobytes())

    def finish(self, skipped: Counter[str], **sizes: int) -> None:
        """Completes the files; what was left out and the vocabularies' sizes go to meta.json."""
        self._codes.seek(0)
        self._write_header()
        self._stack.close()
        padded = np.full((len(self), max(self._lengths)), -1, np.int32)
        padded[np.arange(padded.shape[1]) < np.array(self._lengths)[:, None]] = np.array(self._texts, np.int32)
        with written_beside(self.out / "text.npy") as beside, open(beside, "wb") as file:
            np.save(file, padded)
        shape = {"rows": len(self), "text_length": padded.shape[1], "grid": list(self.grid)}
        counts = {"skipped": {kind: n for kind, n in skipped.items() if n}}
        write_json(self.out / "meta.json", self.settings | shape | sizes | counts)

    def _write_header(self) -> None:
        """An .npy header; NumPy pads it so that the number of rows can grow in place."""
        header = {"descr": "<i4", "fortran_order": False, "shape": (len(self), self.grid[0] * self.grid[1])}
        np.lib.format.write_array_header_1_0(self._codes, header)


def made_of(out: Path, settings: dict) -> "TokenDataset | None":
    """The finished tokens in a folder, if they were made with these settings."""
    path = out / "meta.json"
    return TokenDataset(out) if path.exists() and settings.items() <= _read_meta(path).items() else None


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: no tokenised pairs at {str(path.parent)!r} ({error})") from error
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise ValueError(f"folder: {str(path)!r} is not of version {VERSION} of tokenised pairs")
    return meta


class TokenDataset:
    """Rows of tokens, read from disk as needed. `meta` holds the sizes: "text_length", "grid",
    "codebook_size", "text_vocab_size"; ValueError if the files do not agree with it."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.meta = _read_meta(folder / "meta.json")
        try:
            self.text, self.codes = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in ("text.npy", "codes.npy")
            )
            rows, grid = self.meta["rows"], self.meta["grid"]
            shapes = ((rows, self.meta["text_length"]), (rows, grid[0] * grid[1]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"folder: {str(folder)!r} is damaged ({error})") from error
        for name, values, shape in zip(("text", "codes"), (self.text, self.codes), shapes, strict=True):
            if values.shape != shape or values.dtype != np.int32:
                raise ValueError(f"folder: {name}.npy: expected int32 {shape}, got {values.dtype} {values.shape}")

    def __len__(self) -> int:
        return len(self.text)

    @property
    def tokenizers(self) -> list[str]:
        """Hashes of the text and image tokenizer that made it."""
        return [self.meta["text_sha256"], self.meta["image_sha256"]]

    def check(self, text_sha256: str, image_sha256: str) -> None:
        """ValueError unless these are the hashes of the tokenizers the folder was made with."""
        for name, made_by, got in zip(("text", "image"), self.tokenizers, (text_sha256, image_sha256), strict=True):
            if made_by != got:
                raise ValueError(f"{name} tokenizer: expected {made_by[:12]}, as of these tokens, got {got[:12]}")

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Text int64 [B, T], -1 padded, and codes int64 [B, h w] of some rows. Layouts check the ids."""
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self)):
            raise ValueError(f"indices: expected a list of 0 to {len(self) - 1}, got {indices}")
        text, codes = (torch.from_numpy(a[indices].astype(np.int64)) for a in (self.text, self.codes))
        return text, codes

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the rows, int64, a function of (seed, epoch) alone."""
        return permutation(len(self), seed, epoch)
