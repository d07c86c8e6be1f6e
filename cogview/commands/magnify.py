"""`cogview magnify`: pictures at twice their side, by a run's super-resolution model."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.pictures import (
    SHEET_PIXELS,
    Files,
    Models,
    RunFolder,
    Step,
    load,
    make_places,
    picture_paths,
    report,
)
from cogview.commands.presets import option
from cogview.config import require


@dataclass(frozen=True)
class Magnify:
    """Draw pictures at twice the side, with a model of recipe superresolution: a file each, and a sheet of all beside
    what they were."""

    pictures: Files
    """Files, which are cropped to a square; a picture that cannot be read is named, and the others are done."""
    captions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]
    """What they show: one of each, in their order, or one of all."""
    run_folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    name: Annotated[str | None, option("NAME", "trained last of recipe superresolution")] = None
    """Which of the run's models."""
    step: Step = None
    """Which of its checkpoints. The best has the lowest held-out loss."""
    out: Path = Path("magnified.png")
    """The sheet. Its suffix says the format; the single pictures come into a folder beside it of the same name without
    the suffix."""
    temperature: float = 1.0
    """Below 1 likely tokens become likelier, above 1 less likely."""
    top_k: int = 1
    """Of the likeliest tokens so many may be drawn; 1 comes nearest to the true picture, 200 is as published."""
    top_p: float = 1.0
    """And of those only the likeliest whose probabilities come to this share."""
    seed: int = 0
    """Of the first picture; the others have the following ones."""
    batch_size: int = 32
    """Pictures at once."""
    models: Models = field(default_factory=Models)

    def run(self) -> None:
        from cogview.inputs import images
        from cogview.pictures import contact_sheet, image_of, picture_path, save_image
        from cogview.progress import progress
        from cogview.sampling import Sampling, check_seed

        count = len(self.pictures)
        require(count > 0, "pictures", "at least one", "none")
        require(len(self.captions) in (1, count), "captions", f"one, or one of each of {count}", len(self.captions))
        how = Sampling(self.temperature, self.top_k, self.top_p, batch_size=self.batch_size)
        seeds = range(check_seed(self.seed), self.seed + count)
        sheet = picture_path(self.out)
        system = load(self.run_folder, self.name, self.step, "larger pictures", **self.models.options())
        captions = list(self.captions) * (count // len(self.captions))
        system.encode(captions)
        bad = dict[int, str]()
        given = images(list(self.pictures), system.side, bad)
        left = report(self.pictures, bad)
        require(left < count, "pictures", "at least one that can be read", "none")
        good = [n for n in range(count) if n not in bad]
        make_places(sheet, self.pictures)
        paths = list(picture_paths([path.stem for path in self.pictures], sheet))
        rows = list[tuple[str, list[torch.Tensor]]]()
        small = system.pictures(codes := system.tokenize(given[good]))
        with progress("magnifying", 4 * codes.numel()) as update:
            texts, chosen = [captions[n] for n in good], [seeds[n] for n in good]
            batches = system.magnify_batches(texts, codes, how, seeds=chosen, update=update)
            for k, picture in enumerate(picture for batch in batches for picture in batch):
                save_image(image_of(picture), paths[good[k]])
                if len(rows) * 3 * picture[0].numel() < SHEET_PIXELS:
                    before = [
                        part.repeat_interleave(2, 1).repeat_interleave(2, 2) for part in (given[good[k]], small[k])
                    ]
                    rows.append((texts[k], [*before, picture]))
        shown = contact_sheet(rows, sheet, columns=2, zoom=1, note="given, as the model has it, at twice the side")
        named = f", {left:,} left out" if left else ""
        console.print(
            f"{len(good):,} of {count:,} pictures in {sheet.with_suffix('')}{os.sep}{named}, {shown:,} on {sheet}"
        )
