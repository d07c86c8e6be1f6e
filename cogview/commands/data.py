"""`cogview data`: building, packing and reading shards."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.config import require
from cogview.data.captions import blank
from cogview.data.inspection import BAD_SHARD, Caption, Inspection, inspect, rate, readable
from cogview.data.pack import Packed, pack
from cogview.data.report import Report, printable
from cogview.data.shards import LANGUAGES, PairDataset
from cogview.progress import progress, track

if TYPE_CHECKING:
    from cogview.tokenizers.text import TextTokenizer

LIKELY = ("caption", "text", "title", "description", "prompt", "alt", "en", "zh")  # fields that may be captions
TRAINED_ON = 16384  # captions: a tokenizer that counts tokens


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
    """Of the scenes: another one composes others."""
    scale: int = 1
    """1: pictures of 64 x 64 pixels; 2: the same of 128 x 128, for super-resolution."""

    def run(self) -> None:
        from cogview.demo.scenes import build_scene_shards

        shards = build_scene_shards(
            self.out, self.train, self.test, self.seed, lambda work: track(work, "composing scenes"), self.scale
        )
        for split, paths in shards.items():
            console.print(f"{split}: {len(paths)} shards in {self.out}")


@dataclass(frozen=True)
class Inspect:
    """Read every pair of some tar shards; report what is there, and what is damaged, doubled or left out."""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")]
    """Tar files."""
    languages: tuple[str, ...] = LANGUAGES
    """Fields of the pairs' JSON that hold captions; a pair's .txt is "caption"."""
    max_text: int = 64
    """The limit that captions are held against, in tokens."""
    run_folder: Annotated[Path | None, option("PATH", "none", name="run")] = None
    """Count tokens with this run's text.model; else with a tokenizer trained on these captions."""
    report: Annotated[Path | None, option("PATH", "none")] = None
    """Write every problem here, a JSON object a line."""
    sheet: Annotated[Path | None, option("PATH", "none")] = None
    """Also write a contact sheet (PNG) of the first pairs here."""

    def run(self) -> None:
        if self.max_text < 1:
            raise ValueError(f"max-text: expected at least 1 token, got {self.max_text}")
        if self.run_folder is not None and not (self.run_folder / "text.model").exists():
            raise ValueError(f"run: expected a run's folder with text.model, got {str(self.run_folder)!r}")
        with progress("reading") as update:
            paths, bad = readable(self.shards)
            if not paths:
                raise ValueError(f"shards: none can be read; {'; '.join(problem.detail for problem in bad[:10])}")
            data = PairDataset(paths, languages=self.languages)
            for problem in bad:
                data.report.add(*problem)
            found = inspect(data, update)
        speed = rate(len(data), found.seconds, "pairs")
        console.print(f"{found.readable:,} of {len(data):,} pairs can be read ({speed})")
        if found.sizes:
            sizes = [f"{w} x {h} ({n:,})" for (w, h), n in found.sizes.most_common(5)]
            console.print(f"sizes: {', '.join(sizes)}{_more(len(found.sizes) - 5)}")
        console.print(f"captions: {', '.join(f'{x} ({n:,})' for x, n in found.languages.most_common()) or 'none'}")
        candidates = _candidates(found)
        if candidates:
            console.print(f"other string fields: {candidates}")
        if found.captions:
            console.print(self._lengths(data, found.captions))
        unread: dict[str, tuple[int, str]] = {}
        for shard in data.shards:
            for kind, (n, name) in shard.unread.items():
                before, first = unread.get(kind, (0, name))
                unread[kind] = before + n, first
        if unread:
            members = [f"{kind or 'no extension'} ({n:,}, first {name})" for kind, (n, name) in unread.items()]
            console.print(f"members not read: {', '.join(members[:10])}{_more(len(members) - 10)}")
        _tell(data.report, self.report)
        if self.sheet is not None and found.first:
            from cogview.pictures import contact_sheet

            contact_sheet([(text, [picture]) for text, picture in found.first], self.sheet, columns=6, zoom=1)
            console.print(f"contact sheet: {self.sheet}")
        if not found.readable:
            hint = f"; other string fields: {candidates}" if candidates else ""
            raise ValueError(f"shards: no pair can be read ({data.report}{hint})")

    def _lengths(self, data: PairDataset, captions: list[Caption]) -> str:
        with progress("counting tokens", len(captions)) as update:
            tokenizer, source = self._tokenizer(captions)
            lengths = np.zeros(len(captions), int)
            for number, caption in enumerate(captions):
                lengths[number] = len(tokenizer.encode(caption.text))
                update(number + 1)
        for caption, length in zip(captions, lengths, strict=True):
            if length > self.max_text:
                detail = f'"{caption.language}": {length} tokens, at most {self.max_text}'
                data.report.add("caption too long", data.where(caption.sample), detail, sample=caption.sample)
        over = int((lengths > self.max_text).sum())
        middle, most = np.percentile(lengths, (50, 95), method="higher")
        figures = f"median {middle}, 95 % {most}, longest {lengths.max()}"
        return f"caption lengths in tokens of {source}: {figures}; {over:,} over the limit of {self.max_text}"

    def _tokenizer(self, captions: list[Caption]) -> "tuple[TextTokenizer, str]":
        from cogview.tokenizers.text import TextTokenizer

        if self.run_folder is not None:
            return TextTokenizer.load(path := self.run_folder / "text.model"), str(path)
        texts = [caption.text for caption in captions[:TRAINED_ON]]
        return TextTokenizer.train(texts), "a tokenizer trained on them"


