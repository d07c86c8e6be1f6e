"""`cogview tokenize`: from shards to tokens."""

import json
import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.config import TrainConfig, require
from cogview.data.files import write_json, written_beside
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset

TOKENIZERS = ("text.model", "vqvae.safetensors")
TRAINED_WITH = (
    "vqvae",
    "reconstructions.png",
    "vqvae.training.safetensors",
    "vqvae.jsonl",
)  # the last two: version 0.1


@dataclass(frozen=True)
class Tokenize:
    """Turn tar shards of pairs into tokens, training the tokenizers that the run folder does not have yet. Again with
    more shards or fewer, only what is new is tokenised, by the tokenizers that are there."""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")]
    """All of the split's: tokens of others are dropped."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run: text.model, vqvae.safetensors, tokens/<split>."""
    split: str = "train"
    """Name of the tokens: train, or test for pairs that training only validates on."""
    languages: tuple[str, ...] = ("caption", "en", "zh")
    """Captions to use: fields of the pairs' JSON; "caption" is the text of a .txt, too."""
    image_size: Annotated[int | None, option("INT", "64, or as the run's other tokens")] = None
    """Pixels of a side; others are cropped to a square and resized."""
    max_text: int = 64
    """Longest caption in tokens; longer ones are left out and counted."""
    text_pieces: Annotated[int | None, option("INT", "by the captions")] = None
    """Vocabulary of a text tokenizer trained here."""
    codebook: int = 1024
    """Codes of an image tokenizer trained here."""
    code_dim: int = 64
    """Its numbers to a code."""
    hidden: int = 96
    """Its channels."""
    image_passes: Annotated[float | None, option("FLOAT", "for 1,250 steps, at least 2")] = None
    """How often it sees every pixel."""
    image_seconds: Annotated[float | None, option("SECONDS", "no limit")] = None
    """Time that its training may take."""
    from_run: Annotated[Path | None, option("PATH", "none", name="from")] = None
    """Take the tokenizers of this run, for a model that goes on from one of its models (train --from)."""
    retrain_tokenizers: bool = False
    """Train new ones where the run has some, which are set aside: its models cannot be used with the new tokens."""

    def run(self) -> None:
        from cogview.data import decoded
        from cogview.pipeline import tokenize_pairs
        from cogview.tokenizers.image import VQConfig

        self._check()
        data, folder = PairDataset(self.shards, languages=self.languages), self.run_folder
        require(len(data) > 0, "shards", "at least one pair", f"none ({data.report})")
        if self.from_run is not None:
            adopt(self.from_run, folder)
        if self.retrain_tokenizers:
            require(self.split == "train", "retrain_tokenizers", "split train, which trains them", self.split)
            set_aside(folder, self.shards)
        size = self.image_size or size_of(folder) or 64
        require(size % VQConfig.downsample == 0, "image_size", f"a multiple of {VQConfig.downsample}", size)
        text, image, pictures = self._tokenizers(data, folder, size)
        out, begun = folder / "tokens" / self.split, time.monotonic()
        sizes = {"image_size": size, "max_text": self.max_text}
        tokens = tokenize_pairs(data, text, image, out, **sizes, decoded=pictures)
        decoded.remove(folder / "pixels")
        left_out = ", ".join(f"{n:,} {kind}" for kind, n in tokens.meta["skipped"].items()) or "nothing"
        rate = len(data) / (time.monotonic() - begun)
        console.print(f"{len(tokens):,} sequences in {out} ({rate:,.0f} pairs a second, {os.cpu_count()} cores)")
        console.print(
            f"left out: {left_out}" + ("; `cogview data inspect` says which" if left_out != "nothing" else "")
        )

    def _check(self) -> None:
        require(bool(re.fullmatch(r"\w[\w-]*", self.split)), "split", "a name, as train or test", self.split)
        require(self.text_pieces is None or self.text_pieces >= 300, "text_pieces", "at least 300", self.text_pieces)
        for name in ("image_size", "max_text", "codebook", "code_dim", "hidden", "image_passes", "image_seconds"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "a positive number", value)

    def _tokenizers(self, data: PairDataset, folder: Path, size: int):
        """Both, and the pictures that the image tokenizer was trained on if that was now."""
        from cogview import pipeline
        from cogview.tokenizers.image import VQVAE, VQConfig
        from cogview.tokenizers.train_image import TRAINING, passes_of, seconds_a_step, steps_for

        paths = [folder / name for name in TOKENIZERS]
        if self.split != "train":  # only the training split trains
            there = all(path.exists() for path in paths)
            require(there, "run", "the tokenizers of a training split in it, tokenised first", str(folder))
        said = f"in {folder}" if paths[0].exists() else "trained on these captions"
        text = pipeline.text_tokenizer(data, folder, self.text_pieces)
        console.print(f"text tokenizer: {text.vocab_size:,} pieces, {said}")
        if paths[1].exists():
            image = VQVAE.load(paths[1])
            console.print(f"image tokenizer: {image.config.codebook_size:,} codes, in {folder}")
            return text, image, None
        pictures = pipeline.decode(data, folder, size)
        config = VQConfig(codebook_size=self.codebook, dim=self.code_dim, hidden=self.hidden)
        steps, count = steps_for(len(pictures), size, self.image_passes), len(pictures)
        minutes = min(steps * seconds_a_step(config, size), self.image_seconds or 1e9) / 60
        console.print(
            f"image tokenizer: {steps:,} steps, {passes_of(steps, count, size):.1f} passes over {count:,} pictures of "
            f"{size} x {size}, about {minutes:.1f} minutes"
        )
        training = TrainConfig(steps=steps, seconds=self.image_seconds, **TRAINING)
        image, report = pipeline.image_tokenizer(data, pictures, folder, config, training)
        judged = f"{report.held_out} held-out pictures" if report.held_out else "pictures that it was trained on"
        console.print(
            f"image tokenizer: {report.psnr:.1f} dB on {judged}, {report.used_codes:,} of {self.codebook:,} codes used "
            f"({report.reconstructions})"
        )
        good = steps_for(count, size, None)
        if report.steps < good:
            again = f"--retrain-tokenizers --image-passes {math.ceil(passes_of(good, count, size))}"
            passes = passes_of(report.steps, count, size)
            console.print(f"{passes:.1f} passes over your pictures, {report.steps:,} steps; more would help ({again})")
        return text, image, pictures


