"""The report of the study of DALL-E's choices: a page, its figures, curves."""

import statistics
from pathlib import Path
from typing import Any

from cogview.data.files import write_json, write_text
from cogview.markdown import spread, table
from cogview.studies import dalle_pictures
from cogview.studies import dalle_verdicts as verdicts
from cogview.studies.dalle_verdicts import FORMS, share
from cogview.studies.training_verdicts import Found, held_out

Facts = dict[str, Any]


def write(out: Path, found: dict[str, Found], facts: Facts, yardstick: str) -> str:
    """Writes everything into `out`; the verdicts, a paragraph each. found: by part and way. yardstick: the way that
    others are scaled beside."""
    dalle_pictures.draw(out, found, yardstick)
    said = {
        "text": verdicts.text(found["choices"]),
        "padding": verdicts.padding(found["choices"]),
        "softmax": verdicts.softmax(found["choices"]),
        "attention": verdicts.attention(found, facts),
        "scaling": verdicts.scaling(found, yardstick),
    }
    write_json(out / "figures.json", {**facts, "verdicts": said, "trainings": found})
    write_text(out / "report.md", _page(found, facts, said))
    return "\n".join(said.values())


def _losses(runs: list[dict[str, Any]]) -> list[str]:
    return [spread(held_out(runs, loss)) for loss in ("image_loss", "text_loss")]


_CHOICES = {
    "dalle": "DALL-E's: text 1/8, learned padding, one softmax",
    "text 0": "text 0",
    "text 1": "text as much as images",
    "nothing hidden": "DALL-E's, nothing hidden",
    "nothing hidden, text 0": "text 0, nothing hidden",
    "masked": "masked padding",
    "separate": "two softmaxes",
}


def _choices(found: Found) -> str:
    head = ["", "loss of images", "of text"]
    head += [f"drawn right, {form}" for form in FORMS.values()] + [f"chosen, {form}" for form in FORMS.values()]
    rows = [head]
    for name, label in _CHOICES.items():
        shares = [f"{share(found[name], what, form):.0%}" for what in ("drawn", "chosen") for form in FORMS]
        rows.append([label, *_losses(found[name]), *shares])
    return table(rows)


def _attention(found: dict[str, Found], facts: Facts) -> str:
    rows = [["", "loss of images", "of text", "seconds a step", "of dense"]]
    for grid, trainings in verdicts.attentions(found).items():
        seconds = facts["seconds"][f"attention-{grid}"]
        for name, runs in trainings.items():
            ratio = seconds[name] / seconds[verdicts.dense_of(name)]
            label = f"{grid} x {grid}, {name.replace('_', '-')}"
            rows.append([label, *_losses(runs), f"{seconds[name]:.3f}", f"{ratio:.2f}"])
    return table(rows)


def _scaling(found: dict[str, Found], facts: Facts) -> str:
    head = ["", "held-out loss", "skipped steps; blocks", "scales at the end, 2^", "seconds a step"]
    rows = [[*head, "activations, MiB", "parameters, MiB"]]
    for part in verdicts.DEPTHS:
        for name, runs in found[part].items():
            seconds, bytes_ = facts["seconds"][part][name], facts["memory"][part][name]
            skipped = f"{statistics.fmean(t['skipped'] for t in runs):.1f}"
            if "left_out" in runs[0]:
                skipped += f"; {statistics.fmean(t['left_out'] for t in runs):.1f}"
            loss = spread(held_out(runs)) if verdicts.carries_on(runs) else "diverged"
            cells = [f"{part}, {name}", loss, skipped, _scales(runs[0]), f"{seconds:.3f}"]
            rows.append([*cells, *(f"{bytes_[kind] / 2**20:.1f}" for kind in ("activations", "parameters"))])
    return table(rows)


def _scales(run: dict[str, Any]) -> str:
    """Seed 0's."""
    if "blocks" in run:
        return f"{min(run['blocks'][-1]):.1f} to {max(run['blocks'][-1]):.1f}"
    return f"{run['scale'][-1]:g}" if "scale" in run else ""


def _page(found: dict[str, Found], facts: Facts, said: dict[str, str]) -> str:
    settings = facts["settings"]
    return f"""# DALL-E's choices

## Text, padding, softmax

{said["text"]}

{said["padding"]}

{said["softmax"]}

{_choices(found["choices"])}

![training losses](choices.png)

## What the image sees of itself

{said["attention"]}

{_attention(found, facts)}

![training losses](attention.png)

## Either cure of float16

{said["scaling"]}

{_scaling(found, facts)}

![training losses and scales](scaling.png)

## How

- {settings["scenes"]:,} scenes of emoji with English captions in lower case, {settings["seeds"]} seeds, which
  decide first weights, the order of the data and what is drawn, alike for all ways; ± is the standard deviation
  over seeds, intervals are Student's t of the differences seed by seed. Losses are of 256 held-out captions, a
  token's mean.
- Text, padding, softmax: recipe dalle, preset tiny, {settings["steps"]} steps of 12, 8 x 8 codes. Weights of
  text and images are 1/8 and 7/8, 0 and 1, 1 and 1, of either kind's mean. 70 % of the sequences see a random
  part of their own image only, but where nothing is hidden. "Two softmaxes": what the image sees of text and
  what it sees of itself are normalised apart, and added; how DALL-E combined them is not told. Drawn right: of
  {settings["drawn"]} held-out captions the share whose picture shows emoji, places and background asked for;
  chosen: the share of true pictures whose own caption is the likeliest of eight. Captions "turned round" begin
  with the background, "terse" ones have no articles; training has neither.
- What the image sees: {settings["attention_steps"]} steps of 8, 4 and 2 sequences; the same scenes as 8 x 8, 16
  x 16 and 32 x 32 codes of image tokenizers of 8, 4 and 2 pixels a code. Recipe dalle with learned padding,
  pre-LN and one kind in all layers or DALL-E's schedule; three-region attention is recipe cogview's, with
  Sandwich-LN, beside dense attention there. Nothing is hidden of what was drawn.
- float16: recipe cogview, dense attention, batches of 4, 8 x 8 codes; "tiny" {settings["scaling_steps"]} steps
  at 0.001, "deep" 64 layers of width 128, {settings["deep_steps"]} steps at a rate of 0.01 that does not fall.
  A scale doubles after a quarter of the steps, so that it moves within them, where trainings of usual length
  double it after 1,000: of these more steps are skipped; those of blocks begin at 2^13, that of the loss at
  2^16. Activations: what a forward keeps for its backward; parameters: masters, and what the model computes
  with beside them.
- Seconds of a step, medians of steps taken in turn, {facts["threads"]} thread(s), beside other work, on a CPU
  that may not multiply float16: projections and head are computed in float32 then, and rounded, attention as
  torch does it, slowly. They tell nothing of a GPU.
"""
