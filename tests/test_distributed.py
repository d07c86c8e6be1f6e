"""Training by several processes: the losses of one, whatever they share; checkpoints that any number of them goes on
from; what does not fit is refused before the first step."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from common import needs_processes
from spread import in_processes, losses
from test_train_run import TRAIN

pytestmark = needs_processes
SHARED = dataclasses.replace(TRAIN, steps=20, batch_size=8, hide_context=0.5, drop_text=0.2, accumulate=2)


def alike(found: list[Any], expected: list[Any], **within: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, **within)


@pytest.mark.parametrize(
    ("count", "tensor", "changes", "within"),
    [
        (2, 1, {}, 2e-5),
        (2, 2, {"checkpoint_activations": "selective"}, 2e-5),
        (4, 2, {"accumulate": 1, "checkpoint_activations": "full", "reshard": False}, 2e-5),
        (4, 1, {"optimizer": "muon"}, 1e-3),  # it orthogonalises in bfloat16
    ],
)
def test_several_processes_have_the_losses_of_one(
    tmp_path: Path, count: int, tensor: int, changes: Any, within: float
) -> None:
    """With dropout, hidden context and pivots; the held-out samples, which they do not divide, too."""
    training = dataclasses.replace(SHARED, **changes)
    expected = losses(tmp_path / "alone", training, 3)
    for found in in_processes(count, losses, tmp_path / "several", training, 3, tensor):
        alike(found, expected, rel=within)
