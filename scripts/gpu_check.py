"""Build, test and time every operator on the GPU at hand, in four stages: `make gpu` runs them all.

    python scripts/gpu_check.py first --out FOLDER   4 minutes: does it load, are results right, rows with a target
    python scripts/gpu_check.py tests --out FOLDER   6 minutes: all tests, the stability experiment
    python scripts/gpu_check.py sweep --out FOLDER   5 minutes: CUDA C++ against Triton, rows for tables of what is best
    python scripts/gpu_check.py rows --out FOLDER    15 minutes: all rows, against every other way to compute them

Needs torch with CUDA, setuptools, ninja and pytest, nvcc and a C++ compiler unless the extension is --carried here;
takes what is installed, downloads nothing. Every part is a process with a time limit of its own, and what fails does
not end the rest. FOLDER gets <stage>.json, <stage>.log and results/, four files more for benchmarks/results.
--rehearse goes through it all without a GPU, on small cases.
Exit status: 0 if all passed, 1 if something failed, 2 without a GPU.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).parents[1]
BUDGETS = {"first": 220, "tests": 360, "sweep": 300, "rows": 900}  # seconds
RESERVE = 20  # of them, to interrupt and kill what is late, and for the summary
TESTS = "tests/operators"
SMOKE = "truth and bfloat16 and (cuda or triton)"
SWEPT = "# tables\n"  # from here on benchmarks.sweep prints what it has found
LOG = 2**21  # bytes of a part's output that are kept, half from its begin and half from its end
# The extension has CUDA kernels for this GPU.
LOADS = """
import sys, torch
from cogview_ops import _C
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
archs = _C.cuda_archs()
print(f"extension for {archs or 'no GPU'}, built against torch {_C.torch_version()}")
sys.exit(not (f"{major}.{minor}" in archs or "PTX" in archs))
"""


@dataclass
class Part:
    """A process, and what became of it."""

    name: str
    command: list[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    outcome: str = ""
    seconds: float = 0.0
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"

    def failures(self) -> list[str]:
        """What to show of a part that failed: its failing tests, or its last lines."""
        tests = re.findall(r"^(?:\[gw\d+\].*? )?(?:FAILED|ERROR) (\S+::\S+)", self.output, re.MULTILINE)
        lines = [line for line in self.output.splitlines() if line.strip()]
        return (list(dict.fromkeys(tests)) or lines[-3:])[:8]


def run(part: Part, stop: float, grace: float = 15) -> Part:
    """Runs it until its limit, or until `stop` on the monotonic clock: interrupted then, so that it says how far it
    came, and after `grace` seconds more killed with all that it started."""
    begin = time.monotonic()
    if stop - begin < 10:
        part.outcome = "no time left"
    else:
        limit = min(part.limit, stop - begin)
        with TemporaryDirectory() as folder, open(Path(folder) / "log", "w+b") as log:
            part.outcome = _outcome(part, limit, grace, log)
            log.seek(0)
            part.output = shortened(log.read()).decode(errors="replace")
    part.seconds = round(time.monotonic() - begin, 1)
    print(f"{part.name:<12} {part.outcome}, {part.seconds:.0f} s", flush=True)
    return part


def _outcome(part: Part, limit: float, grace: float, log: Any) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | part.environment
    how: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
    try:
        process = part.process = subprocess.Popen(part.command, start_new_session=True, **how)
    except OSError as error:
        return str(error)
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(grace)
            return f"interrupted after {limit:.0f} s"
        except subprocess.TimeoutExpired:
            return f"killed after {limit + grace:.0f} s"
    finally:
        kill(part)
        process.wait()


def let_parts_hear_interrupts() -> None:
    """What is ignored here (in a shell's background job) would be in every part; what is handled is not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)


def kill(part: Part) -> None:
    """With the compilers and workers that it may have left behind."""
    if part.process:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)


