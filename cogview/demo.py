"""The whole job in one folder, on one machine, in minutes: scenes, tokenizers, GPT, pictures, report.

Every stage goes on where it was stopped. The time budget covers everything, installation included.
"""

import dataclasses
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from . import report
from .config import preset
from .data.files import write_json
from .data.scenes import build_scene_shards, caption, render, sample_scenes
from .data.shards import PairDataset
from .data.tokens import TokenDataset, pixels
from .model import GPT
from .pipeline import fit, image_tokenizer, text_tokenizer, tokens
from .system import System
from .tokenizers.image import VQConfig
from .tokenizers.train_image import VQReport, reconstruct
from .train import Result, Trainer

LANGUAGES = ("en", "zh")
INSTALLATION = 4.0  # minutes of the budget that `make demo` may have spent before
FIXED = 1.6  # minutes for scenes, tokens, pictures and the report
IMAGE_SHARE = 0.25  # of the rest, for the image tokenizer; the GPT has the others
TRAIN_SCENES, TEST_SCENES = 12_000, 1_000
JUDGED = 128  # held-out scenes that are drawn, in each language
IMAGE = VQConfig(codebook_size=1024, dim=64, hidden=96)
TEXT_PIECES = 600
ENOUGH_SEQUENCES = 40_000  # that the GPT sees
TEMPERATURE = 0.9


@dataclasses.dataclass(frozen=True)
class Plan:
    """Seconds of training that fit the budget."""

    minutes: float
    image_seconds: float
    gpt_seconds: float

    @classmethod
    def of(cls, minutes: float) -> "Plan":
        free = 60 * (minutes - INSTALLATION - FIXED)
        if free < 1:
            raise ValueError(f"minutes: expected more than {INSTALLATION + FIXED + 0.1:.1f}, got {minutes:g}")
        return cls(minutes, round(free * IMAGE_SHARE, 1), round(free * (1 - IMAGE_SHARE), 1))


def run(out: Path, minutes: float, console: Console) -> Path:
    """Runs what is not done yet; returns the report's path. KeyboardInterrupt leaves everything resumable."""
    started, plan = time.monotonic(), Plan.of(minutes)
    _remember(out, plan)
    console.print(
        f"Everything goes to {out}: scenes, image tokenizer ({plan.image_seconds / 60:.1f} min), "
        f"GPT ({plan.gpt_seconds / 60:.1f} min), pictures and a report. Ctrl-C stops; the same command goes on."
    )
    console.print(_estimate(plan))

    scenes = build_scene_shards(
        out / "scenes", TRAIN_SCENES, TEST_SCENES, progress=lambda work: track(work, "composing scenes")
    )
    train, test = PairDataset(scenes["train"]), PairDataset(scenes["test"])
    text = text_tokenizer(train, out, LANGUAGES, TEXT_PIECES)
    image, image_report = image_tokenizer(train, out, IMAGE, seconds=plan.image_seconds, image_size=64)
    data = tokens(train, out / "tokens" / "train", text, image, LANGUAGES)
    held_out = tokens(test, out / "tokens" / "test", text, image, LANGUAGES)
    result = _train(data, held_out, out / "gpt", plan)

    system = System.load(out)
    sample = sample_scenes("test", JUDGED)
    with console.status("drawing pictures for captions never seen"):
        begun = time.monotonic()
        drawn = {name: system.draw([caption(s, name) for s in sample], temperature=TEMPERATURE) for name in LANGUAGES}
        seconds_each = (time.monotonic() - begun) / (JUDGED * len(LANGUAGES))
    true = torch.stack([pixels(render(s), 64) for s in sample])
    rebuilt, _ = reconstruct(system.image, true)
    facts = _facts(plan, system, data, image_report, result) | {
        "seconds_per_picture": seconds_each,
        "minutes_this_time": (time.monotonic() - started) / 60,
    }
    return report.write(out, sample, drawn, true, rebuilt, facts)


def _train(data: TokenDataset, held_out: TokenDataset, folder: Path, plan: Plan) -> Result:
    config, training = preset("tiny")
    config, training = fit(config, data, held_out), dataclasses.replace(training, seconds=plan.gpt_seconds)
    torch.manual_seed(training.seed)
    trainer = Trainer(GPT(config), data, training, folder, held_out)
    trainer.resume()
    result = trainer.run()
    if not result.finished:
        raise KeyboardInterrupt
    return result


def _remember(out: Path, plan: Plan) -> None:
    """One folder is one plan: tokens and GPT of another image tokenizer would not fit."""
    record = out / "demo.json"
    if record.exists():
        try:
            found = Plan(**json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{record} is damaged ({error}): give another --out") from error
        if found != plan:
            raise ValueError(f"{out} holds a demo of {found.minutes} minutes: go on with that, or give another --out")
    write_json(record, dataclasses.asdict(plan))


def _estimate(plan: Plan) -> str:
    """What this machine will get done in the budget, from a few training steps of the GPT."""
    config, training = preset("tiny")
    model = GPT(config).to(getattr(torch, training.dtype))
    text, codes = (torch.zeros(training.batch_size, n, dtype=torch.int64) for n in (8, config.image_tokens))
    tokens = model.vocab.text2image(text, codes, config.max_positions)
    seconds = []
    for _ in range(4):
        begun = time.monotonic()
        model(tokens[:, :-1], pivots=model.draw_pivots(tokens[:, :-1])).sum().backward()
        seconds.append(time.monotonic() - begun)
    rate = training.batch_size / min(seconds)
    learned = f"the GPT will see about {rate * plan.gpt_seconds:,.0f} sequences"
    if rate * plan.gpt_seconds > 0.7 * ENOUGH_SEQUENCES:
        return f"About {plan.minutes:g} minutes, installation included; {learned}."
    minutes = INSTALLATION + FIXED + ENOUGH_SEQUENCES / rate / (1 - IMAGE_SHARE) / 60
    return (
        f"About {plan.minutes:g} minutes, but this machine is slow for that: {learned}, good pictures need "
        f"{ENOUGH_SEQUENCES:,}. Better: make demo MINUTES={minutes:.0f}"
    )


def _facts(plan: Plan, system: System, data: TokenDataset, image_report: VQReport, result: Result) -> dict:
    config = system.gpt.config
    return {
        "plan": dataclasses.asdict(plan),
        "parameters": sum(p.numel() for p in system.gpt.parameters()),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "attention": config.attention,
        "tokens": config.max_positions - 1,
        "rows": len(data),
        "text_pieces": system.text.vocab_size,
        "image": dataclasses.asdict(image_report) | {"codebook": system.image.config.codebook_size},
        "steps": result.state.step,
        "batch_size": preset("tiny")[1].batch_size,
        "gpt_seconds": result.state.elapsed,
        "validation": result.validation,
        "threads": torch.get_num_threads(),
    }