def size_of(folder: Path) -> int | None:
    """Of the pictures of a run's tokens, if it has some."""
    for split in ("train", "test"):
        if (folder / "tokens" / split / "meta.json").exists():
            return TokenDataset(folder / "tokens" / split).meta["image_size"]
    return None


def adopt(source: Path, folder: Path) -> None:
    """Copies the tokenizers of a run; ValueError where the folder has others."""
    for name in TOKENIZERS:
        ours, theirs = folder / name, source / name
        require(theirs.exists(), "from", f"{name} in it", str(source))
        if ours.exists():
            same = ours.read_bytes() == theirs.read_bytes()
            if not same:
                raise ValueError(f"from: {folder} has another {name} than {source}: name another run, or the same")
        else:
            with written_beside(ours) as beside:
                shutil.copyfile(theirs, beside)


def set_aside(folder: Path, shards: tuple[Path, ...]) -> None:
    """Moves a run's tokenizers away, but not a training of new ones that the same command was stopped in."""
    record, command = folder / "retraining.json", [str(path.absolute()) for path in shards]
    if record.exists() and not (folder / TOKENIZERS[1]).exists() and json.loads(record.read_text()) == command:
        return
    number = 1
    while (aside := folder / f"tokenizers-{number}").exists():
        number += 1
    for name in (*TRAINED_WITH, *TOKENIZERS):
        if (folder / name).exists():
            aside.mkdir(exist_ok=True)
            (folder / name).rename(aside / name)
    if aside.exists():
        console.print(f"the tokenizers that were there are in {aside} now")
    write_json(record, command)
