"""Sizes of studies."""

from dataclasses import asdict, dataclass

from cogview.config import require


@dataclass(frozen=True)
class Counts:
    """Whole numbers, each at least 1."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(value >= 1, name, "at least 1", value)
