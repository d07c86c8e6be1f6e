"""What the study of CogView2 found: figures, a page, and pictures of it."""

import itertools
from pathlib import Path
from typing import Any

from cogview.data.files import write_json, write_text
from cogview.demo.demo import IMAGE
from cogview.demo.scenes import SIZE
from cogview.pictures import curves
from cogview.studies.cogview2_fine import WINDOWS
from cogview.studies.cogview2_sampling import KEPT, TEMPERATURES, TOP_CLUSTERS, TOP_K, TOP_P
from cogview_ops import pairs

CELLS = SIZE // IMAGE.downsample
DOMAIN = {"early": "before", "domain": "after", "longer": "after as many steps on all scenes"}
ATTRIBUTES = ("emoji", "place", "background", "all")
Lines = dict[str, tuple[list[float], list[float]]]


def write(out: Path, facts: dict[str, Any]) -> str:
    """Writes report.md, figures.json and plots into `out`; returns what they come to."""
    figures = facts["figures"]
    write_json(out / "figures.json", facts)
    ways: Lines = {
        name: ([point["diversity"] for point in points], [point["all"] for point in points])
        for name, points in figures["ways"].items()
    }
    lost = figures["cut"]["lost"]
    cut: Lines = {"of the likeliest cluster": ([float(k) for k in KEPT], [lost[str(k)] for k in KEPT])}
    panels = [("right, by diversity", ways), ("probability that top-k cuts away, by k", cut)]
    curves(panels, out / "sampling.png", across="")
    points = figures["constants"]
    lines = {name: ([p["c"] for p in points], [p[name] for p in points]) for name in ("all", "diversity")}
    clear: Lines = {"clarity": ([p["c"] for p in points], [p["clarity"] for p in points])}
    curves(
        [("right, and diversity", lines), ("PSNR to the scene that explains it", clear)],
        out / "constant.png",
        across="c",
    )
    begun = {name: ([float(x) for x, _ in line], [y for _, y in line]) for name, line in figures["beginnings"].items()}
    curves([("direct super-resolution, held out: nats per token", begun)], out / "beginnings.png", scale="log")
    verdict = _verdict(figures)
    write_text(out / "report.md", _page(verdict, facts))
    return verdict


def _at(points: list[dict[str, float]], diversity: float) -> float:
    """What is right at a diversity, between the points of a way, which lie on both sides."""
    ordered = sorted((p["diversity"], p["all"]) for p in points)
    return next(
        y + (v - y) * (diversity - x) / max(u - x, 1e-9)
        for (x, y), (u, v) in itertools.pairwise(ordered)
        if x <= diversity <= u
    )


def _verdict(figures: dict[str, Any]) -> str:
    points, rounds, fine = figures["constants"], figures["rounds"], figures["fine"]
    best = max(points, key=lambda p: p["all"])
    spread = max(p["clarity"] for p in points) - min(p["clarity"] for p in points)
    walked, parallel = rounds["one after the other"], rounds["direct and rounds"]
    faster = {size: walked["seconds"][size] / parallel["seconds"][size] for size in ("1", "8")}
    ways = figures["ways"]
    low = max(min(p["diversity"] for p in some) for some in ways.values())
    high = min(max(p["diversity"] for p in some) for some in ways.values())
    met = (low + high) / 2
    told = "Ways to draw differ in diversity at all temperatures."
    if low <= high:
        at = ", ".join(f"{name} {_at(some, met):.0%}" for name, some in ways.items())
        error = max(point["error"] for some in ways.values() for point in some)
        told = f"At equal diversity ({met:.2f}): {at}, with standard errors up to {error:.0%}."
    return (
        f"Textual attention: {points[0]['all']:.0%} right without, {best['all']:.0%} at c = {best['c']:g}; clarity "
        f"moves by {spread:.1f} dB over c from 0 to 3. {told} Rounds are "
        f"{faster['1']:.1f} times as fast as one code after the other for one picture, {faster['8']:.1f} times for "
        f"eight, at {parallel['psnr']:.1f} and {walked['psnr']:.1f} dB; bicubic has {fine['bicubic']['psnr']:.1f}."
    )


def _share(window: tuple[int, int]) -> float:
    """Of the pairs of cells that causal attention sees those in a window."""
    return pairs.local_2d((CELLS, CELLS), window, raster_causal=True) / pairs.causal(CELLS**2)


