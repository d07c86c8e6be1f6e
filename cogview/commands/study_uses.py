"""`cogview study` of what a trained model is used for, styles, a single domain, words about people, and of what its
heads see."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cogview.commands.console import console
from cogview.commands.presets import chosen


@dataclass(frozen=True)
class Dalle:
    """What do DALL-E's choices come to beside CogView's: how much text counts, learned padding, one softmax, rows and
    columns, and either cure of float16? On the same scenes of emoji."""

    out: Path = Path("runs/study-dalle")
    """Folder for the trainings, report.md, figures.json and the pictures; a stopped study goes on in it."""
    part: tuple[Literal["choices", "attention", "scaling"], ...] = ("choices", "attention", "scaling")
    """What to train now, so that several processes can divide the study once one has made scenes and tokens; the report
    is written where all parts are asked for."""
    scenes: int = 4_000
    """Scenes to train on."""
    image_steps: int = 600
    """Steps of each of the three image tokenizers."""
    steps: int = 900
    """Of each training that is drawn from."""
    attention_steps: int = 120
    """Of those that compare attentions."""
    scaling_steps: int = 100
    """Of those in float16 and float32."""
    deep_steps: int = 40
    """Of these with 64 layers."""
    drawn: int = 96
    """Held-out captions that are drawn, in each of three forms."""
    seeds: int = 3
    """Trainings of each way, at most 5."""

    def run(self) -> None:
        from cogview.studies import dalle

        console.print(dalle.run(self.out, chosen(self, dalle.Sizes), console.print, self.part))
        console.print(f"Read {self.out / 'report.md'}")


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
    base_steps: int = 3_000
    """Steps of the model that knows the things."""
    style_steps: int = 15
    """Steps of each finetuning."""
    judge_steps: int = 1_200
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
    outfits: int = 4_000
    """To train on."""
    tested: int = 64
    """New ones that are drawn, in either language, and as many with a new pair of piece and colour."""
    image_steps: int = 1_500
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
    drawn: int = 25
    """Pictures of each of 20 kinds of work, in either language."""
    image_steps: int = 700
    """Steps of the image tokenizer."""
    steps: int = 3_000
    """Steps of the GPT."""

    def run(self) -> None:
        from cogview.studies import people

        console.print(people.run(self.out, chosen(self, people.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Attention:
    """Do heads find the part of a picture that a word is about? On held-out scenes of a demo; with a report of what all
    of its model's heads do."""

    out: Path = Path("runs/study-attention")
    """Folder for report.md, figures.json and the pictures."""
    source: Annotated[Path, tyro.conf.arg(name="from", metavar="FOLDER")] = Path("runs/demo")
    """A finished demo."""
    scenes: int = 512
    """Held-out scenes: heads are chosen on one half and judged on the other."""
    measured: int = 64
    """Of them, those that the report of all heads is of."""
    shown: int = 4
    """Of these, those that are shown."""

    def run(self) -> None:
        from cogview.studies import attention

        console.print(attention.run(self.out, self.source, chosen(self, attention.Sizes)))
        console.print(f"Read {self.out / 'report.md'}")
