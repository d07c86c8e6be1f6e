"""Pictures drawn of all captions, the best of 1, 2, 4 and so on up to all candidates by CapLoss (CogView paper, section
3.2), kept as files, so that what was stopped goes on and other evaluations may take them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from cogview.config import require
from cogview.data.files import read_object, sha256_of, write_json, write_text
from cogview.evaluation.asked import name_of, write_captions
from cogview.pictures import image_of, save_image
from cogview.progress import Sum, progress
from cogview.reranking import ordered
from cogview.sampling import Sampling
from cogview.system import System

_TOGETHER = 16  # captions of which all candidates are there, at most
_MAX_BYTES = 1 << 20  # of settings.json


class Drawn(NamedTuple):
    """By how many candidates they are the best of."""

    pictures: dict[int, list[Path]]
    """Files of a picture of each caption."""
    caploss: dict[int, float]
    """Mean over captions of the CapLoss of the drawn codes, which they were ranked by; empty without a judge."""


def counts_of(candidates: int) -> list[int]:
    """The numbers of candidates that are compared: the powers of two below all of them, and all."""
    return [2**k for k in range((candidates - 1).bit_length())] + [candidates]


def draw(
    out: Path,
    system: System,
    judge: System | None,
    captions: Sequence[str],
    how: Sampling,
    candidates: int,
    seed: int,
) -> Drawn:
    """A picture of each caption in out/drawn/of-8, the best of 8 candidates, say; CapLoss of all candidates in
    out/drawn/caploss.jsonl, a line a caption; and the captions in `out`. Each candidate has a seed of its own, counted
    up from `seed` over the captions. What is there is taken; ValueError, before anything is written, if it is of other
    models, captions or settings."""
    folder, counts = out / "drawn", counts_of(candidates)
    _check_same(folder, _settings(system, judge, captions, how, candidates, seed))
    write_captions(out, captions)
    paths = {count: [folder / f"of-{count}" / name_of(n) for n in range(1, len(captions) + 1)] for count in counts}
    done = next((n for n, last in enumerate(paths[candidates]) if not last.is_file()), len(captions))
    kept, ranked = folder / "caploss.jsonl", list[list[float]]()
    if judge is not None:
        ranked = _ranked(kept, candidates)[:done]
        write_text(kept, "".join(map(_line, ranked)))  # behind which it goes on
        done = len(ranked)
    tokens = candidates * system.recipe.config.image_tokens
    with progress("drawing", len(captions) * tokens) as update:
        told = Sum(update)
        told.part()(done * tokens)
        for start in range(done, len(captions), _TOGETHER):
            some = captions[start : start + _TOGETHER]
            seeds = range(seed + start * candidates, seed + (start + len(some)) * candidates)
            repeated = [caption for caption in some for _ in range(candidates)]
            codes = system.code_batches(repeated, how, seeds=seeds, update=told.part())
            for number, (best, losses) in enumerate(_best(judge, some, codes, counts, how.batch_size), start):
                for count, picture in zip(counts, system.pictures(best), strict=True):
                    save_image(image_of(picture), paths[count][number])
                if judge is not None:
                    ranked.append(losses)
                    with open(kept, "a", encoding="utf-8") as file:
                        file.write(_line(losses))
    means = {count: fmean(min(losses[:count]) for losses in ranked) for count in counts} if ranked else {}
    return Drawn(paths, means)


def _best(
    judge: System | None, captions: Sequence[str], codes: Iterator[Tensor], counts: Sequence[int], batch_size: int
) -> Iterator[tuple[Tensor, list[float]]]:
    """Of each caption the codes int64 [len(counts), h, w] of the best of its first candidates, and CapLoss of all."""
    if judge is None:
        yield from ((one[None], []) for batch in codes for one in batch)
    else:
        for found in ordered(judge, captions, codes, counts[-1], batch_size):
            best = found.codes[[int((found.order < count).nonzero()[0]) for count in counts]]
            yield best, found.caploss[found.order.argsort()].tolist()


def _ranked(path: Path, candidates: int) -> list[list[float]]:
    """CapLoss of the candidates of the first captions, as far as the file has it: whoever stopped may have left half a
    line."""
    found = list[list[float]]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            losses = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (isinstance(losses, list) and [type(one) for one in losses] == [float] * candidates):
            break
        found.append(losses)
    return found


def _line(losses: list[float]) -> str:
    return json.dumps(losses) + "\n"


def _settings(
    system: System, judge: System | None, captions: Sequence[str], how: Sampling, candidates: int, seed: int
) -> dict[str, Any]:
    """What decides what is drawn."""
    return {
        "model": _weights(system),
        "judge": None if judge is None else _weights(judge),
        "tokenizers": [system.text.sha256, system.image.sha256],
        "captions": hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest(),
        "sampling": {name: value for name, value in asdict(how).items() if name not in ("batch_size", "clusters")},
        "candidates": candidates,
        "seed": seed,
    }


def _weights(system: System) -> str:
    assert system.source is not None
    path = system.source.path
    return sha256_of([path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()])


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """ValueError where the folder holds pictures of something else."""
    record = folder / "settings.json"
    if record.exists():
        known = read_object(record, "out", _MAX_BYTES)
        other = [name for name in settings if known.get(name) != settings[name]]
        require(not other, "out", f"pictures of the same {', '.join(other)} in {folder}", "others; name another folder")
    else:
        write_json(record, settings)
