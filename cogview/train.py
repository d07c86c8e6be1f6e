"""Training of a GPT on tokenised pairs: AdamW, warm-up and cosine, exact resume.

    trainer = Trainer(GPT(config), TokenDataset("tokens"), train_config, Path("run"), validation)
    trainer.resume()          # continues from the newest checkpoint in run/, if there is one
    result = trainer.run()    # Ctrl-C saves and returns

A run of `steps` resumed anywhere has bit for bit the losses of an uninterrupted one, on the same machine and
thread count. In bfloat16 or float16 the model itself is so, and float32 master weights take the optimizer's steps.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from cogview import checkpoint
from cogview.config import TrainConfig
from cogview.loss import sequence_nll, weighted_mean
from cogview.model import GPT
from cogview.optimizer import Optimizer
from cogview.runlog import RunLog
from cogview.sequence import truncate_text

_MAX_SKIPPED = 20  # non-finite steps in a row after which a run is hopeless


class Pairs(Protocol):
    """What training needs of a data set; `cogview.data.tokens.TokenDataset` is one."""

    @property
    def tokenizers(self) -> list[str]:
        """Hashes of the text and image tokenizer that made it."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Text ids int64 [B, T], -1 padded, and image codes int64 [B, N]."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Permutation of all indices, int64."""


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
    truncated: int = 0
    """Captions that lost text."""


@dataclass(frozen=True)
class Result:
    state: State
    checkpoint: Path
    finished: bool
    """False when the run was interrupted."""
    validation: dict[str, float]
    """The last losses on held-out data, nats per token: loss, text_loss, image_loss; empty without any."""


class Trainer:
    """One training run in one folder. `model` is trained in place, on the device it is on."""

    def __init__(self, model: GPT, data: Pairs, config: TrainConfig, folder: Path, validation: Pairs | None = None):
        if len(data) == 0 or (validation is not None and len(validation) == 0):
            raise ValueError("training and validation data must not be empty")
        self.model, self.data, self.config = model, data, config
        self.folder, self.validation = folder, validation
        self.device = model.word_embeddings.weight.device
        self.optimizer = Optimizer(model, config)
        self.state = State()
        torch.manual_seed(config.seed)  # dropout
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self._nll = torch.compile(sequence_nll) if config.compile else sequence_nll
        self._order: tuple[int, np.ndarray] | None = None  # of which epoch
        self._skipped_in_a_row = 0

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1: of its steps, or of its wall-clock budget."""
        c = self.config
        if c.seconds is not None:
            return min(1.0, self.state.elapsed / c.seconds)
        assert c.steps is not None  # TrainConfig has one of the two
        return min(1.0, self.state.step / c.steps)

    def learning_rate(self) -> float:
        """Of the next step: rises linearly over the warm-up, then falls as a cosine to final_rate."""
        c, done = self.config, self.progress()
        if done < c.warmup:
            first = 1 / c.steps if c.steps is not None else 0.0
            return c.learning_rate * min(1.0, (done + first) / c.warmup)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (done - c.warmup) / (1 - c.warmup))
        return c.learning_rate * (c.final_rate + (1 - c.final_rate) * cosine)

    def step(self) -> dict[str, float]:
        """One optimizer step: losses in nats per token, gradient norm and learning rate."""
        c, model, state = self.config, self.model, self.state
        tokens = self._next_tokens()
        labels = tokens[:, 1:]
        pivots = model.draw_pivots(tokens[:, :-1], self.generator)
        inputs = self._hide_context(tokens[:, :-1])
        weights = model.vocab.loss_weights(labels, c.text_weight, c.image_weight)
        total, nlls = weights.sum(), []
        for rows in torch.arange(c.batch_size, device=self.device).chunk(c.accumulate):
            nll = self._nll(
                model,
                tokens[rows],
                inputs=inputs[rows],
                pivots=None if pivots is None else pivots[:, rows],
                seeds=model.draw_seeds(),
                checkpoint_activations=c.checkpoint_activations,
            )
            self.optimizer.backward((nll * weights[rows]).sum() / total)
            nlls.append(nll.detach())
        rate = self.learning_rate()
        taken, norm = self.optimizer.step(rate)  # a loss that is not finite has such gradients
        state.step += 1
        state.skipped += not taken
        self._skipped_in_a_row = 0 if taken else self._skipped_in_a_row + 1
        losses = self._losses(torch.cat(nlls), labels, weights)
        return {**losses, "gradient_norm": norm, "learning_rate": rate}

    def _hide_context(self, inputs: Tensor) -> Tensor:
        """Inputs with image tokens hidden behind [MASK], in `hide_context` of the rows, a random share of each.

        Nearly everything about a picture's later tokens can be told from its earlier ones, and very little of the loss
        teaches what can only be told from the text; where the earlier ones are hidden, all of it does.
        """
        share = self.config.hide_context
        if share == 0:
            return inputs
        chance = torch.rand(2, len(inputs), 1, generator=self.generator, device=self.device)
        rate = torch.where(chance[0] < share, chance[1], 0)
        hidden = torch.rand(inputs.shape, generator=self.generator, device=self.device) < rate
        return inputs.masked_fill(hidden & self.model.vocab.is_image(inputs), self.model.vocab["MASK"])

    def _next_tokens(self) -> Tensor:
        """The next batch of stored sequences; it may reach into the next epoch."""
        state, indices, missing = self.state, [], self.config.batch_size
        while missing:
            if state.samples_seen == len(self.data):
                state.epoch, state.samples_seen = state.epoch + 1, 0
            if self._order is None or self._order[0] != state.epoch:
                self._order = state.epoch, self.data.order(self.config.seed, state.epoch)
            indices.append(self._order[1][state.samples_seen : state.samples_seen + missing])
            state.samples_seen += len(indices[-1])
            missing -= len(indices[-1])
        return self._tokens(self.data, np.concatenate(indices))

    def _tokens(self, data: Pairs, indices: np.ndarray) -> Tensor:
        config, (text, codes) = self.model.config, data.batch(indices)
        if codes.shape[1] != config.image_tokens:
            raise ValueError(f"images must be {config.image_tokens} codes, got {codes.shape[1]} in the data")
        if self.config.truncate_text:
            text, cut = truncate_text(text, config.max_text)
            self.state.truncated += cut if data is self.data else 0
        return self.model.vocab.text2image(text, codes, config.max_positions).to(self.device)

    def _losses(self, nll: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
        text, image = self.model.vocab.is_text(labels).float(), self.model.vocab.is_image(labels).float()
        values = torch.stack(
            [weighted_mean(nll, weights), weighted_mean(nll, text), weighted_mean(nll, image)]
        ).tolist()
        return dict(zip(("loss", "text_loss", "image_loss"), values, strict=True))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses on the first validate_batches of the held-out data, with the same pivots every time."""
        if self.validation is None:
            return {}
        c, model, nlls, labels = self.config, self.model, [], []
        generator = torch.Generator(self.device).manual_seed(c.seed)
        count = min(len(self.validation), c.validate_batches * c.batch_size)
        model.eval()
        for start in range(0, count, c.batch_size):
            tokens = self._tokens(self.validation, np.arange(start, min(start + c.batch_size, count)))
            nlls.append(self._nll(model, tokens, pivots=model.draw_pivots(tokens[:, :-1], generator)))
            labels.append(tokens[:, 1:])
        model.train()
        nll, label = torch.cat(nlls), torch.cat(labels)
        return self._losses(nll, label, model.vocab.loss_weights(label, c.text_weight, c.image_weight))

    def run(self) -> Result:
        """Trains to the end, logs, validates and saves on the way. Ctrl-C or SIGTERM saves and returns."""
        c, state = self.config, self.state
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = checkpoint.latest(self.folder)
        if newest is not None and newest > checkpoint.path_of(self.folder, state.step):
            raise ValueError(f"{self.folder} holds a run up to {newest.name}: resume it or use another folder")
        log, start = RunLog(self.folder, state.step), time.monotonic() - state.elapsed
        window, window_start = [], time.monotonic()
        validation: dict[str, float] = {}
        self.model.train()
        try:
            with _interrupts() as interrupted, _progress_bar() as bar:
                task = bar.add_task("training", total=1.0, note="")
                while self.progress() < 1 and not interrupted.is_set():
                    window.append(self.step())
                    state.elapsed = time.monotonic() - start
                    last = self.progress() >= 1
                    if state.step % c.log_every == 0 or last:
                        note = self._log_steps(log, window, time.monotonic() - window_start)
                        bar.update(task, note=note)
                        window, window_start = [], time.monotonic()
                    bar.update(task, completed=self.progress())
                    if self._skipped_in_a_row >= _MAX_SKIPPED:
                        raise RuntimeError(
                            f"the loss was not finite for {_MAX_SKIPPED} steps, up to step {state.step}: "
                            "resume from the last checkpoint with a lower learning_rate"
                        )
                    if self.validation is not None and (state.step % c.validate_every == 0 or last):
                        validation = self.validate()
                        log.write(state.step, **{f"validation_{k}": v for k, v in validation.items()})
                    if state.step % c.save_every == 0 and not last:
                        self.save()
            finished = self.progress() >= 1
            if finished and not validation:  # it was finished before
                validation = self.validate()
            return Result(dataclasses.replace(state), self.save(), finished, validation)
        finally:
            log.close()

    def _log_steps(self, log: RunLog, window: list[dict[str, float]], seconds: float) -> str:
        """Logs the means over some steps; returns one line about them."""
        state = self.state
        values = {key: sum(w[key] for w in window) / len(window) for key in window[0]}
        tokens = len(window) * self.config.batch_size * (self.model.config.max_positions - 1)
        values |= {"tokens_per_second": tokens / seconds, "elapsed": state.elapsed}
        log.write(state.step, **values, skipped=state.skipped, truncated=state.truncated)
        return f"step {state.step}, loss {values['loss']:.3f}, {values['tokens_per_second']:.0f} tokens/s"

    def save(self) -> Path:
        """Writes a checkpoint of everything, drops old ones, returns its path."""
        tensors = self.optimizer.tensors()
        tensors["random.draws"] = self.generator.get_state()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = checkpoint.path_of(self.folder, self.state.step)
        state = {"run": dataclasses.asdict(self.state), **self._identity()}
        checkpoint.save(path, tensors, self.model.config, state)
        checkpoint.prune(self.folder, self.config.keep)
        return path

    def _identity(self) -> dict:
        """What a resumed run must have in common with the one before, besides the model's shape."""
        return {"data": len(self.data), "tokenizers": self.data.tokenizers, "seed": self.config.seed}

    def resume(self, path: Path | None = None) -> bool:
        """Continues from a checkpoint, by default the newest of the folder; False when there is none.

        ValueError in one sentence when it is damaged or of another version, model, data set size or seed.
        """
        path = path or checkpoint.latest(self.folder)
        if path is None:
            return False
        tensors, config, state = checkpoint.read(path)
        here, there = dataclasses.asdict(self.model.config), dataclasses.asdict(config)
        here |= self._identity()
        there |= {name: state.get(name) for name in self._identity()}
        for name, ours in here.items():
            if there[name] != ours:
                raise ValueError(f"{path} is of another run: {name} must be {ours}, got {there[name]}")
        checkpoint.check_shapes(path, tensors, self.model)
        try:
            self.optimizer.load(tensors)
            self.generator.set_state(tensors["random.draws"])
            torch.set_rng_state(tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
            self.state = State(**state["run"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error
        return True


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that no step is cut; a second one interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return

    def handle(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: a handler not of Python's


def _progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[note]}"))
