"""What an integration has replaced in a model."""

from collections.abc import Callable
from typing import Any


class Replaced:
    """The names of the modules in which something was replaced; `remove()` puts it back."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._undo: list[Callable[[], Any]] = []

    def add(self, name: str | None, *undo: Callable[[], Any]) -> None:
        if name is not None:
            self.names.append(name)
        self._undo += undo

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __repr__(self) -> str:
        return f"Replaced({', '.join(self.names)})"
