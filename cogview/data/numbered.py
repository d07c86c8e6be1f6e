"""Pictures of captions in a folder, by the numbers that their names begin with: 0001.png, or 001-1-fox.png as
`cogview generate --count 1` leaves them."""

import re
from pathlib import Path

from cogview.config import require
from cogview.data.images import EXTENSIONS

_NUMBER = re.compile(r"([0-9]{1,12})(?:[^0-9].*)?")
_SHEET = "-candidates"  # ends the name of a sheet that `generate --rerank` leaves beside a picture


def pictures_in(folder: Path, name: str) -> dict[int, Path]:
    """By the numbers of their captions; ValueError, of the option `name`, where two have the same, or there is none."""
    require(folder.is_dir(), name, "a folder of pictures", str(folder))
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stem):
        number = _NUMBER.fullmatch(path.stem)
        if number is None or path.suffix.lower().removeprefix(".") not in EXTENSIONS:
            continue
        if path.with_stem(path.stem.removesuffix(_SHEET)) in found.values():
            continue
        other = found.setdefault(int(number[1]), path)
        require(other is path, name, "one picture of each caption", f"{other.name} and {path.name} in {folder}")
    require(bool(found), name, "pictures whose names begin with their captions' numbers", f"none in {folder}")
    return found
