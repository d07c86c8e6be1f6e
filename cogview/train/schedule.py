"""How far a run is, and the learning rate that goes with it."""

import math

from cogview.config import TrainConfig


def progress(config: TrainConfig, step: int, elapsed: float) -> float:
    """Share of the run that is done, 0 to 1: of its steps, or of its wall-clock budget, whichever is nearer its end."""
    shares = [0.0 if config.steps is None else step / config.steps]
    shares += [] if config.seconds is None else [elapsed / config.seconds]
    return min(1.0, max(shares))


def learning_rate(config: TrainConfig, done: float) -> float:
    """Of the next step: rises linearly over the warm-up, then falls as a cosine to final_rate."""
    if done < config.warmup:
        first = 1 / config.steps if config.steps is not None else 0.0
        return config.learning_rate * min(1.0, (done + first) / config.warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (done - config.warmup) / (1 - config.warmup))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)
