"""Training of anything that has a batch and a loss: warm-up and cosine, a log, exact resume.

    trainer = Trainer(task, train_config, Path("run"))
    trainer.resume()          # continues from the newest checkpoint in run/, if there is one
    result = trainer.run()    # Ctrl-C saves and returns

A run of `steps` resumed anywhere has bit for bit the losses of an uninterrupted one, on the same machine and
thread count. In bfloat16 or float16 the model itself is so, and float32 master weights take the optimizer's steps.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.progress import progress
from cogview.train import checkpoint, record, schedule
from cogview.train.checkpoint import Damaged
from cogview.train.damage import aside
from cogview.train.identity import check_same
from cogview.train.interrupts import interrupts
from cogview.train.log import RunLog
from cogview.train.optimizer import Optimizer
from cogview.train.state import State, Window
from cogview.train.task import Task
from cogview.train.validation import Validation

_MAX_SKIPPED = 20  # non-finite steps in a row after which a run is hopeless


@dataclass(frozen=True)
class Result:
    state: State
    checkpoint: Path
    finished: bool
    """False when the run was interrupted."""
    validation: dict[str, float]
    """The last metrics of held-out data; empty without any."""
    validated: int | None = None
    """The step that they are of."""


Watch = Callable[[State, float], str]
"""Told of a run's state and its samples a second whenever they are logged; what it answers stands beside the bar."""


