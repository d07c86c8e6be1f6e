"""`cogview human`: pictures of several models judged by people, and what their answers come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.commands.prompts import read_captions
from cogview.config import require


@dataclass(frozen=True)
class Form:
    """Make a form for evaluators, a folder with a page that needs no server, and its key, which they must not see."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FOLDER ...")]
    """Who drew, and where the pictures are, whose names begin with the number of their caption: as `cogview generate
    --count 1` leaves them, or 0001.png."""
    captions_file: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The captions, one a line (UTF-8); blank lines are skipped."""
    ab: Annotated[str | None, option("NAME=FOLDER", "none")] = None
    """The A-B test: pictures of this model after super-resolution. Half of the evaluators see them for half of the
    captions, those of --models for the other half; the others see it the other way round."""
    out: Path = Path("runs/human")
    """Folder for evaluators, a new one."""
    key: Annotated[Path | None, option("FILE", "that folder's name with -key.json, beside it")] = None
    """Which picture is whose; `cogview human results` needs it."""
    count: int = 50
    """Captions, taken at random."""
    evaluators: int = 72
    """People who are asked, with numbers from 1 on; each sees the models in an order of their own."""
    seed: Annotated[int | None, option("INT", "drawn, and kept in the key")] = None
    """Of the captions, the orders and the halves: the same seed makes the same form. Evaluators must not know it, who
    could find the models by it."""

    def run(self) -> None:
        from cogview.human import form

        models = [_named(text, "models") for text in self.models]
        differ = len({name for name, _ in models}) == len(models)
        require(differ, "models", "names that differ", [name for name, _ in models])
        captions = [caption for _, caption in read_captions(self.captions_file)]
        ab = None if self.ab is None else _named(self.ab, "ab")
        drawn = {} if self.seed is None else {"seed": self.seed}
        asked = form.Form(captions, dict(models), ab, self.count, self.evaluators, **drawn)
        key = self.out.with_name(f"{self.out.name}-key.json") if self.key is None else self.key
        made = asked.write(self.out, key)
        console.print(
            f"{len(made.pictures):,} pictures of {self.count:,} captions for {self.evaluators:,} evaluators in "
            f"{self.out}: give each this folder, or its address on a web server, and a number from 1 on; they open "
            "index.html"
        )
        console.print(f"whose they are is in {key}: keep it from evaluators")
        console.print(f"next: cogview human results answers-*.json --key {key}")


@dataclass(frozen=True)
class Results:
    """Read evaluators' answers: means and standard deviations of the scores, and how often each model is the best."""

    answers: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(help_behavior_hint="(required)", metavar="FILE ..."),
    ]
    """What evaluators saved, a file each."""
    key: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Of their form."""
    out: Path = Path("runs/human-results")
    """Folder for report.md, figures.json and scores.png."""

    def run(self) -> None:
        from cogview.human import results

        console.print(results.run(self.answers, self.key, self.out))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Human:
    """Human evaluation: a form for people who score pictures of several models, and its results."""

    command: Annotated[Form, tyro.conf.subcommand("form")] | Annotated[Results, tyro.conf.subcommand("results")]

    def run(self) -> None:
        self.command.run()


def _named(text: str, option: str) -> tuple[str, Path]:
    """Of NAME=FOLDER."""
    name, sign, folder = text.partition("=")
    require(bool(sign and folder), option, "NAME=FOLDER", text)
    return name, Path(folder)
