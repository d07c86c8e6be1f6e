"""`cogview tokenize`: from shards to tokens, by one process or by all that torchrun starts."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import rich
import torch
import tyro

from cogview.commands.console import console
from cogview.commands.pair_options import PairOptions
from cogview.commands.presets import option
from cogview.commands.tokenizer_options import TokenizerOptions
from cogview.commands.tokenizers import TOKENIZERS, UNFINISHED, adopt, begin, check_made_by
from cogview.config import require
from cogview.data import decoded
from cogview.data.ahead import cores
from cogview.data.crops import Crops, Reduced
from cogview.data.decoded import Decoded
from cogview.data.inspection import BAD_SHARD
from cogview.data.parts import read_part
from cogview.data.ranks import Ranks
from cogview.data.shards import PairDataset
from cogview.data.tar_index import TarIndex
from cogview.data.tokens import TokenDataset, read_meta, tokens_of
from cogview.tokenizers.image import PRESETS
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizing import Tokenizing

NAMED = 20  # shards that cannot be read, each with the reason


@dataclass(frozen=True)
class Tokenize:
    """Turn tar shards of pairs into tokens, training the tokenizers that the run folder does not have yet. Again with
    more shards or fewer, only what is new is tokenised, by the tokenizers that are there. By several processes, of one
    machine or of many that share the folders: torchrun --nproc-per-node 4 -m -- cogview tokenize …"""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")]
    """All of the split's: tokens of others are dropped."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run: text.model, vqvae.safetensors, tokens/<split>."""
    split: str = "train"
    """Name of the tokens: train, test for pairs that training only validates on, or another for train --mix."""
    image_size: Annotated[int | None, option("INT", "as the run's other tokens, or image-preset's")] = None
    """Pixels of a side; others are cropped to a square and resized."""
    max_text: int = 64
    """Longest caption in tokens; longer ones are left out and counted."""
    pairs: bool = False
    """Make the tokens that super-resolution is trained on: of squares of image_size from pictures at twice that, and of
    the same at half the size. Smaller pictures are enlarged, and teach blur. An image tokenizer trained here sees both
    sizes, so begin with these."""
    whole: Annotated[int | None, option("TIMES", "squares")] = None
    """With --pairs: no squares, but the whole picture at image_size and so many times larger, 3 for the recipes direct
    and iterative."""
    crops: int = 1
    """With --pairs: squares of each picture."""
    crop_seed: int = 0
    """With --pairs: of their places."""
    cut: Literal["pictures", "codes"] = "pictures"
    """With --pairs: squares of the pictures, as published, or of the codes of whole ones, which know what is around as
    those do that are magnified: with squares of 8 x 8 codes that came 4 dB nearer to the true pictures."""
    selection: PairOptions = field(default_factory=PairOptions)
    tokenizers: TokenizerOptions = field(default_factory=TokenizerOptions)

    def run(self) -> None:
        self._check()
        with Ranks.of_environment() as ranks:
            console.quiet = rich.get_console().quiet = not ranks.first
            self._run(ranks)

    def _run(self, ranks: Ranks) -> None:
        from cogview.pipeline import finish, make_parts

        mine = [self.shards[number] for number in ranks.share([path.stat().st_size for path in self.shards])]
        data, _ = self.selection.open(mine)
        ranks.tell("read")
        pictures, size = None, 0
        if ranks.first:
            for other in ranks.others:
                ranks.hear("read", other)
            data = self._all(ranks, data)
            text, image, pictures, size = self._tokenizers(data, ranks.count)
            ranks.tell("tokenizers", [size, text.sha256, image.sha256])
        else:
            text, image, size = self._made(ranks)
        out = tokens_of(self.run_folder, self.split, 2 if self.pairs else 1)
        how = Tokenizing(text, image, size * (self.whole or 1), self.max_text, self._rows())
        if ranks.count > 1:
            torch.set_num_threads(ranks.cores())
        if data is None:  # nothing of this process's share can be read
            return ranks.tell("parts", [])
        places = set(mine)
        shards = [number for number, shard in enumerate(data.shards) if shard.path in places]
        make_parts(data, shards, how, out, decoded=pictures, ranks=ranks)
        if ranks.first:
            tokens = finish(data, how, out)
            decoded.remove(self.run_folder / "pixels")
            (self.run_folder / UNFINISHED).unlink(missing_ok=True)
            say(tokens, data, how)

    def _rows(self) -> Crops | Reduced | None:
        """What rows are made of a picture, beside it as it is."""
        if not self.pairs:
            return None
        return Crops(self.crops, self.crop_seed, self.cut) if self.whole is None else Reduced(self.whole)

    def _all(self, ranks: Ranks, mine: PairDataset | None) -> PairDataset:
        """The pairs of all shards."""
        data, bad = (mine, []) if ranks.count == 1 and mine is not None else self.selection.open(self.shards)
        if data is None:
            raise ValueError(f"shards: none can be read; {'; '.join(problem.detail for problem in bad[:10])}")
        require(len(data) > 0, "shards", "at least one pair", f"none ({data.report})")
        return data

    def _tokenizers(
        self, data: PairDataset, processes: int
    ) -> tuple[TextTokenizer, ImageTokenizer, Decoded | None, int]:
        """Those of the run or new ones, the pictures that those were trained on, and the pictures' size."""
        from cogview.pipeline import some_captions

        if processes > 1:
            torch.set_num_threads(cores())  # torchrun gives each process one: the others wait now
        folder, new = self.run_folder, self.tokenizers
        captions = some_captions(data, 1024)
        known_text = new.known_text(folder)
        if new.from_run is not None:
            adopt(new.from_run, folder)
        of_preset, sizes_here = PRESETS[new.image_preset]
        size = self.image_size or size_of(folder) or of_preset
        known = new.known_image(folder)
        rows, times = self._rows(), self.whole or (2 if self.pairs else 1)
        step = (sizes_here if known is None else known.config).downsample * (2 if isinstance(rows, Crops) else 1)
        require(size % step == 0, "image_size", f"a multiple of {step}{' for pairs' if self.pairs else ''}", size)
        if isinstance(rows, Crops):
            rows.check(size, step)
        if self.split == "train":
            shards = [str(path.absolute()) for path in self.shards]
            of = {**data.chosen(), **new.training(known_text, known)}
            about = {"shards": shards, "languages": list(self.selection.languages), **of}
            begin(folder, about, new.retrain_tokenizers)
        text = new.text(data, folder, self.split, known_text)
        shortest = min(len(text.encode(caption)) for caption in captions)
        require(shortest <= self.max_text, "max_text", f"at least {shortest}, of the shortest caption", self.max_text)
        image, pictures = new.image(data, folder, size * times, known, times)
        check_made_by(folder, [text.sha256, image.sha256])
        return text, image, pictures, size

    def _made(self, ranks: Ranks) -> tuple[TextTokenizer, ImageTokenizer, int]:
        """The tokenizers that the first process has by now, and the pictures' size."""
        size, *theirs = ranks.hear("tokenizers", 0)
        text = TextTokenizer.load(self.run_folder / TOKENIZERS[0])
        image = load_image_tokenizer(self.run_folder / TOKENIZERS[1])
        if [text.sha256, image.sha256] != theirs:
            raise ValueError(f"run: expected a folder that all processes share, got another {self.run_folder}")
        return text, image, size

    def _check(self) -> None:
        require(bool(re.fullmatch(r"(?!pairs-)\w[\w-]*", self.split)), "split", "a name, as train or test", self.split)
        folder = self.run_folder
        require(folder.is_dir() or not folder.exists(), "run", "a folder, or a new one", str(folder))
        for name in ("image_size", "max_text"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "a positive number", value)
        if not self.pairs:
            for name in ("whole", "crops", "crop_seed", "cut"):
                given = getattr(self, name) != DEFAULTS[name]
                require(not given, name, "none without --pairs", getattr(self, name))
        if self.whole is not None:
            require(self.whole >= 2, "whole", "at least 2", self.whole)
            for name in ("crops", "crop_seed", "cut"):
                given = getattr(self, name) != DEFAULTS[name]
                require(not given, name, "none with --whole", getattr(self, name))
        self.selection.check()
        self.tokenizers.check(folder, self.split)
        for path in self.shards:
            if not path.is_file():  # mistyped, not damaged
                TarIndex.open(path)  # says so


