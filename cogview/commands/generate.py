"""`cogview generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cogview.commands.device import available

console = Console(highlight=False)


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
    device: str = "cpu"

    def run(self) -> None:
        from cogview.pictures import contact_sheet
        from cogview.system import System

        if not self.captions or self.count < 1:
            raise ValueError("captions, count: expected at least one caption and one picture")
        system = System.load(self.run_folder, available(self.device))
        repeated = [caption for caption in self.captions for _ in range(self.count)]
        seeds = [self.seed + n for _ in self.captions for n in range(self.count)]
        with console.status("drawing"):
            pictures = system.draw(repeated, seeds=seeds, temperature=self.temperature, top_k=self.top_k)
        rows = list(zip(self.captions, pictures.split(self.count), strict=True))
        contact_sheet([(caption, list(group)) for caption, group in rows], self.out, columns=2, zoom=2)
        console.print(f"{len(pictures)} pictures in {self.out}")
