"""The tuner of tile sizes: what it would time runs the kernel that it is to tune, at the sizes that it tries."""

import importlib.util
import json
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_each_call_runs_its_kernel_at_the_sizes_tried() -> None:
    from cogview_ops.triton import (
        _local_2d_gradients,
        _three_region_call,
        configs,
        local_attention_2d,
        three_region_attention,
        tune,
    )

    x = torch.randn(3, 1, 1, 24, 16, device="meta")
    pivots = torch.zeros(1, 5, dtype=torch.int32, device="meta")
    sizes: list[configs.Config] = []

    def caught(kernel: object, grid: tuple[int, ...], config: configs.Config, **arguments: object) -> None:
        sizes.append(config)

    with (
        mock.patch.object(three_region_attention, "launch", caught),
        mock.patch.object(_three_region_call, "launch", caught),
        mock.patch.object(local_attention_2d, "launch", caught),
        mock.patch.object(_local_2d_gradients, "launch", caught),
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


def test_nothing_is_left_to_compile_after_the_workers(tmp_path: Path) -> None:
    """In a process of its own: in this one kernels are interpreted (conftest.py)."""
    tests = Path(__file__).parent
    env = {
        **os.environ,
        "PYTHONPATH": f"{tests.parent}:{tests}",
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    code = "import json, test_triton_tune as t; print(json.dumps(t.compile_ahead()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    errors, hits, missing = json.loads(run.stdout)
    assert errors == [""]
    assert hits == [True]
    assert missing == "AttributeError"


def compile_ahead() -> tuple[list[str], list[bool], str]:
    """What went wrong in workers, whether what the call then wants is in the cache, what is wrong with no kernel."""
    from triton import knobs
    from triton.runtime.jit import JITFunction
    from triton_aot import caught

    from cogview_ops.triton import _compile_ahead, pb_relax_softmax

    def call() -> None:
        pb_relax_softmax.forward(torch.empty(8, 64, dtype=torch.float16, device="meta"), None, 32.0, True)

    run, hits = JITFunction.run, []
    with caught(90), get_context("spawn").Pool(1) as pool:  # a GPU is pretended
        compiler = _compile_ahead.Compiler(pool)
        with _compile_ahead.caught() as found:
            call()
        compiler.ask(found)
        errors = [result.get(300) for result in compiler.asked.values()]
        with (
            mock.patch.object(JITFunction, "run", lambda *args, **rest: run(*args, **{**rest, "warmup": True})),
            mock.patch.object(knobs.compilation, "listener", lambda *, cache_hit, **rest: hits.append(cache_hit)),
        ):
            call()
        (it,) = found.values()
        return errors, hits, _compile_ahead.compile_ahead(it._replace(kernel="none"), compiler.target)
