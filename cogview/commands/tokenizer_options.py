"""The tokenizers of a run: those that are there, those of another run, a published one, or new ones, trained here."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option, words
from cogview.commands.tokenizers import TOKENIZERS, UNFINISHED
from cogview.config import TrainConfig, require
from cogview.data.decoded import Decoded
from cogview.data.shards import PairDataset
from cogview.progress import progress
from cogview.published.image import read_image_tokenizer
from cogview.tokenizers import codec_folder
from cogview.tokenizers.codebook import Training
from cogview.tokenizers.image import PRESETS, Reconstruction, VQConfig
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.train_image import TRAINING, crop_of, passes_of, seconds_a_step, steps_for


def _of_preset(name: str, kind: Any = int) -> Any:
    """An option for a field of the image tokenizer's config. kind: int, or a Literal."""
    metavar = "INT" if kind is int else "{" + ",".join(get_args(kind)) + "}"
    return option(metavar, words({preset: getattr(config, name) for preset, (_, config) in PRESETS.items()}, str))


# no docstring, which help would rule off from the options
@dataclass(frozen=True)
class TokenizerOptions:
    text_pieces: Annotated[int | None, option("INT", "by the captions")] = None
    """Vocabulary of a text tokenizer trained here."""
    text_vocabulary: Annotated[Literal["plain", "bilingual"] | None, option("{plain,bilingual}", "plain")] = None
    """Order of its pieces: as they are found, or CogView2's, common ones, English, Chinese, rare, with <pad>."""
    text_lowercase: bool = False
    """A text tokenizer trained here makes lower-case letters of all, as DALL-E does."""
    text_model: Annotated[Path | None, option("PATH", "none, train one")] = None
    """Take a SentencePiece model as the text tokenizer, such as CogView2's file ice_text.model."""
    image_preset: Annotated[Literal[*PRESETS], tyro.conf.arg()] = "tiny"  # type: ignore[valid-type]
    """Sizes of an image tokenizer trained here: of pictures of 64, 256, 320, 400 or 800 pixels, in dalle-tiny and dalle
    64 and 256, trained as DALL-E's; 8 pixels a code, in fashion-tiny and fashion-800 16."""
    codebook: Annotated[int | None, _of_preset("codebook_size")] = None
    """Its codes."""
    code_dim: Annotated[int | None, _of_preset("dim")] = None
    """Its numbers to a code."""
    hidden: Annotated[int | None, _of_preset("hidden")] = None
    """Its channels."""
    codebook_training: Annotated[Training | None, _of_preset("codebook", Training)] = None
    """How its codes are found: as means of what takes them, unused ones moved to where they help, by the gradient of a
    codebook loss, by drawing them at a temperature that falls (gumbel), or once and for all, a tenth of the training
    in (fixed). moving_average_kmeans: means that begin as those do, unused ones left. relaxed: DALL-E's, an encoder
    that says how likely each code is, and a decoder of mixtures that become single codes as a temperature falls."""
    reconstruction: Annotated[Reconstruction | None, _of_preset("reconstruction", Reconstruction)] = None
    """What its decoder gives, and learns by: pixels, or a distribution of theirs, by likelihood (DALL-E's)."""
    kl_weight: Annotated[float | None, option("FLOAT", f"{VQConfig.kl_weight}, DALL-E's")] = None
    """Of a relaxed codebook: how much it counts that all codes stay likely."""
    adversarial: bool = False
    """Train it as a VQGAN: beside a discriminator, for textures that look real. A step takes about twice the time."""
    image_passes: Annotated[float | None, option("FLOAT", "for 1,250 steps, at least 2")] = None
    """How often it sees every pixel."""
    image_seconds: Annotated[float | None, option("SECONDS", "no limit")] = None
    """Time that its training may take."""
    codec: Annotated[Path | None, option("PATH", "none, train one")] = None
    """Take a published codec as the image tokenizer: a folder of transformers' JanusVQVAE or Emu3VQVAE, alone or in the
    whole model, or of diffusers' VQModel; CogView2's file ice_image.pt, or CogView's vqvae_hard_biggerset_011.pt."""
    from_run: Annotated[Path | None, option("PATH", "none", name="from")] = None
    """Take the tokenizers of this run, for a model that goes on from one of its models (train --from)."""
    retrain_tokenizers: bool = False
    """Train new ones where the run has some, which are set aside: its models cannot be used with the new tokens."""

    def check(self, folder: Path, split: str) -> None:
        """ValueError unless they are valid, and make sense together."""
        require(self.text_pieces is None or self.text_pieces >= 300, "text_pieces", "at least 300", self.text_pieces)
        for name in ("codebook", "code_dim", "hidden", "image_passes", "image_seconds"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "a positive number", value)
        weight = self.kl_weight
        require(weight is None or 0 <= weight < math.inf, "kl_weight", "a finite number of at least 0", weight)
        relaxed = self._config().codebook == "relaxed"
        require(weight is None or relaxed, "kl_weight", "none without --codebook-training relaxed", weight)
        for name in ("codec", "text_model"):
            path = getattr(self, name)
            require(self.from_run is None or path is None, name, "no --from, which takes another", str(path))
        for name in ("text_pieces", "text_vocabulary"):
            value = getattr(self, name)
            require(self.text_model is None or value is None, name, "none with --text-model, which has its own", value)
        kept = self.text_model is None or not self.text_lowercase
        require(kept, "text_lowercase", "none with --text-model, which has its own", self.text_lowercase)
        if self.retrain_tokenizers:
            require(split == "train", "retrain_tokenizers", "split train, which trains them", split)
            require(self.from_run is None, "retrain_tokenizers", "no --from, which takes others", str(self.from_run))

    def known_text(self, folder: Path) -> TextTokenizer | None:
        """The model of --text-model; ValueError where the run, or the one of --from, has something else than is asked
        for."""
        given = None
        if self.text_model is not None:
            try:
                given = TextTokenizer.load(self.text_model)
            except ValueError as error:
                raise ValueError(f"text_model: {str(error).removeprefix('path: ')}") from error
        source = self.from_run or folder
        if self.retrain_tokenizers or not (source / TOKENIZERS[0]).exists():
            return given
        if not (source / UNFINISHED).exists() or (source / TOKENIZERS[1]).exists():  # else it may be begun anew
            self._check_text(TextTokenizer.load(source / TOKENIZERS[0]), given, source)
        return given

    def _check_text(self, there: TextTokenizer, given: TextTokenizer | None, folder: Path) -> None:
        """ValueError unless the text tokenizer of a run is what is asked for."""
        kind = "plain" if there.chinese_from is None else "bilingual"
        what = ""
        if given is not None and given.sha256 != there.sha256:
            what = f"text_model: {folder} has another text tokenizer than {self.text_model}"
        elif self.text_vocabulary not in (None, kind):
            what = f"text_vocabulary: {folder} has a {kind} text tokenizer, not a {self.text_vocabulary} one"
        elif self.text_lowercase and not there.lowercase:
            what = f"text_lowercase: {folder} has a text tokenizer that knows capital letters"
        if what:
            raise ValueError(f"{what}: name another run, or --retrain-tokenizers sets that aside")

    def training(self, text: TextTokenizer | None, image: ImageTokenizer | None) -> dict[str, str]:
        """What a training of tokenizers here depends on besides the pairs. text, image: those that are known."""
        found = {"text_vocabulary": "bilingual"} if self.text_vocabulary == "bilingual" else {}
        if self.text_lowercase:
            found["text_case"] = "lower"
        if text is not None:
            found["text_model"] = text.sha256
        if self.codec is not None and image is not None:
            found["codec"] = image.sha256
        return found

    def text(self, data: PairDataset, folder: Path, split: str, known: TextTokenizer | None) -> TextTokenizer:
        """That of the run, the known one, or one that is trained now."""
        from cogview.pipeline import text_tokenizer

        said = "trained on these captions"
        if split != "train":  # only the training split trains
            there = all((folder / name).exists() for name in TOKENIZERS) and not (folder / UNFINISHED).exists()
            require(there, "run", "the tokenizers of a training split in it, tokenised first", str(folder))
        path = folder / TOKENIZERS[0]
        if known is not None and not path.exists():
            known.save(path)
        if path.exists():
            said = f"in {folder}" if known is None else f"in {folder}, of {self.text_model}"
        with progress("text tokenizer"):
            how = {"bilingual": self.text_vocabulary == "bilingual", "lowercase": self.text_lowercase}
            text = text_tokenizer(data, folder, self.text_pieces, **how)
        self._check_text(text, known, folder)
        order = "" if text.chinese_from is None else f"; Chinese from {text.chinese_from:,} on"
        console.print(f"text tokenizer: {text.vocab_size:,} pieces, {said}{order}")
        return text

    def known_image(self, folder: Path) -> ImageTokenizer | None:
        """The codec, or that of the run; None where one is to be trained."""
        path = folder / TOKENIZERS[1]
        there = load_image_tokenizer(path) if path.exists() and not self.retrain_tokenizers else None
        if self.codec is None:
            return there
        with progress("reading the codec"):
            codec = (read_image_tokenizer if self.codec.is_file() else codec_folder.read)(self.codec)
        if there is not None and there.sha256 != codec.sha256:
            raise ValueError(
                f"codec: {folder} has another image tokenizer than {self.codec}: name another run, or "
                "--retrain-tokenizers sets that aside"
            )
        return codec

    def image(
        self, data: PairDataset, folder: Path, size: int, known: ImageTokenizer | None, times: int
    ) -> tuple[ImageTokenizer, Decoded | None]:
        """That of the run, or one that is trained now, with the pictures that it was trained on. size: of those.
        times: on them so many times smaller, too."""
        from cogview import pipeline

        path = folder / TOKENIZERS[1]
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
        pictures = pipeline.decode(data, folder, size)
        config, count = self._config(), len(pictures)
        crop = crop_of(config)
        steps = steps_for(count, size, self.image_passes, crop)
        minutes = min(steps * seconds_a_step(config, size, self.adversarial), self.image_seconds or math.inf) / 60
        console.print(
            f"image tokenizer: {steps:,} steps, {passes_of(steps, count, size, crop):.1f} passes over {count:,} "
            f"pictures of {size} x {size}, about {minutes:.1f} minutes"
        )
        training = TrainConfig(steps=steps, seconds=self.image_seconds, **TRAINING)
        how: dict[str, Any] = {"adversarial": self.adversarial, "times": times}
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

    def _config(self) -> VQConfig:
        """Of an image tokenizer trained here."""
        given: dict[str, Any] = {
            "codebook_size": self.codebook,
            "dim": self.code_dim,
            "hidden": self.hidden,
            "codebook": self.codebook_training,
            "reconstruction": self.reconstruction,
            "kl_weight": self.kl_weight,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[self.image_preset][1], **chosen)


TRAINING_ONLY = (
    "text_pieces",
    "image_preset",
    "codebook",
    "code_dim",
    "hidden",
    "codebook_training",
    "reconstruction",
    "kl_weight",
    "adversarial",
    "image_passes",
    "image_seconds",
)
DEFAULTS = {field.name: field.default for field in fields(TokenizerOptions)}
