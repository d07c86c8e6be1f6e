"""What the paper saw in its model (arXiv 2105.13290, appendix C), asked of another one. Each answer is computed."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cogview.attention.measure import PAIRS, Figures
from cogview.attention.names import called, offset_name, offset_of, strongest, times

HEAVY, CHECKERS, BROAD = 0.25, 0.1, 0.15  # of a head's attention
TWICE, FIRST = 2.0, 1.5  # times as much as evenly, or as another head
MORE, SMALLER, HALF = 1.25, 0.9, 0.5  # times as much, which chance alone does not make
REGIONS = ("centre", "upper half", "lower half")
Verdict = Literal["yes", "partly", "no"]


class Observation(NamedTuple):
    paper: str
    holds: Verdict
    here: str


def observations(figures: Figures) -> list[Observation]:
    return [
        _offsets(figures),
        _first_rows(figures),
        _checkers(figures),
        _broad(figures),
        _depth(figures),
        _separators(figures),
        _sparse(figures),
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
    beyond = [f.regions[name] - f.by_offset[name] for name in edges]
    found = (beyond[0] - beyond[1]).abs().nan_to_num(0.0)
    layer, head, _ = strongest(found, 1)[0]
    own, other = (float(f.regions[name][layer, head]) for name in edges)
    alone = [float(f.by_offset[name][layer, head]) for name in edges]
    count, avoiding = int((found >= CHECKERS).sum()), int((torch.stack(beyond) < 0).all(0).sum())
    here = (
        f"of their image attention tokens at the left and right edge give {own:.0%} to the edges, those inside "
        f"{other:.0%}, in {called(layer, head)}, which by its mean of each offset alone would be {alone[0]:.0%} and "
        f"{alone[1]:.0%}; in {count} of {found.numel()} heads the two are apart from that by {CHECKERS:.0%} or more. "
        f"In {avoiding} both give the edges less than that"
    )
    paper = "Checkers: tokens at the boundary attend differently from those at the centre (C.1)"
    return Observation(paper, "yes" if count else "no", here)


def _broad(f: Figures) -> Observation:
    """Beyond what all keys alike, and what a head's offsets alone, would give the region."""
    beyond = {name: f.regions[name] - torch.maximum(f.uniform[name], f.by_offset[name]) for name in REGIONS}
    found = {name: values.nan_to_num(0.0) >= BROAD for name, values in beyond.items()}
    parts = []
    for name, there in found.items():
        layer, head, _ = strongest(beyond[name].nan_to_num(-1.0), 1)[0]
        share, even, alone = (float(of[name][layer, head]) for of in (f.regions, f.uniform, f.by_offset))
        parts.append(
            f"the {name} {int(there.sum())}, most {called(layer, head)}: {share:.0%}, by its mean of each offset alone "
            f"{alone:.0%}, evenly {even:.0%}"
        )
    some = torch.stack(list(found.values())).any(0)
    deep = int(some[len(some) // 2 :].sum())
    here = (
        f"of what the lower half gives the image, {int(some.sum())} of {some.numel()} heads, {deep} of them in the "
        f"second half of the layers, give a region {BROAD:.0%} of it more than their offsets alone and than evenly "
        f"({'; '.join(parts)}). What stands in the pictures there counts too"
    )
    verdict: Verdict = "yes" if deep else "partly" if bool(some.any()) else "no"
    return Observation(
        "Broad bias: some heads of deeper layers attend to the centre, the upper or the lower half (C.1)", verdict, here
    )


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


def _last(values: Tensor) -> tuple[Tensor, Tensor, str]:
    """[L, H] of the last fifth of the layers, of those before (the same if there is one layer), and its name."""
    last = max(1, len(values) // 5)
    return values[-last:], values[:-last] if len(values) > last else values, "layer" if last == 1 else f"{last} layers"


def _separators(f: Figures) -> Observation:
    """Yes: much more at the end, where a quarter of the heads give half; partly: more there, where some give much."""
    shares = f.targets["separators"]
    end, before, name = _last(shares)
    late, early = float(end.mean()), float(before.mean())
    most = end >= HALF
    best = ", ".join(f"{called(*at)} {value:.0%}" for *at, value in strongest(shares))
    here = (
        f"separators get {late:.0%} in the last {name}, {early:.0%} before; most by {best}; {int(most.sum())} of "
        f"{most.numel()} heads at the end give half or more, {int((before >= HALF).sum())} of {before.numel()} before "
        f"({MORE:g} times as much, or more, would be a change)"
    )
    some = late >= MORE * early and bool((end >= HEAVY).any())
    many = late >= FIRST * early and float(most.double().mean()) >= 0.25
    verdict: Verdict = "yes" if many and some else "partly" if some else "no"
    paper = "In the last layers many heads attend to a few tokens only, such as separators, as a no-op (C.3)"
    return Observation(paper, verdict, here)


def _sparse(f: Figures) -> Observation:
    """By the entropy, which is 1 where all keys that are seen get the same."""
    end, before, name = _last(f.entropy)
    late, early = float(end.mean()), float(before.mean())
    layers = ", ".join(f"{value:.2f}" for value in f.entropy.mean(1).tolist())
    fewer = int((end <= SMALLER * early).sum())
    here = (
        f"the entropy, of 1 where attention is even, is {late:.2f} in the last {name}, {early:.2f} before (by layer "
        f"{layers}); {fewer} of {end.numel()} heads at the end have at most {SMALLER:g} times the mean before"
    )
    verdict: Verdict = "yes" if late <= SMALLER * early else "partly" if late < early and fewer else "no"
    return Observation("Attention becomes sparse in the last layers (C.3)", verdict, here)


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
