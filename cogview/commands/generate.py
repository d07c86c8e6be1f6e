"""`cogview generate`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from cogview.commands.console import console
from cogview.commands.pictures import SHEET_PIXELS, Models, RunFolder, Step, labels_of, make_places, picture_paths
from cogview.commands.presets import option
from cogview.commands.prompts import Asked, Prompts
from cogview.commands.style import check_learned
from cogview.config import require
from cogview.data.files import write_text

_SHOWN, _WIDE = 128, 1100  # pixels: of a small picture on the sheet, and how wide sheets are, about


@dataclass(frozen=True)
class Generate:
    """Draw pictures for captions with a trained run: a file each, and a sheet of all."""

    prompts: Annotated[Prompts, tyro.conf.arg(name="")] = field(default_factory=Prompts)
    run_folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    name: Annotated[str | None, option("NAME", "trained last")] = None
    """Which of the run's models."""
    step: Step = None
    """Which of its checkpoints. The best has the lowest held-out loss."""
    out: Path = Path("pictures.png")
    """The sheet. Its suffix says the format: png, jpg, webp, bmp, gif or tif. The single pictures come into a folder
    beside it of the same name without the suffix; files that are there already stay, but for those of the same name."""
    count: int = 4
    """Pictures for each caption."""
    temperature: float = 0.9
    """Below 1 likely tokens become likelier, above 1 less likely."""
    top_k: Annotated[int | None, option("INT", "200")] = None
    """Of the likeliest tokens so many may be drawn; 1: always the likeliest."""
    top_p: float = 1.0
    """And of those only the likeliest whose probabilities come to this share."""
    guidance: float = 1.0
    """Above 1 pictures keep closer to their captions and vary less (classifier-free guidance), in twice the time; for
    models trained with --drop-text."""
    text_attention: float = 0.0
    """Added to the scores of what is drawn and text (CogView2): pictures keep closer to their captions. 0 to 3."""
    clusters: Annotated[int | None, option("INT", "none")] = None
    """Draw one of so many of the likeliest clusters of codes, then a code of it (CogView2), instead of --top-k."""
    cluster_temperature: float = 1.0
    """Of the codes in a cluster, besides that of all."""
    labels: Annotated[Path | None, option("FILE", "by k-means")] = None
    """Clusters of the codes, a .npy file of their numbers, as CogView2's cluster_label.npy; default those of the run's
    codebook by k-means, 40 codes in each on average."""
    rerank: Annotated[str | None, option("NAME", "none")] = None
    """Order candidates by CapLoss of this captioning model of the run (train --recipe caption), and keep the best; the
    folder also gets a sheet of each caption's candidates in their order."""
    candidates: Annotated[int | None, option("INT", "60")] = None
    """Drawn of each caption with --rerank."""
    magnify: Annotated[str | None, option("NAME", "none")] = None
    """Draw the pictures at twice their side with this super-resolution model of the run (train --recipe
    superresolution)."""
    magnify_top_k: int = 1
    """With --magnify: of its likeliest tokens so many may be drawn. 1 comes nearest to the true picture; 200 is as
    published."""
    seed: int = 0
    """Of each caption's first picture; the others have the following ones. The same seed draws the same picture."""
    batch_size: int = 32
    """Pictures drawn at once: more are faster and take more memory."""
    models: Models = field(default_factory=Models)

    def run(self) -> None:
        from cogview.clusters import Clusters
        from cogview.pictures import picture_path
        from cogview.runs import last_run
        from cogview.sampling import Sampling
        from cogview.system import System

        require(self.count >= 1, "count", "at least 1", self.count)
        ranked = self.rerank is not None or self.candidates is None
        require(ranked, "candidates", "--rerank NAME, which ranks them", self.candidates)
        candidates = 60 if self.candidates is None else self.candidates
        drawn = self.count if self.rerank is None else candidates
        require(drawn >= self.count, "candidates", f"at least count ({self.count})", drawn)
        last = f"2^63 - {drawn}"  # that of the last picture is below 2^63 then
        require(0 <= self.seed <= 2**63 - drawn, "seed", f"a whole number from 0 to {last}", self.seed)
        more: dict[str, Any] = {"batch_size": self.batch_size, "text_attention": self.text_attention}
        require(self.clusters is None or self.top_k is None, "top_k", "none with clusters", self.top_k)
        for name in ("cluster_temperature", "labels"):
            unused = self.clusters is None and getattr(self, name) != getattr(Generate, name)
            require(not unused, name, "none without clusters", str(getattr(self, name)))
        top_k = 200 if self.top_k is None else self.top_k
        how = Sampling(self.temperature, top_k, self.top_p, self.guidance, **more)
        nearer = replace(how, top_k=self.magnify_top_k, guidance=1.0, text_attention=0.0)
        require(self.magnify is not None or self.magnify_top_k == 1, "magnify_top_k", "--magnify NAME", nearer.top_k)
        sheet = picture_path(self.out)
        asked = self.prompts.read(self.count if self.rerank is None else 1, self.seed)

        folder = last_run() if self.run_folder is None else self.run_folder
        how_loaded = self.models.options()
        system = System.load(folder, name=self.name, step=self.step, draws="pictures", **how_loaded)
        if self.prompts.style is not None:
            assert system.source is not None
            check_learned(system.source, self.prompts.style)
        if self.clusters is not None:
            how = replace(
                how, clusters=Clusters(labels_of(system, self.labels), self.clusters, self.cluster_temperature)
            )
        judge = None
        if self.rerank is not None:
            judge = System.load(folder, name=self.rerank, draws="captions", **how_loaded)
        lens = None
        if self.magnify is not None:
            lens = System.load(folder, name=self.magnify, draws="larger pictures", **how_loaded)
            require(lens.side == system.side, "magnify", f"a model of pictures of {system.side} pixels", lens.side)
        asked.check(filter(None, (system, judge, lens)))  # before a folder is made
        make_places(sheet)
        console.print(str(system.source))
        if judge is not None:
            console.print(f"ranked by {judge.source}")
        if lens is not None:
            console.print(f"magnified by {lens.source}")
        self._draw(system, judge, lens, asked, range(self.seed, self.seed + drawn), how, nearer, sheet)

    def _draw(self, system, judge, lens, asked: Asked, seeds: Sequence[int], how, nearer, sheet: Path) -> None:
        from cogview.pictures import image_of, save_image
        from cogview.progress import Sum, progress

        captions, repeated = asked.captions, asked.pictures
        if judge is not None:  # all candidates of a caption have its words
            repeated = [caption for caption in asked.pictures for _ in range(self.count)]
        paths, kept, written = picture_paths(captions, sheet, self.count), list[Tensor](), list[Path]()
        of_one = system.recipe.config.image_tokens
        total = len(captions) * len(seeds) * of_one + (0 if lens is None else 4 * len(repeated) * of_one)
        with progress("drawing", total) as update:
            told = Sum(update)
            given = list(seeds) * len(captions)
            if judge is None:
                codes = system.code_batches(repeated, how, seeds=given, update=told.part())
            else:
                given = []  # those of the best, as they are found
                codes = self._best(system, judge, asked.pictures, seeds, how, sheet, given, told.part())
            batches: Iterator[Tensor] = map(system.pictures, codes)
            if lens is not None:
                batches = self._larger(lens, repeated, codes, given, nearer, told)
            for picture in (picture for batch in batches for picture in batch):
                written.append(save_image(image_of(picture), next(paths)))
                if len(kept) * picture[0].numel() < SHEET_PIXELS:
                    kept.append(picture)
        if self.prompts.people is not None:
            lines = (f"{path.name}\t{caption}\n" for path, caption in zip(written, repeated, strict=True))
            write_text(sheet.with_suffix("") / "captions.txt", "".join(lines))
        groups = [kept[n : n + self.count] for n in range(0, len(kept), self.count)]
        try:
            shown = self._sheet(list(zip(captions, groups, strict=False)), sheet)
        except Exception as error:  # whatever it is, the pictures are there
            raise ValueError(
                f"no sheet could be made ({error}); the pictures are in {sheet.with_suffix('')}"
            ) from error
        some = f"those of the first {'caption' if shown == 1 else f'{shown:,} captions'}"
        if shown == len(captions):
            some = "all of them" if len(repeated) > 1 else "also"
        pictures = f"{len(repeated):,} picture{'s' if len(repeated) > 1 else ''}"
        console.print(f"{pictures} in {sheet.with_suffix('')}{os.sep}, {some} on {sheet}")

    def _best(self, system, judge, captions, seeds, how, sheet: Path, chosen: list[int], update) -> Iterator[Tensor]:
        """Codes of the best candidates of one caption after the other, whose seeds go to `chosen`; writes a sheet of
        all of them beside."""
        from cogview.reranking import candidate_sheet, draw_ranked

        found = draw_ranked(system, judge, captions, how, seeds=seeds, update=update)
        paths = picture_paths(captions, sheet, 1)
        for caption, candidates, path in zip(captions, found, paths, strict=True):
            try:
                pictures = system.pictures(candidates.codes)
                candidate_sheet(pictures, candidates.caploss, path.with_stem(f"{path.stem}-candidates"), caption)
            except Exception as error:  # whatever it is, the pictures are more
                console.print(f"no sheet of the candidates of {caption!r} could be made ({error})")
            chosen += [seeds[n] for n in candidates.order[: self.count].tolist()]
            yield candidates.codes[: self.count]

    def _larger(self, lens, captions: Sequence[str], codes, seeds: Sequence[int], how, told) -> Iterator[Tensor]:
        """Pictures at twice the side of batches of codes and their captions."""
        first = 0
        for some in codes:
            rows = slice(first, first + len(some))
            yield from lens.magnify_batches(captions[rows], some, how, seeds=seeds[rows], update=told.part())
            first += len(some)

    def _sheet(self, rows: list, sheet: Path) -> int:
        from cogview.pictures import contact_sheet

        side = rows[0][1][0].shape[-1]
        zoom = max(1, round(_SHOWN / side))
        return contact_sheet(rows, sheet, columns=max(1, _WIDE // (min(self.count, 8) * side * zoom)), zoom=zoom)
