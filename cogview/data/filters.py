"""Which pictures and captions are good enough to learn from."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from cogview.config import require


@dataclass(frozen=True)
class Filters:
    """What is left out and counted, None: nothing. Of pictures, what their headers say before anything is decoded."""

    min_size: int | None = None
    """Pixels of the shorter side."""
    max_aspect: float | None = None
    """The longer side in shorter ones."""
    min_caption: int | None = None
    """Characters."""
    max_caption: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(value is None or value >= 1, name, "at least 1", value)
        least, most = self.min_caption, self.max_caption
        fits = least is None or most is None or least <= most
        require(fits, "max_caption", f"at least min_caption, {least}", most)

    def made_with(self) -> dict[str, Any]:
        """Those that are set, for the name of what is made with them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def of_pictures(self) -> bool:
        """Whether there is one."""
        return self.min_size is not None or self.max_aspect is not None

    def picture(self, size: tuple[int, int]) -> str:
        """Why a picture of this width and height is left out, as a kind that is counted; "" if it is not."""
        short, long = sorted(size)
        if self.min_size is not None and short < self.min_size:
            return f"pictures of fewer than {self.min_size} pixels"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"pictures longer than {self.max_aspect:g} : 1"
        return ""

    def suiting(self, captions: dict[str, str], left_out: Counter[str]) -> dict[str, str]:
        """Those captions of a pair that are not left out; left_out: counts the others, by kinds."""
        why = {name: self._caption(text) for name, text in captions.items()}
        left_out.update(filter(None, why.values()))
        return {name: text for name, text in captions.items() if not why[name]}

    def _caption(self, text: str) -> str:
        if self.min_caption is not None and len(text) < self.min_caption:
            return f"captions of fewer than {self.min_caption} characters"
        if self.max_caption is not None and len(text) > self.max_caption:
            return f"captions of more than {self.max_caption} characters"
        return ""
