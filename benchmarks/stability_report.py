"""Results of the stability experiment: kept, judged, drawn. Every verdict is computed from the recorded values."""

import json
from pathlib import Path
from typing import Any

from cogview.data.files import write_text, written_beside

LIMIT = 65504.0  # the largest float16
STYLES = {  # colour and width: lines of variants that behave alike stay visible below each other
    "pre-LN": ("#d62728", 4.0),
    "pre-LN + PB-relax": ("#ff9f1c", 1.6),
    "Sandwich-LN": ("#1f77b4", 4.0),
    "Sandwich-LN + PB-relax": ("#2a9d3a", 1.6),
}


def save(results: dict[str, Any], path: Path) -> None:
    """JSON with a line for each step."""
    runs = []
    for run in results["runs"]:
        steps = ",\n  ".join(json.dumps(step, separators=(",", ":")) for step in run["steps"])
        runs.append(
            json.dumps(run | {"steps": []}, ensure_ascii=False).replace('"steps": []', f'"steps": [\n  {steps}]')
        )
    head = json.dumps(results | {"runs": []}, ensure_ascii=False)
    write_text(path, head.replace('"runs": []', '"runs": [\n ' + ",\n ".join(runs) + "]") + "\n")


def load(path: Path, preset: dict[str, Any]) -> dict[str, Any]:
    """ValueError when the runs are of other settings."""
    results = json.loads(path.read_text())
    wanted = json.loads(json.dumps(preset))
    if results["preset"] != wanted:
        raise ValueError(f"{path} holds runs of {results['preset']}, expected {wanted}: --again replaces them")
    return results


def end(run: dict[str, Any]) -> int | None:
    """The step, from 1, from which on the loss was not finite; None when the run carried on."""
    finite = [i for i, step in enumerate(run["steps"], 1) if step["loss"] is not None]
    last = max(finite, default=0)
    return None if last == len(run["steps"]) else last + 1


def largest(step: dict[str, Any], place: str) -> float:
    """Over all layers; what is not finite does not count."""
    return max((x for x in step[place] if x is not None), default=0.0)


def reached(run: dict[str, Any], place: str) -> float:
    return max(largest(step, place) for step in run["steps"])


def note(step: dict[str, Any]) -> str:
    if step["overflow"]:
        return "overflow: {place} of layer {layer}".format(**step["overflow"])
    return f"loss {step['loss']:.2f}, main branch {largest(step, 'main'):.3g}, scores {largest(step, 'scores'):.3g}"


def verdict(run: dict[str, Any]) -> str:
    """What became of a run, in a few words."""
    last, steps = end(run), run["steps"]
    before = [i for i, step in enumerate(steps[: last and last - 1], 1) if step["overflow"]]
    earlier = f"; {len(before)} overflows without consequence from step {before[0]} on" if before else ""
    if last is None:
        losses = [step["loss"] for step in steps if step["loss"] is not None]
        return f"carries on, {len(steps)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}{earlier}"
    return "overflows at step {0}, {place} of layer {layer}{1}".format(last, earlier, **steps[last - 1]["overflow"])


def summary(runs: list[dict[str, Any]]) -> str:
    """Whether only both together carry on, among the runs of one rate."""
    alive = [run["variant"] for run in runs if end(run) is None]
    if len(runs) < len(STYLES):
        return f"{len(runs)} of {len(STYLES)} variants have run"
    if alive == ["Sandwich-LN + PB-relax"]:
        return "only both together carry on"
    if len(alive) == len(runs):
        return "all carry on, so far nothing separates them"
    return "it is not only both together that carry on, " + ("but " + " and ".join(alive) if alive else "none does")


def by_rate(results: dict[str, Any]) -> dict[float, list[dict[str, Any]]]:
    rates = dict.fromkeys(run["rate"] for run in results["runs"])
    return {rate: [run for run in results["runs"] if run["rate"] == rate] for rate in rates}


def text(results: dict[str, Any]) -> str:
    lines = [_title(results)]
    for rate, runs in by_rate(results).items():
        lines.append(f"Learning rate {rate:g}: {summary(runs)}")
        for run in runs:
            sizes = ", ".join(f"{place} {reached(run, place):.3g}" for place in ("main", "branch", "scores"))
            lines.append(f"  {run['variant']}: {verdict(run)} ({run['seconds']:.0f} s; largest finite {sizes})")
    return "\n".join(lines)


def _title(results: dict[str, Any]) -> str:
    p = results["preset"]
    return f"{p['layers']} layers, hidden size {p['hidden']}, batch {p['batch']}, float16; {results['facts']['device']}"


def draw(results: dict[str, Any], path: Path) -> Path:
    """A PNG: for every rate the largest values over steps, and over layers in the last finite step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = by_rate(results)
    figure = Figure(figsize=(13, 0.5 + 4.4 * len(rates)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(results), fontsize=10, color="#555555")
    rows = figure.subfigures(len(rates), 1, squeeze=False)[:, 0]
    for row, (rate, runs) in zip(rows, rates.items(), strict=True):
        row.suptitle(f"Learning rate {rate:g}: {summary(runs)}", fontsize=12, fontweight="bold")
        axes = row.subplots(1, 3)
        lines = [_draw_run(run, axes) for run in runs]
        titles = (
            "main branch, largest layer",
            "attention scores, largest layer",
            "main branch by layer, last finite step",
        )
        longest = max(len(run["steps"]) for run in runs)
        ends = ("step", longest), ("step", longest), ("layer", results["preset"]["layers"])
        for ax, title, (along, last) in zip(axes, titles, ends, strict=True):
            ax.axhline(LIMIT, color="black", linestyle="--", linewidth=0.9)
            ax.text(0.01, LIMIT, "largest float16", transform=ax.get_yaxis_transform(), va="bottom", size=8)
            ax.set(title=title, xlabel=along, xlim=(0, last + 1), yscale="log", ylim=(None, 4 * LIMIT))
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("largest absolute value")
        labels = [f"{run['variant']}: {verdict(run)}" for run in runs]
        row.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=100)
    return path


def _draw_run(run: dict[str, Any], axes: Any) -> Any:
    """A run's lines, with a cross where it ended; returns one of them."""
    last, (colour, width) = end(run), STYLES[run["variant"]]
    style = {"color": colour, "linewidth": width, "solid_capstyle": "round"}
    finite = run["steps"][: last and last - 1] or run["steps"][:1]  # of a first step that overflows: what was finite
    for ax, place in zip(axes, ("main", "scores"), strict=False):
        (line,) = ax.plot(range(1, len(finite) + 1), [largest(step, place) for step in finite], **style)
        if last is not None and (run["steps"][last - 1]["overflow"]["place"] == "attention scores") == (
            place == "scores"
        ):
            ax.plot([len(finite), last], [largest(finite[-1], place), LIMIT], **style)
            ax.plot(last, LIMIT, "X", markersize=7 + 2 * width, color=colour)
    axes[2].plot(range(1, len(finite[-1]["main"]) + 1), finite[-1]["main"], **style)
    return line