@dataclass(frozen=True)
class Pack:
    """Pack captioned pictures, a folder or an archive as it was downloaded, into tar shards; the pictures' bytes stay
    as they are."""

    folder: tyro.conf.Positional[Path]
    """Pictures at any depth, or a .zip, .tar or .tar.gz of them, which is not unpacked. Captions: a table, or in a
    folder a .txt or .json beside each picture, with its name."""
    out: Path
    """Folder for the shards; those that the same folder was packed to before are replaced, others never."""
    captions: Annotated[Path | None, option("PATH", "the folder's metadata.jsonl or .csv, else its only table")] = None
    """A table with a row a caption: CSV or TSV with a header, JSON lines, a JSON list of objects, or COCO's JSON. Or an
    archive with one, ARCHIVE:NAME where it has several. Further rows of a picture become caption.2, caption.3 and so on
    of its pair."""
    image_column: Annotated[str | None, option("STR", "file_name, image, path or the like")] = None
    """Column with the pictures' names, relative to the folder."""
    caption_columns: Annotated[tuple[str, ...], option("[STR [STR ...]]", "caption, text or the like, en, zh")] = ()
    """Columns (fields of a JSON) with captions. Several keep their names; one alone becomes "caption", unless it is
    en or zh."""
    caption: Annotated[str | None, option("TEXT", "none")] = None
    """Of all pictures, instead of captions of their own."""
    shard_pairs: int = 1000
    """Pairs in a shard."""
    max_shard_mb: int = 1024
    """Megabytes of a shard; a shard ends before it has more, unless one pair alone is larger."""
    report: Annotated[Path | None, option("PATH", "none")] = None
    """Write everything that was left out here, a JSON object a line."""

    def run(self) -> None:
        own = self.captions is None and self.image_column is None and not self.caption_columns
        require(self.caption is None or own, "caption", "none with captions of their own", self.caption)
        require(self.caption is None or not blank(self.caption), "caption", "one that is not blank", self.caption)
        packed = Packed()
        try:
            with progress("packing") as update:
                pack(
                    self.folder,
                    self.out,
                    update,
                    packed,
                    captions=self.captions,
                    image_column=self.image_column,
                    caption_columns=self.caption_columns,
                    every=self.caption,
                    shard_pairs=self.shard_pairs,
                    max_shard_bytes=self.max_shard_mb << 20,
                )
        finally:
            if packed.report.counts or packed.pairs:
                _tell(packed.report, self.report)
        if packed.table is not None and packed.table != self.captions:
            console.print(f"captions from {printable(str(packed.table), 4096)}")
        shards = f"{len(packed.shards):,} shard{'s' if len(packed.shards) > 1 else ''}"
        console.print(f"{packed.pairs:,} pairs in {shards} in {self.out}, captions: {', '.join(packed.fields)}")
        names = list(dict.fromkeys(re.sub(r"\.[0-9]+$", "", name) for name in packed.fields))
        languages = "" if set(names) <= set(LANGUAGES) else f" --languages {' '.join(names)}"
        console.print(f"next: cogview data inspect {self.out}/*.tar{languages}")


@dataclass(frozen=True)
class Data:
    """Captioned pictures in tar shards."""

    command: (
        Annotated[Build, tyro.conf.subcommand("build")]
        | Annotated[Pack, tyro.conf.subcommand("pack")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    )

    def run(self) -> None:
        self.command.run()


def _tell(report: Report, path: Path | None) -> None:
    """Says what is wrong, the first of each kind by name; all of it in the file."""
    for kind, first in sorted(report.first().items()):
        detail = f" ({first.detail})" if first.detail else ""
        console.print(f"  {report.counts[kind]:,} {kind}, first {first.where}{detail}")
        others = [problem for problem in report.problems if problem.kind == kind][1:] if kind == BAD_SHARD else []
        for problem in others[:9]:
            console.print(f"    {problem.where} ({problem.detail})")
    if not report.counts:
        console.print("no problems")
    if path is not None:
        report.write(path)
        console.print(f"{report.counts.total():,} problems in {path}")


def _candidates(found: Inspection) -> str:
    if not found.others:
        return ""
    fields = found.others.most_common(10)
    listed = ", ".join(f"{printable(name, 40)} ({n:,})" for name, n in fields) + _more(len(found.others) - 10)
    likely = next(
        (name for name, _ in fields if name.lower().startswith(LIKELY)), "" if found.captions else fields[0][0]
    )
    return f"{listed}; --languages {printable(likely, 40)} takes one" if likely else listed


def _more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""
