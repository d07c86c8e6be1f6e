"""The whole job in one folder, on one machine, in minutes: scenes, tokenizers, GPT, captions, pictures, report.

Every stage goes on where it was stopped, and a longer demo from a shorter one. The minutes cover everything,
installation included. What is trained has a number of steps at which it is good; where the machine is slower than
planned, it may take three times the time.
"""

import dataclasses
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cogview.config import TrainConfig, require
from cogview.data import decoded
from cogview.data.images import pixels
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo import captions, models, report
from cogview.demo.pace import SLOW, Pace
from cogview.demo.scenes import build_scene_shards, caption, render, sample_scenes
from cogview.pipeline import decode, image_tokenizer, sizes_of, text_tokenizer, tokenize_pairs
from cogview.progress import track
from cogview.recipes import preset
from cogview.recipes.caption import Caption
from cogview.recipes.cogview import CogView
from cogview.system import System
from cogview.tokenizers.image import VQConfig
from cogview.tokenizers.train_image import TRAINING, VQReport, reconstruct, trained_steps
from cogview.train import checkpoint
from cogview.train.interrupts import Interrupted
from cogview.train.loop import Result, Trainer, Watch
from cogview.train.token_task import TokenTask

LANGUAGES = ("en", "zh")
INSTALLATION = 4.0  # minutes of the budget that `make demo` may have spent before
FIXED = 2.4  # minutes for scenes, tokens, the captioning, pictures and the report
IMAGE_SHARE = 0.3  # of the rest, for the image tokenizer; the GPT has the others
MINUTES, GPT_STEPS, IMAGE_STEPS = 15.0, 2_500, 1_200  # a demo of so many minutes has these steps of training
# Good are a few less than these: a GPT of 2,500 drew 99 or 100 % of the held-out scenes right; an image tokenizer of
# 250, 500, 800 steps left 46, 93 and 100 % of the true scenes recognisable.
GPT_GOOD, IMAGE_GOOD = 2_400, 780
MOST = 10_000  # minutes
SLACK = 3.0  # times the planned seconds that a training may take
TRAIN_SCENES, TEST_SCENES = 12_000, 1_000
JUDGED = 128  # held-out scenes that are drawn, in each language
RANKED = 48  # of those, drawn several times and ranked
IMAGE = VQConfig(codebook_size=1024, dim=64, hidden=96)
GPT, GPT_TRAINING = preset("tiny")
TEXT_PIECES = 600
TEMPERATURE = 0.9


