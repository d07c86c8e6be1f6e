"""The pictures of the pages: SVGs for light and for dark ones."""

from collections.abc import Callable
from pathlib import Path

from .drawing import THEMES, Drawing

PICTURES: dict[str, tuple[Callable[[Drawing], None], str]] = {}  # by name: what draws it, and what is to be seen


def picture(name: str, shows: str) -> Callable[[Callable[[Drawing], None]], Callable[[Drawing], None]]:
    def keep(draw: Callable[[Drawing], None]) -> Callable[[Drawing], None]:
        PICTURES[name] = draw, shows
        return draw

    return keep


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draws, shows) in PICTURES.items():
        for theme in THEMES:
            drawing = Drawing(theme, shows)
            draws(drawing)
            (folder / f"{name}-{theme}.svg").write_text(drawing.svg())


def figure(name: str) -> str:
    draws, shows = PICTURES[name]
    drawing = Drawing(THEMES[0], shows)
    draws(drawing)
    wide = " wide" if drawing.width > 500 else ""  # scrolls on a narrow screen, where its text would be too small
    images = "".join(f"![{shows}](assets/{name}-{theme}.svg#only-{theme})" for theme in THEMES)
    return f'<div class="figure{wide}" markdown>\n{images}\n</div>'
