"""`cogview study` of what a trained model is used for: styles, a single domain, words about people."""

from dataclasses import dataclass
from pathlib import Path

from cogview.commands.console import console
from cogview.commands.presets import chosen


@dataclass(frozen=True)
class Styles:
    """Finetuned to pictures of a style whose captions name nothing else, does a model draw what it knew in that style?
    200 things as emoji, drawn by three other hands."""

    out: Path = Path("runs/study-styles")
    """Folder for the models, report.md, figures.json and the pictures; a stopped study goes on in it."""
    drawn: int = 4
    """Pictures of each thing and style that is asked for."""
    image_steps: int = 1_200
    """Steps of the image tokenizer."""
    base_steps: int = 3_500
    """Steps of the model that knows the things."""
    style_steps: int = 20
    """Steps of each finetuning."""
    judge_steps: int = 900
    """Steps of each of the two networks that judge."""

    def run(self) -> None:
        from cogview.studies import styles

        console.print(styles.run(self.out, chosen(self, styles.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Fashion:
    """A single domain, outfits of 320 pixels with 20 x 20 codes of a VQGAN and three-region attention: does every part
    that captions tell come in its kind and colour?"""

    out: Path = Path("runs/study-fashion")
    """Folder for the models, report.md, figures.json and the sheet; a stopped study goes on in it."""
    outfits: int = 2_500
    """To train on."""
    tested: int = 64
    """Held-out ones that are drawn, in either language."""
    image_steps: int = 700
    """Steps of the image tokenizer."""
    steps: int = 1_500
    """Steps of the GPT."""

    def run(self) -> None:
        from cogview.studies import fashion

        console.print(fashion.run(self.out, chosen(self, fashion.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class People:
    """What does a model draw where captions leave gender and skin open, and what with words put in (generate
    --people)?"""

    out: Path = Path("runs/study-people")
    """Folder for the models, report.md, figures.json and the sheet; a stopped study goes on in it."""
    pictures: int = 4_000
    """To train on."""
    drawn: int = 10
    """Pictures of each of 20 kinds of work, in either language."""
    image_steps: int = 700
    """Steps of the image tokenizer."""
    steps: int = 1_500
    """Steps of the GPT."""

    def run(self) -> None:
        from cogview.studies import people

        console.print(people.run(self.out, chosen(self, people.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")