def language_of(number: int) -> str:
    """Of a scene: pairs of one emoji and two, in turn in either language."""
    return LANGUAGES[number // 2 % len(LANGUAGES)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps of training, and the seconds that they are planned to take."""

    minutes: float
    image_steps: int
    image_seconds: float
    gpt_steps: int
    gpt_seconds: float
    caption_steps: int

    @classmethod
    def of(cls, minutes: float) -> "Plan":
        """Steps in proportion to the time there is; more minutes than MINUTES are for the GPT alone."""
        least = INSTALLATION + FIXED
        wanted = f"more than {least + 0.1:.1f}, up to {MOST:,}"
        require(least + 1 / 60 < minutes <= MOST, "minutes", wanted, minutes)
        share = (minutes - least) / (MINUTES - least)
        image, gpt = (60 * (MINUTES - least) * part for part in (IMAGE_SHARE, 1 - IMAGE_SHARE))
        steps = max(1, round(IMAGE_STEPS * min(1.0, share))), max(1, round(GPT_STEPS * share))
        captioning = max(1, round(captions.STEPS * min(1.0, share)))
        return cls(minutes, steps[0], round(image * min(1.0, share), 1), steps[1], round(gpt * share, 1), captioning)


def run(out: Path, minutes: float, console: Console) -> str:
    """Runs what is not done yet and writes the report; returns its first line. Interrupted where it can go on."""
    started, plan = time.monotonic(), Plan.of(minutes)
    console.print(
        f"Everything goes to {out}: scenes, image tokenizer ({plan.image_seconds / 60:.1f} min), "
        f"GPT ({plan.gpt_seconds / 60:.1f} min for {plan.gpt_steps:,} steps), pictures and a report. "
        "Ctrl-C stops; the same command goes on."
    )
    for sentence in _outlook(out, plan):
        console.print(sentence)

    training = _image_training(out, plan)
    pace = Pace("image tokenizer", training, plan.image_seconds, IMAGE_GOOD)
    data, held_out, image_report = scene_tokens(out, training, pace)
    result = _train(data, held_out, out / "gpt", plan)

    most = SLACK * captions.SECONDS * plan.caption_steps / captions.STEPS
    finetuned = models.finetuned(
        out / "caption", Caption, out / "gpt", plan.caption_steps, data, held_out, seconds=most
    )

    system, judges = System.load(out, name="gpt"), System.load(out, name="caption")
    sample = sample_scenes("test", JUDGED)
    texts = {name: [caption(scene, name) for scene in sample] for name in LANGUAGES}
    with console.status("drawing pictures for captions never seen"):
        begun = time.monotonic()
        drawn = {name: system.draw(texts[name], temperature=TEMPERATURE) for name in LANGUAGES}
        seconds_each = (time.monotonic() - begun) / (JUDGED * len(LANGUAGES))
        ranked = captions.write(out, system, judges, sample[:RANKED], texts["en"][:RANKED])
    true = torch.stack([pixels(render(s), 64) for s in sample])
    rebuilt, _ = reconstruct(system.image, true)
    facts = _facts(out, plan, system, data, image_report, result) | {
        "seconds_per_picture": seconds_each,
        "caption": models.fact(finetuned) | ranked,
        "minutes_this_time": (time.monotonic() - started) / 60,
    }
    report.write(out, sample, drawn, true, rebuilt, facts)
    return facts["verdict"]


def scene_tokens(
    out: Path, training: TrainConfig, watch: Watch | None = None
) -> tuple[TokenDataset, TokenDataset, VQReport]:
    """Scenes, tokenizers and the tokens of both splits in a run folder: what is not there yet is made."""
    scenes = build_scene_shards(
        out / "scenes", TRAIN_SCENES, TEST_SCENES, progress=lambda work: track(work, "composing scenes")
    )
    train, test = (PairDataset(scenes[split], languages=LANGUAGES) for split in ("train", "test"))
    text, pictures = text_tokenizer(train, out, TEXT_PIECES), decode(train, out, 64)
    image, report = image_tokenizer(train, pictures, out, IMAGE, training, watch=watch)
    data = tokenize_pairs(train, text, image, out / "tokens" / "train", decoded=pictures)
    held_out = tokenize_pairs(test, text, image, out / "tokens" / "test")
    decoded.remove(out / "pixels")
    return data, held_out, report


def _image_training(out: Path, plan: Plan) -> TrainConfig:
    """Of the image tokenizer; once there is a GPT on its tokens it stays as it is."""
    done = trained_steps(out)
    if done and checkpoint.latest(out / "gpt") is not None:
        return TrainConfig(steps=done, **TRAINING)
    return TrainConfig(steps=plan.image_steps, seconds=SLACK * plan.image_seconds, **TRAINING)


def _train(data: TokenDataset, held_out: TokenDataset, folder: Path, plan: Plan) -> Result:
    training = dataclasses.replace(GPT_TRAINING, steps=plan.gpt_steps, seconds=SLACK * plan.gpt_seconds)
    recipe = CogView(CogView.fit(GPT, **sizes_of(data, held_out)))
    torch.manual_seed(training.seed)
    trainer = Trainer(TokenTask(recipe, recipe.model(), data, training, held_out), training, folder)
    trainer.resume()
    result = trainer.run(Pace("GPT", training, plan.gpt_seconds, GPT_GOOD))
    if not result.finished:
        raise Interrupted
    return result


def _outlook(out: Path, plan: Plan) -> Iterator[str]:
    """What can be said before it begins: about what is there already, and the time that the rest will take."""
    step, spent = 0, 0.0
    if (newest := next(checkpoint.readable(out / "gpt"), None)) is not None:
        begun = newest[1]["run"]
        step, spent = begun["step"], begun["elapsed"]
        if (trained := trained_steps(out)) < IMAGE_GOOD:
            yield f"The image tokenizer there has {trained:,} steps, {IMAGE_GOOD:,} are good, and it stays as it is."
    left, room = plan.gpt_steps - step, SLACK * plan.gpt_seconds - spent
    if left > 0 and room <= 0:
        yield f"The GPT has used the time it has in {plan.minutes:g} minutes, at step {step:,}. More minutes go on."
    elif left > 0:
        planned, expected = plan.gpt_seconds * left / plan.gpt_steps, left * _seconds_a_step()
        if SLOW * expected <= planned:  # as in Pace: no word about less
            yield f"About {plan.minutes:g} minutes in all, installation included, or less."
        else:
            yield (
                f"About {plan.minutes:g} minutes in all were planned, but here {left:,} steps of the GPT may take "
                f"{expected / 60:.0f} instead of {planned / 60:.0f}; it has {room / 60:.0f} at most."
            )


def _seconds_a_step() -> float:
    """Of the GPT on this machine, from a few passes."""
    recipe = CogView(GPT)
    model = recipe.model().to(getattr(torch, GPT_TRAINING.dtype))
    text, codes = (torch.zeros(GPT_TRAINING.batch_size, n, dtype=torch.int64) for n in (8, GPT.image_tokens))
    batch, seconds = recipe.batch(text, codes), []
    for _ in range(4):
        begun = time.monotonic()
        model(batch.inputs, batch.context, targets=batch.targets).sum().backward()
        seconds.append(time.monotonic() - begun)
    return 1.15 * min(seconds)  # with the optimizer


def verdict(out: Path, plan: Plan, image: tuple[int, float], gpt: tuple[int, float]) -> str:
    """Whether a run had the steps it needs, and else why and what helps. image, gpt: steps, and samples a second."""
    had = f"its GPT had {gpt[0]:,} (good: {GPT_GOOD:,}), its image tokenizer {image[0]:,} (good: {IMAGE_GOOD:,})"
    if gpt[0] >= GPT_GOOD and image[0] >= IMAGE_GOOD:
        return f"This run had the steps that good pictures need: {had}."
    short = f"This run had too few steps for good pictures: {had}. What it draws is not what this model can draw."
    why = f"Its {plan.minutes:g} minutes were planned for no more."
    minutes = min(MOST, max(MINUTES, 2 * plan.minutes))
    if image[0] < IMAGE_GOOD:
        if image[0] < plan.image_steps:
            planned = plan.image_steps * TRAINING["batch_size"] / plan.image_seconds
            why = f"The machine trained {image[1]:.0f} pictures a second, {planned:.0f} were planned."
        again = _command(out.with_name(out.name + "-2"), minutes)
        return f"{short} {why} An image tokenizer stays as it is under its GPT; `{again}` starts again."
    if gpt[0] < plan.gpt_steps:
        planned = plan.gpt_steps * GPT_TRAINING.batch_size / plan.gpt_seconds
        why = f"The machine trained {gpt[1]:.0f} captions a second, {planned:.0f} were planned."
    return f"{short} {why} `{_command(out, minutes)}` trains the GPT on from here."


def _command(out: Path, minutes: float) -> str:
    if out == Path("runs/demo"):
        return f"make demo MINUTES={minutes:g}"
    return shlex.join(["cogview", "demo", "--out", str(out), "--minutes", f"{minutes:g}"])


def _facts(
    out: Path, plan: Plan, system: System, data: TokenDataset, image_report: VQReport, result: Result
) -> dict[str, Any]:
    config, batch_size, state = system.recipe.config, GPT_TRAINING.batch_size, result.state
    rate = state.step * batch_size / max(state.elapsed, 1e-9)
    image = image_report.steps, image_report.images_per_second
    return {
        "verdict": verdict(out, plan, image, (state.step, rate)),
        "plan": dataclasses.asdict(plan),
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "attention": getattr(config, "attention", system.recipe.name),
        "tokens": config.max_positions - 1,
        "rows": len(data),
        "text_pieces": system.text.vocab_size,
        "image": dataclasses.asdict(image_report) | {"codebook": system.image.config.codebook_size},
        "steps": state.step,
        "batch_size": batch_size,
        "gpt_seconds": state.elapsed,
        "sequences_per_second": rate,
        "validation": result.validation,
        "drawn_by": str(system.source),
        "threads": torch.get_num_threads(),
    }
