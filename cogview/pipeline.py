"""From shards to tokens: trains the tokenizers that are missing, then tokenises. The commands and the demo call it."""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data.ahead import cores
from cogview.data.crops import Crops, Row, Squares, Whole
from cogview.data.decoded import Decoded
from cogview.data.shards import PairDataset
from cogview.data.tokens import VERSION, PartWriter, Rows, TokenDataset, complete, group, has_part, part_name
from cogview.progress import progress
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.train_image import VQReport, train_vqvae, trained_on
from cogview.train.identity import AnotherRun
from cogview.train.interrupts import Interrupted
from cogview.train.loop import Watch

_GRIDS = {"codes": "grid", "small": "small_grid"}  # as meta.json calls those of the rows' codes
TEXT_ROOM = 4  # tokens that typed captions may be longer than those of the data
MOST = 16384  # samples that tokenizers are trained on
HELD_OUT = 256  # pictures, or a tenth of fewer, that the image tokenizer is judged by


def spread(count: int, most: int = MOST) -> np.ndarray:
    """Numbers of some samples of `count`, all or evenly spread, int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.zeros(0, np.int64)


def text_tokenizer(data: PairDataset, folder: Path, vocab_size: int | None = None) -> TextTokenizer:
    """The tokenizer in folder/text.model; if it is not there, trained on the captions."""
    path = folder / "text.model"
    if not path.exists():
        TextTokenizer.train(some_captions(data), vocab_size).save(path)
    return TextTokenizer.load(path)


def some_captions(data: PairDataset, most: int = MOST) -> list[str]:
    """Those of some samples; ValueError where there is none."""
    found = (data.captions(int(number)) for number in spread(len(data), most))
    captions = [caption for pair in found if pair for caption in pair.values()]
    require(bool(captions), "dataset", f"captions in {', '.join(data.languages)}", str(data.report))
    return captions


def image_tokenizer(
    data: PairDataset,
    decoded: Decoded,
    folder: Path,
    config: VQConfig,
    training: TrainConfig,
    *,
    adversarial: bool = False,
    halves: bool = False,
    watch: Watch | None = None,
) -> tuple[VQVAE, VQReport]:
    """The VQ-VAE in folder/vqvae.safetensors, trained to its end from where it was stopped; else Interrupted.

    halves: on pictures of half the size, too."""
    held = _held_out(data, decoded)
    if trained_on(folder) == len(decoded):  # a training that was begun before any were held out
        held = None
    try:
        about: dict[str, Any] = {"held_out": held, "name": decoded.name, "halves": halves, "watch": watch}
        report = train_vqvae(decoded.images, config, training, folder, adversarial=adversarial, **about)
    except AnotherRun as error:
        raise ValueError(
            f"{error}. An image tokenizer is half trained there: the pictures and options of before go on with it, "
            "--retrain-tokenizers begins anew"
        ) from error
    if not report.finished:
        raise Interrupted
    return VQVAE.load(report.model).eval(), report


def decode(data: PairDataset, folder: Path, image_size: int) -> Decoded:
    """The pictures that an image tokenizer is trained on; `tokenize_pairs` takes them from there, too."""
    return Decoded.of(data, spread(len(data)), image_size, folder / "pixels")


def _held_out(data: PairDataset, decoded: Decoded) -> np.ndarray | None:
    """Rows of some pictures that the image tokenizer does not train on: those that `TokenDataset.hold_out` holds out
    first. None of a single one."""
    captions = [data.captions(int(number)) for number in decoded.numbers]
    names = [next(iter(pair.values())) if pair else str(k) for k, pair in enumerate(captions)]
    groups = np.array([group(name) for name in names], np.uint64)
    order = np.argsort(groups, kind="stable")
    count = min(HELD_OUT, max(1, len(order) // 10))
    alike = np.searchsorted(groups[order], groups[order[count - 1]], side="right")  # with all of the last's caption
    chosen = order[: alike if alike <= len(order) // 2 else count]
    return np.sort(chosen) if len(order) > 1 else None


def tokenize_pairs(
    data: PairDataset,
    text_tokenizer: TextTokenizer,
    vqvae: ImageTokenizer,
    out: str | Path,
    *,
    image_size: int = 64,
    max_text: int = 64,
    batch: int | None = None,
    decoded: Decoded | None = None,
    crops: Crops | None = None,
) -> TokenDataset:
    """Tokenises all captions and pictures into the folder `out`, with progress.

    crops: of each picture at twice image_size some squares of image_size, as two sets of tokens: of the square, and of
    the square at half its size.

    A caption of more than max_text tokens gives no row; meta.json counts those and what cannot be read. Shards whose
    tokens are there already, made with these tokenizers, are kept. batch: pictures that are encoded at once, default as
    many as 128 of 64 x 64 have pixels. decoded: some pictures that are.
    """
    out, side = Path(out), image_size // vqvae.config.downsample
    require(
        image_size % vqvae.config.downsample == 0, "image_size", f"a multiple of {vqvae.config.downsample}", image_size
    )
    made_with: dict[str, Any] = {
        "languages": list(data.languages),
        "image_size": image_size,
        "max_text": max_text,
        "text_sha256": text_tokenizer.sha256,
        "image_sha256": vqvae.sha256,
    }
    grids, step = {"codes": side}, 2 * vqvae.config.downsample
    if crops is not None:
        require(image_size % step == 0, "image_size", f"a multiple of {step} for pairs", image_size)
        crops.check(image_size, step)
        grids["small"] = side // 2
        made_with["crops"] = asdict(crops)
    vqvae.eval()
    batch = max(1, (128 * 64**2) // image_size**2 // (1 if crops is None else crops.count)) if batch is None else batch
    parts: list[str] = []
    with progress(f"tokenising {out.name}", max(1, len(data))) as update:
        last = 0
        for shard in data.shards:
            first, last = last, last + len(shard)
            name = part_name(version=VERSION, shard=shard.digest, **made_with)
            if name in parts:
                data.report.add("shard of the same contents as another", shard.path.name, "left out")
                continue
            parts.append(name)
            if not has_part(out, name):
                with PartWriter(out, name, {key: grid**2 for key, grid in grids.items()}) as writer:
                    texts, skipped = _texts(data, range(first, last), text_tokenizer, max_text)
                    pictures = _pictures(data, list(texts), image_size * (1 if crops is None else 2), decoded)
                    rows_of = Whole() if crops is None else Squares(crops, step, int(shard.digest[:15], 16), first)
                    begun = time.monotonic()
                    for done, (k, rows) in enumerate(_codes(pictures, rows_of, vqvae, batch), 1):
                        ids, hashed = texts.pop(k)
                        for caption, codes in itertools.product(ids, rows):
                            writer.write(caption, codes, hashed)
                        if done % batch == 0:
                            rate = done / (time.monotonic() - begun)
                            update(first + done, f"{rate:.0f} pairs/s on {cores()} cores")
                    skipped["pictures that cannot be read"] = len(texts)
                    shard.check_unchanged()
                    writer.finish(skipped)
            update(last)
    sizes: dict[str, Any] = {"text_vocab_size": text_tokenizer.vocab_size, "codebook_size": vqvae.config.codebook_size}
    sizes |= {_GRIDS[key]: [grid, grid] for key, grid in grids.items()}
    return complete(out, parts, {**made_with, **sizes})


Texts = dict[int, tuple[list[list[int]], int]]
"""By sample: the ids of its captions, and a hash of the first."""


def _texts(data: PairDataset, numbers: range, tokenizer: TextTokenizer, most: int) -> tuple[Texts, Counter[str]]:
    """Of the samples that have a caption of at most so many tokens, and how many have none."""
    found: Texts = {}
    skipped = Counter[str]()
    for number in numbers:
        captions = data.captions(number)
        if captions is None:
            skipped["pairs without a caption"] += 1
            continue
        ids = [tokenizer.encode(caption) for caption in captions.values()]
        fitting = [caption for caption in ids if len(caption) <= most]
        skipped[f"captions of more than {most} tokens"] += len(ids) - len(fitting)
        if fitting:
            found[number] = fitting, group(next(iter(captions.values())))
    return found, skipped


def _codes(
    pictures: Iterator[tuple[int, Tensor]], of: Whole, vqvae: ImageTokenizer, batch: int
) -> Iterator[tuple[int, list[Row]]]:
    """(number, rows) of pictures, `batch` of which are encoded at once."""
    while some := list(itertools.islice(pictures, batch)):
        parts = [of.pictures(number, picture) for number, picture in some]
        codes = {key: _encoded(vqvae, torch.cat([part[key] for part in parts])) for key in parts[0]}
        each = {key: len(rows) for key, rows in parts[0].items()}
        for n, (number, _) in enumerate(some):
            yield number, of.rows(number, {key: c[n * each[key] : (n + 1) * each[key]] for key, c in codes.items()})


def _encoded(vqvae: ImageTokenizer, images: Tensor) -> np.ndarray:
    """int32 [N, h w] of uint8 images."""
    with torch.inference_mode():
        return vqvae.encode(images.float() / 255).flatten(1).to(torch.int32).numpy()


def _pictures(
    data: PairDataset, numbers: list[int], size: int, decoded: Decoded | None
) -> Iterator[tuple[int, Tensor]]:
    """(number, uint8 [3, size, size]) of the samples whose pictures can be read; numbers ascend."""
    if decoded is None:
        return data.pictures(size, numbers)
    known = ((number, decoded[number]) for number in numbers if number in decoded)
    read = data.pictures(size, [number for number in numbers if number not in decoded])
    return heapq.merge(known, read, key=lambda pair: pair[0])


def sizes_of(*data: TokenDataset | Rows) -> dict[str, int]:
    """What `Recipe.fit` takes: the vocabularies, the grid and the longest text of some tokens, and a little room."""
    meta = data[0].meta
    rows, columns = meta["grid"]
    require(rows == columns, "tokens", "square images", f"{rows} x {columns}")
    return {
        "image_vocab": meta["codebook_size"],
        "text_vocab": meta["text_vocab_size"],
        "image_grid": rows,
        "max_text": max(d.meta["text_length"] for d in data) + TEXT_ROOM,
    }
