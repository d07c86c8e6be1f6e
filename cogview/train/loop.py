"""Training of anything that has a batch and a loss: warm-up and cosine, a log, exact resume.

    trainer = Trainer(task, train_config, Path("run"))
    trainer.resume()          # continues from the newest checkpoint in run/, if there is one
    result = trainer.run()    # Ctrl-C saves and returns

A run of `steps` resumed anywhere has bit for bit the losses of an uninterrupted one, on the same machine, thread count
and processes. In bfloat16 or float16 the model itself is so, and float32 master weights take the optimizer's steps.
Several processes, started by torchrun, run this alike; the first writes and speaks.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.hardware import peak_flops
from cogview.progress import Update, progress
from cogview.train import checkpoint, record, resuming, schedule
from cogview.train.feed import Feed
from cogview.train.identity import check_same
from cogview.train.interrupts import interrupts
from cogview.train.log import NoLog, RunLog
from cogview.train.optimizer import Optimizer
from cogview.train.saving import Saver
from cogview.train.skips import Skips
from cogview.train.state import Best, State, Window
from cogview.train.task import Task
from cogview.train.validation import Validation


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
        self.ranks = task.ranks
        self.device = next(task.model.parameters()).device
        self.optimizer = Optimizer(task.model, config, task.ranks)
        self.state, self.window, self.best = State(), Window(), Best()
        self.validation = Validation(task, config)
        self.feed, self.saver = Feed(task, config), Saver(folder, task.ranks)
        self.ranks.check_same(**{**self._identity(), **dataclasses.asdict(config)})
        torch.manual_seed(config.seed)  # what a model draws of its own
        if config.compile:
            task.compile()
        self.skips = Skips(task, self.optimizer, config)
        self._watched: dict[str, float] = {}  # for the log, of the step that it is written behind

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return schedule.progress(self.config, self.state.step, self.state.elapsed)

    def learning_rate(self) -> float:
        """Of the next step."""
        return schedule.learning_rate(self.config, self.progress())

    def step(self) -> dict[str, float]:
        """One optimizer step: the task's metrics, gradient norm and learning rate."""
        batch = self.feed.next(self.state)
        parts, outputs = batch.chunk(self.config.accumulate), []
        if self._watches() and (inside := self.task.inside) is not None:
            self._watched = inside.largest(parts[0])
        for number, part in enumerate(parts, 1):
            loss, output = self.task.loss(part, batch)
            self.optimizer.backward(loss, last=number == len(parts))
            outputs.append(output)
        rate, state = self.learning_rate(), self.state
        taken, norm = self.optimizer.step(rate)  # a loss that is not finite has such gradients
        state.step += 1
        state.skipped += not taken
        if self.optimizer.average is not None:
            self.optimizer.average.update(state.step)
        metrics = self.task.metrics(outputs)
        if said := self.skips.add(taken, state.step, metrics["loss"], parts):
            self.say(said)
        return {**metrics, "gradient_norm": norm, "learning_rate": rate}

    def _watches(self) -> bool:
        """Whether the next step's entry in the log is to tell of the inside of the model."""
        c, step = self.config, self.state.step + 1
        last = schedule.progress(c, step, self.state.elapsed) >= 1
        return c.watch and (step % c.log_every == 0 or last)

    def run(self, watch: Watch | None = None) -> Result:
        """Trains to the end, logs, validates and saves on the way: in steps or seconds of its own, and where the
        held-out loss is the best so far. Ctrl-C or SIGTERM saves and returns."""
        self._prepare()
        with interrupts() as interrupted, progress(self.task.title, shown=self.ranks.first) as update:
            update(self.progress(), self._place())
            with closing(self._log()) as log, closing(self.saver):
                finished = self._train(log, update, watch, interrupted)
                path = self.save()
        return Result(dataclasses.replace(self.state), path, finished, self.validation.metrics, self.validation.step)

    def _prepare(self) -> None:
        self._peak()  # before there is a step that it would take time of
        newest = self.ranks.of_first(lambda: checkpoint.latest(self.folder))
        if newest is not None and checkpoint.step_of(newest) > self.state.step:
            raise ValueError(f"{self.folder} holds a run up to {newest.name}: resume it or use another folder")
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self.folder)
            self._write_config()
        self.task.model.train()

    def _train(self, log: RunLog | NoLog, update: Update, watch: Watch | None, interrupted: threading.Event) -> bool:
        """Whether it came to its end."""
        c, state, task = self.config, self.state, self.task
        start, told, saved = time.monotonic() - state.elapsed, "", state.elapsed
        stop = False
        while self.progress() < 1 and not stop:
            values = self.step()
            self.window.add(values)
            lost = self.saver.done and not self._check_saved()
            state.elapsed, stop, lost = self._agreed(time.monotonic() - start, interrupted.is_set(), lost)
            if lost:
                self._check_saved()  # where another process knew it first: one that is lost is logged once
                self.best.take_back(state)
            last = self.progress() >= 1
            if state.step % c.log_every == 0 or last:
                told = self._log_steps(log, watch)
            update(self.progress(), self._place() + (told or f", loss {values['loss']:.3f}"))
            if hopeless := self.skips.hopeless(state.step):
                self._check_saved()
                raise RuntimeError(hopeless)
            due = state.step % c.save_every == 0 or state.elapsed - saved > c.save_seconds
            if task.held_out is not None and (state.step % c.validate_every == 0 or last):
                due = self._judge(log) or due
            if due and not last:
                log.flush()  # a run that goes on from the checkpoint does not write it again
                lost = not self._check_saved() or lost
                self._begin_save()
                saved = state.elapsed
            if lost:
                log.write(state.step, unsaved=1)
        finished = self.progress() >= 1
        if finished and self.validation.step != state.step:  # it was finished before
            self._judge(log)
        return finished

    def _agreed(self, elapsed: float, stop: bool, lost: bool) -> tuple[float, bool, bool]:
        """The first process's clock, whether any is to stop, and whether any knows of a checkpoint that is lost."""
        if self.ranks.mesh is None:
            return elapsed, stop, lost
        own = [elapsed if self.ranks.first else 0.0, stop, lost]
        values = torch.tensor(own, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        elapsed, stops, losses = values.tolist()
        return elapsed, stops > 0, losses > 0

    def _log(self) -> RunLog | NoLog:
        return RunLog(self.folder, self.state.step) if self.ranks.first else NoLog()

    def _judge(self, log: RunLog | NoLog) -> bool:
        """Validates; whether the loss is the lowest so far."""
        with self.optimizer.averaged():
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

    def _log_steps(self, log: RunLog | NoLog, watch: Watch | None) -> str:
        """Logs the means over the window's steps and begins another; returns words about them."""
        state, task, window = self.state, self.task, self.window
        self.window = Window(begun=state.elapsed)
        values, seconds = window.means(), max(state.elapsed - window.begun, 1e-9)
        samples = window.steps * self.config.batch_size / seconds
        speed = f"{task.unit}_per_second"
        values |= {speed: samples * task.units, "elapsed": state.elapsed}
        if self.optimizer.scale is not None:
            values |= self.optimizer.scale.logged()
        used = ""
        if task.flops:
            values["flops_utilisation"] = samples * task.flops / (self.ranks.count * self._peak())
            used = f", {values['flops_utilisation']:.0%} of peak"
        log.write(state.step, **values, skipped=state.skipped, **task.counts, **self._watched)
        self._watched = {}
        answer = "" if watch is None else watch(dataclasses.replace(state), samples)
        return f", loss {values['loss']:.3f}, {values[speed]:,.0f} {task.unit}/s{used}{answer}"

    def _peak(self) -> float:
        """Operations a second that a process's device could do."""
        return peak_flops(self.device, getattr(torch, self.config.dtype))

    def save(self) -> Path:
        """Writes a checkpoint of everything, drops old ones, returns its path."""
        self._check_saved()
        path = self._begin_save()
        self.saver.end()
        return path

    def _check_saved(self) -> bool:
        """Waits for the checkpoint that is being written. One that cannot be is said, and the next may be."""
        try:
            self.saver.end()
        except OSError as error:
            self.say(f"{error}; training goes on")
            self.best.take_back(self.state)
            return False
        return True

    def _begin_save(self) -> Path:
        self.best.begin(self.state)
        run = {"run": dataclasses.asdict(self.state), "counts": self.task.counts}
        run["window"] = dataclasses.asdict(self.window)
        run["validation"] = self.validation.header()
        averaged = {} if self.optimizer.average is None else {"averaged": True}
        header = {**self.about, **self._identity(), **run, **averaged}
        tensors = {**self.optimizer.tensors(), **self._buffers(), **resuming.random_states(self.device)}
        return self.saver.begin(self.state.step, tensors, header, self.config.keep, self.state.best_step)

    def say(self, sentence: str) -> None:
        if self.ranks.first:
            print(sentence)

    def _buffers(self) -> dict[str, Tensor]:
        """The model's, but for those that it does not keep itself."""
        kept = self.task.model.state_dict().keys()
        return {f"model.{name}": value for name, value in self.task.model.named_buffers() if name in kept}

    def _identity(self) -> dict[str, Any]:
        """As a checkpoint's header has it: JSON knows no tuples."""
        return json.loads(json.dumps({**self.task.identity(), "seed": self.config.seed}))

    def resume(self, path: Path | None = None) -> bool:
        """Continues from a checkpoint, by default the newest of the folder, or where that is damaged from the newest
        before it that is not; False when there is none.

        Damaged when all are; AnotherRun when it is of another model, data set size or seed; ValueError in one sentence
        when it is of another version or does not fit.
        """
        there = self.ranks.of_first(self._recovered)  # of a folder that others may see later
        if path is not None:
            there = [path] if path not in there else there[: there.index(path) + 1]
        found, damaged = resuming.find(there, self.ranks)
        if found is None:
            return False
        check_same(found.path, self._identity(), found.header)
        checkpoint.check_shapes(found.path, found.shapes, self.task.model.state_dict())
        try:
            self._load(found)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{found.path} cannot be resumed from: {error}") from error
        if self.ranks.first:
            resuming.set_aside(damaged, self.state.step)
        best = self.state.best_step
        if best is not None and self.ranks.of_first(lambda: checkpoint.of_step(self.folder, best)) is None:
            self.state.forget_best()  # damaged, or not copied
        self.best = Best(self.state)
        return True

    def _recovered(self) -> list[Path]:
        """The folder's checkpoints, oldest first."""
        checkpoint.recover(self.folder)
        return checkpoint.paths(self.folder)

    def _load(self, found: resuming.Found) -> None:
        tensors, header = found.load(self.optimizer, self._buffers()), found.header
        resuming.set_random_states(tensors, self.device)
        self.state = State(**header["run"])
        self.task.counts.update(header["counts"])
        self.window = Window(**header.get("window", {"begun": self.state.elapsed}))
        self.validation.load(header.get("validation"), self.state)