class Trainer:
    """One training run in one folder."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path, about: dict[str, Any] | None = None):
        """about: what else checkpoints and config.json should say, by name."""
        if len(task.data) == 0 or (task.held_out is not None and len(task.held_out) == 0):
            raise ValueError("data, held_out: expected at least one sample, got none")
        self.task, self.config, self.folder, self.about = task, config, folder, about or {}
        self.device = next(task.model.parameters()).device
        self.optimizer = Optimizer(task.model, config)
        self.state, self.window = State(), Window()
        self.validation = Validation(task, config)
        torch.manual_seed(config.seed)  # dropout
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        if config.compile:
            task.model.compile()
        self._order: tuple[int, np.ndarray] | None = None  # of which epoch
        self._skipped_in_a_row = 0

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return schedule.progress(self.config, self.state.step, self.state.elapsed)

    def learning_rate(self) -> float:
        """Of the next step."""
        return schedule.learning_rate(self.config, self.progress())

    def step(self) -> dict[str, float]:
        """One optimizer step: the task's metrics, gradient norm and learning rate."""
        batch = self.task.batch(self.task.data, self._next_indices(), self.generator)
        outputs = []
        for part in batch.chunk(self.config.accumulate):
            loss, output = self.task.loss(part, batch)
            self.optimizer.backward(loss)
            outputs.append(output)
        rate, state = self.learning_rate(), self.state
        taken, norm = self.optimizer.step(rate)  # a loss that is not finite has such gradients
        state.step += 1
        state.skipped += not taken
        self._skipped_in_a_row = 0 if taken else self._skipped_in_a_row + 1
        return {**self.task.metrics(outputs), "gradient_norm": norm, "learning_rate": rate}

    def _next_indices(self) -> np.ndarray:
        """Of the next batch; it may reach into the next epoch."""
        state, indices, missing = self.state, [], self.config.batch_size
        while missing:
            if state.samples_seen == len(self.task.data):
                state.epoch, state.samples_seen = state.epoch + 1, 0
            if self._order is None or self._order[0] != state.epoch:
                self._order = state.epoch, self.task.data.order(self.config.seed, state.epoch)
            indices.append(self._order[1][state.samples_seen : state.samples_seen + missing])
            state.samples_seen += len(indices[-1])
            missing -= len(indices[-1])
        return np.concatenate(indices)

    def run(self, watch: Watch | None = None) -> Result:
        """Trains to the end, logs, validates and saves on the way: in steps or seconds of its own, and where the
        held-out loss is the best so far. Ctrl-C or SIGTERM saves and returns."""
        c, state, task = self.config, self.state, self.task
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = checkpoint.latest(self.folder)
        if newest is not None and checkpoint.step_of(newest) > state.step:
            raise ValueError(f"{self.folder} holds a run up to {newest.name}: resume it or use another folder")
        for path in self.folder.glob(".*.tmp"):  # of a process that was killed
            path.unlink()
        self._write_config()
        task.model.train()
        with interrupts() as interrupted, progress(task.title) as update:
            update(self.progress(), self._place())
            with closing(RunLog(self.folder, state.step)) as log:
                saved = time.monotonic()
                start, told = saved - state.elapsed, ""
                while self.progress() < 1 and not interrupted.is_set():
                    values = self.step()
                    self.window.add(values)
                    state.elapsed = time.monotonic() - start
                    last = self.progress() >= 1
                    if state.step % c.log_every == 0 or last:
                        told = self._log_steps(log, watch)
                    update(self.progress(), self._place() + (told or f", loss {values['loss']:.3f}"))
                    self._check_hope()
                    due = state.step % c.save_every == 0 or time.monotonic() - saved > c.save_seconds
                    if task.held_out is not None and (state.step % c.validate_every == 0 or last):
                        due = self._judge(log) or due
                    if due and not last:
                        self.save()
                        saved = time.monotonic()
                finished = self.progress() >= 1
                if finished and self.validation.step != state.step:  # it was finished before
                    self._judge(log)
                path = self.save()
        return Result(dataclasses.replace(state), path, finished, self.validation.metrics, self.validation.step)

    def _judge(self, log: RunLog) -> bool:
        """Validates; whether the loss is the lowest so far."""
        best = self.validation.judge(self.state)
        if metrics := self.validation.metrics:
            log.write(self.state.step, **{f"validation_{name}": value for name, value in metrics.items()})
        return best

    def _write_config(self) -> None:
        identity = self.task.identity()
        settings = {
            "recipe": identity.pop("recipe"),
            **self.about,
            **identity,
            "held_out": 0 if self.task.held_out is None else len(self.task.held_out),
            "parameters": sum(p.numel() for p in self.task.model.parameters()),
            "training": dataclasses.asdict(self.config),
            "device": str(self.device),
        }
        record.write(self.folder, self.state.step, settings)

    def _place(self) -> str:
        end = "" if self.config.steps is None else f" of {self.config.steps:,}"
        return f"step {self.state.step:,}{end}"

    def _check_hope(self) -> None:
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            raise RuntimeError(
                f"the loss was not finite for {_MAX_SKIPPED} steps, up to step {self.state.step}: "
                "resume from the last checkpoint with a lower learning_rate"
            )

    def _log_steps(self, log: RunLog, watch: Watch | None) -> str:
        """Logs the means over the window's steps and begins another; returns words about them."""
        state, task, window = self.state, self.task, self.window
        self.window = Window(begun=state.elapsed)
        values, seconds = window.means(), max(state.elapsed - window.begun, 1e-9)
        samples = window.steps * self.config.batch_size / seconds
        speed = f"{task.unit}_per_second"
        values |= {speed: samples * task.units, "elapsed": state.elapsed}
        log.write(state.step, **values, skipped=state.skipped, **task.counts)
        answer = "" if watch is None else watch(dataclasses.replace(state), samples)
        return f", loss {values['loss']:.3f}, {values[speed]:,.0f} {task.unit}/s{answer}"

    def save(self) -> Path:
        """Writes a checkpoint of everything, drops old ones, returns its path."""
        tensors = self.optimizer.tensors()
        tensors |= {f"model.{name}": value for name, value in self._buffers().items()}
        tensors["random.draws"] = self.generator.get_state()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = checkpoint.path_of(self.folder, self.state.step)
        run = {"run": dataclasses.asdict(self.state), "counts": self.task.counts}
        run["window"] = dataclasses.asdict(self.window)
        run["validation"] = self.validation.header()
        checkpoint.save(path, tensors, {**self.about, **self._identity(), **run})
        checkpoint.prune(self.folder, self.config.keep, self.state.best_step)
        return path

    def _buffers(self) -> dict[str, Tensor]:
        """The model's, but for those that it does not keep itself."""
        kept = self.task.model.state_dict().keys()
        return {name: value for name, value in self.task.model.named_buffers() if name in kept}

    def _identity(self) -> dict[str, Any]:
        """As a checkpoint's header has it: JSON knows no tuples."""
        return json.loads(json.dumps({**self.task.identity(), "seed": self.config.seed}))

    def resume(self, path: Path | None = None) -> bool:
        """Continues from a checkpoint, by default the newest of the folder, or where that is damaged from the newest
        before it that is not; False when there is none.

        Damaged when all are; AnotherRun when it is of another model, data set size or seed; ValueError in one sentence
        when it is of another version or does not fit.
        """
        found = checkpoint.paths(self.folder)
        if path is not None:
            found = [path] if path not in found else found[: found.index(path) + 1]
        damaged: dict[Path, Damaged] = {}
        for path in reversed(found):
            try:
                tensors, header = checkpoint.read(path)
            except Damaged as error:
                damaged[path] = error
                continue
            check_same(path, self._identity(), header)
            checkpoint.check_shapes(path, tensors, self.task.model.state_dict())
            try:
                self._load(tensors, header)
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise ValueError(f"{path} cannot be resumed from: {error}") from error
            for bad, reason in damaged.items():
                print(f"{reason}; it is kept as {bad.rename(aside(bad)).name}, and step {self.state.step:,} taken")
            best = self.state.best_step
            if best is not None and not checkpoint.path_of(self.folder, best).exists():  # damaged, or not copied
                self.state.forget_best()
            return True
        if damaged:
            raise Damaged(f"{self.folder}: no checkpoint can be read: {'; '.join(map(str, damaged.values()))}")
        return False

    def _load(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        self.optimizer.load(tensors)
        for name, buffer in self._buffers().items():
            buffer.copy_(tensors[f"model.{name}"])
        self.generator.set_state(tensors["random.draws"])
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.state = State(**header["run"])
        self.task.counts.update(header["counts"])
        self.window = Window(**header.get("window", {"begun": self.state.elapsed}))
        self.validation.load(header.get("validation"), self.state)
