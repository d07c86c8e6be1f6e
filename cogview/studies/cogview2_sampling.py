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
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Of each way, from little diversity to much."""
TOP_K, TOP_P, TOP_CLUSTERS = 20, 0.9, 16
CODES = 8
"""To a cluster, on average: of forty, as published of 20,000 codes, one cluster of these 1,024 has a quarter."""
KEPT = (1, 2, 5, 10, 20, 50, 100, 200)


def ways(labels: Tensor) -> dict[str, list[Sampling]]:
    """Of clusters the temperature of all codes is swept, and their own with the other at 1."""
    some: dict[str, list[dict[str, Any]]] = {
        "top-k": [{"temperature": t, "top_k": TOP_K} for t in TEMPERATURES],
        "top-p": [{"temperature": t, "top_k": len(labels), "top_p": TOP_P} for t in TEMPERATURES],
        "clusters": [{"temperature": t, "clusters": Clusters(labels, TOP_CLUSTERS)} for t in TEMPERATURES],
        "clusters, their own": [{"clusters": Clusters(labels, TOP_CLUSTERS, t)} for t in TEMPERATURES],
    }
    return {name: [Sampling(batch_size=64, **how) for how in each] for name, each in some.items()}


def run(out: Path, system: System, scenes: list[Scene], candidates: int) -> dict[str, Any]:
    codebook = system.image.codebook
    labels = k_means(codebook, max(1, len(codebook) // CODES))
    texts = [caption(scene, language_of(k)) for k, scene in enumerate(scenes)]
    work = [(name, t, how) for name, each in ways(labels).items() for t, how in zip(TEMPERATURES, each, strict=True)]
    found = dict[str, list[dict[str, float]]]()
    for name, temperature, how in track(work, "drawing in several ways"):
        codes = several(system, texts, candidates, how)
        found.setdefault(name, []).append(judged(system, codes, scenes) | {"temperature": temperature})
    constants, rows = list[dict[str, float]](), list[tuple[str, list[Tensor]]]()
    for c in track(CONSTANTS, "drawing with textual attention"):
        codes = several(system, texts, candidates, Sampling(batch_size=64, text_attention=c))
        constants.append(judged(system, codes, scenes) | {"c": c})
        rows.append((f"c = {c:g}: {constants[-1]['all']:.0%} right", list(system.pictures(codes[:8, 0]))))
    contact_sheet(rows, out / "constants.png", columns=1, zoom=1, note="; ".join(texts[:8]))
    return {"ways": found, "constants": constants, "cut": cut(system, labels, scenes, texts)}


def several(system: System, texts: Sequence[str], count: int, how: Sampling) -> Tensor:
    """Codes int64 [N, count, h, w]."""
    repeated = [text for text in texts for _ in range(count)]
    codes = torch.cat(list(system.code_batches(repeated, how, seeds=range(len(repeated)))))
    return codes.unflatten(0, (len(texts), count))


def judged(system: System, codes: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares that are right, with the standard error of that of all, over captions; how clear the pictures are,
    whatever they show; and how unlike those of a caption."""
    pictures = system.pictures(codes.flatten(0, 1))
    each = [
        score(some, [scene] * len(some)) for some, scene in zip(pictures.split(codes.shape[1]), scenes, strict=True)
    ]
    shares = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
    error = float(torch.tensor([one["all"] for one in each]).std()) / len(each) ** 0.5
    apart = diversity(codes, system.image.codebook)
    return shares | {"error": error, "clarity": clarity(pictures), "diversity": apart}


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
    facts = {"codes": float(sizes.mean()), "probability": float(share.mean()), "places": len(likely)}
    each = labels.bincount()
    return {"lost": lost, **facts, "clusters": len(each), "largest": int(each.max())}
