"""What the demo of CogView2 leaves: one sheet, curves, and a page of figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.data.files import write_json, write_text
from cogview.pictures import contact_sheet, curves
from cogview.train.log import read_log

SHOWN = 12


class Sheet(NamedTuple):
    captions: Sequence[str]
    ranked: Sequence[tuple[str, Tensor]]
    """Some of them with CapLoss of all candidates, and these, uint8 [n, 3, h, w], the best first."""
    stages: Sequence[Tensor]
    """uint8 [N, 3, H, W], small ones first."""
    true: Tensor
    edits: Sequence[tuple[str, Tensor, Tensor, Tensor]]
    """Caption, picture [3, H, W], mask [H, W], what came of them."""


def write(out: Path, facts: dict[str, Any], sheet: Sheet) -> str:
    """Writes samples.png, curves.png, figures.json and report.md into `out`; returns its first line."""
    side, purple = sheet.true.shape[-1], torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    small, direct, fine = sheet.stages
    large, *batches = (
        some.repeat_interleave(side // some.shape[-1], 2).repeat_interleave(side // some.shape[-1], 3)
        for some in (small, *(pictures for _, pictures in sheet.ranked))
    )
    named = zip(sheet.ranked, batches, strict=True)
    cells = [(f"a batch by CapLoss: {text}", list(pictures)) for (text, _), pictures in named]
    cells += [(text, [large[k], direct[k], fine[k], sheet.true[k]]) for k, text in enumerate(sheet.captions[:SHOWN])]
    cells += [(f"edited: {text}", [one, torch.where(mask, purple, one), done]) for text, one, mask, done in sheet.edits]
    note = (
        "above: small pictures, the best first; the best, direct, iterative super-resolution, true; given, mask, edited"
    )
    contact_sheet(cells, out / "samples.png", columns=2, zoom=1, note=note)
    _curves(out)
    write_json(out / "figures.json", facts)
    verdict = _verdict(facts["figures"])
    write_text(out / "report.md", _page(out, verdict, facts))
    return verdict


def _curves(out: Path) -> None:
    panels = []
    for name in ("coglm", "direct", "iterative"):
        entries = read_log(out / name)
        kinds = sorted({key for entry in entries for key in entry if key.endswith("_loss") and "validation" not in key})
        lines = {}
        for kind in kinds:
            for key, of in ((kind, ""), (f"validation_{kind}", ", held out")):
                points = [(float(e["step"]), float(e[key])) for e in entries if key in e]
                if points:
                    lines[kind.removesuffix("_loss") + of] = [x for x, _ in points], [y for _, y in points]
        panels.append((f"{name}: nats per token", lines))
    curves(panels, out / "curves.png")


def _verdict(figures: dict[str, Any]) -> str:
    base, fine = figures["base"], figures["fine"]
    return (
        f"Of captions never seen {base['en']['all']:.0%} (en) and {base['zh']['all']:.0%} (zh) are drawn right, of "
        f"pictures never seen {base['captions']:.0%} captioned right; enlarged three times, held-out pictures come to "
        f"{fine['direct']['psnr']:.1f} dB at once and {fine['direct, then iterative']['psnr']:.1f} after the rounds, "
        f"bicubic to {fine['bicubic']['psnr']:.1f}, the bound is {fine['bound']['psnr']:.1f}."
    )


def _page(out: Path, verdict: str, facts: dict[str, Any]) -> str:
    base, fine, drawn = (facts["figures"][name] for name in ("base", "fine", "drawn"))
    rows = ["| | emoji | place | background | everything |", "|---|---:|---:|---:|---:|"]
    for name, of in (("chance", "chance"), ("drawn, en", "en"), ("drawn, zh", "zh"), ("tokenizer's bound", "bound")):
        rows.append(
            f"| {name} | " + " | ".join(f"{base[of][k]:.0%}" for k in ("emoji", "place", "background", "all")) + " |"
        )
    larger = ["| | PSNR | recognised |", "|---|---:|---:|"]
    larger += [f"| {name} | {of['psnr']:.2f} | {of['all']:.0%} |" for name, of in fine.items()]
    fills = base["fills"]
    trained = "\n".join(
        f"- {name}: {m['steps']:,} steps in {m['seconds'] / 60:.1f} minutes, held-out loss {m['held_out']['loss']:.3f}"
        for name, m in facts["models"].items()
    )
    return f"""{verdict}

# What this CogView2 learned

![samples](samples.png)

## One CogLM

It draws from captions that it never saw,

{chr(10).join(rows)}

captions pictures that it never saw ({base["captions"]:.0%} are right, in either language), and draws a masked emoji
anew: {fills["recognised, told"]:.0%} of the scenes are recognised then, with another scene's caption
{fills["recognised, chance"]:.0%}; of its codes {fills["codes, told"]:.0%} are the true ones.

## Super-resolution

From 8 x 8 to 24 x 24 codes, held-out pictures, the likeliest codes:

{chr(10).join(larger)}

Bicubic enlarges the decoded small picture; the bound is the true picture after the image tokenizer. Of captions never
seen the best of a batch of small pictures, by CapLoss, shows everything in {drawn["small"]["all"]:.0%}, after direct
super-resolution in {drawn["direct"]["all"]:.0%}, after the rounds in {drawn["fine"]["all"]:.0%}; all stages take
{drawn["seconds"]:.1f} seconds a caption ({facts["threads"]} threads).

## How

{trained}

![curves](curves.png)

Draw and edit your own, with the environment that made this activated (`source .venv/bin/activate`):

    cogview2 generate --run {out} --captions "a fox above a tree on a green background"
    cogview2 edit picture.png --run {out} --box 64 64 128 128 --around inf \\
      --caption "a frog in the middle of a blue background"
"""
