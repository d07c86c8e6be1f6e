"""One evaluation: pictures that models drew of held-out captions, and the image tokenizer's own of the true ones,
against the true pictures, by FID and Inception Score at several radii of blur, CMMD and CapLoss (CogView paper, section
4.1).

Pictures are read again for each score and seen batch by batch, so that memory holds features, not pictures.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.data.shards import PairDataset
from cogview.evaluation import report
from cogview.evaluation.asked import BATCH, Asked, ask, batches_of, pictures_in, write_captions
from cogview.evaluation.classifier import Seen
from cogview.evaluation.distances import check_torchmetrics, cmmd, frechet, inception_score
from cogview.evaluation.drawing import counts_of, draw
from cogview.evaluation.networks import Network
from cogview.evaluation.prepare import blurred, contrasted
from cogview.evaluation.report import OTHERS, RECOVERED
from cogview.pictures import contact_sheet
from cogview.progress import track
from cogview.sampling import Sampling
from cogview.system import System

_ON_SHEET = 12  # captions
Batches = Callable[[], Iterator[Tensor]]
"""Pictures uint8 [B, 3, S, S], from the beginning each time."""


@dataclass(frozen=True)
class Settings:
    """What is compared: pictures of `count` captions, each the best of so many candidates. contrast: of what was drawn,
    in rows of its own; 1: no such rows. radii: standard deviations of the blur, in pixels."""

    count: int
    candidates: int
    seed: int
    contrast: float
    radii: tuple[float, ...]

    def __post_init__(self):
        require(self.count >= 2, "count", "at least 2 captions, of whose pictures FID has covariances", self.count)
        require(self.candidates >= 1, "candidates", "at least 1", self.candidates)
        last = self.count * self.candidates
        require(0 <= self.seed <= 2**63 - last, "seed", f"a whole number from 0 to 2^63 - {last}", self.seed)
        contrasted(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), self.contrast)
        for radius in self.radii:
            blurred(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), radius)
        fits = bool(self.radii) and self.radii[0] == 0 and len(set(self.radii)) == len(self.radii)
        require(fits, "radii", "different ones, of which the first is 0", list(self.radii))


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


def run(
    out: Path,
    data: PairDataset,
    system: System,
    judges: Judges,
    how: Sampling,
    settings: Settings,
    compare: Mapping[str, Path],
) -> str:
    """Draws what is not drawn yet, and writes report.md, figures.json, captions.jsonl and pictures; returns the first
    sentence. compare: folders of pictures that other models drew of the captions, by the models' names."""
    check_torchmetrics()
    asked, others, left_out = _asked(data, system, judges.captioner, settings)
    write_captions(out / "captions.jsonl", asked.captions)
    files = {name: pictures_in(folder, len(asked)) for name, folder in compare.items()}
    drawn = draw(out / "drawn", system, judges.captioner, asked.captions, how, settings.candidates, settings.seed)
    best = drawn[settings.candidates]
    assert system.source is not None
    of = "" if settings.candidates == 1 else f", best of {settings.candidates}"
    models = {f"{system.source.path.parent.name}{of}": best} | files
    rows = _rows(system, asked, others, models, settings.contrast)
    _sheet(out / "sheet.png", asked, [row for row in rows if row.name != OTHERS])
    truth, encoded = _seen(judges, asked.batches, settings.radii)
    scores = {row.name: _scores(row, judges, truth, encoded, settings.radii) for row in track(rows, "comparing")}
    by_candidates = {
        count: _of_candidates(asked, judges, truth[0], drawn[count])
        for count in track(counts_of(settings.candidates), "comparing candidates")
    }
    facts = {
        "pictures": len(asked),
        "side": asked.side,
        "left_out": dict(left_out),
        "settings": asdict(settings),
        "sampling": {name: value for name, value in vars(how).items() if name not in ("batch_size", "clusters")},
        "model": str(system.source),
        "judge": None if judges.captioner is None else str(judges.captioner.source),
        "network": report.described(judges.network),
        "cmmd_network": report.described(judges.encoder),
        "rows": scores,
        "by_candidates": by_candidates if settings.candidates > 1 else {},
    }
    return report.write(out, facts, next(iter(models)))


