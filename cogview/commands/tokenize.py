"""`cogview tokenize`: from shards to tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cogview.config import TrainConfig
from cogview.data.shards import PairDataset

console = Console(highlight=False)


@dataclass(frozen=True)
class Tokenize:
    """Turn tar shards of pairs into tokens, training the tokenizers that the run folder does not have yet."""

    shards: tyro.conf.Positional[tuple[Path, ...]]
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run: text.model, vqvae.safetensors, tokens/<split>."""
    split: str = "train"
    languages: tuple[str, ...] = ("en", "zh")
    """Captions to use, by their keys in the pairs' JSON ("caption" for plain text)."""
    image_size: int = 64
    """Pixels of a side; others are cropped to a square and resized."""
    max_text: int = 64
    """Longest caption in tokens; longer ones are left out and counted."""
    text_pieces: int = 600
    """Vocabulary of a text tokenizer trained here."""
    codebook: int = 1024
    """Codes of an image tokenizer trained here."""
    code_dim: int = 64
    hidden: int = 96
    image_seconds: float = 150
    """Training time of an image tokenizer trained here."""

    def run(self) -> None:
        from cogview.pipeline import image_tokenizer, text_tokenizer, tokenize_pairs
        from cogview.tokenizers.image import VQVAE, VQConfig
        from cogview.tokenizers.text import TextTokenizer
        from cogview.tokenizers.train_image import TRAINING, newest_checkpoint

        data, folder = PairDataset(self.shards), self.run_folder
        trained = folder / "vqvae.safetensors"
        if self.split == "train":
            text = text_tokenizer(data, folder, self.languages, self.text_pieces)
        else:  # only the training split trains
            text = TextTokenizer.load(folder / "text.model")
        if self.split != "train" or (trained.exists() and newest_checkpoint(folder) is None):
            image = VQVAE.load(trained).eval()
        else:
            config = VQConfig(codebook_size=self.codebook, dim=self.code_dim, hidden=self.hidden)
            training = TrainConfig(seconds=self.image_seconds, **TRAINING)
            image, report = image_tokenizer(data, folder, config, training, image_size=self.image_size)
            console.print(f"image tokenizer: {report.psnr:.1f} dB, {report.used_codes} codes used")
        out = folder / "tokens" / self.split
        sizes = {"image_size": self.image_size, "max_text": self.max_text}
        dataset = tokenize_pairs(data, text, image, out, self.languages, **sizes)
        console.print(f"{len(dataset)} sequences in {out}; left out: {dataset.meta['skipped'] or 'none'}")