def _row(name: str, of: dict[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{of[kind]:.0%}" for kind in ATTRIBUTES) + " |"


def _page(verdict: str, facts: dict[str, Any]) -> str:
    figures, names = facts["figures"], {"en": "English", "zh": "Chinese"}
    head = ["| | emoji | place | background | everything |", "|---|---:|---:|---:|---:|"]
    base, domain, cut, sizes = figures["base"], figures["domain"], figures["cut"], facts["sizes"]
    rows = [*head, _row("chance", base["chance"])]
    rows += [_row(f"CogLM, {word}", base[name]) for name, word in names.items()]
    rows += [_row(f"CogView of the same size and steps, {word}", figures["gpt"][name]) for name, word in names.items()]
    early = {"early": "CogLM stopped early", "early-gpt": "CogView of as many steps"}
    rows += [_row(f"{of}, {word}", figures[kind][name]) for kind, of in early.items() for name, word in names.items()]
    rows.append(_row("tokenizer's bound", base["bound"]))
    larger = ["| | PSNR | recognised |", "|---|---:|---:|"]
    larger += [f"| {name} | {of['psnr']:.2f} | {of['all']:.0%} |" for name, of in figures["fine"].items()]
    timed = ["| | forwards | seconds, 1 picture | 8 pictures | PSNR | recognised |", "|---|---:|---:|---:|---:|---:|"]
    for name, way in figures["rounds"].items():
        seconds = " | ".join(f"{way['seconds'][size]:.2f}" for size in ("1", "8"))
        timed.append(f"| {name} | {way['forwards']} | {seconds} | {way['psnr']:.2f} | {way['recognised']:.0%} |")
    near = ", ".join(f"{name} {loss:.3f}" for name, loss in figures["local"].items() if name != "trained")
    trained = "\n".join(
        f"- {name}: {m['steps']:,} steps in {m['seconds'] / 60:.1f} minutes, held-out loss {m['held_out']['loss']:.3f}"
        for name, m in facts["models"].items()
    )
    cells, window = " x ".join([str(CELLS)] * 2) + " codes", " x ".join(map(str, WINDOWS[0]))
    begun = {name: line[0][1] for name, line in figures["beginnings"].items()}
    ended = {name: line[-1][1] for name, line in figures["beginnings"].items()}
    fills, drawn = base["fills"], sizes["tested"] * sizes["candidates"]
    error = max(point["error"] for some in figures["ways"].values() for point in some)
    other = ["| | two emoji | one |", "|---|---:|---:|"]
    other += [f"| {DOMAIN[name]} | {of['two']:.0%} | {of['one']:.0%} |" for name, of in domain.items()]
    return f"""{verdict}

# CogView2 in small

## One CogLM

{chr(10).join(rows)}

It captions {base["captions"]:.0%} of unseen pictures rightly (of another picture {base["captions, chance"]:.0%} of the
captions are right), which CogView does after a finetuning only. Of masked emoji {fills["recognised, told"]:.0%} are
recognised in what it draws anew ({fills["recognised, chance"]:.0%} with another scene's caption); the tokenizer's bound
is that of the table.

Finetuned to one domain, scenes of two emoji; scenes of each kind that are drawn right:

{chr(10).join(other)}

## Clusters of codes

![sampling](sampling.png)

Drawn by the model stopped early: top-{TOP_K}, top-p {TOP_P:g} and the {TOP_CLUSTERS} likeliest clusters, each at
temperatures from {TEMPERATURES[0]:g} to {TEMPERATURES[-1]:g}, of all codes or of those inside a cluster. Diversity is
the mean distance between codes of two pictures of one caption as a share of that between any two codes. A point is of
{drawn} pictures; over captions its standard error is {error:.0%} at most.

Of {cut["clusters"]} clusters the largest has {cut["largest"]} codes. At {cut["places"]:,} places of unseen pictures
the likeliest cluster has {cut["codes"]:.0f} codes and {cut["probability"]:.0%} of the probability, of which top-20 cuts
away {cut["lost"]["20"]:.1%} and top-5 {cut["lost"]["5"]:.1%}.

## Textual attention

![textual attention](constant.png)

![pictures](constants.png)

Clarity is the PSNR of a picture to the scene that explains it best, whatever was asked for.

## Local attention with dense weights

Held-out nats an image token of the CogLM, and with causal windows in all its layers, without a step of training:
{near}. After {sizes["domain_steps"]:,} steps with {window}: {figures["local"]["trained"]:.3f}. On {cells} windows of
{window} hold {_share(WINDOWS[0]):.0%} of the pairs that dense causal attention sees, those of 9 x 9
{_share(WINDOWS[-1]):.0%}.

## Super-resolution

![beginnings](beginnings.png)

Direct super-resolution begins at {begun["from CogLM"]:.2f} nats with CogLM's weights, at {begun["new weights"]:.2f}
with new ones, and comes to {ended["from CogLM"]:.3f} and {ended["new weights"]:.3f}. Held-out pictures, the likeliest
codes:

{chr(10).join(larger)}

## Rounds against one code after the other

{chr(10).join(timed)}

The same 24 x 24 codes from the same coarse ones, the likeliest; the model that draws them one after the other, with a
cache, begins with CogLM's weights too and was trained as many steps as either other one. Medians of
{facts["threads"]} threads.

## How

{trained}
"""
