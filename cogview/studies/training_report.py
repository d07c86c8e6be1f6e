"""The report of the study of training: a page, its figures, curves."""

import statistics
from pathlib import Path
from typing import Any

from cogview.data.files import write_json, written_beside
from cogview.studies import training_pictures
from cogview.studies import training_verdicts as verdicts
from cogview.studies.training_verdicts import SHRINK, Found, against, held_out, late, said


def write(out: Path, found: Found, facts: dict[str, Any]) -> str:
    """Writes everything into `out`; the verdicts, a paragraph each."""
    training_pictures.draw(out, found, facts)
    said_of = {
        "precision": verdicts.precision(found),
        "shrink": f"{verdicts.shrink(found, '')} {verdicts.shrink(found, 'deep, ')} {verdicts.gradients(found)}",
        "attention": verdicts.attention(found, facts),
        "batch": verdicts.batch(found),
        "optimizer": verdicts.optimizer(found, facts),
    }
    write_json(out / "figures.json", {**facts, "verdicts": said_of, "trainings": found})
    with written_beside(out / "report.md") as beside:
        beside.write_text(_page(found, facts, said_of), encoding="utf-8")
    return "\n".join(said_of.values())


_SECTIONS = {
    "precision": ("Precision", ("float32", "bfloat16", "float16"), "float32"),
    "shrink": ("Shrunk embedding gradients", SHRINK, ""),
    "attention": ("Three-region and dense attention", ("dense", "three_region"), "dense"),
    "batch": ("Batch and learning rate", ("x1", "bfloat16", "x4", "x2, square root", "x4, square root"), "x1"),
    "optimizer": ("AdamW and Muon", ("bfloat16", "adamw, longer", "muon"), "bfloat16"),
}
"""Title, trainings, and the one that others are compared with."""


def _largest(found: Found) -> str:
    """A table: gradients of each group, and in how many skipped steps they overflowed."""
    groups = {"words": "token table", "read": "of it reading", "positions": "positions", "other": "layers"}
    lines = [f"| largest gradient; overflowed | {' | '.join(groups.values())} |", "|---" + "|---:" * len(groups) + "|"]
    for name in SHRINK:
        cells = [f"{late(found[name], g):.2g}; {sum(t['overflowed'][g] for t in found[name])}" for g in groups]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _table(found: Found, facts: dict[str, Any], names: tuple[str, ...], base: str) -> str:
    head = "| | batch | steps | held-out loss | of text | of images | against the first | skipped steps |"
    lines = [head, "|---" + "|---:" * 7 + "|"]
    for name in names:
        trainings = found[name]
        losses = [
            f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
            for values in (held_out(trainings, loss) for loss in ("loss", "text_loss", "image_loss"))
        ]
        first = base or ("deep, not shrunk" if name.startswith("deep") else "not shrunk")
        difference = said(against(found, name, first)) if name != first else ""
        skipped = f"{statistics.fmean(t['skipped'] for t in trainings):.1f}"
        cells = [name, facts["batches"][name], trainings[0]["steps"], *losses, difference, skipped]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _page(found: Found, facts: dict[str, Any], said_of: dict[str, str]) -> str:
    settings, seconds = facts["settings"], facts["step_seconds"]
    parts = "\n\n".join(
        "\n\n".join(
            [
                f"## {title}\n\n{said_of[key]}",
                _table(found, facts, names, base),
                *([_largest(found)] if key == "shrink" else []),
                f"![{key}]({key}.png)",
            ]
        )
        for key, (title, names, base) in _SECTIONS.items()
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
  tokens fed, batches of 4, blocks of 16, windows of 2 blocks).
- float16: parameters, activations and gradients; masters and optimizer float32; the loss scale doubles after 1,000 good
  steps, in the part on shrunk gradients after {facts["patience"]["tiny"]} (64 layers:
  {facts["patience"]["deep"]}), so that it moves within these steps. The
  shrink is embedding_grad_scale 0.1 instead of 1. 64 layers: width 128, batches of 4, rate 0.01 that does not fall,
  {settings["deep_steps"]} steps: float16 near its limit.
- "x2" is the training called bfloat16; "adamw, longer" has as many more steps as Muon's take more time.
- Seconds of a step, medians of steps taken in turn, {facts["threads"]} thread(s), beside other work: {times}
  (dense and three_region: of the large pictures).
"""