def shortened(output: bytes) -> bytes:
    left_out = len(output) - LOG
    if left_out <= 0:
        return output
    return output[: LOG // 2] + f"\n[{left_out} bytes left out]\n".encode() + output[-LOG // 2 :]


def facts() -> dict[str, Any]:
    """What figures must be read with, and what this machine has."""
    import torch

    gpu = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "nvidia-smi": (gpu or "not there").strip(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout")},
        "processors": os.cpu_count(),
        "tools": {name: shutil.which(name) for name in ("git", "make", "g++", "nvcc", "ninja", "compute-sanitizer")},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> str | None:
    """Why nothing can be checked here."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "no GPU that torch can use"


def pytest(*arguments: str, workers: int = 1) -> list[str]:
    """Each test is named as it ends and has a minute; a worker that hangs or loses the GPU is replaced."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=60", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") and workers > 1:
        command += ["-n", str(workers), "--dist=worksteal"]
    return command + list(arguments)


class Check:
    """One stage: parts in their order, and what they left behind."""

    def __init__(self, stage: str, out: Path, rehearse: bool, carried: bool, begin: float, budget: float = 0) -> None:
        self.stage, self.out, self.rehearse, self.carried = stage, out, rehearse, carried
        self.facts = facts()
        self.patience = 10 if rehearse else 1  # a CPU is slower
        self.stop = begin + ((budget or BUDGETS[stage]) - RESERVE) * self.patience
        self.stopped = False
        self.parts: list[Part] = []
        self.results = out / "results"

    def together(self, *parts: Part) -> None:
        self.parts += parts
        for part in parts:
            part.limit *= self.patience
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(run, part, self.stop) for part in parts]
            try:
                for job in running:
                    job.result()
            except KeyboardInterrupt:
                for part in parts:
                    kill(part)
                raise
        self.save([])  # what is here if all of this is stopped

    def extension(self) -> None:
        """Loaded as it is where it was --carried here, else built from what has changed."""
        if self.carried:
            self.together(Part("load", [sys.executable, "-c", LOADS], 60))
            if self.parts[-1].passed:
                return
            print(*self.parts.pop().failures(), "so it is built here", sep="\n", flush=True)
        import torch

        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        arch = f"{major}.{minor}" + "a" * (major == 9)
        wish = {"COGVIEW_OPS_CUDA": "auto" if self.rehearse else "1", "TORCH_CUDA_ARCH_LIST": arch}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        self.together(Part("build", command, 240, wish))

    def pytest(self, name: str, limit: float, *arguments: str) -> Part:
        if self.rehearse:  # launches are counted, not run
            return Part(name, pytest("-p", "tests.triton_count", *arguments), limit)
        return Part(name, pytest(*arguments, workers=max(1, min(14, (os.cpu_count() or 1) - 2))), limit)

    def benchmarks(self, limit: float, *arguments: str) -> Part:
        left = max(min(limit, self.stop - time.monotonic()) - 30, 0)  # the last case may take so long
        extra = ["--rehearse"] if self.rehearse else []
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(self.results), "--budget", f"{left:.0f}"]
        return Part("benchmarks", [*command, *arguments, *extra], limit)

    def first(self) -> None:
        shutil.rmtree(self.results, ignore_errors=True)
        self.extension()
        self.together(Part("info", [sys.executable, "-m", "cogview_ops.info"], 30))
        self.together(self.pytest("smoke", 90, "-k", SMOKE, TESTS))
        self.together(self.benchmarks(150, "--targets", "--dtype", "bf16", "--seconds", "0.3"))

    def tests(self) -> None:
        self.extension()
        stability = ["--rates", "0.1", "--out", str(self.results / "stability")]
        stability += ["--preset", "tiny"] * self.rehearse
        self.together(
            self.pytest("tests", 220, "-k", "(cuda or triton) and not float64", TESTS),
            Part("stability", [sys.executable, "-m", "benchmarks.stability", *stability], 220),
        )
        self.together(  # a quarter of the compilations, and the slowest: last
            Part("large", pytest("tests/test_gpu.py"), 100),
            self.pytest("float64", 100, "-k", "(cuda or triton) and float64", TESTS),
        )

    def sweep(self) -> None:
        self.extension()
        left = max(min(BUDGETS["sweep"] * self.patience, self.stop - time.monotonic()) - 30, 0)
        command = [sys.executable, "-m", "benchmarks.sweep", "--out", str(self.results / "sweep")]
        command += ["--budget", f"{left:.0f}", *["--rehearse", "--seconds", "0.02"] * self.rehearse]
        self.together(Part("sweep", command, BUDGETS["sweep"]))  # alone on the machine

    def rows(self) -> None:
        self.extension()
        self.together(self.benchmarks(BUDGETS["rows"], "--dtype", "bf16"))  # alone on the machine

    def run(self) -> list[str]:
        """All of it, whatever happens, and the summary."""
        try:
            getattr(self, self.stage)()
        except KeyboardInterrupt:
            self.stopped = True
        except Exception:
            self.parts.append(Part("the script", [], 0, outcome="broke", output=traceback.format_exc()))
        lines = self.summary()
        self.save(lines)
        return lines

    def summary(self) -> list[str]:
        from benchmarks import targets

        rows = [row for path in self.results.glob("*.json") for row in json.loads(path.read_text())]
        lines = [f"{self.facts['device']}, torch {self.facts['torch']}, triton {self.facts['triton']}"]
        for part in self.parts:
            lines.append(f"{'ok' if part.passed else 'FAILED':<6} {part.name}: {part.outcome}, {part.seconds:.0f} s")
            if not part.passed:
                lines += [f"         {line[:100]}" for line in part.failures()]
            if part.name == "sweep":
                lines += [line[:160] for line in part.output.partition(SWEPT)[2].splitlines()]
        if self.rehearse:
            lines.append("a rehearsal: these rows are of small cases under the names of large ones")
        if rows:
            copy, product = rows[0]["ceilings"]["copy"] / 1e12, rows[0]["ceilings"]["matmul"] / 1e12
            lines.append(f"copy {copy:.2f} TB/s, bfloat16 product {product:.0f} TFLOP/s")
        return lines + targets.lines(rows)

    def save(self, lines: list[str]) -> None:
        parts = [
            {"part": p.name, "passed": p.passed, "outcome": p.outcome, "seconds": p.seconds, "command": p.command}
            for p in self.parts
        ]
        texts = {
            ".json": json.dumps({"stage": self.stage, **self.facts, "parts": parts, "summary": lines}, indent=1) + "\n",
            ".log": "\n".join(f"===== {p.name}: {p.outcome}\n{p.output}" for p in self.parts),
        }
        for suffix, text in texts.items():
            beside = self.out / f"{self.stage}.tmp"
            beside.write_text(text)
            os.replace(beside, self.out / f"{self.stage}{suffix}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="+", choices=list(BUDGETS), metavar="stage", help="some of first, tests, sweep, rows"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder (default: build/gpu)")
    parser.add_argument("--carried", action="store_true", help="use the extension that is here if it loads")
    parser.add_argument("--budget", type=float, default=0, metavar="S", help=f"seconds of a stage (default: {BUDGETS})")
    parser.add_argument("--commit", help="of the sources, where there is no git to say it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on small cases")
    options = parser.parse_args()
    reason = missing()
    if reason and not options.rehearse:
        print(f"gpu_check: {reason}; nothing was checked")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # parts end with this script, however it is ended
    let_parts_hear_interrupts()
    if options.commit:
        os.environ["COGVIEW_OPS_COMMIT"] = options.commit
    sys.path.insert(0, str(ROOT))
    options.out.mkdir(parents=True, exist_ok=True)
    passed, begin = True, STARTED
    for stage in options.stages:
        check = Check(stage, options.out.resolve(), options.rehearse, options.carried, begin, options.budget)
        print(json.dumps(check.facts, indent=1), flush=True)
        print(f"\nSummary of {stage}", *check.run(), f"All of it is in {options.out}", sep="\n", flush=True)
        if check.stopped:
            return 130
        passed &= all(part.passed for part in check.parts)
        begin = time.monotonic()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
