"""The report of the study of training: a page, its figures, curves."""

import statistics
from pathlib import Path
from typing import Any

from cogview.data.files import write_json, write_text
from cogview.markdown import spread, table
from cogview.studies import training_pictures
from cogview.studies import training_verdicts as verdicts
from cogview.studies.training_verdicts import SHRINK, Found, against, held_out, late, said


def write(out: Path, found: Found, facts: dict[str, Any]) -> str:
    """Writes everything into `out`; the verdicts, a paragraph each."""
    training_pictures.draw(out, found, facts)
    said_of = {
        "precision": verdicts.precision(found),
        "shrink": f"{verdicts.shrink(found)} {verdicts.gradients(found)}",
        "attention": verdicts.attention(found, facts),
        "batch": verdicts.batch(found),
        "optimizer": verdicts.optimizer(found, facts),
    }
    write_json(out / "figures.json", {**facts, "verdicts": said_of, "trainings": found})
    write_text(out / "report.md", _page(found, facts, said_of))
    return "\n".join(said_of.values())


_SQUARE_ROOT = {name: f"{name[:2]}, rate by the square root" for name in ("x2, square root", "x4, square root")}
_WHOLE = "three-region, windows reach everything"
_ATTENTIONS = {"dense": "dense", "three_region": "three-region", "three_region, whole": _WHOLE}
_SECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "precision": ("Precision", {name: name for name in ("float32", "bfloat16", "float16")}),
    "shrink": ("Shrunk embedding gradients", {name: name for name in SHRINK}),
    "attention": ("Three-region and dense attention", _ATTENTIONS),
    "batch": ("Batch and learning rate", {"x1": "x1", "bfloat16": "x2", "x4": "x4", **_SQUARE_ROOT}),
    "optimizer": ("AdamW and Muon", {"bfloat16": "AdamW", "adamw, longer": "AdamW, as long as Muon", "muon": "Muon"}),
}
"""Title, and names of the trainings, the first of which the others are compared with."""


def _largest(found: Found) -> str:
    """A table: gradients of each group, and in how many skipped steps they overflowed."""
    groups = {"words": "token table", "read": "of it reading", "positions": "positions", "other": "layers"}
    rows = [["largest gradient; overflowed", *groups.values()]]
    for name in SHRINK:
        cells = [f"{late(found[name], g):.2g}; {sum(t['overflowed'][g] for t in found[name])}" for g in groups]
        rows.append([name, *cells])
    return table(rows)


def _table(found: Found, facts: dict[str, Any], names: dict[str, str]) -> str:
    head = ["", "batch", "steps", "held-out loss", "of text", "of images", "difference", "skipped steps"]
    rows: list[list[Any]] = [head]
    for name, label in names.items():
        trainings = found[name]
        losses = [spread(held_out(trainings, loss)) for loss in ("loss", "text_loss", "image_loss")]
        first = f"{name.removesuffix('shrunk').removesuffix('not ')}not shrunk" if name in SHRINK else next(iter(names))
        difference = said(against(found, name, first)) if name != first else ""
        skipped = f"{statistics.fmean(t['skipped'] for t in trainings):.1f}"
        rows.append([label, facts["batches"][name], trainings[0]["steps"], *losses, difference, skipped])
    return table(rows)


def _page(found: Found, facts: dict[str, Any], said_of: dict[str, str]) -> str:
    settings, seconds, patience = (facts[name] for name in ("settings", "step_seconds", "patience"))
    parts = "\n\n".join(
        "\n\n".join(
            [
                f"## {title}\n\n{said_of[key]}",
                _table(found, facts, names),
                *([_largest(found)] if key == "shrink" else []),
                f"![{key}]({key}.png)",
            ]
        )
        for key, (title, names) in _SECTIONS.items()
    )
    times = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    return f"""# Training

{parts}

## How

- The preset tiny, {settings["steps"]} steps of 8 scenes at a rate of 0.001 but where a part says otherwise, in bfloat16
  but where it says float16 or float32; {settings["seeds"]} seeds, which decide first weights, the order of the data and
  what is drawn, alike for all ways. Losses are the preset's, text counting 0.2; ± is the standard deviation over seeds,
  intervals are Student's t of the differences seed by seed. Held out: 256 captions of scenes that training never saw.
- {settings["scenes"]:,} scenes with their captions in two languages, no caption twice in a training, as tokens of an
  image tokenizer of {settings["image_steps"]} steps: 8 x 8, and 16 x 16 for the attention ({facts["tokens"]["large"]}
  tokens fed, batches of 4, blocks of 16, windows of 2 blocks, or of so many that only roundings tell three-region
  attention from dense).
- float16: parameters, activations and gradients; masters and optimizer float32; the loss scale doubles after 1,000 good
  steps, in the part on shrunk gradients after {patience["tiny"]} (64 layers: {patience["deep"]}), so that it moves
  within these steps. The shrink is embedding_grad_scale 0.1 instead of 1. "small": embeddings begin with a standard
  deviation of 0.02 instead of 0.1. "deep": 64 layers of width 128, which begin as published, batches of 4, a rate of
  0.01 that does not fall, {settings["deep_steps"]} steps. Largest gradients: means over the second half; overflowed: in
  how many skipped steps.
- "x2" and "AdamW" are the trainings called bfloat16 above; "as long as Muon" has as many more steps as Muon's take
  more time. Muon takes AdamW's learning rate, its steps scaled to the size of AdamW's.
- Seconds of a step, medians of steps taken in turn, {facts["threads"]} thread(s), beside other work: {times}
  (dense and three_region: of the large pictures).
"""
