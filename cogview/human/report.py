"""The report of a human evaluation: who was kept, a table, bars as in figure 10, super-resolution against none."""

import textwrap
from pathlib import Path
from typing import Any

from cogview.data.files import write_text
from cogview.human.answers import AGREE
from cogview.human.key import SCORES
from cogview.pictures import plainly, save_figure


def write(out: Path, figures: dict[str, Any]) -> str:
    """Writes report.md and scores.png; returns the first sentence."""
    bars(figures, out / "scores.png")
    verdict = _verdict(figures)
    write_text(out / "report.md", _page(verdict, figures))
    return verdict


def bars(figures: dict[str, Any], path: Path) -> Path:
    """A picture of three panels, bars grouped by model: how often it is the best; the overall score; the three aspects.
    Means, with standard deviations as error bars (figure 10)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    models, kinds, aspects = figures["models"], _kinds(figures), [name for name in SCORES if name != "overall"]
    colours, width = colormaps["tab10"], max(3.4, 0.8 + len(kinds))
    figure = Figure(figsize=(3 * width, 3.8), dpi=110, layout="constrained")
    first, second, third = figure.subplots(1, 3)
    first.bar(range(len(models)), [100 * found["best"] for found in models.values()], 0.5, color=colours(7))
    drawn = [_scored(third, kinds, name, n, len(aspects), colours(n)) for n, name in enumerate(aspects)]
    _scored(second, kinds, "overall", 0, 1, colours(7))
    figure.legend(drawn, aspects, loc="outside lower right", ncols=len(aspects), fontsize=8)
    titles = ("chosen as the best, %", f"overall, 1 to {SCORES['overall']}", f"three aspects, 1 to {SCORES['clarity']}")
    for axes, title, names in zip((first, second, third), titles, (models, kinds, kinds), strict=True):
        plainly(axes.title, title)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xticks(range(len(names)), [textwrap.fill(name, 12) for name in names], fontsize=8)
        for label, name in zip(axes.get_xticklabels(), names, strict=True):
            plainly(label, name)  # in fonts that have it; where lines end comes back when it is drawn
    return save_figure(figure, path)


def _scored(axes: Any, kinds: dict[str, Any], name: str, number: int, of: int, colour: Any) -> Any:
    """Bars of one score, the number-th of so many of each group."""
    found, width = [kind["scores"][name] for kind in kinds.values()], 0.8 / max(of, 1.6)
    places = [k + (number - (of - 1) / 2) * width for k in range(len(found))]
    axes.set_ylim(1, SCORES[name] + 0.5)
    axes.set_yticks(range(1, SCORES[name] + 1))
    means, deviations = ([one[part] for one in found] for part in ("mean", "deviation"))
    return axes.bar(places, means, width, yerr=deviations, color=colour, error_kw={"capsize": 2, "elinewidth": 1})


def _kinds(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of the models, of the A-B test's both kinds."""
    ab = figures.get("super_resolution")
    found = dict[str, Any]()
    for name, model in figures["models"].items():
        if ab is not None and ab["model"] == name:
            found |= {f"{name} {kind} SR": ab[kind] for kind in ("without", "with") if ab[kind] is not None}
        else:
            found[name] = model
    return found


def _verdict(figures: dict[str, Any]) -> str:
    shares = {name: model["best"] for name, model in figures["models"].items()}
    ordered = sorted(shares, key=shares.__getitem__, reverse=True)
    named = ", ".join(f"{name} {shares[name]:.1%}" for name in ordered)
    kept = figures["evaluators"]["kept"]
    return f"Chosen as the best in {figures['comparisons']:,} comparisons by {kept:,} evaluators: {named}."


def _page(verdict: str, figures: dict[str, Any]) -> str:
    who = figures["evaluators"]
    dropped = "".join(f"- evaluator {number}: {fault}\n" for number, fault in who["dropped"].items())
    ab = figures.get("super_resolution")
    return f"""{verdict}

# Human evaluation

Each evaluator scored a picture of each model for {figures["captions"]:,} captions, its clarity, texture and relevance
from 1 to {SCORES["clarity"]}, then overall from 1 to {SCORES["overall"]}, and chose the best of each caption (arXiv
2105.13290, section 4.2 and appendix E).

{_table(figures["models"])}

Mean ± standard deviation over all judgements.

![scores](scores.png)
{"" if ab is None else _against(ab)}
## Evaluators

{who["asked"]:,} were to be asked, {who["answered"]:,} answered, {who["kept"]:,} are kept: those who answered
everything, and of whose best pictures over {AGREE:.0%} have the highest overall score that they gave for the caption;
where several have it, any of these agrees.

{dropped or "Nobody who answered was dropped." + chr(10)}"""


def _table(kinds: dict[str, Any]) -> str:
    rows = [f"| | judgements | the best | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 3) + "|"]
    for name, found in kinds.items():
        scores = [f"{score['mean']:.2f} ± {score['deviation']:.2f}" for score in found["scores"].values()]
        rows.append(f"| {name} | {found['judgements']:,} | {found['best']:.1%} | {' | '.join(scores)} |")
    return "\n".join(rows)


def _against(ab: dict[str, Any]) -> str:
    kinds = {f"{ab['model']} {kind} SR": ab[kind] for kind in ("without", "with") if ab[kind] is not None}
    return f"""
## Super-resolution

Half of the pictures of {ab["model"]} came after super-resolution (SR), each to half of the evaluators (A-B test).

{_table(kinds)}

{_differences(ab)}
"""


def _differences(ab: dict[str, Any]) -> str:
    if ab["difference"] is None:
        return "No caption was judged both with and without it by those who are kept, so that neither can be compared."
    words = [
        f"{name} {found['difference']:+.2f} ({found['interval'][0]:+.2f} to {found['interval'][1]:+.2f})"
        for name, found in ab["difference"].items()
    ]
    some = f"the {ab['captions']:,} captions" if ab["captions"] > 1 else "the one caption"
    return f"""With it less without it, means over {some} judged both ways (95 % interval by the bootstrap over
captions): {", ".join(words)}."""
