"""Damaged files of a run are kept beside it: what is in them is the user's."""

from pathlib import Path


def aside(path: Path) -> Path:
    """A free name beside `path` for a damaged file, which no pattern for whole ones matches."""
    names = (f"{path.name}.damaged{number}" for number in ("", *(f".{n}" for n in range(2, 10_000))))
    return next(free for free in map(path.with_name, names) if not free.exists())
