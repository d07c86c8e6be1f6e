"""The report of an evaluation: the paper's table 1, the curve of its figure 9, and what the scores are by."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from cogview.data.files import write_json, write_text
from cogview.evaluation.distances import splits_of
from cogview.evaluation.networks import Network
from cogview.labels import printable
from cogview.markdown import table
from cogview.pictures import curves

OTHERS, RECOVERED = "other true pictures", "recovered ground truth"
"""Rows of every report."""
_RANKED = """As ranked: CapLoss of the codes that were drawn, by which the best were chosen, so that it never rises with
more candidates. CapLoss itself may: it is of the codes that the image tokenizer makes of the chosen pictures."""
_INTERVALS = "The intervals are of the bootstrap over captions, for networks of at most 512 features."


def described(network: Network) -> dict[str, Any]:
    """What figures have to say about a network."""
    known = {name: getattr(network, name) for name in ("name", "sha256", "features", "classes")}
    return known | {"trained": None if network.trained is None else asdict(network.trained)}


def write(out: Path, figures: dict[str, Any], drawn: str) -> str:
    """Writes report.md, figures.json and, of several candidates, candidates.png; returns the first sentence. drawn: the
    row of the model that is evaluated."""
    if figures["by_candidates"]:
        curves(_panels(figures), out / "candidates.png", across="candidates")
    write_json(out / "figures.json", figures)
    verdict = _verdict(figures, drawn)
    write_text(out / "report.md", _page(verdict, figures))
    return verdict


def _panels(figures: Mapping[str, Any]) -> list[tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """FID-0, the Inception Score and CapLoss over the number of candidates, those that there are, beside what is
    recovered."""
    by_count: dict[int, dict[str, Any]] = figures["by_candidates"]
    recovered = figures["rows"][RECOVERED]
    bounds = {"fid": recovered["fid"]["0"], "is": recovered["is"].get("0", (0,))[0], "caploss": recovered["caploss"]}
    counts, panels = [float(count) for count in by_count], []
    for title, name in (("FID-0", "fid"), ("Inception Score", "is"), ("CapLoss", "caploss")):
        values = [some[name] for some in by_count.values()]
        if None not in values:
            lines = {"the best by CapLoss": (counts, values), RECOVERED: (counts, [bounds[name]] * len(counts))}
            if name == "caploss":
                lines["as it was ranked"] = counts, [some["ranked"] for some in by_count.values()]
            panels.append((title, lines))
    return panels


def _verdict(figures: Mapping[str, Any], drawn: str) -> str:
    fids = {name: f"{row['fid']['0']:.3g}" for name, row in figures["rows"].items()}
    scale = ", ".join(f"{name} to {fids[name]}" for name in (RECOVERED, OTHERS) if name in fids)
    count, network = f"{figures['pictures']:,} captions", _shown(figures["network"]["name"])
    return f"{_shown(drawn)}, of {count}, comes to an FID-0 of {fids[drawn]} by {network}; {scale}."


def _page(verdict: str, figures: Mapping[str, Any]) -> str:
    rows, radii = figures["rows"], [f"{radius:g}" for radius in figures["settings"]["radii"]]
    parts = [verdict, "# Pictures of captions, by machine", _scores(rows, radii), _legend(figures)]
    if small := _small(rows, figures["network"]["features"]):
        parts.append(small)
    if figures["network"]["classes"]:
        header = ["Inception Score at radius", *radii]
        parts.append(table([header] + [[_shown(n), *(_mean(row["is"][r]) for r in radii)] for n, row in rows.items()]))
    else:
        parts.append(f"There is no Inception Score: {_shown(figures['network']['name'])} has no classes.")
    if by_count := figures["by_candidates"]:
        parts.append("Of the best of so many candidates by CapLoss, without blur, as in the paper's figure 9:")
        header = ["candidates", "FID-0", f"above that of {max(by_count)}, 95 %", "IS", "CapLoss", "as ranked"]
        lines = [
            [
                str(n),
                f"{x['fid']:.3g}",
                _ends(x["fid_beyond_all"]),
                *(_number(x[k]) for k in ("is", "caploss", "ranked")),
            ]
            for n, x in by_count.items()
        ]
        parts += [table([header, *lines]), _RANKED, _INTERVALS, "![candidates](candidates.png)"]
    return "\n\n".join([*parts, "![the first captions](sheet.png)", "## How", _how(figures)]) + "\n"


def _scores(rows: Mapping[str, Any], radii: Sequence[str]) -> str:
    """As the paper's table 1."""
    lines = [["Model", "pictures", *(f"FID-{radius}" for radius in radii), "IS", "CapLoss", "CMMD"]]
    for name, row in rows.items():
        fids = [f"{row['fid'][radius]:.3g}" for radius in radii]
        others = [_mean(row["is"].get("0")), _number(row["caploss"]), _three(row["cmmd"])]
        lines.append([_shown(name), f"{row['pictures']:,}", *fids, *others])
    return table(lines)


