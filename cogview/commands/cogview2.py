"""`cogview2 generate` and `cogview2 edit`: CogView2 of a run, all its stages."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.pictures import SHEET_PIXELS, make_places, picture_paths
from cogview.commands.presets import option
from cogview.commands.prompts import read_captions
from cogview.commands.stages import Run, Ways
from cogview.config import require
from cogview.editing import AROUND

if TYPE_CHECKING:
    from cogview.cogview2 import CogView2
    from cogview.completion import Edited

STAGES = ("small", "direct", "fine")
SHOWN = 512  # pixels of the longer side of an edited picture on its sheet
Corners = tuple[int, int, int, int]


@dataclass(frozen=True)
class Generate:
    """Draw pictures for captions: many small ones, the best of them by CapLoss enlarged, a file each, and a sheet."""

    captions: Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="TEXT ...")] = ()
    """What to draw. Several may follow, and the option may be repeated."""
    captions_file: Annotated[Path | None, option("FILE", "none")] = None
    """More captions, one a line (UTF-8); blank lines are skipped."""
    out: Path = Path("pictures.png")
    """The sheet. Its suffix says the format; the single pictures come into a folder beside it of the same name without
    the suffix."""
    count: int = 4
    """Pictures of each caption."""
    candidates: Annotated[int | None, option("INT", "as many as count")] = None
    """Small pictures drawn of each caption, of which the best are kept."""
    keep_stages: bool = False
    """Also write each picture as the stages before have it."""
    seed: int = 0
    """Of each caption's first candidate; the others have the following ones. The same seed draws the same picture."""
    models: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)
    ways: Annotated[Ways, tyro.conf.arg(name="")] = field(default_factory=Ways)

    def run(self) -> None:
        from cogview.pictures import picture_path
        from cogview.progress import progress

        captions = [caption.strip() for group in self.captions for caption in group]
        if self.captions_file is not None:
            captions += [caption for _, caption in read_captions(self.captions_file)]
        require(bool(captions), "captions", "at least one, of --captions or --captions-file", captions)
        sheet = picture_path(self.out)
        models, at_once = self.models.load()
        how = self.ways.of(models, at_once)
        about: dict[str, Any] = {"count": self.count, "candidates": self.candidates, "seed": self.seed}
        with progress("drawing", models.work(len(captions), self.count, self.candidates)) as update:
            drawn = models.draw(captions, how, **about, update=update)
            make_places(sheet)
            self._write(models, captions, drawn, sheet)

    def _write(self, models: "CogView2", captions: list[str], drawn: Any, sheet: Path) -> None:
        from cogview.pictures import contact_sheet, image_of, save_image

        paths, rows, kept = picture_paths(captions, sheet, self.count), list[tuple[str, list[torch.Tensor]]](), 0
        for one in drawn:
            stages = [codes for codes in (one.small, one.direct, one.fine) if codes is not None]
            pictures = [models.base.pictures(codes) for codes in stages]
            for n in range(self.count):
                path = next(paths)
                save_image(image_of(pictures[-1][n]), path)
                if self.keep_stages:
                    for stage, name in zip(pictures[:-1], STAGES, strict=False):
                        save_image(image_of(stage[n]), path.with_stem(f"{path.stem}-{name}"))
            if kept < SHEET_PIXELS:
                losses = " ".join(f"{loss:.2f}" for loss in one.caploss.tolist())
                rows.append((f"{one.caption} (CapLoss {losses})", list(pictures[-1])))
                kept += pictures[-1].numel()
        shown = contact_sheet(rows, sheet, columns=max(1, 8 // self.count), zoom=max(1, 128 // models.side))
        total, folder = f"{len(captions) * self.count:,} pictures", f"{sheet.with_suffix('')}{os.sep}"
        console.print(f"{total} in {folder}, those of {shown:,} captions on {sheet}")


@dataclass(frozen=True)
class Edit:
    """Draw a part of a picture anew, by a caption of what its surroundings show; all else stays as it is."""

    picture: tyro.conf.Positional[Path]
    """PNG, JPEG, WebP, GIF or BMP of any size."""
    caption: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What the square around the mask is to show."""
    mask: Annotated[Path | None, option("FILE", "none")] = None
    """A picture of the same size: what is light in it, or where it has transparency what is opaque, is drawn anew."""
    box: Annotated[tyro.conf.UseAppendAction[tuple[Corners, ...]], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = ()
    """Pixels of a rectangle that is drawn anew, to before RIGHT and BOTTOM; may be repeated, and go with --mask."""
    out: Path = Path("edited.png")
    """The sheet: the picture, its mask and what was drawn. The pictures, PNG, come into a folder beside it."""
    count: int = 4
    """Pictures, the best first."""
    candidates: Annotated[int | None, option("INT", "as many as count")] = None
    """Small squares drawn, of which the best are kept."""
    around: float = AROUND
    """Side of the square that is given to the model, as times that of what is masked; inf: as large as the picture has
    room for. The caption is of the square."""
    feather: int = 0
    """Pixels inside the mask's border in which what is drawn fades in."""
    keep_stages: bool = False
    """Also write the square that is given to the models as each stage draws it."""
    seed: int = 0
    """Of the first candidate; the others have the following ones."""
    models: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)
    ways: Annotated[Ways, tyro.conf.arg(name="")] = field(default_factory=Ways)

    def run(self) -> None:
        from cogview.completion import edit
        from cogview.editing import check, masked_by, read_mask
        from cogview.inputs import whole
        from cogview.pictures import picture_path
        from cogview.progress import progress

        sheet = picture_path(self.out)
        given = whole(self.picture, exact=True)
        mask = masked_by(self.box, given)
        if self.mask is not None:
            mask |= read_mask(self.mask, given)
        check(mask, given)
        models, at_once = self.models.load()
        how = self.ways.of(models, at_once)
        about: dict[str, Any] = {"count": self.count, "candidates": self.candidates, "seed": self.seed}
        about |= {"around": self.around, "feather": self.feather}
        make_places(sheet, [self.picture, self.mask])
        with progress("drawing", models.work(1, self.count, self.candidates)) as update:
            found = edit(models, given, mask, self.caption, how, **about, update=update)
        self._write(models, given, mask, found, sheet)

    def _write(self, models: "CogView2", given: torch.Tensor, mask: torch.Tensor, found: "Edited", sheet: Path) -> None:
        from cogview.pictures import contact_sheet, image_of, save_image, thumbnail

        paths = [path.with_suffix(".png") for path in picture_paths([self.caption], sheet, self.count)]
        for path, picture in zip(paths, found.pictures, strict=True):
            save_image(image_of(picture), path)  # a PNG keeps every pixel
        for name, codes in zip(STAGES, found.codes if self.keep_stages else (), strict=False):
            for path, square in zip(paths, models.base.pictures(codes), strict=True):
                save_image(image_of(square), path.with_stem(f"{path.stem}-{name}"))
        new = torch.tensor([255, 0, 255, 255], dtype=torch.uint8)[: len(given), None, None]
        named = [("given", given), ("drawn anew", torch.where(mask, new, given))]
        losses = [f"CapLoss {loss:.2f}" for loss in found.caploss.tolist()]
        named += zip(losses, found.pictures, strict=True)
        cells = [(name, [thumbnail(picture, SHOWN)]) for name, picture in named]
        contact_sheet(cells, sheet, columns=len(cells), zoom=1, note=self.caption)
        console.print(f"{self.count} pictures in {sheet.with_suffix('')}{os.sep}, all of them on {sheet}")
