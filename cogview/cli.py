"""The command line: `cogview demo | data build | data inspect | tokenize | train | generate | info`."""

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track

from .config import PRESETS, TrainConfig, preset
from .data.scenes import build_scene_shards
from .data.shards import Pair, PairDataset
from .data.tokens import TokenDataset
from .model import GPT

console = Console(highlight=False)


@dataclass(frozen=True)
class Demo:
    """Train a small CogView on composed scenes and look at what it draws for captions it never saw."""

    out: Path = Path("runs/demo")
    """Folder for everything; a stopped demo goes on in it."""
    minutes: float = 15
    """Budget for the whole, four minutes of installation included."""

    def run(self) -> None:
        from . import demo

        report = demo.run(self.out, self.minutes, console)
        console.print(f"Look at {self.out / 'samples.png'} and read {report}")


@dataclass(frozen=True)
class Build:
    """Compose captioned scenes of emoji into tar shards (WebDataset layout)."""

    out: Path
    """Folder for the shards."""
    train: int = 12_000
    """Scenes to train on."""
    test: int = 1_000
    """Scenes of combinations that training never sees."""
    seed: int = 0

    def run(self) -> None:
        shards = build_scene_shards(
            self.out, self.train, self.test, self.seed, lambda work: track(work, "composing scenes")
        )
        for split, paths in shards.items():
            console.print(f"{split}: {len(paths)} shards in {self.out}")


@dataclass(frozen=True)
class Inspect:
    """Read every pair of some tar shards; report what is there and what is damaged."""

    shards: tyro.conf.Positional[tuple[Path, ...]]
    sheet: Path | None = None
    """Also write a contact sheet (PNG) of the first pairs here."""

    def run(self) -> None:
        data = PairDataset(self.shards)
        sizes, languages = Counter[tuple[int, int]](), Counter[str]()
        first: list[Pair] = []
        for index in track(range(len(data)), "reading"):
            if (pair := data[index]) is None:
                continue
            sizes[pair.image.size] += 1
            languages.update(pair.captions.keys())
            if len(first) < 24:
                first.append(pair)
        console.print(f"{sum(sizes.values())} of {len(data)} pairs can be read")
        console.print("sizes: " + ", ".join(f"{w} x {h} ({n})" for (w, h), n in sizes.most_common(5)))
        console.print("captions: " + ", ".join(f"{name} ({n})" for name, n in languages.most_common()))
        console.print(str(data.report))
        if self.sheet is not None and first:
            from .data.tokens import pixels
            from .pictures import contact_sheet

            rows = [(next(iter(p.captions.values()), p.key), [pixels(p.image, 128)]) for p in first]
            contact_sheet(rows, self.sheet, columns=6, zoom=1)
            console.print(f"contact sheet: {self.sheet}")


@dataclass(frozen=True)
class Data:
    """Captioned pictures in tar shards."""

    command: Annotated[Build, tyro.conf.subcommand("build")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]

    def run(self) -> None:
        self.command.run()


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
        from .pipeline import image_tokenizer, text_tokenizer, tokens
        from .tokenizers.image import VQVAE, VQConfig
        from .tokenizers.text import TextTokenizer

        data, folder = PairDataset(self.shards), self.run_folder
        trained, unfinished = folder / "vqvae.safetensors", folder / "vqvae.training.safetensors"
        if self.split == "train":
            text = text_tokenizer(data, folder, self.languages, self.text_pieces)
        else:  # only the training split trains
            text = TextTokenizer.load(folder / "text.model")
        if self.split != "train" or (trained.exists() and not unfinished.exists()):
            image = VQVAE.load(trained).eval()
        else:
            config = VQConfig(codebook_size=self.codebook, dim=self.code_dim, hidden=self.hidden)
            image, report = image_tokenizer(
                data, folder, config, seconds=self.image_seconds, image_size=self.image_size
            )
            console.print(f"image tokenizer: {report.psnr:.1f} dB, {report.used_codes} codes used")
        out = folder / "tokens" / self.split
        dataset = tokens(data, out, text, image, self.languages, image_size=self.image_size, max_text=self.max_text)
        console.print(f"{len(dataset)} sequences in {out}; left out: {dataset.meta['skipped'] or 'none'}")


