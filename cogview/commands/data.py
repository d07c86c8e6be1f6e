"""`cogview data`: building and reading shards."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cogview.data.shards import Pair, PairDataset
from cogview.progress import track

console = Console(highlight=False)


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
        from cogview.demo.scenes import build_scene_shards

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
            from cogview.data.images import pixels
            from cogview.pictures import contact_sheet

            rows = [(next(iter(p.captions.values()), p.key), [pixels(p.image, 128)]) for p in first]
            contact_sheet(rows, self.sheet, columns=6, zoom=1)
            console.print(f"contact sheet: {self.sheet}")


@dataclass(frozen=True)
class Data:
    """Captioned pictures in tar shards."""

    command: Annotated[Build, tyro.conf.subcommand("build")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]

    def run(self) -> None:
        self.command.run()
