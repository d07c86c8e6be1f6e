"""Whether a training keeps the time that was planned for it, said while something can still be done about it."""

from rich.console import Console

from cogview.config import TrainConfig
from cogview.train.loop import State

EARLY = 20.0  # seconds after which the rate is believed
SLOW = 0.8  # of the planned rate


class Pace:
    """A `watch` of Trainer.run for a training of so many steps, planned to take `seconds`."""

    def __init__(self, console: Console, what: str, training: TrainConfig, seconds: float):
        assert training.steps is not None
        self.console, self.what, self.training, self.seconds = console, what, training, seconds
        self.steps, self.planned = training.steps, training.steps * training.batch_size / seconds
        self._begin: State | None = None
        self._warned = False

    def __call__(self, state: State, rate: float) -> str:
        """Its answer stands beside the progress bar: the rate and what it should be. Samples a second."""
        self._begin = self._begin or state
        spent, steps = state.elapsed - self._begin.elapsed, state.step - self._begin.step
        if spent > EARLY and not self._warned:
            average = steps * self.training.batch_size / spent
            if average < SLOW * self.planned:
                self._warned = True
                self.console.print(self.warning(state, average))
        return f", {rate:.0f} of {self.planned:.0f} samples/s planned"

    def warning(self, state: State, rate: float) -> str:
        """What becomes of a training that goes on at this rate."""
        expected = state.elapsed + (self.steps - state.step) * self.training.batch_size / rate
        slow = f"The {self.what} trains {rate:.0f} samples a second here, {self.planned:.0f} were planned"
        limit = self.training.seconds
        if limit is None or expected <= limit:
            return f"{slow}: it will take about {expected / 60:.0f} minutes instead of {self.seconds / 60:.0f}."
        reached = int(self.steps - (expected - limit) * rate / self.training.batch_size)
        return (
            f"{slow}: it will be stopped after {limit / 60:.0f} minutes at about step {max(reached, state.step):,} of "
            f"{self.steps:,}, and the result will show it. Is something else running? Ctrl-C stops; the same command "
            "goes on later."
        )
