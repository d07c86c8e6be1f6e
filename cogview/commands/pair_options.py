"""Which pairs of some shards are taken, and with which captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cogview.commands.presets import option
from cogview.config import require
from cogview.data.ahead import ahead
from cogview.data.filters import Filters
from cogview.data.inspection import BAD_SHARD
from cogview.data.report import Problem, printable
from cogview.data.shards import LANGUAGES, PairDataset
from cogview.data.tar_index import TarIndex
from cogview.data.translation import Translation
from cogview.progress import track


# no docstring, which help would rule off from the options
@dataclass(frozen=True)
class PairOptions:
    languages: tuple[str, ...] = LANGUAGES
    """Captions to use: fields of the pairs' JSON; "caption" is the text of a .txt, too."""
    min_size: Annotated[int | None, option("PIXELS", "no limit")] = None
    """Leave out pictures whose shorter side has fewer pixels."""
    max_aspect: Annotated[float | None, option("FLOAT", "no limit")] = None
    """Leave out pictures whose longer side is more than so many times the shorter one."""
    min_caption: Annotated[int | None, option("CHARACTERS", "no limit")] = None
    """Leave out captions that have fewer."""
    max_caption: Annotated[int | None, option("CHARACTERS", "no limit")] = None
    """Leave out captions that have more."""
    translate: Annotated[str | None, option("MODULE:FUNCTION", "no translation")] = None
    """Captions that a pair lacks, by a Python function of yours, found from the current folder: it takes a list of
    texts and returns as many. Its attribute `version`, where it has one, says when to translate anew."""
    translate_from: str = "zh"
    """With --translate: the field of the captions that it is given; themselves they are used as --languages says."""
    translate_to: str = "en"
    """With --translate: one of --languages, for pairs without such a caption."""

    def check(self) -> None:
        """ValueError unless they are valid."""
        self._filters()
        for name in ("translate_from", "translate_to"):
            given = getattr(self, name) != getattr(PairOptions, name)
            require(self.translate is not None or not given, name, "none without --translate", getattr(self, name))

    def open(self, paths: Sequence[Path]) -> tuple[PairDataset | None, list[Problem]]:
        """The pairs of the shards that can be read, by all cores, and which of them cannot; None of no shard."""
        translation = None
        if self.translate is not None:
            translation = Translation.named(self.translate, self.translate_from, self.translate_to)
        found = list(track(ahead(_opened, paths), "reading the shards", len(paths)))
        shards = [shard for shard in found if isinstance(shard, TarIndex)]
        bad = [problem for problem in found if isinstance(problem, Problem)]
        if not shards:
            return None, bad
        chosen = {"languages": self.languages, "filters": self._filters(), "translation": translation}
        data = PairDataset(shards, **chosen)  # type: ignore[arg-type]
        for problem in bad:
            data.report.add(*problem)
        return data, bad

    def _filters(self) -> Filters:
        return Filters(self.min_size, self.max_aspect, self.min_caption, self.max_caption)


def _opened(path: Path) -> TarIndex | Problem:
    """A shard that was read once, for its digest, or what is wrong with it."""
    try:
        shard = TarIndex.open(path)
        shard.digest  # noqa: B018  # keeps it
        return shard
    except (ValueError, OSError) as error:
        return Problem(BAD_SHARD, printable(str(path)), str(error))
