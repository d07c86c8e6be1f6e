"""Training measured where the paper and the package make claims about it, on the preset tiny: float16 against float32,
the shrink of the embeddings' gradients (CogView paper, section 2.4), three-region against dense attention (appendix B),
larger batches at equal tokens (section 2.3), Muon against AdamW. The same scenes, seeds and order of data.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.config import require
from cogview.data.files import write_json
from cogview.data.tokens import TokenDataset
from cogview.demo.large_scenes import LargeScenes, splits
from cogview.studies import training_report
from cogview.studies.counts import Counts
from cogview.studies.training_runs import Way, share_seen, step_seconds, trained
from cogview.tokenizers.image import VQConfig

_IMAGE = VQConfig(codebook_size=512, dim=32, hidden=48)
_HELD_OUT = 300  # scenes
BATCH, RATE = 8, 1e-3
BASE = "bfloat16"
"""The way that others differ from."""
LONGER = 4
"""Times as many steps for the attentions: how they begin to learn text differs, what they come to need not."""


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study: scenes, steps of the image tokenizer, of each training, of the deep ones; seeds of each."""

    scenes: int
    image_steps: int
    steps: int
    deep_steps: int
    seeds: int

    def __post_init__(self):
        super().__post_init__()
        require(self.seeds <= 5, "seeds", "at most 5", self.seeds)


def ways(sizes: Sizes) -> dict[str, Way]:
    """All trainings but the one that lasts as long as Muon's."""

    def way(name: str, times: float = 1.0, rate: float = RATE, large: bool = False, **changed: Any) -> Way:
        names = ("attention", "window_blocks", "embedding_grad_scale", *_DEEP)
        model = {key: changed.pop(key) for key in names if key in changed}
        training = {"batch_size": round(BATCH * times), "learning_rate": rate, "dtype": "bfloat16"} | changed
        return Way(name, max(1, round(sizes.steps / times)), model, training, large)

    half: dict[str, Any] = {"batch_size": BATCH // 2}
    scaled: dict[str, Any] = {"dtype": "float16", "scale_patience": max(1, sizes.steps // 20)}
    shrink = {"shrunk": 0.1, "not shrunk": 1.0}
    deep = scaled | half | _DEEP | {"final_rate": 1.0, "scale_patience": max(1, sizes.deep_steps // 10)}
    found = [
        *(way(dtype, dtype=dtype) for dtype in (BASE, "float32", "float16")),
        *(way(name, embedding_grad_scale=x, **scaled) for name, x in shrink.items()),
        *(way(f"small, {name}", embedding_grad_scale=x, embedding_std=0.02, **scaled) for name, x in shrink.items()),
        *(
            replace(way(f"deep, {name}", rate=0.01, embedding_grad_scale=x, **deep), steps=sizes.deep_steps)
            for name, x in shrink.items()
        ),
        *(
            replace(way(name, large=True, **how, **half), steps=LONGER * sizes.steps)
            for name, how in _ATTENTIONS.items()
        ),
        way("x1", 0.5, RATE / 2),  # and x2 is BASE
        way("x4", 2.0, 2 * RATE),
        way("x2, square root", 1.0, RATE / math.sqrt(2)),
        way("x4, square root", 2.0, RATE),
        way("muon", optimizer="muon"),
    ]
    return {way.name: way for way in found}


_ATTENTIONS: dict[str, dict[str, Any]] = {
    "dense": {"attention": "dense"},
    "three_region": {"attention": "three_region"},
    "three_region, whole": {"attention": "three_region", "window_blocks": 64},
}
"""The last with windows that reach everything, so that only roundings tell it from dense attention."""

_DEEP: dict[str, Any] = {"num_layers": 64, "hidden_size": 128, "num_heads": 2, "init_std": 0.02}
_DEEP |= {"embedding_std": 0.02, "branch_gain": 1.0}
"""A model as in the paper's experiment on stability, narrower."""


_SCALED = {"tiny": "shrunk", "deep": "deep, shrunk"}


def run(out: Path, sizes: Sizes, tell: Callable[[str], None]) -> str:
    """Trains what is not trained yet, writes report.md, figures.json and the pictures. What was found, in words."""
    record, settings = out / "study.json", asdict(sizes)
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"out: {str(out)!r} holds a study of other sizes; name another or remove it")
    write_json(record, settings)
    with LargeScenes(out, sizes.scenes, _HELD_OUT, _IMAGE, sizes.image_steps) as scenes:
        scenes.tokenize("small")
        scenes.tokenize("large", image_size=128)
    data = {name == "large": splits(out, name) for name in ("small", "large")}
    all_ways = ways(sizes)
    seconds = _step_seconds(out, all_ways, data)
    ratio = seconds["muon"] / seconds[BASE]
    all_ways["adamw, longer"] = replace(all_ways[BASE], name="adamw, longer", steps=max(1, round(sizes.steps * ratio)))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in all_ways}
    for seed in range(sizes.seeds):
        for name, way in all_ways.items():
            figures = trained(way, data[way.large], seed, out / "trainings" / f"{name.replace(', ', '-')}-{seed}")
            found[name].append(figures)
            tell(f"{name}, seed {seed}: held-out loss {figures['held_out']['loss']:.4f}")
    three_region, (tokens, _) = all_ways["three_region"].recipe(data[True]), data[True]
    inputs = three_region.batch(*tokens.batch(np.arange(min(64, len(tokens))))).inputs
    facts = {
        "settings": settings,
        "step_seconds": seconds,
        "share_seen": share_seen(three_region, inputs),
        "tokens": {"small": all_ways[BASE].recipe(data[False]).length, "large": three_region.length},
        "batches": {name: way.training["batch_size"] for name, way in all_ways.items()},
        "patience": {key: all_ways[name].training["scale_patience"] for key, name in _SCALED.items()},
        "threads": torch.get_num_threads(),
    }
    return training_report.write(out, found, facts)


def _step_seconds(out: Path, all_ways: dict[str, Way], data: dict[bool, list[TokenDataset]]) -> dict[str, float]:
    """Measured once: how long AdamW trains beside Muon depends on it."""
    path = out / "step_seconds.json"
    if not path.exists():
        timed: Sequence[Way] = [
            all_ways[name] for name in (BASE, "float32", "float16", "muon", "dense", "three_region")
        ]
        write_json(path, step_seconds(timed, [data[way.large] for way in timed], out / "timing"))
    return json.loads(path.read_text(encoding="utf-8"))
