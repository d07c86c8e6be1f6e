"""Pairs as tokens, a folder: meta.json, which lists the parts, one for each shard, and their files (parts.py).

A row is one picture with one of its captions, so a picture with two captions gives two rows, next to each other,
pictures in the order of the shards. A part is named by the contents of its shard and by all that its tokens depend on:
what has not changed is kept, and a folder that is being rewritten is the old one until meta.json is replaced.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import require
from cogview.data.files import write_json
from cogview.data.parts import ARRAYS, part_name, read_part
from cogview.data.shuffle import permutation

VERSION = 2
_PART = re.compile(r"[0-9a-f]{32}")


def tokens_of(run: Path, split: str, sizes: int = 1) -> Path:
    """The folder of a split's tokens in a run, of pictures at one size or two."""
    return run / "tokens" / (split if sizes == 1 else f"pairs-{split}")


def complete(folder: Path, parts: Sequence[str], settings: dict[str, Any]) -> "TokenDataset":
    """Makes a folder's tokens those of these parts, in their order, and removes all others.

    settings: what they were made with and the sizes: version, image_size, max_text, languages, text_sha256,
    image_sha256, grid, codebook_size, text_vocab_size, and of pictures at two sizes small_grid.
    """
    found = [read_part(folder, name) for name in parts]
    skipped = Counter[str]()
    for part in found:
        skipped.update(part["skipped"])
    rows, length = sum(part["rows"] for part in found), max((part["text_length"] for part in found), default=0)
    if not rows:
        why = ", ".join(f"{n:,} {kind}" for kind, n in skipped.items()) or "empty shards"
        raise ValueError(f"dataset: no pair with a caption that could be tokenised ({why})")
    meta = {"parts": list(parts), "rows": rows, "text_length": length, "skipped": dict(skipped)}
    whole = {"version": VERSION, **settings, **meta}
    if read_meta(folder) != whole:
        write_json(folder / "meta.json", whole)
    named = set(parts)
    for path in folder.iterdir():
        kept = path.name == "meta.json" or path.name.removeprefix("part-").partition(".")[0] in named
        if not kept and path.is_file() and path.suffix in (".npy", ".json", ".tmp"):  # the last of a killed process
            path.unlink()
    return TokenDataset(folder)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Of a folder of tokens; None where there are none, or none that can be read."""
    try:
        return _read_meta(folder / "meta.json")
    except ValueError:
        return None


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: no tokenised pairs at {str(path.parent)!r} ({error})") from error
    if not isinstance(meta, dict) or meta.get("version") not in (1, VERSION):
        raise ValueError(f"folder: {str(path)!r} is not of version 1 or {VERSION} of tokenised pairs")
    return meta


class TokenDataset:
    """Rows of tokens, read from disk as needed. `meta` holds the sizes: "text_length", "grid", maybe "small_grid",
    "codebook_size", "text_vocab_size"; ValueError if the files do not agree with it.

    tokenizers: hashes of the text and image tokenizer that made it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder / "meta.json")
        try:
            self._parts = [self._part(name) for name in self.meta.get("parts", [None])]
            self._starts = np.cumsum([0] + [len(part["text"]) for part in self._parts])
            rows, length = self.meta["rows"], self.meta["text_length"]
            longest = max(part["text"].shape[1] for part in self._parts)
            self.tokenizers = [str(self.meta["text_sha256"]), str(self.meta["image_sha256"])]
            for name in ("text_vocab_size", "codebook_size", "image_size"):
                require(isinstance(self.meta[name], int) and self.meta[name] > 0, name, "a number", self.meta[name])
        except KeyError as error:
            raise ValueError(f"folder: {str(folder)!r} is damaged (its meta.json has no {error})") from error
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise ValueError(f"folder: {str(folder)!r} is damaged ({error}): tokenize again") from error
        if (len(self), longest) != (rows, length):
            got = f"{len(self)} and {longest}"
            raise ValueError(f"folder: {str(folder)!r}: expected {rows} rows of {length} text ids, got {got}")

    def _part(self, name: str | None) -> dict[str, np.ndarray]:
        """Its arrays by their names; None: the only one, of version 1, without groups."""
        if name is not None and not _PART.fullmatch(name):
            raise ValueError(f"parts: expected names of 32 digits, got {name!r}")
        paths = {key: self.folder / (f"part-{name}.{key}.npy" if name else f"{key}.npy") for key in ARRAYS}
        grids = {"codes": self.meta["grid"], "small": self.meta.get("small_grid")}
        for key in ("groups",) * (name is None) + ("small",) * (grids["small"] is None):
            del paths[key]
        maps = {key: np.load(path, mmap_mode="r", allow_pickle=False) for key, path in paths.items()}
        found = {key: values.view(np.ndarray) for key, values in maps.items()}  # rows of a memmap cost seven times more
        rows = len(found["text"])
        wanted = {"text": (rows, found["text"].shape[-1]), "groups": (rows,)}
        wanted |= {key: (rows, grid[0] * grid[1]) for key, grid in grids.items() if grid is not None}
        for key, values in found.items():
            fits = values.shape == wanted[key] and values.dtype == ARRAYS[key]
            got = f"{values.dtype} {values.shape}"
            require(fits, paths[key].name, f"{np.dtype(ARRAYS[key])} {wanted[key]}", got)
        return found

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def digest(self) -> str:
        """Names the rows; "" of version 1."""
        return part_name(parts=self.meta["parts"]) if "parts" in self.meta else ""

    @property
    def parts(self) -> list[tuple[Path, str]]:
        """Folders and names of those that have checksums, which version 1 has not."""
        return [(self.folder, name) for name in self.meta.get("parts", [])]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, ...]:
        """Text int64 [B, T], -1 padded, and codes int64 [B, h w] of some rows, those at half the size before them if
        there are some. Layouts check the ids."""
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self)):
            raise ValueError(f"indices: expected a list of 0 to {len(self) - 1}, got {indices}")
        text = np.full((len(indices), self.meta["text_length"]), -1, np.int64)
        codes = {
            key: np.empty((len(indices), self._parts[0][key].shape[1]), np.int64)
            for key in ("small", "codes")
            if key in self._parts[0]
        }
        places = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(places):
            mine, part = places == number, self._parts[number]
            rows = indices[mine] - self._starts[number]
            text[mine, : part["text"].shape[1]] = part["text"][rows]
            for key, values in codes.items():
                values[mine] = part[key][rows]
        return torch.from_numpy(text), *map(torch.from_numpy, codes.values())

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the rows, int64, a function of (seed, epoch) alone."""
        return permutation(len(self), seed, epoch)

    def groups(self) -> np.ndarray:
        """uint64 [N]: a hash of each pair's caption (of version 1, which has none: of its codes)."""
        if "groups" in self._parts[0]:
            return np.concatenate([part["groups"] for part in self._parts])
        digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in self._parts[0]["codes"]]
        return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)

    def hold_out(self, share: float) -> "tuple[Rows, Rows]":
        """The rows to train on, and about this share of all to validate on: which, the captions decide, so that it
        stays so when shards are added, and all rows of a picture are on one side. Either may be empty."""
        require(0 <= share < 1, "hold_out", "a share in [0, 1)", share)
        held = self.groups() < np.uint64(share * 2**64)
        return Rows(self, np.flatnonzero(~held)), Rows(self, np.flatnonzero(held))


class Rows:
    """Some rows of tokens, as a data set of their own."""

    def __init__(self, data: TokenDataset, numbers: np.ndarray):
        self.data, self.numbers, self.meta, self.tokenizers = data, numbers, data.meta, data.tokenizers
        self.folder = data.folder

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def digest(self) -> str:
        """Names the rows."""
        return hashlib.sha256(self.data.digest.encode() + self.numbers.tobytes()).hexdigest()[:32]

    @property
    def parts(self) -> list[tuple[Path, str]]:
        """Of all rows, not of these alone."""
        return self.data.parts

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, ...]:
        return self.data.batch(self.numbers[np.asarray(indices, np.int64)])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return permutation(len(self), seed, epoch)
