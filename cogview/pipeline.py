"""From pairs to tokens: trains the tokenizers that are missing, then tokenises. The CLI and the demo call it."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.progress import track

from .config import GPTConfig
from .data.shards import PairDataset
from .data.tokens import TokenDataset, load_images, tokenize_pairs
from .tokenizers.image import VQVAE, VQConfig
from .tokenizers.text import TextTokenizer
from .tokenizers.train_image import VQReport, train_vqvae


def text_tokenizer(
    data: PairDataset, folder: Path, languages: Sequence[str], vocab_size: int, limit: int = 16384
) -> TextTokenizer:
    """The tokenizer in folder/text.model; if it is not there, trained on the captions of the first `limit` pairs."""
    path = folder / "text.model"
    if not path.exists():
        captions = []
        for index in range(min(limit, len(data))):
            if (pair := data[index]) is not None:
                captions += [pair.captions[name] for name in languages if name in pair.captions]
        if not captions:
            raise ValueError(f"no caption in {', '.join(languages)} among the first {limit} pairs ({data.report})")
        TextTokenizer.train(captions, vocab_size, path)
    return TextTokenizer.load(path)


def image_tokenizer(
    data: PairDataset, folder: Path, config: VQConfig, *, seconds: float, image_size: int, limit: int = 16384
) -> tuple[VQVAE, VQReport]:
    """The VQ-VAE in folder/vqvae.safetensors, trained for `seconds` in all, going on where it was stopped."""
    images = load_images(data, image_size, limit)
    report = train_vqvae(images, config, out_dir=folder, seconds=seconds)
    if not report.finished:
        raise KeyboardInterrupt
    return VQVAE.load(report.model).eval(), report


def tokens(
    data: PairDataset, out: Path, text: TextTokenizer, image: VQVAE, languages: Sequence[str], **options
) -> TokenDataset:
    """The tokenised pairs, with a progress bar; options as `tokenize_pairs`."""

    def progress(batches: range) -> Iterable[int]:
        return track(batches, f"tokenising {out.name}")

    return tokenize_pairs(data, text, image, out, languages, progress=progress, **options)


TEXT_ROOM = 4  # tokens that typed captions may be longer than those of the data


def fit(config: GPTConfig, *data: TokenDataset) -> GPTConfig:
    """A preset with the vocabularies, the grid and the longest text of some tokens, and a little room."""
    meta = data[0].meta
    rows, columns = meta["grid"]
    if rows != columns:
        raise ValueError(f"the tokens' images must be square, got {rows} x {columns}")
    max_text = max(d.meta["text_length"] for d in data) + TEXT_ROOM
    return dataclasses.replace(
        config,
        image_vocab=meta["codebook_size"],
        text_vocab=meta["text_vocab_size"],
        image_grid=rows,
        max_positions=rows * columns + 4 + max_text,
        # all text and commands, and room for some of the image
        num_pivots=max(config.num_pivots, max_text + 4 + rows * columns // 4),
    )
