"""Several Python threads at once, and processes forked after the operators were used.

What holds after a fork is what holds for torch's own operators: a forked child must stay on one thread, as DataLoader's
workers do, because GNU OpenMP does not bring its threads along and waits for them forever.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from cases import BY_LABEL, DECODE, PRODUCTS
from common import DTYPES, Case, run
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import cogview_ops

TESTS = Path(__file__).parents[1]
# those whose results do not depend on the number of threads
CASES = [
    *(BY_LABEL[x] for x in ("text_pivots", "blocks_of_64_all", "blocks_of_128", "wide_heads", "cogview2", "softmax")),
    BY_LABEL["packed_uneven"],
    *DECODE,
    *PRODUCTS,
]


def results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients."""
    inputs = case.inputs(dtype)
    if not case.differentiable:
        return list(case(inputs, "cpp"))
    outputs, grads = run(case, inputs, "cpp")
    return [*outputs, *grads.values()]


def test_different_calls_at_once(threads: None) -> None:
    """Every thread has another operator, shape, dtype and number of OpenMP threads at any time."""
    calls = [(case, dtype) for case in CASES for dtype in DTYPES]
    expected = [results(*call) for call in calls]
    workers = 4
    together = Barrier(workers)

    def work(number: int) -> None:
        together.wait(timeout=60)
        for step in range(len(calls)):
            torch.set_num_threads(1 + (number + step) % 3)
            at = (step + number * len(calls) // workers) % len(calls)
            mine = results(*calls[at])
            assert all(map(torch.equal, mine, expected[at])), f"{calls[at][0].label}, {calls[at][1]}"

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_fork_after_use() -> None:
    """In a process of its own, so that a hang ends and this one stays as it is."""
    folders = (str(Path(cogview_ops.__file__).parents[1]), str(TESTS))
    environment = {"PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, __file__], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["equal"] * 3


class Results(Dataset[list[Tensor]]):
    """Computed where they are loaded."""

    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, at: int) -> list[Tensor]:
        return results(CASES[at], torch.bfloat16)


def use_after_fork() -> None:
    """Forward and backward on several threads, then in forked DataLoader workers, then here again."""
    torch.set_num_threads(3)
    expected = [results(case, torch.bfloat16) for case in CASES]

    def compare(found: list[list[Tensor]]) -> None:
        same = [all(map(torch.equal, x, y)) for x, y in zip(found, expected, strict=True)]
        print("equal" if all(same) else f"different: {[c.label for c, ok in zip(CASES, same, strict=True) if not ok]}")

    loader = DataLoader(
        Results(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60, persistent_workers=True
    )
    compare(list(loader))
    compare([results(case, torch.bfloat16) for case in CASES])
    compare(list(loader))


if __name__ == "__main__":
    use_after_fork()
