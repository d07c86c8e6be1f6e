"""What breaks in a long training, and what is left of it: nothing is lost but steps since the last checkpoint."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import needs_processes, preloaded
from safetensors.torch import load_file
from spread import faults, in_processes, to_its_end
from test_train_best import TIMES

from cogview.train import checkpoint
from cogview.train.log import read_log

ALL = os.environ.get("COGVIEW_TESTS") == "all"
TESTS = Path(__file__).parent


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if k.removeprefix("validation_") not in TIMES} for entry in read_log(folder)
    ]


def check_all_is_whole(folder: Path) -> int:
    """Every checkpoint that is there; the step of the newest."""
    for path in checkpoint.paths(folder):
        checkpoint.read(path)
    return newest(folder)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without any."""
    return max(map(checkpoint.step_of, checkpoint.paths(folder)), default=0)


def some_moment(draw: random.Random, folder: Path, steps: int, within: float, runs: Callable[[], bool]) -> None:
    """Waits for a random step of what is left of a run, and then for some of `within` seconds; or until it has ended.
    In steps, since a time could be all of it or none on another machine."""
    step = draw.randrange(newest(folder), steps + 1)
    while runs() and newest(folder) < step:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, within))


def begin_anew(folder: Path) -> None:
    for path in checkpoint.paths(folder):
        checkpoint.remove(path)
    (folder / "log.jsonl").unlink()


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """By kill -9, in steps and while checkpoints are written: what is there is whole, nothing goes back, and in the end
    it is bit for bit the run that was not killed."""
    to_its_end(tmp_path / "whole")
    folder, draw = tmp_path / "killed", random.Random(0)
    processes = multiprocessing.get_context(preloaded())
    kills, inside, before = 0, 0, 0
    folder.mkdir()
    while kills < (30 if ALL else 5) or inside < (10 if ALL else 1):
        process = processes.Process(target=to_its_end, args=(folder,))
        process.start()
        some_moment(draw, folder, 60, 0.02, process.is_alive)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        now = check_all_is_whole(folder)
        assert now >= before
        inside += now > before and process.exitcode != 0
        before = now
        if process.exitcode == 0:  # it came to its end: once more from the beginning
            begin_anew(folder)
            before = 0
    to_its_end(folder)
    assert log_of(folder) == log_of(tmp_path / "whole")
    ours, theirs = (load_file(checkpoint.latest(x)) for x in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert not list(folder.glob(".*.tmp"))


@needs_processes
def test_a_broken_batch_and_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On one of two processes: both skip the step, the training goes on, and the next checkpoint is written, and what
    the log had no room for."""
    both = in_processes(2, faults, tmp_path, heard=True)
    assert both[0]["loss"] == both[1]["loss"]
    for found in both:
        assert found["broken"]["loss"] != found["broken"]["loss"]
        assert (found["finished"], found["skipped"]) == (True, 1)
    steps = [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)]
    assert (steps[0], steps[-1]) == (9, 11)
    assert check_all_is_whole(tmp_path) == 11
    said = capfd.readouterr().out
    failed = said.count(f"cannot write checkpoint in {tmp_path}: ")  # at step 3 and 6, and where the best one was
    assert failed >= 2
    assert said.count(f"cannot write {tmp_path / 'log.jsonl'}: ") == 1
    assert said.count("; training goes on") == failed + 1
    assert "no more TensorBoard events: " in said
    assert sum("unsaved" in entry for entry in read_log(tmp_path)) == failed
    assert [entry["step"] for entry in read_log(tmp_path) if "loss" in entry] == list(range(2, 12))
    assert not list(tmp_path.glob(".*.tmp"))


def torchrun(folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen(
        [*command, str(TESTS / "spread.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@needs_processes
def test_a_process_that_dies_and_then_sigterm(tmp_path: Path) -> None:
    """torchrun starts all of them again, and they go on from the last checkpoint; told to end, they save at once."""
    run = torchrun(tmp_path, "--max-restarts", "1", SECONDS_A_STEP="0.3")
    while max((entry["step"] for entry in read_log(tmp_path)), default=0) < 9:  # it died at 7
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    said, _ = run.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    step = check_all_is_whole(tmp_path)
    assert f"came to step {step}, finished False" in said
    assert (tmp_path / "died").exists()
    assert 9 <= step < 30
    assert checkpoint.read_header(checkpoint.latest(tmp_path))["run"]["step"] == step
    steps = [entry["step"] for entry in read_log(tmp_path) if "loss" in entry]
    assert steps == list(range(1, step + 1))


@needs_processes
@pytest.mark.skipif(not ALL, reason="COGVIEW_TESTS=all")
def test_several_processes_killed_at_random_moments(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    draw, before, inside = random.Random(0), 0, 0
    for _ in range(10):
        run = torchrun(tmp_path, SECONDS_A_STEP="0.2")
        some_moment(draw, tmp_path, 30, 0.2, lambda run=run: run.poll() is None)
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)])  # torchrun's processes have sessions of their own
        run.communicate()
        now = check_all_is_whole(tmp_path)
        assert now >= before
        inside, before = inside + (before < now < 30), now
        if now == 30:  # it came to its end: once more from the beginning
            begin_anew(tmp_path)
            before = 0
    assert inside >= 1
    said, _ = torchrun(tmp_path).communicate(timeout=120)
    assert "came to step 30, finished True" in said
    steps = [entry["step"] for entry in read_log(tmp_path) if "loss" in entry]
    assert steps == list(range(1, 31))


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither budgets nor checkpoints go by the time of day."""
    to_its_end(tmp_path / "a")
    now, begun = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now() + 86_400 * int(10 * (time.monotonic() - begun)))
    to_its_end(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert read_log(tmp_path / "b")[-1]["step"] == 60
    shutil.rmtree(tmp_path)
