"""Whether a training keeps the time that was planned for it, said while something can still be done about it."""

import rich
from rich.console import Console

from cogview.config import TrainConfig
from cogview.train.state import State

EARLY = 20.0  # seconds after which the rate is believed
SLOW = 0.8  # of the planned rate


class Pace:
    """A `watch` of Trainer.run for a training of so many steps, planned to take `seconds`.

    It says once that the training will take longer, and once that it will be stopped too early, on the console that
    progress bars are drawn on.
    """

    def __init__(
        self, what: str, training: TrainConfig, seconds: float, good: int, console: Console | None = None
    ) -> None:
        """good: steps after which the result is good."""
        assert training.steps is not None
        self.what, self.training, self.seconds, self.good = what, training, seconds, good
        self.console = console or rich.get_console()
        self.steps, self.planned = training.steps, training.steps * training.batch_size / seconds
        self._begin: State | None = None
        self._said = 0

    def __call__(self, state: State, rate: float) -> str:
        """Its answer stands beside the progress bar: the rate and what it should be. Samples a second."""
        self._begin = self._begin or state
        spent, steps = state.elapsed - self._begin.elapsed, state.step - self._begin.step
        if spent > EARLY:
            trouble, sentence = self.outlook(state, steps * self.training.batch_size / spent)
            if trouble > self._said:
                self._said = trouble
                self.console.print(sentence)
        return f", {rate:.0f} of {self.planned:.0f} samples/s planned"

    def outlook(self, state: State, rate: float) -> tuple[int, str]:
        """What becomes of a training that goes on at this rate, and in words: 0, what was planned; 1, it takes longer;
        2, it is stopped too early."""
        batch, limit = self.training.batch_size, self.training.seconds
        expected = state.elapsed + (self.steps - state.step) * batch / rate
        here = f"The {self.what} trains {rate:.0f} samples a second here, {self.planned:.0f} were planned"
        if limit is None or expected <= limit:
            slow = rate < SLOW * self.planned
            return int(slow), f"{here}: it will take {expected / 60:.1f} minutes instead of {self.seconds / 60:.1f}."
        reached = max(state.step, int(self.steps - (expected - limit) * rate / batch))
        gone = f", and {state.elapsed / 60:.1f} minutes are gone" if self._begin and self._begin.elapsed > EARLY else ""
        stopped = f"{here}{gone}: it will be stopped after {limit / 60:.1f} minutes, at about step {reached:,}"
        if reached >= self.good:
            return 1, f"{stopped} of {self.steps:,}, which is still good."
        return 2, (
            f"{stopped} of {self.steps:,}; {self.good:,} are good, and the pictures will show it. Is something else "
            "running? Ctrl-C stops, and the same command goes on when the machine is free; minutes that are gone count."
        )
