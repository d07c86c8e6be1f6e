"""Every example runs by itself, as its page is, and says what it found."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
# the package that it needs beside torch, and what it must print with its defaults
EXAMPLES: dict[str, tuple[str | None, str]] = {
    "anyup_upsampler": (None, r"attention over copied keys: forward \d+ ms, \d+ MB"),
    "dinat_on_cpu": ("transformers", r"of 200 new pictures (9\d|100)% are told right"),
    "vit_local_attention": ("transformers", r"with a window of the whole picture the outputs differ by \de-0[5-9]"),
    "gemma3_fused_norms": (
        "transformers",
        r"[0-9.]+ times as fast forward, [0-9.]+ times as fast a step, -?[0-9]+% less kept",
    ),
    "llama_three_region": ("transformers", r"three-region attention: .* s a step"),
}


def test_all_are_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name: str) -> None:
    package, line = EXAMPLES[name]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[integrations]'")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::UserWarning", str(FOLDER / f"{name}.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(line, run.stdout), run.stdout
