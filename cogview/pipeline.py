"""From shards to tokens: trains the tokenizers that are missing, then tokenises. The commands and the demo call it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogview.config import TrainConfig, require
from cogview.data.ahead import cores
from cogview.data.crops import Crops, Reduced
from cogview.data.decoded import Decoded
from cogview.data.mixture import Mixture
from cogview.data.parts import group, has_part
from cogview.data.ranks import Ranks
from cogview.data.shards import PairDataset
from cogview.data.tar_index import ShardLost, TarIndex
from cogview.data.tokens import Rows, TokenDataset, complete
from cogview.progress import progress
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.train_image import VQReport, train_vqvae, trained_on
from cogview.tokenizing import Tokenizing
from cogview.train.identity import AnotherRun
from cogview.train.interrupts import Interrupted
from cogview.train.loop import Watch

TEXT_ROOM = 4  # tokens that typed captions may be longer than those of the data
MOST = 16384  # samples that tokenizers are trained on
HELD_OUT = 256  # pictures, or a tenth of fewer, that the image tokenizer is judged by


def spread(count: int, most: int = MOST) -> np.ndarray:
    """Numbers of some samples of `count`, all or evenly spread, int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.zeros(0, np.int64)


def text_tokenizer(
    data: PairDataset, folder: Path, vocab_size: int | None = None, *, bilingual: bool = False, lowercase: bool = False
) -> TextTokenizer:
    """The tokenizer in folder/text.model; if it is not there, trained on the captions (see `TextTokenizer.train`)."""
    path = folder / "text.model"
    if not path.exists():
        TextTokenizer.train(some_captions(data), vocab_size, bilingual=bilingual, lowercase=lowercase).save(path)
    return TextTokenizer.load(path)


def some_captions(data: PairDataset, most: int = MOST) -> list[str]:
    """Those of some samples; ValueError where there is none."""
    captions = [caption for pair in data.captions_of(spread(len(data), most).tolist()) for caption in pair.values()]
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
    times: int = 1,
    watch: Watch | None = None,
) -> tuple[VQVAE, VQReport]:
    """The VQ-VAE in folder/vqvae.safetensors, trained to its end from where it was stopped; else Interrupted.

    times: on pictures so many times smaller, too."""
    held = _held_out(data, decoded)
    if trained_on(folder) == len(decoded):  # a training that was begun before any were held out
        held = None
    try:
        about: dict[str, Any] = {"held_out": held, "name": decoded.name, "times": times, "watch": watch}
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
    captions = data.captions_of(decoded.numbers.tolist())
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
    crops: Crops | Reduced | None = None,
) -> TokenDataset:
    """Tokenises all captions and pictures into the folder `out`, with progress.

    crops: of each picture at twice image_size some squares of image_size, as two sets of tokens: of the square, and of
    the square at half its size; or two of the whole picture, at image_size and smaller.

    A caption of more than max_text tokens gives no row; meta.json counts those, what cannot be read and what the
    filters of `data` leave out. Shards whose tokens are there already, made with these tokenizers, are kept. batch:
    pictures that are encoded at once, default as many as 128 of 64 x 64 have pixels. decoded: some pictures that are.
    """
    out, how = Path(out), Tokenizing(text_tokenizer, vqvae, image_size, max_text, crops, batch)
    make_parts(data, range(len(data.shards)), how, out, decoded=decoded)
    return finish(data, how, out)


def make_parts(
    data: PairDataset,
    shards: Sequence[int],
    how: Tokenizing,
    out: Path,
    *,
    decoded: Decoded | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Makes the parts of some shards that are not there yet; the first of `ranks` waits for those of the others, and
    shows how far all are. A shard that cannot be read at the moment does not stop the others: OSError names it when
    they are done."""
    ranks, failed, begun = Ranks() if ranks is None else ranks, list[str](), time.monotonic()
    who = f"on {cores()} cores" if ranks.count == 1 else f"by {ranks.count} processes"
    with progress(f"tokenising {out.name}", max(1, len(data))) as update:

        def tell(pairs: int = 0, new: bool = True) -> None:
            made = ranks.counted("made", pairs if new else 0)
            update(ranks.counted("done", pairs), f"{made / max(time.monotonic() - begun, 1e-9):.0f} pairs/s {who}")

        for number in shards:
            try:
                if has_part(out, how.part(data, data.shards[number])):
                    tell(len(data.numbers(number)), new=False)
                else:
                    how.write(data, number, out, tell, threads=ranks.cores(), decoded=decoded)
            except ShardLost as error:
                failed.append(str(error))
        ranks.tell("parts", failed)
        if ranks.first:
            for other in ranks.others:
                failed += ranks.hear("parts", other, tell)
            if failed:
                more = f" and {len(failed) - 1:,} more like it" if len(failed) > 1 else ""
                raise OSError(f"{failed[0]}{more}; the other shards are done, and the same command goes on")


def finish(data: PairDataset, how: Tokenizing, out: Path) -> TokenDataset:
    """Makes the parts of all shards of `data` the tokens of the folder, and removes all others."""
    parts: dict[str, TarIndex] = {}
    for shard in data.shards:
        name = how.part(data, shard)
        if name in parts:
            data.report.add("shard of the same contents as another", shard.path.name, "left out")
        elif not (out / f"part-{name}.json").exists():
            raise OSError(f"shard {str(shard.path)!r} could not be read by the process whose it was: tokenize again")
        parts.setdefault(name, shard)
    return complete(out, list(parts), how.settings(data))


def sizes_of(*data: TokenDataset | Rows | Mixture) -> dict[str, int]:
    """What `Recipe.fit` takes: the vocabularies, the grid and the longest text of some tokens, and a little room."""
    meta = data[0].meta
    rows, columns = meta["grid"]
    require(rows == columns, "tokens", "square images", f"{rows} x {columns}")
    return {
        "image_vocab": meta["codebook_size"],
        "text_vocab": meta["text_vocab_size"],
        "image_grid": rows,
        "max_text": max(d.meta["text_length"] for d in data) + TEXT_ROOM,
        **({"chinese_from": meta["chinese_from"]} if "chinese_from" in meta else {}),
        **({"small_grid": meta["small_grid"][0]} if "small_grid" in meta else {}),
    }
