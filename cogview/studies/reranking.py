"""Self-reranking measured (CogView paper, section 3.2, figures 6 and 9): a model that was stopped early enough to err
draws candidates; which of them show what was asked for is known, since they are scenes of the demo.

Picked are the candidate of the lowest CapLoss, by a model finetuned from the same weights; the nearest by a contrastive
model of the same pairs; any; and the oracle's, which is right where one is.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data.files import save_tensors, written_beside
from cogview.data.images import pixels
from cogview.data.tokens import TokenDataset
from cogview.demo import captions, demo, models
from cogview.demo.measure import decibels
from cogview.demo.scenes import SIZE, Scene, caption, render, sample_scenes
from cogview.pipeline import sizes_of
from cogview.progress import progress, track
from cogview.recipes.caption import Caption
from cogview.reranking import candidate_sheet, draw_ranked
from cogview.sampling import Sampling
from cogview.studies import contrastive, reranking_report
from cogview.studies.counts import Counts
from cogview.system import System
from cogview.tokenizers.train_image import TRAINING
from cogview.train.loop import Result

BASE, JUDGE, OTHER = "gpt", "caption", "others/contrastive"  # folders of the models; the last is none of a run
_HOW = Sampling(temperature=demo.TEMPERATURE, batch_size=64)


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study. Steps: of the model that draws, of its finetuning, of the contrastive model."""

    captions: int
    candidates: int
    on_sheet: int
    base_steps: int
    caption_steps: int
    contrastive_steps: int

    def __post_init__(self):
        super().__post_init__()
        power = self.candidates & (self.candidates - 1) == 0
        require(power, "candidates", "a power of two", self.candidates)


@dataclass(frozen=True)
class Found:
    """What the candidates [N, M] of N captions came to."""

    right: Tensor
    """bool [N, M]: everything that was asked for is there."""
    psnr: Tensor
    """dB to the true picture."""
    caploss: Tensor
    similarity: Tensor


def run(out: Path, source: Path | None, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and pictures; returns what they come to."""
    begun = time.monotonic()
    data, held_out = _tokens(out, source)
    base = models.drawing(out / BASE, sizes.base_steps, data, held_out)
    judge = models.finetuned(out / JUDGE, Caption, out / BASE, sizes.caption_steps, data, held_out)
    other = _contrastive(out, data, held_out, sizes.contrastive_steps)
    system, ranks = (System.load(out, name=name) for name in (BASE, JUDGE))
    scenes = sample_scenes("test", sizes.captions)
    texts = [caption(scene, demo.language_of(k)) for k, scene in enumerate(scenes)]
    codes = _candidates(out, system, texts, sizes.candidates)
    nearest = contrastive.load(other.checkpoint)
    found = _measured(system, ranks, nearest, scenes, texts, codes)
    number = int((found.right.float().mean(dim=1) - 0.5).abs().argmin())
    _sheet(out, system, ranks, scenes[number], texts[number], sizes.on_sheet)
    facts = {
        "sizes": asdict(sizes),
        "models": {name: models.fact(result) for name, result in ((BASE, base), (JUDGE, judge), (OTHER, other))},
        "parameters": {JUDGE: _count(ranks.model), OTHER: _count(nearest)},
        "captions_right": _captions_right(ranks, scenes),
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    scores = {"CapLoss": found.caploss, "contrastive": -found.similarity}
    return reranking_report.write(out, found.right, found.psnr, scores, facts)


def _tokens(out: Path, source: Path | None) -> tuple[TokenDataset, TokenDataset]:
    """Those that are there; else of a finished demo, whose tokenizers are copied too, or made here."""
    train, test = (out / "tokens" / split for split in ("train", "test"))
    if source is not None and not (test / "meta.json").exists():
        there = all((source / part).exists() for part in ("scenes/scenes.json", "tokens/train", "tokens/test"))
        require(there, "from", "the folder of a demo with its tokens", str(source))
        for name in ("text.model", "vqvae.safetensors"):
            with written_beside(out / name) as beside:
                shutil.copyfile(source / name, beside)
        for folder in (train, test):
            beside = folder.with_name(f".{folder.name}.tmp")
            shutil.copytree(source / "tokens" / folder.name, beside, dirs_exist_ok=True)
            beside.rename(folder)
    elif not (test / "meta.json").exists():
        demo.scene_tokens(out, TrainConfig(steps=demo.IMAGE_STEPS, **TRAINING))
    return TokenDataset(train), TokenDataset(test)


def _contrastive(out: Path, data: TokenDataset, held_out: TokenDataset, steps: int) -> Result:
    sizes = sizes_of(data, held_out)
    sizes["image_tokens"] = sizes.pop("image_grid") ** 2
    training = TrainConfig(steps=steps, batch_size=128, learning_rate=1e-3, dtype="float32", validate_every=100)
    torch.manual_seed(training.seed)
    model = contrastive.Contrastive(contrastive.ContrastiveConfig(**sizes))
    return models.trained(out / OTHER, contrastive.ContrastiveTask(model, data, held_out), training)


def _candidates(out: Path, system: System, texts: Sequence[str], count: int) -> Tensor:
    """Codes int64 [N, count, h, w] of the captions, drawn once by the same model."""
    path, source = out / "candidates.safetensors", system.source
    of = json.dumps([str(source), str(_HOW), [system.text.sha256, system.image.sha256], len(texts), count])
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("of") == of:
                return file.get_tensor("codes").long()
    repeated, seeds = [c for c in texts for _ in range(count)], list(range(count)) * len(texts)
    with progress("drawing candidates", len(repeated) * system.recipe.config.image_tokens) as update:
        codes = torch.cat(list(system.code_batches(repeated, _HOW, seeds=seeds, update=update)))
    codes = codes.view(len(texts), count, *codes.shape[1:])
    save_tensors(path, {"codes": codes.int()}, {"of": of})
    return codes


def _measured(
    system: System,
    ranks: System,
    nearest: contrastive.Contrastive,
    scenes: Sequence[Scene],
    texts: Sequence[str],
    codes: Tensor,
) -> Found:
    rows = []
    for scene, text, some in track(list(zip(scenes, texts, codes, strict=True)), "judging candidates"):
        similarity = nearest.similarity(system.encode(text) * len(some), some)
        drawn, true = system.pictures(some), pixels(render(scene), SIZE)
        rows.append((captions.shown(drawn, scene), decibels(drawn, true), ranks.caploss(text, some), similarity))
    return Found(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _sheet(out: Path, system: System, ranks: System, scene: Scene, text: str, count: int) -> None:
    """As figure 6, of a caption about half of whose candidates are right."""
    with progress("drawing a sheet", count * system.recipe.config.image_tokens) as update:
        found = next(draw_ranked(system, ranks, [text], _HOW, seeds=range(count), update=update))
    pictures = system.pictures(found.codes)
    marks = ["right" if right else "wrong" for right in captions.shown(pictures, scene).tolist()]
    candidate_sheet(pictures, found.caploss, out / "candidates.png", f"{text}: in the order of CapLoss", marks)


def _captions_right(ranks: System, scenes: Sequence[Scene]) -> float:
    """Share of true pictures whose likeliest caption is right, in either language and order."""
    written = captions.written_for(ranks, torch.stack([pixels(render(scene), SIZE) for scene in scenes]))
    return sum(map(captions.tells, written, scenes)) / len(scenes)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
