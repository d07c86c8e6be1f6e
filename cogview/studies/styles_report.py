"""The report of the study of styles: a page, its figures, pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.data.files import write_json, write_text
from cogview.demo.things import FILTERS, STYLES, things
from cogview.pictures import contact_sheet, curves

MODELS = {"before": "before", "own": "finetuned to it", "all": "finetuned to all three"}
SHARES = ("style", "thing", "both")
KINDS = {"held out": "never seen in the style", "seen": "seen in it, without their names"}


def write(out: Path, facts: dict[str, Any], rows: Sequence[tuple[str, list[Tensor]]]) -> str:
    """Writes everything into `out`; returns the verdict."""
    verdict = _verdict(facts["figures"])
    contact_sheet(rows, out / "sheet.png", columns=1, zoom=1, note="things whose picture in the style was held out")
    curves(_along(facts["figures"]), out / "steps.png", across="steps of the finetuning")
    write_json(out / "figures.json", facts | {"verdict": verdict})
    write_text(out / "report.md", _page(verdict, facts))
    return verdict


def _along(figures: dict[str, Any]) -> list[tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    panels = []
    for style in STYLES:
        lines = dict[str, tuple[list[float], list[float]]]()
        for name, points in figures[style]["along"].items():
            told = {"own": "", "all": " (all three)"}[name]
            steps = [float(point["steps"]) for point in points]
            lines |= {f"{of}{told}": (steps, [point[of] for point in points]) for of in SHARES}
        panels.append((f"{style}: share of pictures", lines))
    return panels


def _verdict(figures: dict[str, Any]) -> str:
    def of_each(name: str, of: str) -> str:
        return ", ".join(f"{figures[style]['held out'][name][of]:.0%}" for style in STYLES)

    def told(name: str) -> str:
        return (
            f"{of_each(name, 'style')} in the style, {of_each(name, 'thing')} the thing, {of_each(name, 'both')} both"
        )

    unasked = ", ".join(f"{figures[style]['not asked for']['style']:.0%}" for style in STYLES)
    return (
        f"Of things that the finetuning never showed in the style, by the judges, of {', '.join(STYLES)}: "
        f"{told('own')}. Before: {told('before')}. By one finetuning to all three styles: {told('all')}. Captions that "
        f"do not ask for the style get it, from what was finetuned to it, in {unasked}."
    )


def _equal_steps(figures: dict[str, Any]) -> list[str]:
    """Rows: both finetunings at the steps at which they were asked, means over the styles."""
    rows = []
    for n, point in enumerate(figures[STYLES[0]]["along"]["own"]):
        means = [
            sum(figures[style]["along"][name][n][of] for style in STYLES) / len(STYLES)
            for name in ("own", "all")
            for of in SHARES
        ]
        rows.append(f"| {point['steps']} | " + " | ".join(f"{mean:.0%}" for mean in means) + " |")
    return rows


def _page(verdict: str, facts: dict[str, Any]) -> str:
    figures, sizes, base = facts["figures"], facts["sizes"], facts["models"]["gpt"]
    lines = ["| | | style | thing | both | pictures |", "|---|---|---:|---:|---:|---:|"]
    for style in STYLES:
        for kind, told in KINDS.items():
            for name, model in MODELS.items():
                f = figures[style][kind][name]
                lines.append(f"| {style}: {told} | {model} | {_shares(f)} | {f['pictures']} |")
        f = figures[style]["not asked for"]
        lines.append(f"| {style}, not asked for: never seen in it | finetuned to it | {_shares(f)} | {f['pictures']} |")
    true, plain = figures["true"], figures["plain"]
    styles, count = len(FILTERS) + len(STYLES) + 1, len(things())
    held = ", ".join(f"{n} of {style}" for style, n in facts["pairs"].items())
    return f"""{verdict}

# Styles

A model that knows {count} things, by captions as "a fox" and, in the styles of {len(FILTERS)} filters, as "a fox of
sepia style", is finetuned to pictures of things drawn by another hand, all of them called "an image of flat style".
Drawn is "a fox of flat style".

{chr(10).join(lines)}

Shares of the pictures that are in the style, of {styles}, that show the thing, of {count}, and both, as two networks
say; in brackets standard errors over things. "Not asked for": captions as "a fox". Of true pictures after the image
tokenizer, on backgrounds that they were not trained on, the networks say {true["style"]:.0%} and {true["thing"]:.0%}
rightly; of plain things ("a fox") that the model draws before the finetuning they call {plain["thing"]:.0%} the thing,
but {plain["style"]:.0%} plain: a share of a style is what looks like it to them.

![things whose picture in the style was held out](sheet.png)

What is learned of the style and forgotten of the things, of those held out in the style:

![shares over the steps of the finetuning](steps.png)

After as many steps of 16 pictures the finetunings to one style, and to all three, give in the mean:

| steps | style | thing | both | all three: style | thing | both |
|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(_equal_steps(figures))}

## How

- Styles: blob (Noto before 2017), flat and contrast (Fluent); {held} are held out. On seven
  backgrounds, which captions do not tell.
- Image tokenizer: {sizes["image_steps"]:,} steps, on pictures of all styles but those that are held out.
- The model: preset tiny, {base["steps"]:,} steps in {base["seconds"] / 60:.1f} minutes. Finetuned in
  {sizes["style_steps"]} steps of 16 pictures, to all three styles in {len(STYLES) * sizes["style_steps"]}. Drawn at
  temperature 0.5 with textual attention 1.
- Threads: {facts["threads"]}.
"""


def _shares(figures: dict[str, float]) -> str:
    return " | ".join(f"{figures[of]:.0%} ({figures[f'{of} error']:.0%})" for of in SHARES)
