"""Scores of pictures of captions: by a network at several radii of blur, by that of CMMD, by a captioning model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogview.evaluation.asked import BATCH, Asked, batches_of
from cogview.evaluation.classifier import Seen
from cogview.evaluation.distances import cmmd, frechet, inception_score, intervals
from cogview.evaluation.drawing import Drawn
from cogview.evaluation.networks import Network
from cogview.evaluation.prepare import blurred
from cogview.progress import track
from cogview.system import System

Batches = Callable[[], Iterator[Tensor]]
"""Pictures uint8 [B, 3, S, S], from the beginning each time."""


@dataclass(frozen=True)
class Row:
    """Pictures of captions, under a name."""

    name: str
    captions: Sequence[str]
    batches: Batches


@dataclass(frozen=True)
class Judges:
    """What scores are by: a network for FID and the Inception Score, one for CMMD, and a captioning model or None."""

    network: Network
    encoder: Network
    captioner: System | None

    def see(self, batches: Batches, radii: Sequence[float]) -> tuple[list[Seen], Seen]:
        """By the one network at each radius, and by that of CMMD without blur."""
        seen = self.network.see(batches(), [partial(blurred, radius=radius) for radius in radii])
        if self.encoder is self.network:
            return seen, seen[0]
        return seen, self.encoder.see(batches(), [partial(blurred, radius=0)])[0]

    def caploss(self, captions: Sequence[str], batches: Iterator[Tensor]) -> float | None:
        """The mean over captions of their pictures, whose codes are the image tokenizer's."""
        judge = self.captioner
        if judge is None:
            return None
        found = [judge.caploss(captions[n * BATCH : (n + 1) * BATCH], batch) for n, batch in enumerate(batches)]
        return float(torch.cat(found).double().mean())


def scores(row: Row, judges: Judges, truth: Sequence[Seen], encoded: Seen, radii: Sequence[float]) -> dict[str, Any]:
    """Of a row, against what is seen in the true pictures at each radius; encoded: by the network of CMMD."""
    seen, own = judges.see(row.batches, radii)
    return {
        "pictures": len(seen[0].features),
        "fid": {f"{r:g}": frechet(t.features, s.features) for r, t, s in zip(radii, truth, seen, strict=True)},
        "is": {f"{r:g}": inception_score(s.logits) for r, s in zip(radii, seen, strict=True) if s.logits is not None},
        "cmmd": cmmd(encoded.features, own.features),
        "caploss": judges.caploss(row.captions, row.batches()),
    }


def by_candidates(asked: Asked, judges: Judges, truth: Seen, drawn: Drawn) -> dict[int, dict[str, Any]]:
    """As in figure 9: of the best of so many candidates, without blur; and how much more or less the FID is than that
    of the best of all, 95 % interval of it; ranked: CapLoss of the codes that were drawn."""
    found, features = dict[int, dict[str, Any]](), list[Tensor]()
    for count, paths in track(list(drawn.pictures.items()), "comparing candidates"):
        pictures = partial(batches_of, paths, asked.side)
        seen = judges.network.see(pictures(), [partial(blurred, radius=0)])[0]
        features.append(seen.features)
        found[count] = {
            "fid": frechet(truth.features, seen.features),
            "is": None if seen.logits is None else inception_score(seen.logits)[0],
            "caploss": judges.caploss(asked.captions, pictures()),
            "ranked": drawn.caploss[count],
        }
    apart = intervals(truth.features, features)
    return {count: one | {"fid_beyond_all": own} for (count, one), own in zip(found.items(), apart, strict=True)}
