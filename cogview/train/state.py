"""Where a run stands: what its checkpoints have beside weights, optimizer and random states."""

from dataclasses import dataclass, field


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    samples_seen: int = 0
    """In this epoch."""
    elapsed: float = 0.0
    """Seconds spent in the run, all its sessions together."""
    skipped: int = 0
    """Steps not taken because the loss or a gradient was not finite."""
    best_step: int | None = None
    """That with the lowest held-out loss so far, whose checkpoint is kept; None before there is one."""
    best_loss: float | None = None

    def forget_best(self) -> None:
        """The next one is the best."""
        self.best_step = self.best_loss = None


class Best:
    """Which step's checkpoint, with its loss, is the best of those that are written to their end."""

    def __init__(self, state: State | None = None):
        """state: of a checkpoint that is there."""
        self._written = (None, None) if state is None else (state.best_step, state.best_loss)
        self._begun: tuple[int | None, float | None] = self._written
        self._step = -1

    def begin(self, state: State) -> None:
        """One is begun; the one before has come to its end, or is taken back."""
        self._written, self._begun, self._step = self._begun, (state.best_step, state.best_loss), state.step

    def take_back(self, state: State) -> None:
        """What was begun last could not be written. If it was the best, the one before is the best again."""
        self._begun = self._written
        if state.best_step == self._step:
            state.best_step, state.best_loss = self._written


@dataclass
class Window:
    """Sums over the steps since the last entry in the log. Checkpoints have them, so that an entry of a resumed run is
    of as many steps as that of one that was not stopped."""

    begun: float = 0.0
    """Seconds that the run had spent then."""
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Those of one step."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / self.steps for name, value in self.sums.items()}
