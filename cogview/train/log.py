"""The record of a run: one JSON object a line in log.jsonl, and TensorBoard events where it is installed."""

import json
from pathlib import Path

from cogview.data.files import written_beside


class RunLog:
    """Appends to `folder`. On opening, entries after `step` are dropped: a resumed run writes them again."""

    def __init__(self, folder: Path, step: int):
        path = folder / "log.jsonl"
        kept = [entry for entry in read_log(folder) if entry["step"] <= step]
        with written_beside(path) as beside:
            beside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = open(path, "a")  # noqa: SIM115, closed in close()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._events = None
            print("TensorBoard is not installed: this run writes log.jsonl only.")
        else:
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """All whole entries of a run's log; none when there is no log."""
    path = folder / name
    if not path.exists():
        return []
    # The last line of a killed process may be cut; it has no newline then.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