@dataclass(frozen=True)
class Train:
    """Train a GPT on tokens; the same command goes on where it was stopped."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run, with tokens/train and maybe tokens/test; checkpoints go to its gpt folder."""
    preset: Literal["tiny", "cogview-4b", "cogview-large", "fashion-3b"] = "tiny"
    steps: int | None = None
    """Length of the run in steps; bit for bit repeatable."""
    minutes: float | None = None
    """Or its length in minutes."""
    attention: Literal["dense", "dense_pb_relax", "three_region", "dalle"] | None = None
    """Default: the preset's, like all that is not given."""
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    learning_rate: float | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    text_weight: float | None = None
    image_weight: float | None = None
    checkpoint_activations: bool | None = None
    compile: bool | None = None
    seed: int | None = None
    device: str = "cpu"

    def run(self) -> None:
        from .pipeline import fit
        from .train import Trainer

        folders = [self.run_folder / "tokens" / split for split in ("train", "test")]
        data = TokenDataset(folders[0])
        held_out = TokenDataset(folders[1]) if folders[1].exists() else None
        config, training = preset(self.preset)
        config = _replace(
            config, num_layers=self.layers, hidden_size=self.hidden_size, num_heads=self.heads, attention=self.attention
        )
        config = fit(config, data) if held_out is None else fit(config, data, held_out)
        training = self._training(training)
        torch.manual_seed(training.seed)
        model = GPT(config).to(self.device)
        trainer = Trainer(model, data, training, self.run_folder / "gpt", held_out)
        console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} sequences")
        if trainer.resume():
            console.print(f"going on at step {trainer.state.step}")
        result = trainer.run()
        console.print(f"{'done' if result.finished else 'stopped'} at step {result.state.step}: {result.checkpoint}")
        for name, value in result.validation.items():
            console.print(f"  held-out {name} {value:.3f}")

    def _training(self, base: TrainConfig) -> TrainConfig:
        if self.steps is not None or self.minutes is not None:
            seconds = None if self.minutes is None else 60 * self.minutes
            base = dataclasses.replace(base, steps=self.steps, seconds=seconds)
        names = {f.name for f in dataclasses.fields(base)} - {"steps", "seconds"}
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return _replace(base, **given)


def _replace(base, **values):
    """A dataclass with those values that are not None."""
    return dataclasses.replace(base, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Generate:
    """Draw pictures for captions with a trained run."""

    captions: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Repeat for several captions."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder of the run: both tokenizers and the GPT's checkpoints."""
    out: Path = Path("pictures.png")
    """The contact sheet (PNG)."""
    count: int = 4
    """Pictures for each caption."""
    temperature: float = 0.9
    top_k: int = 200
    seed: int = 0

    def run(self) -> None:
        from .pictures import contact_sheet
        from .system import System

        if not self.captions or self.count < 1:
            raise ValueError("captions, count: expected at least one caption and one picture")
        system = System.load(self.run_folder)
        repeated = [caption for caption in self.captions for _ in range(self.count)]
        seeds = [self.seed + n for _ in self.captions for n in range(self.count)]
        with console.status("drawing"):
            pictures = system.draw(repeated, seeds=seeds, temperature=self.temperature, top_k=self.top_k)
        rows = list(zip(self.captions, pictures.split(self.count), strict=True))
        contact_sheet([(caption, list(group)) for caption, group in rows], self.out, columns=2, zoom=2)
        console.print(f"{len(pictures)} pictures in {self.out}")


@dataclass(frozen=True)
class Info:
    """Versions, the operators that run here, and the presets."""

    def run(self) -> None:
        from cogview_ops import info

        info.main()
        print(f"\n{'preset':<16}{'layers':>8}{'hidden':>8}{'heads':>8}{'tokens':>8}{'parameters':>16}  attention")
        for name, c in PRESETS.items():
            with torch.device("meta"):
                count = sum(p.numel() for p in GPT(c).parameters())
            sizes = f"{c.num_layers:>8}{c.hidden_size:>8}{c.num_heads:>8}{c.max_positions - 1:>8}"
            print(f"{name:<16}{sizes}{count:>16,}  {c.attention}")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(arguments: list[str] | None = None) -> None:
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="cogview",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    try:
        command.run()
    except KeyboardInterrupt:
        resumable = isinstance(command, (Demo, Data, Tokenize, Train))
        sys.exit(f"cogview: stopped{'; the same command goes on from here' if resumable else ''}")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"cogview: {error}")


if __name__ == "__main__":
    main()
