"""Checkpoints written beside the training, from copies of what they hold."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from cogview.train import checkpoint
from cogview.train.ranks import Ranks


class Saver:
    """Of a run's folder; one checkpoint is written at a time. Of several processes all call it alike."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Any] | None = None

    def begin(self, step: int, tensors: dict[str, Tensor], header: dict[str, Any], keep: int, best: int | None) -> Path:
        """Copies the tensors, and returns where they will be; older checkpoints but for `keep` and the best step's are
        dropped then. The one before must have come to its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = checkpoint.path_of(self.folder, step, several=self.ranks.mesh is not None)
        drop_old = partial(self._drop_old, path, keep, best)
        if self.ranks.mesh is None:
            copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
            self._writing = self._thread.submit(_write, path, copies, header, drop_old)
        else:
            self._writing = self._begin_shards(path, tensors, header, drop_old)
        return path

    def _drop_old(self, path: Path, keep: int, best: int | None) -> None:
        for other in checkpoint.paths(self.folder):
            if checkpoint.step_of(other) == checkpoint.step_of(path) and other != path:  # of as many steps, but ...
                checkpoint.remove(other)  # ... alone and not of several processes, or the other way round
        checkpoint.prune(self.folder, keep, best)

    def _begin_shards(
        self, path: Path, tensors: dict[str, Tensor], header: dict[str, Any], then: Callable[[], None]
    ) -> Future[Any]:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        from cogview.train.shards import Writer

        writer = Writer(path, checkpoint.described(header), then)
        return async_save(dict(tensors), storage_writer=writer, process_group=self.ranks.saving)  # type: ignore[return-value]

    @property
    def done(self) -> bool:
        """Whether one that was begun has come to its end."""
        return self._writing is not None and self._writing.done()

    def end(self) -> None:
        """Waits for what is being written. OSError in one sentence when it could not be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = writing.exception()
        if error is not None and self.ranks.first:
            checkpoint.clean(self.folder)
        failures = [found for found, _ in getattr(error, "failures", {}).values()]  # what each of several processes met
        if failures and all(isinstance(found, OSError | SafetensorError) for found in failures):
            reasons = sorted(set(map(str, failures)))
            raise OSError(f"cannot write checkpoint in {self.folder}: {'; '.join(reasons)}") from error
        writing.result()

    def close(self) -> None:
        """Waits, whatever comes of it; not for other processes, which may be gone."""
        if self._writing is not None and self.ranks.mesh is None:
            self._writing.exception()


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], then: Callable[[], None]) -> None:
    checkpoint.save(path, tensors, header)
    then()