DEFAULTS = {option.name: option.default for option in fields(Tokenize)}


def say(tokens: TokenDataset, data: PairDataset, how: Tokenizing) -> None:
    """What became of the pairs, as the parts say, whichever process made them, and when."""
    console.print(f"{len(tokens):,} sequences in {tokens.folder}")
    left_out = [f"{n:,} {kind}" for kind, n in tokens.meta["skipped"].items()]
    console.print(f"left out: {', '.join(left_out) or 'nothing'}")
    counts, first = Counter[str](), dict[str, str]()
    for problem in data.report.of(None):
        counts[problem.kind] += 1
        first.setdefault(problem.kind, problem.where)
    parts = {how.part(data, shard): shard for shard in reversed(data.shards)}  # the first of the same contents
    for part, shard in reversed(parts.items()):
        for kind, (count, key) in read_part(tokens.folder, part).get("problems", {}).items():
            counts[kind] += count
            first.setdefault(kind, data.named(shard, key))
    for kind, count in sorted(counts.items()):
        console.print(f"  {count:,} {kind}, first {first[kind]}")
    for problem in [problem for problem in data.report.of(None) if problem.kind == BAD_SHARD][:NAMED]:
        console.print(f"    {problem.detail}")


def size_of(folder: Path) -> int | None:
    """Of the pictures of a run's tokens, if it has some."""
    found = (read_meta(tokens_of(folder, split, sizes)) for sizes in (1, 2) for split in ("train", "test"))
    return next((meta["image_size"] for meta in found if meta is not None and "image_size" in meta), None)
