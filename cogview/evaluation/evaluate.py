"""One evaluation: pictures that models drew of held-out captions, and the image tokenizer's own of the true ones,
against the true pictures, by FID and Inception Score at several radii of blur, CMMD and CapLoss (CogView paper, section
4.1).

Pictures are read again for each score and seen batch by batch, so that memory holds features, not pictures.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cogview.config import require
from cogview.data.shards import PairDataset
from cogview.evaluation import report
from cogview.evaluation.asked import BATCH, Asked, ask, batches_of, compared, name_of
from cogview.evaluation.distances import check_torchmetrics
from cogview.evaluation.drawing import draw
from cogview.evaluation.judges import Batches, Judges, Row, by_candidates, scores
from cogview.evaluation.prepare import blurred, contrasted
from cogview.evaluation.report import OTHERS, RECOVERED
from cogview.pictures import contact_sheet, image_of, save_image
from cogview.progress import progress, track
from cogview.sampling import Sampling
from cogview.system import System

_ON_SHEET = 12  # captions


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


def run(
    out: Path,
    data: PairDataset,
    system: System,
    judges: Judges,
    how: Sampling,
    settings: Settings,
    compare: Mapping[str, Path],
) -> str:
    """Draws what is not drawn yet, and writes report.md, figures.json, the captions and pictures, those of the image
    tokenizer in `recovered`; returns the first sentence. compare: folders of pictures that other models drew of the
    captions, by the models' names."""
    check_torchmetrics()
    assert system.source is not None
    of = "" if settings.candidates == 1 else f", best of {settings.candidates}"
    own = f"{system.source.path.parent.name}{of}"
    _check_names([own, *compare], settings.contrast)
    asked, others, left_out = _asked(data, system, judges.captioner, settings)
    files = {name: compared(folder, len(asked)) for name, folder in compare.items()}
    for paths in files.values():
        for _ in batches_of(paths, asked.side):  # one that cannot be read is found before an hour of drawing
            pass
    truth, encoded = judges.see(asked.batches, settings.radii)
    drawn = draw(out, system, judges.captioner, asked.captions, how, settings.candidates, settings.seed)
    models = {own: drawn.pictures[settings.candidates]} | files
    rows = _rows(_recovered(out / "recovered", system, asked), asked, others, models, settings.contrast)
    _sheet(out / "sheet.png", asked, [row for row in rows if row.name != OTHERS])
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
        "rows": {row.name: scores(row, judges, truth, encoded, settings.radii) for row in track(rows, "comparing")},
        "by_candidates": by_candidates(asked, judges, truth[0], drawn) if settings.candidates > 1 else {},
    }
    return report.write(out, facts, own)


def _check_names(drawn: Sequence[str], contrast: float) -> None:
    """ValueError where two rows would have one name."""
    names = [OTHERS, RECOVERED, *drawn]
    names += [_stronger(name, contrast) for name in drawn] if contrast != 1 else []
    twice = [name for name, count in Counter(names).items() if count > 1]
    require(not twice, "compare", "names that no other row has", ", ".join(twice))


def _stronger(name: str, contrast: float) -> str:
    return f"{name}, contrast × {contrast:g}"


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
    recovered: Sequence[Path], asked: Asked, others: Asked, models: Mapping[str, Sequence[Path]], contrast: float
) -> list[Row]:
    rows = [Row(OTHERS, others.captions, others.batches)] if len(others) >= 2 else []
    for name, paths in {RECOVERED: recovered, **models}.items():
        rows.append(Row(name, asked.captions, partial(batches_of, paths, asked.side)))
    if contrast != 1:
        for row in rows[-len(models) :]:
            stronger = partial(_contrasted, row.batches, contrast)
            rows.append(Row(_stronger(row.name, contrast), row.captions, stronger))
    return rows


def _recovered(folder: Path, system: System, asked: Asked) -> list[Path]:
    """Files of the true pictures behind the image tokenizer and back, written anew, since data may have changed."""
    paths = [folder / name_of(number) for number in range(1, len(asked) + 1)]
    with progress("recovering true pictures", len(asked)) as update:
        for start, batch in zip(range(0, len(asked), BATCH), asked.batches(), strict=True):
            for path, picture in zip(paths[start:], system.pictures(system.tokenize(batch)), strict=False):
                save_image(image_of(picture), path)
            update(start + len(batch))
    return paths


def _contrasted(batches: Batches, factor: float) -> Iterator[Tensor]:
    return (contrasted(batch, factor) for batch in batches())


def _sheet(path: Path, asked: Asked, rows: Sequence[Row]) -> None:
    """The first captions, each below its true picture and those of some rows."""
    sets = [next(asked.batches())] + [next(row.batches()) for row in rows]
    cells = [(caption, [some[n] for some in sets]) for n, caption in enumerate(asked.captions[:_ON_SHEET])]
    note = "each: " + "; ".join(["true", *(row.name for row in rows)])
    contact_sheet(cells, path, columns=3, zoom=max(1, round(96 / asked.side)), note=note)
