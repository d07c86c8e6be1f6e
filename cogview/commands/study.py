"""`cogview study`: experiments whose figures are asked for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from cogview.commands.console import console


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

        sizes = tokenizers.Sizes(**{field.name: getattr(self, field.name) for field in fields(tokenizers.Sizes)})
        console.print(tokenizers.run(self.out, sizes, console.print))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Study:
    """Run an experiment and write its report, figures and pictures."""

    command: Annotated[Tokenizers, tyro.conf.subcommand("tokenizers")]

    def run(self) -> None:
        self.command.run()
