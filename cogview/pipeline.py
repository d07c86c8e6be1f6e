"""From shards to tokens: trains the tokenizers that are missing, then tokenises. The commands and the demo call it."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data.images import pixels
from cogview.data.shards import PairDataset
from cogview.data.tokens import VERSION, TokenDataset, TokenWriter, made_of
from cogview.progress import track
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.train_image import VQReport, train_vqvae
from cogview.train.interrupts import Interrupted
from cogview.train.loop import Watch

TEXT_ROOM = 4  # tokens that typed captions may be longer than those of the data


def text_tokenizer(
    data: PairDataset, folder: Path, languages: Sequence[str], vocab_size: int, limit: int = 16384
) -> TextTokenizer:
    """The tokenizer in folder/text.model; if it is not there, trained on the captions of the first `limit` pairs."""
    path = folder / "text.model"
    if not path.exists():
        captions = []
        for pair in data.readable(0, limit):
            captions += [pair.captions[name] for name in languages if name in pair.captions]
        if not captions:
            raise ValueError(f"no caption in {', '.join(languages)} among the first {limit} pairs ({data.report})")
        TextTokenizer.train(captions, vocab_size, path)
    return TextTokenizer.load(path)


def load_images(data: PairDataset, image_size: int = 64, limit: int | None = None) -> Tensor:
    """The first `limit` readable pictures, uint8 [N, 3, image_size, image_size]."""
    found = [pixels(pair.image, image_size) for pair in islice(data.readable(), limit)]
    if not found:
        raise ValueError(f"dataset: no readable picture ({data.report})")
    return torch.stack(found)


def image_tokenizer(
    data: PairDataset,
    folder: Path,
    config: VQConfig,
    training: TrainConfig,
    *,
    image_size: int,
    limit: int = 16384,
    watch: Watch | None = None,
) -> tuple[VQVAE, VQReport]:
    """The VQ-VAE in folder/vqvae.safetensors, trained to its end from where it was stopped; else Interrupted."""
    report = train_vqvae(load_images(data, image_size, limit), config, training, folder, watch=watch)
    if not report.finished:
        raise Interrupted
    return VQVAE.load(report.model).eval(), report


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
) -> TokenDataset:
    """Tokenises all captions and pictures into the folder `out`, with a progress bar.

    languages: keys of `Pair.captions`; where one is missing there is no row. A caption of more than max_text
    tokens gives no row; meta.json counts those and the unreadable samples. A folder that already holds these
    pairs made with these tokenizers is kept.
    """
    out = Path(out)
    settings: dict[str, Any] = {
        "version": VERSION,
        "shards": [[shard.path.name, shard.path.stat().st_size] for shard in dataset.shards],
        "pairs": len(dataset),
        "languages": list(languages),
        "image_size": image_size,
        "max_text": max_text,
        "text_sha256": text_tokenizer.sha256,
        "image_sha256": vqvae.sha256,
    }
    if (finished := made_of(out, settings)) is not None:
        return finished
    side, skipped = image_size // vqvae.config.downsample, Counter[str]()
    vqvae.eval()
    with TokenWriter(out, settings, (side, side)) as writer:
        for start in track(range(0, len(dataset), batch), f"tokenising {out.name}"):
            end = min(start + batch, len(dataset))
            pairs = list(dataset.readable(start, end))
            skipped["unreadable pairs"] += end - start - len(pairs)
            if not pairs:
                continue
            with torch.inference_mode():
                images = torch.stack([pixels(pair.image, image_size) for pair in pairs])
                codes = vqvae.encode(images.float() / 255).flatten(1).to(torch.int32).numpy()
            for pair, row in zip(pairs, codes, strict=True):
                for language in languages:
                    ids = text_tokenizer.encode(pair.captions[language]) if language in pair.captions else []
                    if 0 < len(ids) <= max_text:
                        writer.write(ids, row)
                    else:
                        skipped["captions too long" if ids else "captions missing"] += 1
        if not len(writer):
            raise ValueError(f"dataset: no pair with a caption in {', '.join(languages)} ({dict(skipped)})")
        sizes = {"text_vocab_size": text_tokenizer.vocab_size, "codebook_size": vqvae.config.codebook_size}
        writer.finish(skipped, **sizes)
    return TokenDataset(out)


def sizes_of(*data: TokenDataset) -> dict[str, int]:
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
