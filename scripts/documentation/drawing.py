"""SVG with the colours of a light or a dark page."""

from html import escape

CELL = 18
COLOURS = {  # light, dark; told apart by lightness too
    "ink": ("#1f2933", "#e4e7eb"),
    "faint": ("#9aa5b1", "#616e7c"),
    "nothing": ("#eef1f4", "#2b323b"),
    "query": ("#d64545", "#f29b9b"),
    "window": ("#0f8b8d", "#3ec6c8"),
    "pivot": ("#e0a100", "#f4c95d"),
    "text": ("#7b5ea7", "#b79ced"),
    "coarse": ("#c86b1f", "#f0a868"),
    "ground": ("#ffffff", "#1e2129"),
}
THEMES = ("light", "dark")
FONT = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


class Drawing:
    def __init__(self, theme: str, shows: str) -> None:
        self.colours = {name: pair[THEMES.index(theme)] for name, pair in COLOURS.items()}
        self.shows, self.parts = shows, list[str]()
        self.width = self.height = 0.0

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width + 10:g} {self.height + 10:g}" width="{self.width + 10:g}"'
        title = f"<title>{escape(self.shows)}</title>"
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{title}{"".join(self.parts)}</svg>\n'

    def _reach(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)

    def cell(self, x: float, y: float, size: float, colour: str) -> None:
        self._reach(x + size, y + size)
        gap = 0.5 if size < 10 else 1
        at = f'x="{x + gap:g}" y="{y + gap:g}" width="{size - 2 * gap:g}" height="{size - 2 * gap:g}"'
        self.parts.append(f'<rect {at} rx="{size / 9:g}" fill="{self.colours[colour]}"/>')

    def box(self, x: float, y: float, width: float, height: float, *, dashed: bool = False) -> None:
        self._reach(x + width, y + height)
        at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" stroke="{self.colours["faint"]}"'
        dashes = ' stroke-dasharray="5 4" rx="6"' if dashed else ""
        self.parts.append(f"<rect {at}{dashes}/>")

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        how = f'stroke="{self.colours["faint"]}" stroke-width="0.6"'
        self.parts.append(f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" {how}/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        u, v = (to_x - x) / length, (to_y - y) / length
        sides = [(to_x - 7 * u - side * v, to_y - 7 * v + side * u) for side in (4, -4)]
        head = sides[0], (to_x, to_y), sides[1]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in head)
        ink = self.colours["ink"]
        self.parts.append(f'<path d="M{x:g} {y:g}L{to_x - 5 * u:.1f} {to_y - 5 * v:.1f}" stroke="{ink}" fill="none"/>')
        self.parts.append(f'<polygon points="{points}" fill="{ink}"/>')
        self._reach(max(x, to_x), max(y, to_y))

    def text(self, x: float, y: float, words: str, *, align: str = "middle", turn: int = 0, code: bool = False) -> None:
        wide = len(words) * (8 if code else 6.2)
        self._reach(x + {"start": wide, "middle": wide / 2, "end": 0}[align] * (not turn), y)
        turned = f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
        how = (
            f'text-anchor="{align}" font-family="{MONO if code else FONT}" font-size="13" fill="{self.colours["ink"]}"'
        )
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {how}{turned}>{escape(words)}</text>')

    def flow(self, x: float, y: float, name: str, note: str, wide: float = 200) -> None:
        """A box of a diagram, 40 high."""
        at = f'x="{x:g}" y="{y:g}" width="{wide:g}" height="40" rx="6"'
        self.parts.append(f'<rect {at} fill="{self.colours["nothing"]}" stroke="{self.colours["faint"]}"/>')
        self.text(x + wide / 2, y + (18 if note else 25), name)
        if note:
            self.text(x + wide / 2, y + 34, note)
        self._reach(x + wide, y + 40)

    def circle(self, x: float, y: float, sign: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="none" stroke="{self.colours["ink"]}"/>')
        self.text(x, y + 5, sign)

    def legend(self, x: float, y: float, entries: dict[str, str], *, across: bool = False) -> None:
        for colour, words in entries.items():
            self.cell(x, y, 15, colour)
            self.text(x + 22, y + 12, words, align="start")
            x, y = (x + 50 + len(words) * 7, y) if across else (x, y + 34)
