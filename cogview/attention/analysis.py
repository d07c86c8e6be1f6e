"""A model's attention, looked at in some pictures: measured, drawn, and reported in a folder."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cogview.attention import plots, report, words
from cogview.attention.look import Seen, check, places_of
from cogview.attention.measure import Figures, Tally
from cogview.attention.names import called
from cogview.attention.plots import Panel, Row
from cogview.attention.record import Looked
from cogview.attention.words import Word
from cogview.data.files import read_object
from cogview.labels import file_name
from cogview.pictures import curves
from cogview.system import System

SHOWN = 4  # heads of each word, and of dots
_MARKED = re.compile(r"\d{3,}[^/\\\0]*\.png")  # a plain name, as `_marked` makes it
_MAX_BYTES = 256 << 20  # of figures.json


def analyse(
    system: System,
    captions: Sequence[str],
    codes: Tensor,
    out: Path,
    *,
    wanted: Sequence[str] = (),
    shown: int = 8,
    seed: int = 0,
    update: Callable[[int], None] = lambda done: None,
) -> str:
    """Looks at captions and the codes int64 [P, g, g] of a picture of each, and writes report.md, figures.json, maps
    and pictures; returns the report's first sentence. wanted: the words to show, default all; shown: of how many of the
    pictures, from the first on. `update` is told how many are done. ValueError before anything is computed."""
    check(system.recipe)
    ids = system.encode(captions)
    words.check_words(system.text, ids, wanted)
    c = system.recipe.config
    tally, looked = Tally(c.num_layers, c.num_heads, c.image_grid), list[Looked]()
    for number, (caption, own) in enumerate(zip(captions, ids, strict=True), 1):
        found = list[Word]()
        if number <= shown:
            each = (words.find(system.text, own, text) for text in wanted)
            found = [word for word in each if word is not None] if wanted else words.words_of(system.text, own)
        looked.append(_looked(system, caption, own, codes[number - 1], found, tally, seed))
        update(number)
    figures = tally.figures()
    peaks = torch.stack([scores[..., [0, 2]].abs().amax((1, 2)) for scores in figures.scores.values()])
    largest = int(peaks.amax(0).argmax())
    _forget(out)
    _draw(out, figures, largest)
    paths = _marked(out, looked, system.pictures(codes[:shown]))
    return report.write(out, system, looked, figures, paths)


def _forget(out: Path) -> None:
    """Removes the marked pictures of the report that stands there, and nothing else."""
    if not (figures := out / "figures.json").exists():
        return
    names = read_object(figures, "out", _MAX_BYTES).get(report.MARKED)
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and _MARKED.fullmatch(name):
            (out / name).unlink(missing_ok=True)


def _draw(out: Path, figures: Figures, largest: int) -> None:
    """Writes what is of all pictures. largest: the layer of the largest scores."""
    title = "attention of image tokens by the key's offset; the query is below, in the middle"
    plots.sheet(figures.relative, out / "offsets.png", title, "mean attention")
    title, bar = "attention of image tokens by the key's place in the picture", "times as much as evenly"
    plots.sheet(figures.absolute, out / "places.png", title, bar, middle=1.0)
    layers, title = range(len(figures.entropy)), "scores of each head: least, mean, largest"
    plots.scales(figures.scores, layers, out / "scores.png", title)
    plots.scales(figures.scores, [largest], out / "largest-scores.png", f"{title}, in the layer where they are largest")
    curves(report.by_depth(figures), out / "depth.png", across="layer")


def _looked(
    system: System, caption: str, ids: list[int], codes: Tensor, found: list[Word], tally: Tally, seed: int
) -> Looked:
    c, places = system.recipe.config, places_of(system, ids)
    size, grid = (c.num_layers, c.num_heads), c.image_grid
    received, uniform = torch.zeros(*size, grid**2), torch.zeros(c.num_layers, 1, grid**2)

    def see(seen: Seen) -> None:
        tally(seen, places)
        image = seen.weights[:, places.image][:, :, places.image]
        received[seen.layer, seen.heads] = image.mean(1).cpu()
        visible = seen.visible[places.image].float()
        uniform[seen.layer] = (visible / visible.sum(1, keepdim=True))[:, places.image].mean(0).cpu()

    maps = words.collect(system, ids, codes, found, seed=seed, see=see)
    best = words.contrast(maps).flatten(0, 1).topk(min(SHOWN, size[0] * size[1]), dim=0).indices.T  # [W, SHOWN]
    shown = maps.flatten(0, 1)[best, torch.arange(len(found))[:, None]].unflatten(-1, (grid, grid))
    heads = torch.stack([best // c.num_heads, best % c.num_heads], dim=-1)
    return Looked(caption, codes, found, heads, shown, received, uniform)


def _marked(out: Path, looked: Sequence[Looked], pictures: Tensor) -> list[Path]:
    """Writes each picture with the places that matter (figure 13): those that a head attends to most, of the heads that
    differ most from picture to picture (of a single one: from giving all the same), and those that attend to words."""
    received = torch.stack([one.received for one in looked])
    usual = received.mean(0) if len(looked) > 1 else looked[0].uniform
    differs = (received - usual).clamp_min(0).sum(-1).mean(0)
    best = differs.flatten().topk(min(SHOWN, differs.numel())).indices.tolist()
    paths = list[Path]()
    for number, (one, picture) in enumerate(zip(looked, pictures, strict=False), 1):
        times = (one.received / one.uniform).unflatten(-1, tuple(one.codes.shape))
        dots = [Panel(called(*divmod(n, differs.shape[1])), times.flatten(0, 1)[n], dots=True) for n in best]
        rows = [Row("attended", picture, dots)]
        for word, heads, maps in zip(one.words, one.heads.tolist(), one.maps, strict=True):
            titles = [f"{called(*at)}: {float(values.mean()):.0%}" for at, values in zip(heads, maps, strict=True)]
            rows.append(Row(word.text, picture, [Panel(*own) for own in zip(titles, maps, strict=True)]))
        words_of_it = file_name(one.caption)
        path = out / f"{number:03d}{words_of_it and '-'}{words_of_it}.png"
        paths.append(plots.marked(rows, path, one.caption))
    return paths
