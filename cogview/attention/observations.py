"""What the paper saw in its model (arXiv 2105.13290, appendix C), asked of another one. Each answer is computed."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cogview.attention.measure import PAIRS, Figures, regions_of

HEAVY, CHECKERS = 0.25, 0.1  # of a head's attention
TWICE, FIRST = 2.0, 1.5  # times as much as evenly, or as another head
MORE, SMALLER, HALF = 1.25, 0.9, 0.5  # times as much, which chance alone does not make
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


def observations(figures: Figures) -> list[Observation]:
    return [
        _offsets(figures),
        _first_rows(figures),
        _checkers(figures),
        _depth(figures),
        _separators(figures),
        _text_scores(figures),
        _scales(figures),
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
    by_offset = [of_offsets_alone(f, name) for name in edges]
    beyond = [f.regions[name] - own for name, own in zip(edges, by_offset, strict=True)]
    found = (beyond[0] - beyond[1]).abs().nan_to_num(0.0)
    layer, head, _ = strongest(found, 1)[0]
    own, other = (float(f.regions[name][layer, head]) for name in edges)
    alone = [float(share[layer, head]) for share in by_offset]
    count = int((found >= CHECKERS).sum())
    here = (
        f"of their image attention tokens at the left and right edge give {own:.0%} to the edges, those inside "
        f"{other:.0%}, in {called(layer, head)}, which by its mean of each offset alone would be {alone[0]:.0%} and "
        f"{alone[1]:.0%}; in {count} of {found.numel()} heads the two are apart from that by {CHECKERS:.0%} or more"
    )
    paper = "Checkers: tokens at the boundary attend differently from those at the centre (C.1)"
    return Observation(paper, "yes" if count else "no", here)


def of_offsets_alone(f: Figures, region: str) -> Tensor:
    """[L, H]: the share of its image attention that a head would give a region if it gave every key before the query,
    or the query itself, what it gives its offset on average, wherever the query stands."""
    g = f.relative.shape[2]
    y, x = torch.arange(g**2) // g, torch.arange(g**2) % g
    offset = (y - y[:, None] + g - 1) * (2 * g - 1) + x - x[:, None] + g - 1
    queries, keys = regions_of(g)[region]
    asked = queries & torch.ones(g**2, g**2, dtype=torch.bool).tril()
    profile = f.relative.flatten(2).nan_to_num(0.0)
    given = [profile @ offset[some].bincount(minlength=g * (2 * g - 1)).double() for some in (asked & keys, asked)]
    return given[0] / given[1]


def _halves(values: Tensor) -> tuple[float, float]:
    """Means of [L, H] of the first half of the layers, and of the others."""
    half = max(1, len(values) // 2)
    return float(values[:half].mean()), float(values[half:].mean()) if len(values) > half else float(values.mean())


def _depth(f: Figures) -> Observation:
    """Content is what the caption's words say: no other content of attention is measured here."""
    columns, peaks = _halves(_columns(f)), _halves(f.offsets.flatten(2).amax(2))
    words = _halves(f.targets["words"])
    here = (
        f"heads of the first half of the layers give their strongest offset {peaks[0]:.0%}, and the column above "
        f"{columns[0]:.1f} times as much as evenly, on average, the others {peaks[1]:.0%} and {columns[1]:.1f} times; "
        f"words get {words[0]:.0%} in the first half, {words[1]:.0%} in the other ({MORE:g} times as much, or less, "
        f"would be a change)"
    )
    position = peaks[0] >= MORE * peaks[1] and columns[0] >= MORE * columns[1]
    content = words[1] > 0 and words[1] >= MORE * words[0]
    verdict: Verdict = "yes" if position and content else "partly" if position or content else "no"
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
    """By the root mean square of a score: of largest ones the larger is where there are more pairs."""
    text, others = (_scale(f, name) for name in PAIRS)
    smaller = text <= SMALLER * others
    here = (
        f"in {int(smaller.sum())} of {text.numel()} heads the root mean square of the scores is at most {SMALLER:g} "
        f"times the others'; on average it is {float(text.mean()):.2f}, the others' {float(others.mean()):.2f}"
    )
    share = float(smaller.double().mean())
    verdict: Verdict = "yes" if share >= 0.75 else "partly" if share > 0.25 else "no"
    return Observation("Text-to-text scores are smaller (C.4)", verdict, here)


def _scale(f: Figures, pairs: str) -> Tensor:
    """[L, H]: the root mean square of a head's scores, what it multiplies q and k to."""
    return (f.scores[pairs][..., 1].square() + f.scores[pairs][..., 3].square()).sqrt()


def _scales(f: Figures) -> Observation:
    """In C.4 scores are large and vary little: most of a head's scale is what all of its scores have in common."""
    scales, inside = _scale(f, "others"), f.scores["others"][..., 3]
    between, within = scales.amax(1) / scales.amin(1), (inside / scales).mean(1)
    wide, narrow = between >= TWICE, within <= HALF
    layer = int(between.argmax())
    here = (
        f"the largest root mean square of a head's scores is {float(between.min()):.1f} to {float(between.max()):.1f} "
        f"times the smallest of its layer (most in layer {layer + 1}; {TWICE:g} times or more in {int(wide.sum())} of "
        f"{len(wide)} layers); inside a head scores deviate by {float(within.min()):.0%} to {float(within.max()):.0%} "
        f"of it (at most {HALF:.0%} in {int(narrow.sum())})"
    )
    both, either = (float(some.double().mean()) for some in (wide & narrow, wide | narrow))
    verdict: Verdict = "yes" if both >= 0.5 else "partly" if either >= 0.5 else "no"
    return Observation("Scales differ much between heads but little inside one (C.4)", verdict, here)
