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
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "gpu"
BUDGET = 560  # seconds for all parts together
OPERATORS = [
    "operators",
    "three_region_attention",
    "local_attention_2d",
    "pb_relax_softmax",
    "sandwich_layer_norm",
    "gpu",
]
TESTS = [f"tests/test_{name}.py" for name in OPERATORS]
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
# (operator, shape, direction) in bfloat16: at least this part of the floor, or at most these microseconds
TARGETS: dict[tuple[str, str, str], tuple[str, float]] = {
    ("layer_norm", "33792x2560", "forward"): ("of floor", 0.90),
    ("layer_norm", "33792x2560", "forward+backward"): ("of floor", 0.85),
    ("sandwich_layer_norm", "33792x2560", "forward"): ("of floor", 0.90),
    ("sandwich_layer_norm", "33792x2560", "forward+backward"): ("of floor", 0.85),
    ("pb_relax_softmax", "320x1088x1088-causal", "forward"): ("µs", 285),
    ("pb_relax_softmax", "320x1088x1088-causal", "forward+backward"): ("µs", 665),
    ("pb_relax_softmax", "16x4224x4224", "forward"): ("of floor", 0.85),
    ("three_region_attention", "160x4224x64", "forward"): ("µs", 365),
    ("three_region_attention", "160x4224x64", "forward+backward"): ("µs", 1515),
    ("local_attention_2d", "320x64x64x64", "forward"): ("µs", 205),
    ("local_attention_2d", "320x64x64x64", "forward+backward"): ("µs", 725),
    ("local_attention_2d", "16x128x128x64-13", "forward"): ("µs", 58),
    ("local_attention_2d", "16x128x128x64-13", "forward+backward"): ("µs", 208),
}


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
    """A line for each target: what was wanted and what was measured."""
    found = {(r["op"], r["shape"], r["direction"]): r for r in rows if r["dtype"] == "bf16"}
    lines = []
    for key, (unit, goal) in TARGETS.items():
        row = found.get(key, {"failed": "not measured"})
        name = " ".join(key)
        if "failed" in row:
            lines.append(f"  ?      {name}: {str(row['failed'])[:60]}")
        elif unit == "µs":
            mine = row["median_s"] * 1e6
            lines.append(f"  {'met' if mine <= goal else 'MISSED':<6} {name}: {mine:.0f} µs, wanted {goal:.0f}")
        else:
            mine = row["floor_s"] / row["median_s"]
            lines.append(
                f"  {'met' if mine >= goal else 'MISSED':<6} {name}: {mine:.0%} of the floor, wanted {goal:.0%}"
            )
    return lines


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
