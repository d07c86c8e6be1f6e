"""The demo's second model: the first one finetuned to caption. It writes what it sees, and ranks what the first one
draws (CogView paper, section 3.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.data.images import pixels
from cogview.demo.measure import judge
from cogview.demo.scenes import RELATIONS, SIZE, Scene, caption, render
from cogview.pictures import contact_sheet
from cogview.reranking import draw_ranked
from cogview.sampling import Sampling
from cogview.system import System

STEPS, SECONDS = 500, 80.0  # of its training, as planned; at 300 it captioned 58 % of unseen pictures rightly
SHOWN, CANDIDATES = 12, 8
_BOLD = Sampling(temperature=2.0, batch_size=64)  # where some of what a good model draws is wrong


def write(
    out: Path, system: System, judges: System, scenes: Sequence[Scene], captions: Sequence[str]
) -> dict[str, Any]:
    """Writes captions.png, unseen pictures above what is written of them, and ranked.png, candidates for each caption
    in the order of CapLoss; returns shares that are right."""
    true = torch.stack([pixels(render(scene), SIZE) for scene in scenes])
    written = written_for(judges, true)
    note = "written by the finetuned model for pictures that it never saw"
    contact_sheet(
        [(text, [picture]) for text, picture in zip(written, true, strict=True)][:SHOWN],
        out / "captions.png",
        columns=4,
        note=note,
    )
    ranked = draw_ranked(system, judges, captions, _BOLD, seeds=range(CANDIDATES))
    drawn = [system.pictures(found.codes) for found in ranked]
    right = torch.stack([shown(pictures, scene) for pictures, scene in zip(drawn, scenes, strict=True)]).float()
    rows = [(text, list(pictures)) for text, pictures in zip(captions, drawn, strict=True)]
    wrong_first = sorted(range(len(rows)), key=lambda n: float(right[n].mean()))[: SHOWN // 2]
    contact_sheet(
        [rows[n] for n in sorted(wrong_first)],
        out / "ranked.png",
        columns=1,
        note="each row in the order of CapLoss, the best first",
    )
    return {
        "pictures": len(scenes),
        "temperature": _BOLD.temperature,
        "candidates": CANDIDATES,
        "captions_right": sum(map(tells, written, scenes)) / len(scenes),
        "candidates_right": float(right.mean()),
        "best_right": float(right[:, 0].mean()),
    }


def written_for(judges: System, pictures: Tensor) -> list[str]:
    """The likeliest captions."""
    return judges.caption(pictures, top_k=1)


def tells(text: str, scene: Scene) -> bool:
    """Whether a caption is one of the scene's, in either language and order of two emoji."""
    return text in {caption(one, language) for one in _same(scene) for language in ("en", "zh")}


def shown(pictures: Tensor, scene: Scene) -> Tensor:
    """bool [N]: whether pictures show all of a scene."""
    return torch.tensor([judge(picture, scene)["all"] == 1 for picture in pictures])


def _same(scene: Scene) -> list[Scene]:
    """All scenes that have its picture."""
    if scene.second is None:
        return [scene]
    here = RELATIONS[scene.place][:2]
    turned = next(name for name, (first, second, *_) in RELATIONS.items() if (second, first) == here)
    return [scene, Scene(scene.second, turned, scene.background, scene.first)]
