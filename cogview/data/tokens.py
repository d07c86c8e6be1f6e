"""Pairs as tokens, a folder: text.npy (int32 [N, T], -1 padded), codes.npy (int32 [N, h w]), meta.json.

A row is one picture with its caption in one language, so a picture with two captions gives two rows, next to
each other, pictures in the order of the shards. meta.json is written last: a folder without it is unfinished.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.text import TextTokenizer

from .files import write_json, written_beside
from .shards import Pair, PairDataset
from .shuffle import permutation

VERSION = 1


def pixels(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size] of an RGB picture; other sizes are cropped to a square and resized."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_images(dataset: PairDataset, image_size: int = 64, limit: int | None = None) -> Tensor:
    """The first `limit` readable pictures of a dataset, uint8 [N, 3, image_size, image_size]."""
    found = [pixels(pair.image, image_size) for _, pair in zip(range(limit or len(dataset)), _pairs(dataset))]  # noqa: B905
    if not found:
        raise ValueError(f"dataset: no readable picture ({dataset.report})")
    return torch.stack(found)


def tokenize_pairs(
    dataset: PairDataset,
    text_tokenizer: TextTokenizer,
    vqvae: VQVAE,
    out: str | Path,
    languages: Sequence[str] = ("en", "zh"),
    *,
    image_size: int = 64,
    max_text: int = 64,
    batch: int = 128,
    progress=iter,
) -> "TokenDataset":
    """Tokenises all captions and pictures into the folder `out`.

    languages: keys of `Pair.captions`; where one is missing there is no row. A caption of more than max_text
    tokens gives no row; meta.json counts those and the unreadable samples. A folder that already holds these
    pairs made with these tokenizers is kept. progress wraps the list of batches.
    """
    out = Path(out)
    settings = {
        "version": VERSION,
        "shards": [[shard.path.name, shard.path.stat().st_size] for shard in dataset.shards],
        "pairs": len(dataset),
        "languages": list(languages),
        "image_size": image_size,
        "max_text": max_text,
        "text_sha256": text_tokenizer.sha256,
        "image_sha256": vqvae.sha256,
    }
    meta_path = out / "meta.json"
    if meta_path.exists():
        if settings.items() <= _read_meta(meta_path).items():
            return TokenDataset(out)
        meta_path.unlink()  # from here on the folder is unfinished
    side = image_size // vqvae.config.downsample
    texts, lengths, rows, skipped = array("i"), array("i"), 0, Counter[str]()
    vqvae.eval()
    with written_beside(out / "codes.npy") as beside, open(beside, "wb") as file:
        _write_header(file, 0, side * side)
        for start in progress(range(0, len(dataset), batch)):
            pairs = list(_pairs(dataset, start, min(start + batch, len(dataset))))
            skipped["unreadable pairs"] += min(batch, len(dataset) - start) - len(pairs)
            if not pairs:
                continue
            with torch.inference_mode():
                images = torch.stack([pixels(pair.image, image_size) for pair in pairs])
                codes = vqvae.encode(images.float() / 255).flatten(1).to(torch.int32).numpy()
            for pair, row in zip(pairs, codes, strict=True):
                for language in languages:
                    ids = text_tokenizer.encode(pair.captions[language]) if language in pair.captions else []
                    if not 0 < len(ids) <= max_text:
                        skipped["captions too long" if ids else "captions missing"] += 1
                        continue
                    texts.extend(ids)
                    lengths.append(len(ids))
                    file.write(row.tobytes())
                    rows += 1
        if not rows:
            raise ValueError(f"dataset: no pair with a caption in {', '.join(languages)} ({dict(skipped)})")
        file.seek(0)
        _write_header(file, rows, side * side)
    padded = np.full((rows, max(lengths)), -1, np.int32)
    padded[np.arange(padded.shape[1]) < np.array(lengths)[:, None]] = np.array(texts, np.int32)
    with written_beside(out / "text.npy") as beside, open(beside, "wb") as file:
        np.save(file, padded)
    sizes = {
        "rows": rows,
        "text_length": padded.shape[1],
        "grid": [side, side],
        "text_vocab_size": text_tokenizer.vocab_size,
        "codebook_size": vqvae.config.codebook_size,
    }
    write_json(meta_path, settings | sizes | {"skipped": {k: n for k, n in skipped.items() if n}})
    return TokenDataset(out)


def _pairs(dataset: PairDataset, start: int = 0, end: int | None = None) -> Iterator[Pair]:
    """The readable pairs in storage order."""
    for index in range(start, len(dataset) if end is None else end):
        if (pair := dataset[index]) is not None:
            yield pair


def _write_header(file, rows: int, columns: int) -> None:
    """An .npy header; NumPy pads it so that the number of rows can grow in place."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(file, header)


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

    def check(self, text_tokenizer: TextTokenizer, vqvae: VQVAE) -> None:
        """ValueError unless these are the tokenizers the folder was made with."""
        for name, got in (("text", text_tokenizer.sha256), ("image", vqvae.sha256)):
            if (made_by := self.meta[f"{name}_sha256"]) != got:
                raise ValueError(f"{name} tokenizer: expected {made_by[:12]}, as of these tokens, got {got[:12]}")

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Text int64 [B, T], -1 padded, and codes int64 [B, h w] of some rows."""
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self)):
            raise ValueError(f"indices: expected a list of 0 to {len(self) - 1}, got {indices}")
        text, codes = (torch.from_numpy(a[indices].astype(np.int64)) for a in (self.text, self.codes))
        bounds = (("text", text, -1, "text_vocab_size"), ("codes", codes, 0, "codebook_size"))
        for name, values, lowest, size in bounds:
            if values.numel() and not lowest <= int(values.min()) <= int(values.max()) < self.meta[size]:
                raise ValueError(f"folder: {name}.npy: expected {lowest} to {self.meta[size] - 1}, got others")
        return text, codes

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the rows, int64, a function of (seed, epoch) alone."""
        return permutation(len(self), seed, epoch)
