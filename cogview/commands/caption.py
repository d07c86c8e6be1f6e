"""`cogview caption` and `cogview rerank`: what a run's captioning model says of pictures."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cogview.commands.console import console
from cogview.commands.pictures import Files, RunFolder, Step, check_kept, load, report
from cogview.commands.presets import option
from cogview.config import require
from cogview.data.files import write_text
from cogview.labels import printable

Name = Annotated[str | None, option("NAME", "trained last of recipe caption or coglm")]


@dataclass(frozen=True)
class Caption:
    """Write captions of pictures, with a model of recipe caption or coglm."""

    pictures: Files
    """Files; a picture that cannot be read is named, and the others have captions."""
    run_folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    name: Name = None
    """Which of the run's models."""
    step: Step = None
    """Which of its checkpoints. The best has the lowest held-out loss."""
    out: Annotated[Path | None, option("FILE", "none")] = None
    """Also write them here: JSON lines of file_name, caption (the best) and captions (all, with their CapLoss), as
    `cogview data pack --captions` takes them."""
    count: int = 1
    """Captions drawn of each picture, shown from the lowest CapLoss on; what is drawn twice is shown once."""
    language: Annotated[Literal["en", "zh"] | None, option("{en,zh}", "en of recipe coglm")] = None
    """Of the captions, for models of recipe coglm, which are told; those of recipe caption choose themselves."""
    longest: Annotated[int | None, option("INT", "what there is room for")] = None
    """Tokens of a caption at most; default 20 of models that learned no end, as the released one."""
    temperature: float = 0.7
    """Below 1 likely tokens become likelier, above 1 less likely."""
    top_k: int = 200
    """Of the likeliest tokens so many may be drawn; 1: always the likeliest."""
    top_p: float = 1.0
    """And of those only the likeliest whose probabilities come to this share."""
    seed: int = 0
    """Of each picture's first caption; the others have the following ones."""
    batch_size: int = 32
    """Captions drawn at once."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def run(self) -> None:
        from cogview.pictures import check_place
        from cogview.sampling import Sampling
        from cogview.system import Described

        require(bool(self.pictures), "pictures", "at least one", "none")
        how = Sampling(self.temperature, self.top_k, self.top_p, batch_size=self.batch_size)
        require(self.count >= 1, "count", "at least 1", self.count)
        if self.out is not None:
            check_kept(self.pictures, self.out)
            check_place(self.out)  # before anything is computed
        system = load(self.run_folder, self.name, self.step, "captions", device=self.device)
        records, left, at_once = list[dict[str, Any]](), 0, max(1, self.batch_size // self.count)
        for start in range(0, len(self.pictures), at_once):
            some, bad = self.pictures[start : start + at_once], dict[int, str]()
            about: dict[str, Any] = {"seed": self.seed, "longest": self.longest, "language": self.language}
            found = system.describe(list(some), self.count, **about, bad=bad, **vars(how))
            left += report(some, bad)
            for number in (n for n in range(len(some)) if n not in bad):
                captions = found[number] or [Described("", math.nan)]
                for text, loss in captions:
                    said = (
                        f"{printable(text)}  (CapLoss {loss:.3f})" if text else "no caption: the model ends it at once"
                    )
                    console.print(f"{some[number]}: {said}")
                records.append({"file_name": str(some[number]), "caption": captions[0].text, "captions": found[number]})
        require(left < len(self.pictures), "pictures", "at least one that can be read", "none")
        if self.out is not None:
            write_text(self.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        if self.out is not None or left:
            named = f", {left:,} left out" if left else ""
            console.print(f"captions of {len(records):,} pictures{named}{'' if self.out is None else f': {self.out}'}")


@dataclass(frozen=True)
class Rerank:
    """Put pictures in the order in which they fit a caption, by CapLoss, with a model of recipe caption or coglm."""

    pictures: Files
    """Files; a picture that cannot be read is named, and the others have their order."""
    caption: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What they should show."""
    run_folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    name: Name = None
    """Which of the run's models."""
    step: Step = None
    """Which of its checkpoints. The best has the lowest held-out loss."""
    out: Annotated[Path | None, option("FILE", "none")] = None
    """A sheet of them in their order, each above its CapLoss. Its suffix says the format."""
    batch_size: int = 32
    """Pictures at once."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def run(self) -> None:
        from cogview.inputs import images
        from cogview.pictures import picture_path
        from cogview.reranking import candidate_sheet

        require(bool(self.pictures), "pictures", "at least one", "none")
        sheet = None if self.out is None else picture_path(self.out)
        if sheet is not None:
            check_kept(self.pictures, sheet)
        system = load(self.run_folder, self.name, self.step, "captions", device=self.device)
        system.encode(self.caption)
        bad = dict[int, str]()
        pictures = images(list(self.pictures), system.side, bad)
        left = report(self.pictures, bad)
        require(left < len(pictures), "pictures", "at least one that can be read", "none")
        good = [n for n in range(len(pictures)) if n not in bad]
        order, losses = system.rerank(self.caption, pictures[good], batch_size=self.batch_size)
        for n in order.tolist():
            console.print(f"{losses[n]:.3f}  {self.pictures[good[n]]}")
        if sheet is not None:
            shown = candidate_sheet(pictures[good][order], losses[order], sheet, self.caption)
            console.print(f"{shown:,} of {len(good):,} pictures on {sheet}")
