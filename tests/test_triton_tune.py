"""The tuner of tile sizes: what it would time runs the kernel that it is to tune, at the sizes that it tries."""

import importlib.util
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_each_call_runs_its_kernel_at_the_sizes_tried() -> None:
    from cogview_ops.triton import configs, local_attention_2d, three_region_attention, tune

    x = torch.randn(1, 1, 24, 16, device="meta")
    pivots = torch.zeros(1, 5, dtype=torch.int32, device="meta")
    sizes: list[configs.Config] = []

    def caught(kernel: object, grid: tuple[int, ...], config: configs.Config, **arguments: object) -> None:
        sizes.append(config)

    with (
        mock.patch.object(three_region_attention, "launch", caught),
        mock.patch.object(local_attention_2d, "launch", caught),
    ):
        calls = tune.three_region_calls(x, pivots, 4, 2) | tune.local_2d_calls(x, [4, 6], [3, 3])
        assert sorted(calls) == sorted(tune.KERNELS) == sorted({name for name, _ in configs.ANY})
        for kernel, call in calls.items():
            last = list(tune.candidates(kernel))[-1]
            sizes.clear()
            call()
            assert last not in sizes
            with configs.trying(kernel, last):
                call()
            assert last in sizes
