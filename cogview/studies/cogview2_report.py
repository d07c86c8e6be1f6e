"""What the study of CogView2 found: figures, a page, and pictures of it."""

import itertools
from pathlib import Path
from typing import Any

from cogview.data.files import write_json, written_beside
from cogview.pictures import curves
from cogview.studies.cogview2_sampling import KEPT

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
    curves([("direct super-resolution, held out: nats per token", begun)], out / "beginnings.png")
    verdict = _verdict(figures)
    with written_beside(out / "report.md") as beside:
        beside.write_text(_page(verdict, facts), encoding="utf-8")
    return verdict


def _at(points: list[dict[str, float]], diversity: float) -> float:
    """What is right at a diversity, between the points of a way; the nearest outside of them."""
    ordered = sorted((p["diversity"], p["all"]) for p in points)
    for (x, y), (u, v) in itertools.pairwise(ordered):
        if x <= diversity <= u:
            return y + (v - y) * (diversity - x) / max(u - x, 1e-9)
    return ordered[0][1] if diversity < ordered[0][0] else ordered[-1][1]


def _verdict(figures: dict[str, Any]) -> str:
    points, rounds, fine = figures["constants"], figures["rounds"], figures["fine"]
    best = max(points, key=lambda p: p["all"])
    spread = max(p["clarity"] for p in points) - min(p["clarity"] for p in points)
    walked, parallel = rounds["one after the other"], rounds["direct and rounds"]
    faster = {size: walked["seconds"][size] / parallel["seconds"][size] for size in ("1", "8")}
    ways = figures["ways"]
    low = max(min(p["diversity"] for p in some) for some in ways.values())
    high = min(max(p["diversity"] for p in some) for some in ways.values())
    at = {name: _at(some, (low + high) / 2) for name, some in ways.items()}
    told = ", ".join(f"{name} {share:.0%}" for name, share in at.items())
    return (
        f"Textual attention: {points[0]['all']:.0%} right without, {best['all']:.0%} at c = {best['c']:g}; clarity "
        f"moves by {spread:.1f} dB over c from 0 to 3. At equal diversity ({(low + high) / 2:.2f}): {told}. Rounds are "
        f"{faster['1']:.1f} times as fast as one code after the other for one picture, {faster['8']:.1f} times for "
        f"eight, at {parallel['psnr']:.1f} and {walked['psnr']:.1f} dB; bicubic has {fine['bicubic']['psnr']:.1f}."
    )


def _row(name: str, of: dict[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{of[kind]:.0%}" for kind in ATTRIBUTES) + " |"


def _page(verdict: str, facts: dict[str, Any]) -> str:
    figures, names = facts["figures"], {"en": "English", "zh": "Chinese"}
    head = ["| | emoji | place | background | everything |", "|---|---:|---:|---:|---:|"]
    base, domain, cut = figures["base"], figures["domain"], figures["cut"]
    rows = [*head, _row("chance", base["chance"])]
    rows += [_row(f"CogLM, {word}", base[name]) for name, word in names.items()]
    rows += [_row(f"CogView of the same size and steps, {word}", figures["gpt"][name]) for name, word in names.items()]
    rows += [_row(f"CogLM stopped early, {word}", figures["early"][name]) for name, word in names.items()]
    rows.append(_row("tokenizer's bound", base["bound"]))
    larger = ["| | PSNR | recognised |", "|---|---:|---:|"]
    larger += [f"| {name} | {of['psnr']:.2f} | {of['all']:.0%} |" for name, of in figures["fine"].items()]
    timed = ["| | forwards | seconds, 1 picture | 8 pictures | PSNR | recognised |", "|---|---:|---:|---:|---:|---:|"]
    for name, way in figures["rounds"].items():
        seconds = " | ".join(f"{way['seconds'][size]:.2f}" for size in ("1", "8"))
        timed.append(f"| {name} | {way['forwards']} | {seconds} | {way['psnr']:.2f} | {way['recognised']:.0%} |")
    near = ", ".join(f"{name} {loss:.3f}" for name, loss in figures["local"].items())
    trained = "\n".join(
        f"- {name}: {m['steps']:,} steps in {m['seconds'] / 60:.1f} minutes, held-out loss {m['held_out']['loss']:.3f}"
        for name, m in facts["models"].items()
    )
    begun = {name: line[0][1] for name, line in figures["beginnings"].items()}
    ended = {name: line[-1][1] for name, line in figures["beginnings"].items()}
    fills = base["fills"]
    return f"""{verdict}

# CogView2 in small

## One CogLM

{chr(10).join(rows)}

It captions {base["captions"]:.0%} of unseen pictures rightly, and of masked emoji {fills["recognised, told"]:.0%} are
recognised in what it draws anew ({fills["recognised, chance"]:.0%} with another scene's caption). Finetuned to scenes
of two emoji, the one stopped early draws {domain["two, before"]:.0%} of those right before and
{domain["two, after"]:.0%} after, of scenes of one {domain["one, before"]:.0%} and {domain["one, after"]:.0%}.

## Clusters of codes

![sampling](sampling.png)

Drawn by the model stopped early at temperature 1: each way from little diversity, the mean distance between codes of
two pictures of one caption as a share of that between any two codes, to much. At {cut["places"]:,} places of unseen
pictures the likeliest cluster has {cut["codes"]:.0f} codes and {cut["probability"]:.0%} of the probability, of which
top-20 cuts away {cut["lost"]["20"]:.1%} and top-5 {cut["lost"]["5"]:.1%}.

## Textual attention

![textual attention](constant.png)

![pictures](constants.png)

Clarity is the PSNR of a picture to the scene that explains it best, whatever was asked for.

## Local attention with dense weights

Held-out nats an image token of the CogLM, and with causal windows in all its layers, without a step of training:
{near}.

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
