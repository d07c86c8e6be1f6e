"""How codes are drawn, measured on a model that errs: clusters against top-k and top-p at equal diversity, what top-k
cuts away among codes that are nearly alike, and the textual attention c."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.clusters import Clusters, k_means
from cogview.demo.cogview2 import pictures_of
from cogview.demo.demo import language_of
from cogview.demo.measure import clarity, score
from cogview.demo.scenes import Scene, caption
from cogview.pictures import contact_sheet
from cogview.progress import track
from cogview.sampling import Sampling
from cogview.sequence import pad_text
from cogview.system import System

CONSTANTS = (0.0, 0.5, 1.0, 1.4, 2.0, 3.0)
WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "top-k": tuple({"top_k": k} for k in (2, 5, 10, 20, 50, 200)),
    "top-p": tuple({"top_p": p, "top_k": 1024} for p in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)),
    "clusters": tuple({"clusters": n} for n in (1, 2, 3, 5, 9, 17)),
}
"""Each from little diversity to much."""
TEMPERATURE = 1.0
KEPT = (1, 2, 5, 10, 20, 50, 100, 200)


def run(out: Path, system: System, scenes: list[Scene], candidates: int) -> dict[str, Any]:
    labels = k_means(system.image.codebook)
    texts = [caption(scene, language_of(k)) for k, scene in enumerate(scenes)]
    ways, work = dict[str, list[dict[str, float]]](), [(name, how) for name, some in WAYS.items() for how in some]
    for name, how in track(work, "drawing in several ways"):
        own = {**how, **({"clusters": Clusters(labels, how["clusters"])} if "clusters" in how else {})}
        codes = several(system, texts, candidates, **own)
        found = right(system, codes, scenes) | {"diversity": diversity(codes, system.image.codebook)}
        ways.setdefault(name, []).append(found | {key: float(value) for key, value in how.items()})
    constants, rows = list[dict[str, float]](), list[tuple[str, list[Tensor]]]()
    for c in track(CONSTANTS, "drawing with textual attention"):
        codes = several(system, texts, candidates, text_attention=c)
        found = right(system, codes, scenes) | {"diversity": diversity(codes, system.image.codebook)}
        constants.append(found | {"c": c})
        rows.append((f"c = {c:g}: {found['all']:.0%} right", list(system.pictures(codes[:8, 0]))))
    contact_sheet(rows, out / "constants.png", columns=1, zoom=1, note="; ".join(texts[:8]))
    return {"ways": ways, "constants": constants, "cut": cut(system, labels, scenes, texts)}


def several(system: System, texts: Sequence[str], count: int, **how: Any) -> Tensor:
    """Codes int64 [N, count, h, w]."""
    repeated, seeds = [text for text in texts for _ in range(count)], list(range(count)) * len(texts)
    sampling = Sampling(**{"temperature": TEMPERATURE, "batch_size": 64} | how)
    codes = torch.cat(list(system.code_batches(repeated, sampling, seeds=seeds)))
    return codes.unflatten(0, (len(texts), count))


def right(system: System, codes: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares that are right, and how clear the pictures are, whatever they show."""
    pictures = system.pictures(codes.flatten(0, 1))
    repeated = [scene for scene in scenes for _ in range(codes.shape[1])]
    return score(pictures, repeated) | {"clarity": clarity(pictures)}


def diversity(codes: Tensor, codebook: Tensor) -> float:
    """Of codes [N, M, h, w]: the mean distance of the vectors at one place in two pictures of a caption, as a share of
    that of two vectors of the codebook."""
    vectors = codebook.float()[codes.flatten(2)]
    count = codes.shape[1]
    pairs = [(i, k) for i in range(count) for k in range(i)]
    apart = torch.stack([(vectors[:, i] - vectors[:, k]).norm(dim=-1).mean() for i, k in pairs]).mean()
    any_two = torch.cdist(codebook.float(), codebook.float())
    return float(apart / any_two[~torch.eye(len(codebook), dtype=torch.bool)].mean())


@torch.no_grad()
def cut(system: System, labels: Tensor, scenes: Sequence[Scene], texts: Sequence[str]) -> dict[str, Any]:
    """At the places of held-out pictures, by the model's own distribution: of the probability of the likeliest cluster
    what top-k leaves out, by k; and how many codes of it are among them."""
    recipe = system.recipe
    codes, text = system.tokenize(pictures_of(list(scenes))).flatten(1), pad_text(system.encode(texts))
    batch = recipe.batch(text, codes)
    logits = system.model(batch.inputs, batch.context)[batch.targets < recipe.config.image_vocab]
    likely = logits[:, : recipe.config.image_vocab].softmax(dim=1)
    sums = torch.zeros(len(likely), int(labels.max()) + 1).index_add_(1, labels, likely)
    inside = labels == sums.argmax(dim=1)[:, None]
    share, lost = sums.amax(dim=1), dict[str, float]()
    sizes = inside.sum(dim=1).float()
    for k in KEPT:
        kept = torch.zeros_like(inside).scatter_(1, likely.topk(min(k, likely.shape[1])).indices, True)
        left = torch.where(inside & ~kept, likely, 0).sum(dim=1)
        lost[str(k)] = float((left / share).mean())
    return {"lost": lost, "codes": float(sizes.mean()), "probability": float(share.mean()), "places": len(likely)}
