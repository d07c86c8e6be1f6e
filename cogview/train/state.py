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
