"""Captions in another language, by a function of the user's: nothing here translates, and nothing is downloaded."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cogview.config import require
from cogview.data.captions import clean

BATCH = 256  # captions that the function is given at once, at most


@dataclass(frozen=True)
class Translation:
    """Captions of the field `source` as captions of the field `target`, of pairs that have none there."""

    function: Callable[[list[str]], list[str]]
    """As many texts as it is given, in their order; a blank one is no caption."""
    name: str
    """Names the function, and its version if it has one: what was made with it under this name is not made again."""
    source: str = "zh"
    target: str = "en"

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "name", "a name of the function", self.name)
        require(self.source != self.target, "translate_to", f"another field than {self.source}", self.target)

    @classmethod
    def named(cls, name: str, source: str, target: str) -> "Translation":
        """By the name MODULE:FUNCTION, imported as from the current folder; ValueError in a sentence if that is none.
        The function's attribute `version`, if it has one, is a part of its name."""
        module, _, attribute = name.partition(":")
        require(bool(module and attribute), "translate", "MODULE:FUNCTION", name)
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # of the user's code
            raise ValueError(f"translate: {name} cannot be imported ({type(error).__name__}: {error})") from error
        require(callable(function), "translate", "a function", name)
        version = getattr(function, "version", None)
        return cls(function, name if version is None else f"{name} {version}", source, target)

    def made_with(self) -> list[str]:
        """For the name of what is made with it."""
        return [self.name, self.source, self.target]

    def added(self, pairs: list[dict[str, str]], keep: bool) -> list[dict[str, str]]:
        """The captions of some pairs with their translations behind them. keep: those of `source`, too. RuntimeError in
        a sentence where the function fails or gives something else than as many texts."""
        wanted = [self._missing(captions) for captions in pairs]
        texts = iter(self._translated([text for missing in wanted for text in missing.values()]))
        found = []
        for captions, missing in zip(pairs, wanted, strict=True):
            kept = {name: text for name, text in captions.items() if keep or not self._of_source(name)}
            new = {name: next(texts) for name in missing}
            found.append(kept | {name: text for name, text in new.items() if text})
        return found

    def _missing(self, captions: dict[str, str]) -> dict[str, str]:
        """What of a pair's captions is to be translated, by the fields that the translations go into."""
        if self.target in captions:
            return {}
        chosen = {name: text for name, text in captions.items() if self._of_source(name)}
        return {self.target + name[len(self.source) :]: text for name, text in chosen.items()}

    def _of_source(self, name: str) -> bool:
        """As "zh", "zh.2" and so on."""
        return name == self.source or name.startswith(f"{self.source}.")

    def _translated(self, texts: Sequence[str]) -> list[str]:
        """As captions are used, "" where there is none."""
        found: list[str] = []
        for start in range(0, len(texts), BATCH):
            given = list(texts[start : start + BATCH])
            try:
                got = list(self.function(given))
            except Exception as error:  # of the user's code
                raise RuntimeError(f"translate: {self.name} failed ({type(error).__name__}: {error})") from error
            if len(got) != len(given):
                raise RuntimeError(f"translate: {self.name} gave {len(got):,} texts for {len(given):,} captions")
            for text, translated in zip(given, got, strict=True):
                try:
                    require(isinstance(translated, str), "caption", "text", translated)
                    found.append(clean(translated))
                except ValueError as error:
                    raise RuntimeError(f"translate: {self.name} made of {text[:80]!r} no text ({error})") from error
        return found
