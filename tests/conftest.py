"""Fixtures of all tests."""

import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import interpreter
import pytest
import torch

from cogview_ops import _dispatch


def triton_version() -> tuple[int, ...]:
    """(0,) without Triton."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("triton"))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0,)


if not torch.cuda.is_available() and triton_version() >= (3, 7):  # the interpreter of 3.6 fails with numpy 2.4
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors
    interpreter.hasten()


def pytest_configure() -> None:
    wish = os.environ.get("COGVIEW_TESTS", "")
    if wish not in ("", "all"):
        raise pytest.UsageError(f"COGVIEW_TESTS: expected all or nothing, got {wish!r}")


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    return emulated_cuda.load()


@pytest.fixture(autouse=True)
def emulate_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test with impl="cuda", CPU tensors are taken where there is no GPU."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("impl") == "cuda" and not torch.cuda.is_available():
        request.getfixturevalue("emulated_library")
        monkeypatch.setattr(_dispatch, "select", emulated_cuda.select(_dispatch.select))


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction set; `common.every_isa` parametrises it."""
    _dispatch._C.force_cpu(request.param)
    yield request.param
    _dispatch._C.force_cpu(None)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every allocation that is not initialised, also those of compiled kernels, is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # and with it torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """After a fault on the GPU no call in this process works again: the worker ends, another one takes its tests."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{nodeid}: the GPU is lost to this process ({str(error).splitlines()[0]})", flush=True)
            os._exit(70)
        if torch.cuda.memory_reserved() > 2**31:  # others test on this GPU as well
            torch.cuda.empty_cache()