def _legend(figures: Mapping[str, Any]) -> str:
    count, side = figures["pictures"], figures["side"]
    parts = "of all of them" if splits_of(count) == 1 else f"mean and deviation of {splits_of(count)} parts"
    return f"""FID-k: Fréchet distance to the true pictures of the same {count:,} captions, all of them behind a
Gaussian filter whose standard deviation is k of {side} pixels (Pillow's radius). IS: Inception Score, {parts}.
CapLoss: mean over captions, in nats a text token, of the codes that the image tokenizer makes of the pictures, which
need not be those that were drawn and ranked. CMMD: biased estimate, times 1000. Lower is better, of IS higher. What is
recovered went through the image tokenizer and back, the best that a model of its codes can do; other true pictures are
of other captions, and say what chance alone comes to."""


def _how(figures: Mapping[str, Any]) -> str:
    settings, model = figures["settings"], _shown(figures["model"])
    sampling = ", ".join(f"{name} {value:g}" for name, value in figures["sampling"].items())
    left = ", ".join(f"{n:,} {_shown(kind)}" for kind, n in figures["left_out"].items()) or "none"
    return f"""- Drawn by {model}: {sampling}; candidates {settings["candidates"]}, seed {settings["seed"]}.
- CapLoss by {_shown(figures["judge"] or "no model, which --judge names")}.
- FID and IS by {_network(figures["network"])}.
- CMMD by {_network(figures["cmmd_network"])}.
- Pairs left out: {left}. captions.jsonl has the captions by their pictures' numbers.
- Scores by another network, of other pictures or of another number of them are not comparable with these."""


def _small(rows: Mapping[str, Any], features: int) -> str:
    """A warning where covariances of so many features cannot be whole."""
    fewest = min(row["pictures"] for row in rows.values())
    if fewest > features:
        return ""
    return (
        f"**{fewest:,} pictures are no more than the network's {features:,} features: their covariance is singular, "
        "and FID far too large. Take more pictures, or look at CMMD.**"
    )


def _network(network: Mapping[str, Any]) -> str:
    classes = f"{network['classes']:,} classes" if network["classes"] else "no classes"
    known = f"{_shown(network['name'])}, {network['features']:,} features, {classes}, sha256 `{network['sha256']}`"
    if (trained := network["trained"]) is None:
        return known
    return (
        f"{known}, trained on {trained['pictures']:,} pictures to tell {_shown(' and '.join(trained['fields']))} (data "
        f"of sha256 `{_shown(trained['data'])}`); it has {trained['right']:.1%} of {trained['held_out']:,} others right"
    )


def _mean(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return "–"
    mean, deviation = score
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _ends(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _three(value: float) -> str:
    """Three digits of any size, 0.250 or 3.50e-05."""
    return f"{value:#.3g}".removesuffix(".")


def _shown(text: str) -> str:
    """A name from outside, as Markdown shows it."""
    return escape(printable(text), quote=False).replace("|", "&#124;").replace("`", "&#96;")
