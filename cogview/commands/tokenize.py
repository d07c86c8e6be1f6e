"""`cogview tokenize`: from shards to tokens."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.commands.tokenizers import TOKENIZERS, UNFINISHED, adopt, begin, check_made_by
from cogview.config import TrainConfig, require
from cogview.data import decoded
from cogview.data.ahead import ahead
from cogview.data.crops import Crops
from cogview.data.decoded import Decoded
from cogview.data.shards import PairDataset
from cogview.data.tokens import read_meta, tokens_of
from cogview.progress import progress, track
from cogview.tokenizers import codec_folder
from cogview.tokenizers.codebook import Training
from cogview.tokenizers.image import PRESETS, VQConfig
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.train_image import TRAINING, crop_of, passes_of, seconds_a_step, steps_for


def _of_preset(name: str) -> Any:
    """An option for a size of the image tokenizer."""
    values = f"tiny {getattr(PRESETS['tiny'][1], name)}, others {getattr(VQConfig, name)}"
    return option("INT", values)


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
    image_size: Annotated[int | None, option("INT", "as the run's other tokens, or image-preset's")] = None
    """Pixels of a side; others are cropped to a square and resized."""
    pairs: bool = False
    """Make the tokens that super-resolution is trained on: of squares of image_size from pictures at twice that, and of
    the same at half the size. Smaller pictures are enlarged, and teach blur. An image tokenizer trained here sees both
    sizes, so begin with these."""
    crops: int = 1
    """With --pairs: squares of each picture."""
    crop_seed: int = 0
    """With --pairs: of their places."""
    cut: Literal["pictures", "codes"] = "pictures"
    """With --pairs: squares of the pictures, as published, or of the codes of whole ones, which know what is around as
    those do that are magnified: with squares of 8 x 8 codes that came 4 dB nearer to the true pictures."""
    max_text: int = 64
    """Longest caption in tokens; longer ones are left out and counted."""
    text_pieces: Annotated[int | None, option("INT", "by the captions")] = None
    """Vocabulary of a text tokenizer trained here."""
    image_preset: Annotated[Literal["tiny", "cogview", "fashion-400", "fashion-800"], tyro.conf.arg()] = "tiny"
    """Sizes of an image tokenizer trained here: of pictures of 64, 256, 400 or 800 pixels, 8 pixels a code, in
    fashion-800 16."""
    codebook: Annotated[int | None, _of_preset("codebook_size")] = None
    """Its codes."""
    code_dim: Annotated[int | None, _of_preset("dim")] = None
    """Its numbers to a code."""
    hidden: Annotated[int | None, _of_preset("hidden")] = None
    """Its channels."""
    codebook_training: Training = "moving_average"
    """How its codes are found: as means of what takes them, unused ones moved to where they help, by the gradient of a
    codebook loss, by drawing them at a temperature that falls (gumbel), or once and for all, a tenth of the training
    in (fixed). moving_average_kmeans: means that begin as those do, unused ones left."""
    adversarial: bool = False
    """Train it as a VQGAN: beside a discriminator, for textures that look real. A step takes about twice the time."""
    image_passes: Annotated[float | None, option("FLOAT", "for 1,250 steps, at least 2")] = None
    """How often it sees every pixel."""
    image_seconds: Annotated[float | None, option("SECONDS", "no limit")] = None
    """Time that its training may take."""
    codec: Annotated[Path | None, option("FOLDER", "none, train one")] = None
    """Take a published codec as the image tokenizer: a folder of transformers' JanusVQVAE or Emu3VQVAE, alone or in the
    whole model, or of diffusers' VQModel."""
    from_run: Annotated[Path | None, option("PATH", "none", name="from")] = None
    """Take the tokenizers of this run, for a model that goes on from one of its models (train --from)."""
    retrain_tokenizers: bool = False
    """Train new ones where the run has some, which are set aside: its models cannot be used with the new tokens."""

    def run(self) -> None:
        from cogview.pipeline import some_captions, tokenize_pairs

        self._check()
        folder = self.run_folder
        with progress("opening the shards"):
            data = PairDataset(self.shards, languages=self.languages)
        require(len(data) > 0, "shards", "at least one pair", f"none ({data.report})")
        captions = some_captions(data, 1024)
        if self.from_run is not None:
            adopt(self.from_run, folder)
        of_preset, sizes_here = PRESETS[self.image_preset]
        size = self.image_size or size_of(folder) or of_preset
        known = self._known_image_tokenizer()
        step = (sizes_here if known is None else known.config).downsample * (2 if self.pairs else 1)
        require(size % step == 0, "image_size", f"a multiple of {step}{' for pairs' if self.pairs else ''}", size)
        crops = Crops(self.crops, self.crop_seed, self.cut) if self.pairs else None
        if crops is not None:
            crops.check(size, step)
        for _ in track(ahead(lambda shard: shard.digest, data.shards), "reading the shards", len(data.shards)):
            pass
        if self.split == "train":
            shards = [str(path.absolute()) for path in self.shards]
            of = {} if self.codec is None or known is None else {"codec": known.sha256}
            begin(folder, {"shards": shards, "languages": list(self.languages), **of}, self.retrain_tokenizers)
        text = self._text_tokenizer(data, captions)
        image, pictures = self._image_tokenizer(data, size, known)
        check_made_by(folder, [text.sha256, image.sha256])
        out = tokens_of(folder, self.split, 2 if self.pairs else 1)
        sizes = {"image_size": size, "max_text": self.max_text}
        tokens = tokenize_pairs(data, text, image, out, **sizes, decoded=pictures, crops=crops)
        decoded.remove(folder / "pixels")
        (folder / UNFINISHED).unlink(missing_ok=True)
        console.print(f"{len(tokens):,} sequences in {out}")
        left_out = [f"{n:,} {kind}" for kind, n in tokens.meta["skipped"].items()]
        console.print(f"left out: {', '.join(left_out) or 'nothing'}")
        for kind, first in sorted(data.report.first().items()):
            console.print(f"  {data.report.counts[kind]:,} {kind}, first {first.where}")

    def _check(self) -> None:
        require(bool(re.fullmatch(r"(?!pairs-)\w[\w-]*", self.split)), "split", "a name, as train or test", self.split)
        folder = self.run_folder
        require(folder.is_dir() or not folder.exists(), "run", "a folder, or a new one", str(folder))
        require(self.text_pieces is None or self.text_pieces >= 300, "text_pieces", "at least 300", self.text_pieces)
        for name in ("image_size", "max_text", "codebook", "code_dim", "hidden", "image_passes", "image_seconds"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "a positive number", value)
        require(self.from_run is None or self.codec is None, "codec", "no --from, which takes another", str(self.codec))
        if not self.pairs:
            for name in ("crops", "crop_seed", "cut"):
                given = getattr(self, name) != DEFAULTS[name]
                require(not given, name, "none without --pairs", getattr(self, name))
        if self.retrain_tokenizers:
            require(self.split == "train", "retrain_tokenizers", "split train, which trains them", self.split)
            require(self.from_run is None, "retrain_tokenizers", "no --from, which takes others", str(self.from_run))

    def _text_tokenizer(self, data: PairDataset, captions: list[str]) -> TextTokenizer:
        """That of the run, or one that is trained now. captions: some that are to be tokenised."""
        from cogview.pipeline import text_tokenizer

        folder, said = self.run_folder, "trained on these captions"
        if self.split != "train":  # only the training split trains
            there = all((folder / name).exists() for name in TOKENIZERS) and not (folder / UNFINISHED).exists()
            require(there, "run", "the tokenizers of a training split in it, tokenised first", str(folder))
        if (folder / TOKENIZERS[0]).exists():
            said = f"in {folder}"
        with progress("text tokenizer"):
            text = text_tokenizer(data, folder, self.text_pieces)
        console.print(f"text tokenizer: {text.vocab_size:,} pieces, {said}")
        shortest = min(len(text.encode(caption)) for caption in captions)
        require(shortest <= self.max_text, "max_text", f"at least {shortest}, of the shortest caption", self.max_text)
        return text

    def _known_image_tokenizer(self) -> ImageTokenizer | None:
        """The codec, or that of the run; None where one is to be trained."""
        path = self.run_folder / TOKENIZERS[1]
        there = load_image_tokenizer(path) if path.exists() and not self.retrain_tokenizers else None
        if self.codec is None:
            return there
        with progress("reading the codec"):
            codec = codec_folder.read(self.codec)
        if there is not None and there.sha256 != codec.sha256:
            raise ValueError(
                f"codec: {self.run_folder} has another image tokenizer than {self.codec}: name another run, or "
                "--retrain-tokenizers sets that aside"
            )
        return codec

    def _image_tokenizer(
        self, data: PairDataset, size: int, known: ImageTokenizer | None
    ) -> tuple[ImageTokenizer, Decoded | None]:
        """That of the run, or one that is trained now, with the pictures that it was trained on."""
        from cogview import pipeline

        folder, path = self.run_folder, self.run_folder / TOKENIZERS[1]
        if self.codec is not None and known is not None and not path.exists():
            known.save(path)
        if path.exists():
            image, of = load_image_tokenizer(path), "" if self.codec is None else f", of {self.codec}"
            console.print(f"image tokenizer: {image.config.codebook_size:,} codes, in {folder}{of}")
            names = TRAINING_ONLY if self.codec is None else TRAINING_ONLY[1:]
            unused = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != DEFAULTS[name]]
            if unused:
                console.print(f"not used, since the tokenizers are there: {', '.join(unused)}")
            return image, None
        size *= 2 if self.pairs else 1
        pictures = pipeline.decode(data, folder, size)
        config, count = self._image_config(), len(pictures)
        crop = crop_of(config)
        steps = steps_for(count, size, self.image_passes, crop)
        minutes = min(steps * seconds_a_step(config, size, self.adversarial), self.image_seconds or math.inf) / 60
        console.print(
            f"image tokenizer: {steps:,} steps, {passes_of(steps, count, size, crop):.1f} passes over {count:,} "
            f"pictures of {size} x {size}, about {minutes:.1f} minutes"
        )
        training = TrainConfig(steps=steps, seconds=self.image_seconds, **TRAINING)
        how: dict[str, Any] = {"adversarial": self.adversarial, "halves": self.pairs}
        image, report = pipeline.image_tokenizer(data, pictures, folder, config, training, **how)
        judged = f"held-out pictures ({report.held_out})" if report.held_out else "pictures that it was trained on"
        console.print(
            f"image tokenizer: {report.psnr:.1f} dB on {judged}, {report.used_codes:,} of {config.codebook_size:,} "
            f"codes used ({report.reconstructions})"
        )
        if report.steps < steps_for(count, size, None, crop):
            passes, given = passes_of(report.steps, count, size, crop), ("image_passes", "image_seconds")
            without = " and ".join(f"--{name.replace('_', '-')}" for name in given if getattr(self, name) is not None)
            again = f"--retrain-tokenizers without {without}"
            console.print(f"{passes:.1f} passes over your pictures, {report.steps:,} steps; more would help ({again})")
        return image, pictures

    def _image_config(self) -> VQConfig:
        """Of an image tokenizer trained here."""
        given = {"codebook_size": self.codebook, "dim": self.code_dim, "hidden": self.hidden}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[self.image_preset][1], codebook=self.codebook_training, **chosen)


TRAINING_ONLY = (
    "text_pieces",
    "image_preset",
    "codebook",
    "code_dim",
    "hidden",
    "codebook_training",
    "adversarial",
    "image_passes",
    "image_seconds",
)
DEFAULTS = {field.name: field.default for field in fields(Tokenize)}


def size_of(folder: Path) -> int | None:
    """Of the pictures of a run's tokens, if it has some."""
    found = (read_meta(tokens_of(folder, split, sizes)) for sizes in (1, 2) for split in ("train", "test"))
    return next((meta["image_size"] for meta in found if meta is not None and "image_size" in meta), None)
