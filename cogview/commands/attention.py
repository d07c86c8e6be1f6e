"""`cogview attention`: what a model's attention heads look at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cogview.commands.console import console
from cogview.commands.pictures import RunFolder, Step, check_kept
from cogview.commands.presets import option
from cogview.config import require


@dataclass(frozen=True)
class Attention:
    """Measure, draw and name what a model's attention heads do, in pictures that it draws or is given: report.md,
    figures.json and pictures (CogView paper, appendix C)."""

    captions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]
    """What the pictures show, one of each."""
    pictures: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="PICTURE ...", help_behavior_hint="(default: drawn)")
    ] = ()
    """Files to look at instead of drawing some, one of each caption; models that write captions draw none."""
    words: Annotated[tuple[str, ...], option("WORD ...", "all")] = ()
    """Which words of the captions to show on the pictures; also several in a row, in quotes."""
    shown: int = 8
    """Pictures that are marked, from the first on; all are measured."""
    run_folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    name: Annotated[str | None, option("NAME", "trained last of those that draw pictures")] = None
    """Which of the run's models: of recipe cogview, caption, coglm or dalle."""
    step: Step = None
    """Which of its checkpoints. The best has the lowest held-out loss."""
    out: Path = Path("attention")
    """Folder for the report and the pictures."""
    seed: int = 0
    """Of the first picture that is drawn, the others have the following ones; and of what attention samples."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def run(self) -> None:
        from cogview.attention.analysis import analyse
        from cogview.attention.look import check
        from cogview.attention.words import check_words
        from cogview.pictures import check_place
        from cogview.progress import progress
        from cogview.runs import last_run
        from cogview.sampling import check_seeds
        from cogview.system import System

        count = len(self.captions)
        require(count > 0, "captions", "at least one", "none")
        require(self.shown >= 0, "shown", "at least 0", self.shown)
        given = len(self.pictures)
        require(given in (0, count), "pictures", f"none, or one of each of {count} captions", given)
        seeds = check_seeds(range(self.seed, self.seed + count), count)
        if self.out.exists():
            require(self.out.is_dir(), "out", "a folder, or a new one", str(self.out))
        check_kept(self.pictures, self.out / "report.md", self.out)
        how: dict[str, Any] = {"name": self.name, "step": self.step, "device": self.device}
        system = System.load(last_run() if self.run_folder is None else self.run_folder, **how)
        check(system.recipe)
        check_words(system.text, system.encode(self.captions), self.words)
        given_codes = system.tokenize(list(self.pictures)) if self.pictures else None
        drawing = system if self.pictures else system.which_draws("pictures")
        check_place(self.out / "report.md")  # behind all that can be wrong, since it makes the folder
        console.print(str(system.source))
        codes = self._drawn(drawing, seeds) if given_codes is None else given_codes
        with progress("looking at pictures", count) as update:
            how = {"wanted": self.words, "shown": self.shown, "seed": self.seed, "update": update}
            told = analyse(system, self.captions, codes, self.out, **how)
        console.print(told)
        console.print(f"Read {self.out / 'report.md'}")

    def _drawn(self, system, seeds):
        """Codes of a picture of each caption."""
        import torch

        from cogview.progress import progress
        from cogview.sampling import Sampling

        with progress("drawing", len(self.captions) * system.recipe.config.image_tokens) as update:
            how = Sampling(temperature=0.9, top_k=200)
            return torch.cat(list(system.code_batches(self.captions, how, seeds=seeds, update=update)))
