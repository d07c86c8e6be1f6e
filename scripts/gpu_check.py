"""`make gpu`: build the CUDA extension, test and time every operator on the GPU at hand; no network, under ten minutes.

Needs torch with CUDA, nvcc, a C++ compiler, setuptools, ninja and pytest; Triton's tests run where Triton is. Each part
is a process with a time limit of its own, and what fails does not end the rest. Everything goes to build/gpu:
check.json, table.txt and a log of each part. Exit status: 0 if all passed, 1 if something failed, 2 without a GPU.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "gpu"
BUDGET = 560  # seconds for all parts together
OPERATORS = [
    "operators",
    "three_region_attention",
    "local_attention_2d",
    "pb_relax_attention",
    "pb_relax_softmax",
    "sandwich_layer_norm",
    "gpu",
]
TESTS = [f"tests/test_{name}.py" for name in OPERATORS]
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE"]


class Target(NamedTuple):
    """In bfloat16: at least this part of the memory floor, or so many times as fast as the fastest of the baselines."""

    op: str
    shape: str
    direction: str
    goal: float
    against: tuple[str, ...] = ()  # baselines; none: the floor, all bytes at the speed of the device's copy

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"


DENSE = ("causal SDPA", "flash causal SDPA", "cuDNN causal SDPA")
TARGETS = [
    Target("layer_norm", "33792x2560", "forward", 0.90),
    Target("layer_norm", "33792x2560", "backward", 0.85),
    Target("sandwich_layer_norm", "33792x2560", "forward", 0.90),
    Target("sandwich_layer_norm", "33792x2560", "backward", 0.85),
    Target("pb_relax_softmax", "320x1088x1088-causal", "forward", 0.85),
    Target("pb_relax_softmax", "16x4224x4224", "forward", 0.85),
    Target("three_region_attention", "160x4224x64", "forward", 2, DENSE),
    Target("three_region_attention", "160x4224x64", "forward+backward", 1.8, DENSE),
    Target("three_region_attention", "40x33792x64", "forward", 8, DENSE),
    Target("three_region_attention", "40x33792x64", "forward+backward", 8, DENSE),
    Target("local_attention_2d", "320x64x64x64", "forward", 1 / 1.5),
    Target("local_attention_2d", "320x64x64x64", "backward", 1 / 2),
    Target("local_attention_2d", "320x64x64x64", "forward", 3, ("FlexAttention",)),
    Target("local_attention_2d", "320x64x64x64", "forward", 40, ("global vanilla",)),
]


def missing() -> str | None:
    """Why this machine cannot do it."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return None


def run(name: str, command: list[str], limit: float, **environment: str) -> dict[str, Any]:
    """One part: its outcome, seconds and the end of what it printed."""
    if limit < 10:
        return {"part": name, "passed": False, "outcome": "no time left", "seconds": 0.0, "tail": ""}
    start, log = time.monotonic(), OUT / f"{name}.log"
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code = process.wait(limit)
            outcome = "passed" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with its compilers and workers
            process.wait()
            outcome = f"stopped after {limit:.0f} s"
        except OSError as error:
            outcome = str(error)
    tail = log.read_text(errors="replace")[-6000:]
    part = {"part": name, "passed": outcome == "passed", "outcome": outcome, "seconds": time.monotonic() - start}
    print(f"{name:<12} {outcome}, {part['seconds']:.0f} s", flush=True)
    return part | {"tail": tail}


