"""What the paper saw in its model (arXiv 2105.13290, appendix C), asked of another one. Each answer is computed."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cogview.attention.measure import PAIRS, Figures

HEAVY, CHECKERS = 0.25, 0.1  # of a head's attention
TWICE, FIRST = 2.0, 1.5  # times as much as evenly
Verdict = Literal["yes", "partly", "no"]


class Observation(NamedTuple):
    paper: str
    holds: Verdict
    here: str


def called(layer: int, head: int) -> str:
    """Of numbers from 0."""
    return f"layer {layer + 1} head {head + 1}"


def strongest(values: Tensor, count: int = 3) -> list[tuple[int, int, float]]:
    """Layer and head, from 0, and value of the largest of [L, H]."""
    best = values.flatten().topk(min(count, values.numel()))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(*divmod(n, values.shape[1]), value) for value, n in pairs]


def offset_of(figures: Figures, layer: int, head: int) -> tuple[int, int, float]:
    """dy, dx of the offset that gets the most of all that the image queries give, and what those that see it give."""
    shares = figures.offsets[layer, head]
    last = len(shares) - 1
    dy, dx = divmod(int(shares.argmax()), shares.shape[1])
    return dy - last, dx - last, float(figures.relative[layer, head, dy, dx])


def offset_name(dy: int, dx: int) -> str:
    """As in "the token above"."""
    names = {(0, 0): "the token itself", (0, -1): "its left neighbour", (-1, 0): "the token above"}
    names |= {(-1, 1): "the token above what is drawn"}
    if dx in (0, 1) and dy < -1:
        return f"the token {-dy} rows above{' what is drawn' if dx else ''}"
    return names.get((dy, dx), f"the token at ({dy}, {dx})")


def times(figures: Figures, region: str) -> Tensor:
    """[L, H]: how many times as much a region gets as if all that is seen got the same; 0 where there is no such place,
    in pictures of a few."""
    return (figures.regions[region] / figures.uniform[region]).nan_to_num(0.0)


def observations(figures: Figures, largest: int) -> list[Observation]:
    """largest: the layer of the largest scores, from 0."""
    return [
        _offsets(figures),
        _first_rows(figures),
        _checkers(figures),
        _depth(figures),
        _separators(figures),
        _text_scores(figures),
        _scales(figures, largest),
    ]


def _offsets(f: Figures) -> Observation:
    peaks, above = f.offsets.flatten(2).amax(2), _columns(f)
    heavy = int((peaks >= HEAVY).sum())
    layer, head, _ = strongest(peaks, 1)[0]
    dy, dx, share = offset_of(f, layer, head)
    columns = ", ".join(f"{called(*at)} {value:.1f}" for *at, value in strongest(above))
    here = (
        f"{heavy} of {peaks.numel()} heads give {HEAVY:.0%} or more to one offset; the most is {called(layer, head)}, "
        f"{share:.0%} to {offset_name(dy, dx)}. To the column above, or above what is drawn, "
        f"{int((above >= TWICE).sum())} give at least {TWICE:g} times as much as evenly ({columns})"
    )
    verdict: Verdict = "yes" if heavy else "partly" if bool((above >= TWICE).any()) else "no"
    return Observation(
        "Many heads attend heavily to fixed offsets, multiples of the row above all (C.1)", verdict, here
    )


def _columns(f: Figures) -> Tensor:
    """[L, H]: times evenly, what the column above gets, or that above what is drawn."""
    return torch.maximum(times(f, "column above"), times(f, "column above what is drawn"))


def _first_rows(f: Figures) -> Observation:
    found = times(f, "first rows")
    layer, head, value = strongest(found, 1)[0]
    share, count = float(f.regions["first rows"][layer, head]), int((found >= FIRST).sum())
    whole = float((f.targets["image"] + f.targets["itself"])[layer, head])
    here = (
        f"of what the lower half gives the image {called(layer, head)} gives {share:.0%} to the first quarter of the "
        f"rows, {value:.1f} times as much as evenly, and to the image {whole:.0%} of all; {count} of {found.numel()} "
        f"heads give {FIRST:g} times or more"
    )
    return Observation("Some heads attend to the first few rows (C.1)", "yes" if count else "no", here)


def _checkers(f: Figures) -> Observation:
    edges = "edges, from edges", "edges, from inside"
    beyond = [f.regions[name] - f.uniform[name] for name in edges]
    found = (beyond[0] - beyond[1]).abs().nan_to_num(0.0)
    layer, head, _ = strongest(found, 1)[0]
    own, other = (float(f.regions[name][layer, head]) for name in edges)
    even = [float(f.uniform[name][layer, head]) for name in edges]
    count = int((found >= CHECKERS).sum())
    here = (
        f"of their image attention tokens at the left and right edge give {own:.0%} to the edges, those inside "
        f"{other:.0%}, in {called(layer, head)} (evenly {even[0]:.0%} and {even[1]:.0%}); {count} of {found.numel()} "
        f"heads tell the two apart by {CHECKERS:.0%} or more"
    )
    paper = "Checkers: tokens at the boundary attend differently from those at the centre (C.1)"
    return Observation(paper, "yes" if count else "no", here)


def _halves(values: Tensor) -> tuple[float, float]:
    """Means of [L, H] of the first half of the layers, and of the others."""
    half = max(1, len(values) // 2)
    return float(values[:half].mean()), float(values[half:].mean()) if len(values) > half else float(values.mean())


def _depth(f: Figures) -> Observation:
    columns, peaks = _halves(_columns(f)), _halves(f.offsets.flatten(2).amax(2))
    here = (
        f"heads of the first half of the layers give their strongest offset {peaks[0]:.0%}, and the column above "
        f"{columns[0]:.1f} times as much as evenly, on average; the others {peaks[1]:.0%} and {columns[1]:.1f} times"
    )
    met = (peaks[0] > peaks[1]) + (columns[0] > columns[1])
    verdict: Verdict = "yes" if met == 2 else "partly" if met else "no"
    return Observation("Earlier layers attend by position, later ones by content (C.3)", verdict, here)


def _separators(f: Figures) -> Observation:
    shares = f.targets["separators"]
    last = max(1, len(shares) // 5)
    late, early = float(shares[-last:].mean()), float(shares[:-last].mean()) if len(shares) > last else 0.0
    heavy = (shares >= 0.5).sum(1)
    best = ", ".join(f"{called(*at)} {value:.0%}" for *at, value in strongest(shares))
    here = (
        f"separators get {late:.0%} in the last {'layer' if last == 1 else f'{last} layers'}, {early:.0%} before; "
        f"most by {best}; {int(heavy.sum())} heads give half or more, {int(heavy[-last:].sum())} of these at the end"
    )
    some = bool((shares >= HEAVY).any())
    verdict: Verdict = "yes" if late > 1.5 * early and some else "partly" if some else "no"
    paper = "In the last layers many heads attend to a few tokens only, such as separators, as a no-op (C.3)"
    return Observation(paper, verdict, here)


def _text_scores(f: Figures) -> Observation:
    text, others = (f.scores[name][..., [0, 2]].abs().amax(2) for name in PAIRS)
    smaller, ratio = float((text < others).double().mean()), float((text / others).mean())
    deviations = [float(f.scores[name][..., 3].mean()) for name in PAIRS]
    here = (
        f"in {smaller:.0%} of the heads the largest absolute score is smaller, {ratio:.0%} of the others' on average; "
        f"scores deviate by {deviations[0]:.2f}, the others by {deviations[1]:.2f}"
    )
    verdict: Verdict = "yes" if smaller >= 0.75 else "partly" if smaller > 0.5 else "no"
    return Observation("Text-to-text scores are smaller (C.4)", verdict, here)


def _scales(f: Figures, largest: int) -> Observation:
    mean, inside = f.scores["others"][largest, :, 1], f.scores["others"][largest, :, 3]
    between, within = float(mean.std(unbiased=False)), float(inside.mean())
    widest = float(f.scores["others"][..., 3].amax() / f.scores["others"][..., 3].amin())
    here = (
        f"in layer {largest + 1}, of the largest scores, the means of heads deviate by {between:.2f}, scores inside a "
        f"head by {within:.2f}; of all heads the widest scores deviate {widest:.1f} times as much as the narrowest"
    )
    paper = "Scales differ much between heads but little inside one (C.4)"
    return Observation(paper, "yes" if between > within else "no", here)
