"""Makes the form: a folder with a page and its pictures, which needs no server and asks nothing of any."""

import hashlib
import json
import random
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cogview.config import require
from cogview.data.files import write_text
from cogview.data.numbered import pictures_in
from cogview.human.key import SCORES, Key, plan
from cogview.inputs import whole
from cogview.labels import printable
from cogview.pictures import image_of, save_image
from cogview.progress import track

MOST_EVALUATORS = 1_000
_PAGE = Path(__file__).with_name("page.html")
_NAME = re.compile(r"[\w .+()-]{1,40}")


@dataclass(frozen=True)
class Form:
    """What is asked of whom. All draws depend on the seed alone, and those of an evaluator on the number too."""

    captions: Sequence[str]
    models: Mapping[str, Path]
    """A folder of pictures each, whose names begin with the number of their caption: 0001.png, or 001-1-fox.png."""
    ab: tuple[str, Path] | None = None
    """One of the models, and a folder with its pictures after super-resolution."""
    count: int = 50
    """Captions, taken at random."""
    evaluators: int = 72
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    """Not known to evaluators, who could find the models by it."""

    def __post_init__(self):
        require(len(self.models) >= 2, "models", "at least two", list(self.models))
        for name in self.models:
            require(bool(_NAME.fullmatch(name)), "models", "names of at most 40 letters, digits, blanks, .+-()", name)
        fits, there = 1 <= self.count <= len(self.captions), f"the captions that there are ({len(self.captions):,})"
        require(fits, "count", f"a number from 1 to {there}", self.count)
        fits = 1 <= self.evaluators <= MOST_EVALUATORS
        require(fits, "evaluators", f"a number from 1 to {MOST_EVALUATORS:,}", self.evaluators)
        if self.ab is not None:
            require(self.ab[0] in self.models, "ab", f"one of the models {', '.join(self.models)}", self.ab[0])
            for name in ("count", "evaluators"):
                number = getattr(self, name)
                require(number % 2 == 0, name, "an even number with ab, for two halves", number)

    def write(self, out: Path, key: Path) -> Key:
        """Writes the folder for evaluators, and the key, which must stand outside; returns the key. ValueError before
        anything is written for what is wrong."""
        new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        require(new, "out", "a new folder", str(out))
        outside = not key.resolve().is_relative_to(out.resolve())
        require(outside, "key", f"a file outside {out}, which evaluators get", str(key))
        require(not key.exists(), "key", "a new file, since answers are worth nothing without their key", str(key))
        chosen = sorted(random.Random(f"captions {self.seed}").sample(range(len(self.captions)), self.count))
        folders = self._folders(chosen)
        ab = None if self.ab is None else self.ab[0]
        pictures, shown = plan(self.count, list(self.models), ab, self.evaluators, self.seed)
        files = {number: folders[p.model, p.enlarged][chosen[p.caption] + 1] for number, p in pictures.items()}
        texts = [printable(self.captions[n]) for n in chosen]
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            made = Path(beside) / "form"
            content = json.dumps([texts, shown, _copy(files, made / "pictures")])
            name = hashlib.sha256(content.encode()).hexdigest()[:16]
            found = Key(name, list(self.models), ab, texts, shown, pictures, self.seed)
            write_text(made / "index.html", page_of(found))
            found.write(key)
            made.rename(out)
        return found

    def _folders(self, chosen: Sequence[int]) -> dict[tuple[str, bool], dict[int, Path]]:
        """By model, and whether it is after super-resolution; ValueError where a chosen caption has no picture."""
        found = {(name, False): pictures_in(folder, "models") for name, folder in self.models.items()}
        if self.ab is not None:
            found[self.ab[0], True] = pictures_in(self.ab[1], "ab")
        for (name, enlarged), folder in found.items():
            for number in chosen:
                got = f"none of caption {number + 1} in that of {name}"
                require(number + 1 in folder, "ab" if enlarged else "models", "pictures of all captions", got)
        return found


def page_of(key: Key) -> str:
    """The page, which knows pictures by their numbers alone."""
    fields = {"id": key.form, "scores": SCORES, "captions": key.captions, "shown": key.shown}
    inside = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, after = _PAGE.read_text(encoding="utf-8").split(">FORM<")
    return f"{before}>{inside}<{after}"


def _copy(files: Mapping[int, Path], folder: Path) -> str:
    """Pixels alone, under the pictures' numbers and in their order, so that neither name, time nor what a file says of
    itself tells whose they are; their SHA-256."""
    digest = hashlib.sha256()
    for number in track(sorted(files), "copying pictures"):
        path = save_image(image_of(whole(files[number])), folder / f"{number:04d}.png")
        digest.update(path.read_bytes())
    return digest.hexdigest()
