"""CogView2's whole job in one folder: scenes of emoji at two sizes, one CogLM that draws, captions and completes, both
super-resolutions, and a sheet of what they make of captions and pictures that they never saw.

Every stage goes on where it was stopped. Steps are in proportion to the minutes; 40 are planned on two cores.
"""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cogview.cogview2 import CogView2, Settings
from cogview.completion import complete, edit
from cogview.config import require
from cogview.data.crops import Reduced, smaller
from cogview.data.images import resized
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset, tokens_of
from cogview.demo import cogview2_report, models
from cogview.demo.captions import tells
from cogview.demo.demo import IMAGE, LANGUAGES, TEMPERATURE, language_of
from cogview.demo.large_scenes import LargeScenes
from cogview.demo.measure import chance, decibels, score
from cogview.demo.scenes import PLACES, SIZE, TILE, Scene, build_scene_shards, caption, render, sample_scenes
from cogview.inputs import whole
from cogview.pipeline import tokenize_pairs
from cogview.progress import progress, track
from cogview.recipes.coglm import CogLM
from cogview.recipes.direct import Direct
from cogview.recipes.iterative import Iterative
from cogview.sampling import Sampling
from cogview.train.loop import Result

MINUTES, FIXED = 40.0, 6.0  # of the plan; and those of it for scenes, tokens, pictures and the report
TIMES = 3
BASE_SCENES, FINE_SCENES, TEST_SCENES = 12_000, 3_000, 400
IMAGE_STEPS, BASE_STEPS, FINE_STEPS = 1_500, 3_500, 700
FINE_BATCH = 8
JUDGED, CANDIDATES, ENLARGED, RANKED, EDITED = 64, 4, 32, 4, 4


@dataclasses.dataclass(frozen=True)
class Steps:
    """Of each training."""

    image: int
    base: int
    fine: int

    @classmethod
    def of(cls, minutes: float) -> "Steps":
        require(FIXED < minutes <= 10_000, "minutes", f"more than {FIXED:g}, up to 10,000", minutes)
        share = (minutes - FIXED) / (MINUTES - FIXED)
        image, base, fine = (max(1, round(share * steps)) for steps in (IMAGE_STEPS, BASE_STEPS, FINE_STEPS))
        return cls(min(image, IMAGE_STEPS), base, fine)


def run(out: Path, minutes: float, console: Console) -> str:
    """Runs what is not done yet and writes the report; returns its first line. Interrupted where it can go on."""
    begun, steps = time.monotonic(), Steps.of(minutes)
    console.print(
        f"Everything goes to {out}: scenes at two sizes, image tokenizer ({steps.image:,} steps), CogLM "
        f"({steps.base:,}), direct and iterative super-resolution ({steps.fine:,} each), pictures and a report; about "
        f"{minutes:g} minutes on two cores. Ctrl-C stops; the same command goes on."
    )
    tokens(out, steps.image)
    trained = train(out, steps)
    found = CogView2.load(out, base="coglm", direct="direct", iterative="iterative")
    scenes = sample_scenes("test", JUDGED)
    facts = {
        "steps": dataclasses.asdict(steps),
        "models": {name: models.fact(result) for name, result in trained.items()},
        "parameters": {s.recipe.name: sum(p.numel() for p in s.model.parameters()) for s in found.stages},
        "threads": torch.get_num_threads(),
    }
    figures = {"base": of_base(found, scenes), "fine": of_fine(found, scenes[:ENLARGED])}
    shown, sheet = show(found, scenes)
    figures["drawn"] = shown
    facts["minutes_this_time"] = (time.monotonic() - begun) / 60
    return cogview2_report.write(out, facts | {"figures": figures}, sheet)


def tokens(out: Path, steps: int) -> None:
    """Scenes, tokenizers and tokens in a run folder: whole pictures of 64 pixels, and pairs of those of 64 and 192."""
    with LargeScenes(out, FINE_SCENES, TEST_SCENES, IMAGE, steps, times=TIMES, bilingual=True) as scenes:
        for split, pairs in scenes.data.items():
            known = scenes.pictures if split == "train" else None
            how: dict[str, Any] = {"image_size": TIMES * SIZE, "crops": Reduced(TIMES), "decoded": known}
            tokenize_pairs(pairs, scenes.text, scenes.image, tokens_of(out, split, 2), **how)
        small = build_scene_shards(
            out / "small-scenes", BASE_SCENES, TEST_SCENES, progress=lambda work: track(work, "composing scenes")
        )
        for split, paths in small.items():
            data = PairDataset(paths, languages=LANGUAGES)
            tokenize_pairs(data, scenes.text, scenes.image, tokens_of(out, split), image_size=SIZE)


def train(out: Path, steps: Steps) -> dict[str, Result]:
    """The three models, to their ends."""
    small, both = ([TokenDataset(tokens_of(out, split, n)) for split in ("train", "test")] for n in (1, 2))
    found = {"coglm": models.new(out / "coglm", CogLM, steps.base, *small)}
    for kind in (Direct, Iterative):
        how: dict[str, Any] = {"batch_size": FINE_BATCH}
        found[kind.name] = models.finetuned(out / kind.name, kind, out / "coglm", steps.fine, *both, **how)
    return found


def pictures_of(scenes: list[Scene], scale: int = 1) -> Tensor:
    """uint8 [N, 3, H, W]."""
    return torch.stack([whole(render(scene, scale)) for scene in scenes])


