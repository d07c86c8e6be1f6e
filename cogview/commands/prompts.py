"""The captions that `cogview generate` draws: where they come from, and what is put into them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cogview.commands.presets import option
from cogview.config import require
from cogview.data.captions import blank
from cogview.data.files import read_bytes

if TYPE_CHECKING:
    from cogview.system import System

MAX_CAPTIONS_BYTES = 16 << 20
_NEW_LINE = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Prompts:
    """Captions, and what is put into them."""

    captions: Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="TEXT ...")] = ()
    """What to draw. Several may follow, and the option may be repeated."""
    captions_file: Annotated[Path | None, option("FILE", "none")] = None
    """More captions, one a line (UTF-8); blank lines are skipped."""
    style: Annotated[str | None, option("STYLE", "none")] = None
    """Draw the captions, each a thing, in a style that the model was finetuned to (cogview style): "a fox" becomes "a
    fox of sketch style"."""
    people: Annotated[str | None, option("{world,FILE}", "captions as they are")] = None
    """Put words into captions for what they leave open about people, gender and ethnicity, for each picture others, in
    the proportions of a list: world, or a file like cogview/assets/people.json. With --rerank once for each caption.
    What was asked for stands in captions.txt beside the pictures."""

    def read(self, each: int, seed: int) -> "Asked":
        """each: pictures of a caption. seed: of the first picture's words, the others have the following ones."""
        from cogview.inputs import BadCaption
        from cogview.people.specify import specify
        from cogview.people.words import LIST, People
        from cogview.recipes.style import drawn

        captions = [caption.strip() for group in self.captions for caption in group]
        numbered = [] if self.captions_file is None else read_captions(self.captions_file)
        given, captions = len(captions), captions + [caption for _, caption in numbered]
        require(bool(captions), "captions", "at least one, of --captions or --captions-file", captions)
        for number, caption in enumerate(captions, 1):
            if blank(caption):
                raise BadCaption(number, caption, "one that is not blank", "nothing to draw")
        asked = [caption for caption in captions for _ in range(each)]
        if self.people is not None:
            words = People.load(LIST if self.people == "world" else Path(self.people))
            asked = [specify(caption, seed + number % each, words) for number, caption in enumerate(asked)]
        if self.style is not None:
            captions, asked = ([drawn(caption, self.style) for caption in some] for some in (captions, asked))
        places = [f"line {line} of {self.captions_file}" for line, _ in numbered]
        return Asked(captions, asked, each, given, places)


@dataclass(frozen=True)
class Asked:
    captions: list[str]
    pictures: list[str]
    """What is drawn, `each` of every caption, one caption after the other."""
    each: int
    given: int
    """Captions of the command line; then come those of a file."""
    places: list[str]
    """Of these."""

    def check(self, systems: "Iterable[System]") -> None:
        """ValueError names a caption that a model cannot read, by where it comes from."""
        from cogview.inputs import BadCaption

        try:
            for system in systems:
                system.encode(self.pictures)
        except BadCaption as error:
            number = (error.number - 1) // self.each
            if number < self.given:
                raise BadCaption(number + 1, self.pictures[error.number - 1], error.expected, error.got) from None
            place = f"{self.places[number - self.given]}: {error.shown}"
            raise ValueError(f"captions-file: expected {error.expected}, got {error.got} in {place}") from error


def read_captions(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers; ValueError without any."""
    data = read_bytes(path, "captions-file", MAX_CAPTIONS_BYTES)
    try:
        text, wrong, at = data.decode("utf-8-sig"), "a NUL character", data.find(0)  # which UTF-16 has many of
    except UnicodeDecodeError as error:
        text, wrong, at = "", "something else", error.start
    if at >= 0:
        line = len(_NEW_LINE.findall(data[:at].decode("latin-1"))) + 1
        raise ValueError(f"captions-file: expected UTF-8, got {wrong} in line {line} of {path}")
    lines = [(n, line.strip()) for n, line in enumerate(_NEW_LINE.split(text), 1) if not blank(line)]
    if not lines:
        raise ValueError(f"captions-file: expected at least one caption, got none in {path}")
    return lines