def _asked(
    data: PairDataset, system: System, judge: System | None, settings: Settings
) -> tuple[Asked, Asked, Counter[str]]:
    """The pairs whose captions are drawn, and as many others, which may be fewer or none."""
    systems = [system] if judge is None else [system, judge]
    found, left_out = ask(data, systems, 2 * settings.count, settings.seed)
    named = f"at least 2 pairs that can be read and drawn ({', '.join(left_out) or data.report})"
    require(len(found) >= 2, "shards", named, len(found))
    return found[: settings.count], found[settings.count :], left_out


def _rows(
    system: System, asked: Asked, others: Asked, models: Mapping[str, Sequence[Path]], contrast: float
) -> list[Row]:
    def recovered() -> Iterator[Tensor]:
        return (system.pictures(system.tokenize(batch)) for batch in asked.batches())

    rows = [Row(OTHERS, others.captions, others.batches)] if len(others) >= 2 else []
    rows += [Row(RECOVERED, asked.captions, recovered)]
    for name, paths in models.items():
        rows.append(Row(name, asked.captions, partial(batches_of, paths, asked.side)))
    if contrast != 1:
        for row in rows[-len(models) :]:
            stronger = partial(_contrasted, row.batches, contrast)
            rows.append(Row(f"{row.name}, contrast × {contrast:g}", row.captions, stronger))
    names = [row.name for row in rows]
    require(len(set(names)) == len(names), "compare", "names that no other row has", names)
    return rows


def _contrasted(batches: Batches, factor: float) -> Iterator[Tensor]:
    return (contrasted(batch, factor) for batch in batches())


def _seen(judges: Judges, batches: Batches, radii: Sequence[float]) -> tuple[list[Seen], Seen]:
    """By the one network at each radius, and by that of CMMD without blur."""
    seen = judges.network.see(batches(), [partial(blurred, radius=radius) for radius in radii])
    if judges.encoder is judges.network:
        return seen, seen[0]
    return seen, judges.encoder.see(batches(), [partial(blurred, radius=0)])[0]


def _scores(row: Row, judges: Judges, truth: Sequence[Seen], encoded: Seen, radii: Sequence[float]) -> dict[str, Any]:
    """Of a row, against what is seen in the true pictures at each radius."""
    seen, own = _seen(judges, row.batches, radii)
    found = {
        "pictures": len(seen[0].features),
        "fid": {f"{r:g}": frechet(t.features, s.features) for r, t, s in zip(radii, truth, seen, strict=True)},
        "is": {f"{r:g}": inception_score(s.logits) for r, s in zip(radii, seen, strict=True) if s.logits is not None},
        "cmmd": cmmd(encoded.features, own.features),
    }
    return found | {"caploss": _caploss(judges.captioner, row.captions, row.batches())}


def _of_candidates(asked: Asked, judges: Judges, truth: Seen, paths: Sequence[Path]) -> dict[str, Any]:
    """As in figure 9: of the best of so many candidates, without blur."""
    seen = _seen(judges, partial(batches_of, paths, asked.side), (0,))[0][0]
    return {
        "fid": frechet(truth.features, seen.features),
        "is": None if seen.logits is None else inception_score(seen.logits)[0],
        "caploss": _caploss(judges.captioner, asked.captions, batches_of(paths, asked.side)),
    }


def _caploss(judge: System | None, captions: Sequence[str], batches: Iterator[Tensor]) -> float | None:
    """The mean over captions of their pictures, whose codes are the image tokenizer's."""
    if judge is None:
        return None
    found = [judge.caploss(captions[n * BATCH : (n + 1) * BATCH], batch) for n, batch in enumerate(batches)]
    return float(torch.cat(found).double().mean())


def _sheet(path: Path, asked: Asked, rows: Sequence[Row]) -> None:
    """The first captions, each below its true picture and those of some rows."""
    sets = [next(asked.batches())] + [next(row.batches()) for row in rows]
    cells = [(caption, [some[n] for some in sets]) for n, caption in enumerate(asked.captions[:_ON_SHEET])]
    note = "each: " + "; ".join(["true", *(row.name for row in rows)])
    contact_sheet(cells, path, columns=3, zoom=max(1, round(96 / asked.side)), note=note)
