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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from cogview.config import TrainConfig
from cogview.train import checkpoint
from cogview.train.interrupts import interrupts
from cogview.train.log import RunLog
from cogview.train.optimizer import Optimizer
from cogview.train.schedule import learning_rate, progress
from cogview.train.task import Task

_MAX_SKIPPED = 20  # non-finite steps in a row after which a run is hopeless


@dataclass
class State:
    """Where a run stands. Saved in its checkpoints, next to weights, optimizer and random states."""

    step: int = 0
    epoch: int = 0
    samples_seen: int = 0
    """In this epoch."""
    elapsed: float = 0.0
    """Seconds spent in the run, all its sessions together."""
    skipped: int = 0
    """Steps not taken because the loss or a gradient was not finite."""


@dataclass(frozen=True)
class Result:
    state: State
    checkpoint: Path
    finished: bool
    """False when the run was interrupted."""
    validation: dict[str, float]
    """The last metrics of held-out data; empty without any."""


Watch = Callable[[State, float], str]
"""Told of a run's state and its samples a second whenever they are logged; what it answers stands beside the bar."""


class Trainer:
    """One training run in one folder."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path):
        if len(task.data) == 0 or (task.held_out is not None and len(task.held_out) == 0):
            raise ValueError("data, held_out: expected at least one sample, got none")
        self.task, self.config, self.folder = task, config, folder
        self.device = next(task.model.parameters()).device
        self.optimizer = Optimizer(task.model, config)
        self.state = State()
        torch.manual_seed(config.seed)  # dropout
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        if config.compile:
            task.model.compile()
        self._order: tuple[int, np.ndarray] | None = None  # of which epoch
        self._skipped_in_a_row = 0

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return progress(self.config, self.state.step, self.state.elapsed)

    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.config, self.progress())

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

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics of the first validate_batches of the held-out data, with the same draws every time."""
        c, task = self.config, self.task
        if task.held_out is None:
            return {}
        draws, outputs = torch.Generator(self.device).manual_seed(c.seed), []
        count = min(len(task.held_out), c.validate_batches * c.batch_size)
        task.model.eval()
        for start in range(0, count, c.batch_size):
            indices = np.arange(start, min(start + c.batch_size, count))
            batch = task.batch(task.held_out, indices, draws)
            outputs += [task.loss(part, batch)[1] for part in batch.chunk(c.accumulate)]
        task.model.train()
        return task.metrics(outputs)

    def run(self, watch: Watch | None = None) -> Result:
        """Trains to the end, logs, validates and saves on the way. Ctrl-C or SIGTERM saves and returns."""
        c, state, task = self.config, self.state, self.task
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = checkpoint.latest(self.folder)
        if newest is not None and newest > checkpoint.path_of(self.folder, state.step):
            raise ValueError(f"{self.folder} holds a run up to {newest.name}: resume it or use another folder")
        log, start = RunLog(self.folder, state.step), time.monotonic() - state.elapsed
        window, window_start, saved = [], time.monotonic(), time.monotonic()
        validation: dict[str, float] = {}
        task.model.train()
        try:
            with interrupts() as interrupted, _progress_bar() as bar:
                shown = bar.add_task(task.title, total=1.0, note="")
                while self.progress() < 1 and not interrupted.is_set():
                    window.append(self.step())
                    state.elapsed = time.monotonic() - start
                    last = self.progress() >= 1
                    if state.step % c.log_every == 0 or last:
                        note = self._log_steps(log, window, time.monotonic() - window_start, watch)
                        bar.update(shown, note=note)
                        window, window_start = [], time.monotonic()
                    bar.update(shown, completed=self.progress())
                    self._check_hope()
                    if task.held_out is not None and (state.step % c.validate_every == 0 or last):
                        validation = self.validate()
                        log.write(state.step, **{f"validation_{k}": v for k, v in validation.items()})
                    due = state.step % c.save_every == 0 or time.monotonic() - saved > c.save_seconds
                    if due and not last:
                        self.save()
                        saved = time.monotonic()
            finished = self.progress() >= 1
            if finished and not validation:  # it was finished before
                validation = self.validate()
            return Result(dataclasses.replace(state), self.save(), finished, validation)
        finally:
            log.close()

    def _check_hope(self) -> None:
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            raise RuntimeError(
                f"the loss was not finite for {_MAX_SKIPPED} steps, up to step {self.state.step}: "
                "resume from the last checkpoint with a lower learning_rate"
            )

    def _log_steps(self, log: RunLog, window: list[dict[str, float]], seconds: float, watch: Watch | None) -> str:
        """Logs the means over some steps; returns one line about them."""
        state, task = self.state, self.task
        values = {key: sum(w[key] for w in window) / len(window) for key in window[0]}
        samples = len(window) * self.config.batch_size / seconds
        speed = f"{task.unit}_per_second"
        values |= {speed: samples * task.units, "elapsed": state.elapsed}
        log.write(state.step, **values, skipped=state.skipped, **task.counts)
        answer = "" if watch is None else watch(dataclasses.replace(state), samples)
        return f"step {state.step}, loss {values['loss']:.3f}, {values[speed]:.0f} {task.unit}/s{answer}"

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
        checkpoint.save(path, tensors, {**self._identity(), **run})
        checkpoint.prune(self.folder, self.config.keep)
        return path

    def _buffers(self) -> dict[str, Tensor]:
        """The model's, but for those that it does not keep itself."""
        kept = self.task.model.state_dict().keys()
        return {name: value for name, value in self.task.model.named_buffers() if name in kept}

    def _identity(self) -> dict[str, Any]:
        """As a checkpoint's header has it: JSON knows no tuples."""
        return json.loads(json.dumps({**self.task.identity(), "seed": self.config.seed}))

    def resume(self, path: Path | None = None) -> bool:
        """Continues from a checkpoint, by default the newest of the folder; False when there is none.

        ValueError in one sentence when it is damaged or of another version, model, data set size or seed.
        """
        path = path or checkpoint.latest(self.folder)
        if path is None:
            return False
        tensors, header = checkpoint.read(path)
        for name, ours in self._identity().items():
            for part, wanted, got in _differences(name, ours, header.get(name)):
                raise ValueError(f"{path} is of another run: {part}: expected {wanted!r}, got {got!r}")
        checkpoint.check_shapes(path, tensors, self.task.model.state_dict())
        try:
            self.optimizer.load(tensors)
            for name, buffer in self._buffers().items():
                buffer.copy_(tensors[f"model.{name}"])
            self.generator.set_state(tensors["random.draws"])
            torch.set_rng_state(tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
            self.state = State(**header["run"])
            self.task.counts.update(header["counts"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error
        return True


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, fields of a config by their own names."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from _differences(key, ours.get(key), theirs.get(key))
    elif ours != theirs:
        yield name, ours, theirs


def _progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[note]}"))
