"""The report of the study of styles: a page, its figures, pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.data.files import write_json, write_text
from cogview.demo.things import FILTERS, STYLES, things
from cogview.pictures import contact_sheet, curves

MODELS = {"before": "before", "own": "finetuned to it", "all": "finetuned to all three"}
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
        points = figures[style]["along"]
        steps = [point["steps"] for point in points]
        lines = {of: (steps, [point[of] for point in points]) for of in ("style", "thing", "both")}
        panels.append((f"{style}: share of pictures", lines))
    return panels


def _mean(figures: dict[str, Any], kind: str, name: str, of: str) -> float:
    return sum(figures[style][kind][name][of] for style in STYLES) / len(STYLES)


def _verdict(figures: dict[str, Any]) -> str:
    style, thing, both = (
        {name: f"{_mean(figures, 'held out', name, of):.0%}" for name in MODELS} for of in ("style", "thing", "both")
    )
    return (
        f"Of things that the finetuning never showed in the style {style['own']} are drawn in it (before "
        f"{style['before']}, one finetuning to all three styles {style['all']}), {thing['own']} show the thing "
        f"({thing['before']}, {thing['all']}), {both['own']} both ({both['before']}, {both['all']})."
    )


def _page(verdict: str, facts: dict[str, Any]) -> str:
    figures, sizes, base = facts["figures"], facts["sizes"], facts["models"]["gpt"]
    lines = ["| | | style | thing | both | pictures |", "|---|---|---:|---:|---:|---:|"]
    for style in STYLES:
        for kind, told in KINDS.items():
            for name, model in MODELS.items():
                f = figures[style][kind][name]
                shares = " | ".join(f"{f[of]:.0%} ({f[f'{of} error']:.0%})" for of in ("style", "thing", "both"))
                lines.append(f"| {style}: {told} | {model} | {shares} | {f['pictures']} |")
    true, styles, count = figures["true"], len(FILTERS) + len(STYLES) + 1, len(things())
    held = ", ".join(f"{n} of {style}" for style, n in facts["pairs"].items())
    return f"""{verdict}

# Styles

A model that knows {count} things, by captions as "a fox" and, in the styles of {len(FILTERS)} filters, as "a fox of
sepia style", is finetuned to pictures of things drawn by another hand, all of them called "an image of flat style".
Drawn is "a fox of flat style".

{chr(10).join(lines)}

Shares of the pictures that are in the style asked for, of {styles}, that show the thing asked for, of {count}, and
both, as two networks say; in brackets standard errors over things. Of true pictures after the image tokenizer, on
backgrounds that they were not trained on, they say {true["style"]:.0%} and {true["thing"]:.0%} rightly. Plain things
("a fox") the model draws right in {figures["plain"]["thing"]:.0%} of the cases.

![things whose picture in the style was held out](sheet.png)

What is learned of the style and forgotten of the things, of those held out in the style:

![shares over the steps of the finetuning](steps.png)

## How

- Styles: blob (Noto before 2017), flat and contrast (Fluent); {held} are held out. On seven
  backgrounds, which captions do not tell.
- Image tokenizer: {sizes["image_steps"]:,} steps, on pictures of all styles but those that are held out.
- The model: preset tiny, {base["steps"]:,} steps in {base["seconds"] / 60:.1f} minutes. Finetuned in
  {sizes["style_steps"]} steps of 16 pictures, to all three styles in {len(STYLES) * sizes["style_steps"]}. Drawn at
  temperature 0.5 with textual attention 1.
- Threads: {facts["threads"]}.
"""