def of_base(found: CogView2, scenes: list[Scene]) -> dict[str, Any]:
    """Shares of right pictures in both languages, of right captions, and what comes of filled squares."""
    true, base = pictures_of(scenes), found.base
    rebuilt = base.pictures(base.tokenize(true))
    figures: dict[str, Any] = {"bound": score(rebuilt, scenes), "chance": chance(true, scenes)}
    for language in LANGUAGES:
        texts = [caption(scene, language) for scene in scenes]
        figures[language] = score(base.draw(texts, temperature=TEMPERATURE), scenes)
    written = base.caption(true, top_k=1)
    figures["captions"] = sum(map(tells, written, scenes)) / len(scenes)
    figures["captions, chance"] = sum(map(tells, written, scenes[1:] + scenes[:1])) / len(scenes)
    figures["fills"] = of_fills(found, scenes, true)
    return figures


def of_fills(found: CogView2, scenes: list[Scene], true: Tensor) -> dict[str, float]:
    """Of each scene the tile of its first emoji is drawn anew, with its caption, likeliest codes: how often it is
    recognised, its codes are the true ones, and both by chance, with another scene's caption."""
    how = Sampling(top_k=1, batch_size=JUDGED)
    figures: dict[str, float] = {}
    for name, order in (("told", scenes), ("chance", scenes[1:] + scenes[:1])):
        filled, right = [], []
        for scene, other, picture in zip(scenes, order, true, strict=True):
            cells = tile_mask(scene)
            codes = found.base.tokenize(picture)
            drawn = complete(found, caption(other, "en"), codes[0], cells, how, seeds=[0])
            filled.append(found.base.pictures(drawn)[0])
            right.append(float((drawn == codes)[:, cells].float().mean()))
        figures |= {f"recognised, {name}": score(torch.stack(filled), scenes)["all"]}
        figures |= {f"codes, {name}": sum(right) / len(right)}
    return figures


def tile_mask(scene: Scene, scale: int = 1, cell: int = 8) -> Tensor:
    """bool [h, w]: the cells of a scene's first emoji."""
    (x, y), side = PLACES[scene.placed[0][1]][0], SIZE * scale // cell
    mask = torch.zeros(side, side, dtype=torch.bool)
    x, y, width = (n * scale // cell for n in (x, y, TILE))
    mask[y : y + width, x : x + width] = True
    return mask


def of_fine(found: CogView2, scenes: list[Scene]) -> dict[str, Any]:
    """Held-out true small pictures enlarged, the likeliest codes of each stage, against bicubic and the bound."""
    true = pictures_of(scenes, TIMES)
    small = torch.stack([smaller(picture, TIMES) for picture in true])
    codes = found.base.tokenize(small)
    ids = found.base.encode([caption(scene, language_of(k)) for k, scene in enumerate(scenes)])
    greedy = Sampling(top_k=1, batch_size=16)
    with progress("enlarging", 1) as update:
        direct, fine = found.enlarge(ids, codes, Settings(greedy, greedy, greedy, None), list(range(len(scenes))))
        update(1)
    assert direct is not None
    assert fine is not None
    image = found.base.image
    whole_codes = torch.cat([image.encode(part.float() / 255) for part in true.split(8)])
    decoded = found.base.pictures(codes)
    large = {
        "bicubic": resized(decoded, TIMES * decoded.shape[-1]),
        "direct": found.base.pictures(direct),
        "direct, then iterative": found.base.pictures(fine),
        "bound": found.base.pictures(whole_codes),
    }
    return {
        name: {"psnr": float(decibels(some, true).mean()), "all": score(some, scenes)["all"]}
        for name, some in large.items()
    }


def show(found: CogView2, scenes: list[Scene]) -> tuple[dict[str, Any], cogview2_report.Sheet]:
    """A batch of small pictures of each caption, ranked, the best enlarged twice; and some pictures edited."""
    shown = scenes[:ENLARGED]
    texts = [caption(scene, language_of(k)) for k, scene in enumerate(shown)]
    bold = Sampling(temperature=1.2, batch_size=32)  # where a good model errs, too
    how = Settings(bold, Sampling(top_k=1, batch_size=16), Sampling(top_k=20, temperature=0.7, batch_size=16), None)
    begun = time.monotonic()
    with progress("drawing", found.work(len(texts), 1, CANDIDATES)) as update:
        drawn = list(found.draw(texts, how, count=1, candidates=CANDIDATES, update=update))
    seconds = (time.monotonic() - begun) / len(texts)
    stages = [
        torch.cat([found.base.pictures(getattr(one, stage)) for one in drawn]) for stage in ("small", "direct", "fine")
    ]
    small = dataclasses.replace(found, direct=None, iterative=None)
    ranked = [
        (f"{one.caption}: {' '.join(f'{loss:.2f}' for loss in one.caploss.tolist())}", found.base.pictures(one.small))
        for one in small.draw(texts[:RANKED], how, count=CANDIDATES)
    ]
    edits = []
    for scene, other in itertools.pairwise(shown[: EDITED + 1]):
        picture = whole(render(scene, TIMES))
        mask = tile_mask(scene, TIMES, 1)
        wanted = dataclasses.replace(scene, first=another(scene, other.first))
        done = edit(found, picture, mask, caption(wanted, "en"), how, candidates=CANDIDATES, around=math.inf)
        edits.append((caption(wanted, "en"), picture, mask, done.pictures[0]))
    best = {"small": score(stages[0], shown), "direct": score(stages[1], shown), "fine": score(stages[2], shown)}
    true = pictures_of(shown, TIMES)
    return {**best, "seconds": seconds}, cogview2_report.Sheet(texts, ranked, stages, true, edits)


def another(scene: Scene, wish: str) -> str:
    """An emoji that is not in the scene yet."""
    there = {scene.first, scene.second}
    return wish if wish not in there else next(name for name in ("fox", "star", "tree") if name not in there)
