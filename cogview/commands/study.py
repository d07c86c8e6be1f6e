"""`cogview study`: experiments whose figures are asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cogview.commands import study_uses
from cogview.commands.console import console
from cogview.commands.presets import chosen, option


@dataclass(frozen=True)
class Reranking:
    """Does the candidate of the lowest CapLoss show what was asked for? Against a contrastive model and chance."""

    out: Path = Path("runs/study-reranking")
    """Folder for the models, report.md, figures.json and the pictures; a stopped study goes on in it."""
    source: Annotated[Path | None, option("FOLDER", "made here", name="from")] = None
    """A demo whose tokenizers and tokens to take."""
    captions: int = 128
    """Held-out captions."""
    candidates: int = 16
    """Pictures drawn of each, a power of two."""
    on_sheet: int = 60
    """Candidates on the sheet of one caption."""
    base_steps: int = 950
    """Steps of the model that draws, few enough to err."""
    caption_steps: int = 500
    """Steps of its finetuning to captions."""
    contrastive_steps: int = 300
    """Steps of the contrastive model, of 128 pairs: as much time as the finetuning takes."""

    def run(self) -> None:
        from cogview.studies import reranking

        console.print(reranking.run(self.out, self.source, chosen(self, reranking.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Superresolution:
    """Does magnification by a model come nearer to the true picture than bicubic enlargement? On scenes of emoji, 64 to
    128 pixels, with a look at the seams between its windows."""

    out: Path = Path("runs/study-superresolution")
    """Folder for the models, report.md, figures.json and the pictures; a stopped study goes on in it."""
    scenes: int = 6_000
    """To train on."""
    crops: int = 3
    """Squares of each."""
    tested: int = 128
    """Held-out scenes that are magnified."""
    image_steps: int = 1_000
    """Steps of the image tokenizer."""
    base_steps: int = 900
    """Steps of the model that draws."""
    steps: int = 1_600
    """Steps of its finetuning to super-resolution."""

    def run(self) -> None:
        from cogview.studies import superresolution

        console.print(superresolution.run(self.out, chosen(self, superresolution.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Tokenizers:
    """Do four ways to train an image tokenizer's codebook end at a similar loss? And what does a VQGAN look like?"""

    out: Path = Path("runs/study-tokenizers")
    """Folder for the trainings, report.md, figures.json and the pictures; a stopped study goes on in it."""
    pictures: int = 2000
    """Scenes to train on."""
    held_out: int = 256
    """Scenes to judge by."""
    seeds: int = 3
    """Trainings of each way."""
    steps: int = 400
    """Of each training."""
    batch_size: int = 16
    """Pictures of a step."""
    codebook: int = 512
    """Codes."""
    code_dim: int = 32
    """Numbers to a code."""
    hidden: int = 64
    """Channels."""

    def run(self) -> None:
        from cogview.studies import tokenizers

        console.print(tokenizers.run(self.out, chosen(self, tokenizers.Sizes), console.print))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Training:
    """Does float16 train as float32 does? What do shrunk embedding gradients, three-region attention, larger batches
    and Muon come to? On the preset tiny."""

    out: Path = Path("runs/study-training")
    """Folder for the trainings, report.md, figures.json and the pictures; a stopped study goes on in it."""
    scenes: int = 2000
    """Scenes to train on."""
    image_steps: int = 600
    """Steps of the image tokenizer."""
    steps: int = 120
    """Of each training."""
    deep_steps: int = 40
    """Of those of 64 layers."""
    seeds: int = 3
    """Trainings of each way, at most 5."""

    def run(self) -> None:
        from cogview.studies import training

        console.print(training.run(self.out, chosen(self, training.Sizes), console.print))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class CogView2:
    """How do CogLM, clusters, textual attention, direct super-resolution and parallel rounds do, beside what they stand
    against? On scenes of emoji of 64 and 192 pixels."""

    out: Path = Path("runs/study-cogview2")
    """Folder for the models, report.md, figures.json and the pictures; a stopped study goes on in it. That of a demo of
    cogview2 may be it: its models are taken as they are."""
    tested: int = 32
    """Held-out scenes."""
    candidates: int = 3
    """Pictures of each, where diversity is asked for."""
    image_steps: int = 1_500
    """Steps of the image tokenizer."""
    base_steps: int = 3_500
    """Steps of CogLM, and of CogView beside it."""
    early_steps: int = 1_500
    """Steps of the CogLM that errs, and of a CogView beside it."""
    domain_steps: int = 1_000
    """Steps of its finetuning to one domain, of as long a training on all scenes beside it, and of a CogLM that goes
    on with local attention."""
    fine_steps: int = 700
    """Steps of each model of fine codes."""

    def run(self) -> None:
        from cogview.studies import cogview2

        console.print(cogview2.run(self.out, chosen(self, cogview2.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Study:
    """Run an experiment and write its report, figures and pictures."""

    command: (
        Annotated[Reranking, tyro.conf.subcommand("reranking")]
        | Annotated[Superresolution, tyro.conf.subcommand("superresolution")]
        | Annotated[Tokenizers, tyro.conf.subcommand("tokenizers")]
        | Annotated[Training, tyro.conf.subcommand("training")]
        | Annotated[CogView2, tyro.conf.subcommand("cogview2")]
        | Annotated[study_uses.Dalle, tyro.conf.subcommand("dalle")]
        | Annotated[study_uses.Styles, tyro.conf.subcommand("styles")]
        | Annotated[study_uses.Fashion, tyro.conf.subcommand("fashion")]
        | Annotated[study_uses.People, tyro.conf.subcommand("people")]
        | Annotated[study_uses.Attention, tyro.conf.subcommand("attention")]
    )

    def run(self) -> None:
        self.command.run()