def parts() -> list[dict[str, Any]]:
    import torch

    stop = time.monotonic() + BUDGET

    def limit(seconds: float) -> float:
        return min(seconds, stop - time.monotonic())

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}" + "a" * (major == 9)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = [run("build", build, limit(240), COGVIEW_OPS_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)]
    done.append(run("info", [sys.executable, "-m", "cogview_ops.info"], limit(30)))
    if importlib.util.find_spec("pytest") is None:
        reason = {"passed": False, "outcome": "pytest is not installed", "seconds": 0.0, "tail": ""}
        return [*done, {"part": "tests", **reason}, {"part": "benchmarks", **reason}]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    chosen = [test for test in TESTS if (ROOT / test).exists()]
    done.append(run("tests", [*PYTEST, *workers, "-k", "cuda or triton", *chosen], limit(180)))
    done.append(run("large", [*PYTEST, "tests/test_gpu.py"], limit(60)))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        small = [*PYTEST, "tests/test_pb_relax_softmax.py", "tests/test_sandwich_layer_norm.py", "-k"]
        small.append("truth and cuda and (width_17 or causal_mask or 17-row or 100-tensor)")
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *small]
        done.append(run("memcheck", command, limit(60), PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    else:
        print("memcheck     left out: compute-sanitizer is not on PATH")
    left = limit(200)
    bench = [sys.executable, "-m", "benchmarks.gpu", "--budget", str(max(left - 30, 0)), "--out"]
    done.append(run("benchmarks", [*bench, str(OUT / "benchmarks.json")], left))
    return done


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each target: what was measured and what was wanted."""
    found = {(r["op"], r["shape"], r["direction"]): r for r in rows if r["dtype"] == "bf16"}
    lines = []
    for target in TARGETS:
        try:
            mine, unit = measured(target, found)
            outcome = "met" if mine >= target.goal else "MISSED"
            lines.append(f"  {outcome:<6} {target}: {mine:.2f} {unit}, wanted {target.goal:.2f}")
        except LookupError as reason:
            lines.append(f"  ?      {target}: not measured ({str(reason.args[0])[:60]})")
    return lines


def measured(target: Target, found: dict[tuple[str, str, str], dict[str, Any]]) -> tuple[float, str]:
    """A backward is the difference of two rows. LookupError says why there is no figure."""

    def row(direction: str) -> dict[str, Any]:
        it = found.get((target.op, target.shape, direction), {"failed": "no such row"})
        if "failed" in it:
            raise LookupError(it["failed"])
        return it

    if target.against:
        others = row(target.direction)["baselines"]
        ratios = {name: others[name]["ratio"] for name in target.against if "ratio" in others.get(name, {})}
        if not ratios:
            raise LookupError(others.get(target.against[0], {}).get("failed", f"no {target.against[0]}"))
        fastest = min(ratios, key=ratios.__getitem__)
        return ratios[fastest], f"times as fast as {fastest}"
    whole = row("forward+backward" if target.direction == "backward" else target.direction)
    floor, time = whole["floors_s"]["memory"], whole["median_s"]
    if target.direction == "backward":
        forward = row("forward")
        floor, time = floor - forward["floors_s"]["memory"], time - forward["median_s"]
    return floor / time, "of copy speed"


def failures(part: dict[str, Any]) -> list[str]:
    """What to show of a part that failed: its failing tests, or its last lines."""
    tests = re.findall(r"^(?:FAILED|ERROR) (\S+)", part["tail"], re.MULTILINE)
    return [f"    {x}" for x in (tests or part["tail"].splitlines()[-3:])[:8]]


def main() -> int:
    reason = missing()
    if reason:
        print(f"make gpu: {reason}; nothing was checked")
        return 2
    import torch

    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "benchmarks.json").unlink(missing_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    done = parts()
    path = OUT / "benchmarks.json"
    measured = json.loads(path.read_text()) if path.exists() else {"ceilings": {}, "rows": []}
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version}
    beside = OUT / "check.tmp"
    beside.write_text(json.dumps({**facts, "parts": done, **measured}, indent=1) + "\n")
    os.replace(beside, OUT / "check.json")
    log = OUT / "benchmarks.log"
    (OUT / "table.txt").write_text(log.read_text(errors="replace") if log.exists() else "")
    print("\nSummary")
    for part in done:
        print(f"  {'ok' if part['passed'] else 'FAILED':<6} {part['part']}: {part['outcome']}")
        if not part["passed"]:
            print("\n".join(failures(part)))
    if measured["ceilings"]:
        copy, matmul = measured["ceilings"]["copy"] / 1e12, measured["ceilings"]["matmul"] / 1e12
        print(f"  copy {copy:.2f} TB/s, bfloat16 product {matmul:.0f} TFLOP/s")
    print("\n".join(targets(measured["rows"])))
    print(f"All of it: {OUT.relative_to(ROOT)}/check.json, table.txt and the logs beside them")
    return 0 if all(part["passed"] for part in done) else 1


if __name__ == "__main__":
    sys.exit(main())
