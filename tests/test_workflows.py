"""What GitHub reads: its linters (of make lint) find what they should; the matrix tests what pyproject.toml
promises; workflows call targets of the Makefile; forms ask for the report."""

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from common import python
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Version = tuple[int, ...]


def read(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / ".github" / name).read_text())


def version(text: str) -> Version:
    """Major and minor."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


TESTS = read("workflows/tests.yml")["jobs"]
PAIRS = [(version(x["torch"]), version(x["python"])) for x in TESTS["operators"]["strategy"]["matrix"]["include"]]


def test_linters_find_what_they_should(tmp_path: Path) -> None:
    """A fault a file, each of another kind."""
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    shutil.copy(ROOT / "CITATION.cff", tmp_path)

    def break_it(name: str, old: str, new: str) -> None:
        path = tmp_path / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    title = "make asan '${{ github.event.pull_request.title }}'"
    break_it(".github/workflows/sanitizers.yml", "make asan", title)
    break_it(".github/workflows/gpu.yml", "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1", "a/b@main")
    break_it(".github/workflows/docs.yml", "    timeout-minutes: 45\n", "")
    break_it(".github/workflows/wheels.yml", "runs-on", "runs-at")
    break_it(".github/ISSUE_TEMPLATE/bug.yml", "type: textarea", "type: text")
    break_it(".github/dependabot.yml", "monthly", "often")
    break_it("CITATION.cff", "1.2.0", "9.9.9")
    run = python("scripts/lint_github.py", str(tmp_path))
    assert run.returncode == 1, run.stderr
    for said in ("template-injection", "unpinned-uses", "docs.yml", "wheels.yml", "bug.yml", "dependabot.yml", "9.9.9"):
        assert said in run.stdout, said


def test_linters_miss_no_kind_of_file(tmp_path: Path) -> None:
    run = python("scripts/lint_github.py", str(tmp_path))
    assert run.returncode == 1
    assert "expected files .github/workflows/*.yml, there is none" in run.stderr


def test_the_matrix_is_what_is_promised() -> None:
    """Every Python of the classifiers and every torch from the oldest on, the ends with each other."""
    torchs, pythons = sorted({torch for torch, _ in PAIRS}), sorted({python for _, python in PAIRS})
    classified = [x.rpartition(" ")[2] for x in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", x)]
    assert pythons == [version(x) for x in classified]
    assert PROJECT["requires-python"] == ">={}.{}".format(*pythons[0])
    assert pythons == [(3, minor) for minor in range(pythons[0][1], pythons[-1][1] + 1)]
    [torch] = [x for x in PROJECT["dependencies"] if x.startswith("torch")]
    assert torch == "torch>={}.{}".format(*torchs[0])
    assert torchs == [(2, minor) for minor in range(torchs[0][1], torchs[-1][1] + 1)]
    assert {(torchs[i], pythons[j]) for i in (0, -1) for j in (0, -1)} <= set(PAIRS)
    assert len(PAIRS) == len(set(PAIRS))


def test_all_tests_run_with_what_make_installs() -> None:
    [default] = re.findall(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version(default) in {torch for torch, _ in PAIRS}
    for job in ("lint", "test"):
        [setup] = [step for step in TESTS[job]["steps"] if "setup-python" in step.get("uses", "")]
        assert version(setup["with"]["python-version"]) == version(PROJECT["requires-python"])
    assert any(step.get("run", "").startswith("make test ") for step in TESTS["test"]["steps"])


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_what_there_is(path: Path) -> None:
    """People can run the same: what workflows do is in the Makefile."""
    targets = " ".join(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)).split()
    jobs = read(f"workflows/{path.name}")["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs
    for command in (line for text in runs for line in text.splitlines()):
        first, second = command.split()[:2]
        assert first in ("make", "python3", "gh", "dnf", "pip", "python", "grep"), command
        assert first != "python" or command.startswith("python -m cogview_ops.info --report"), command
        assert first != "make" or second in targets
        assert first != "python3" or (ROOT / second).exists()


def test_nothing_is_published_but_from_a_tag_and_by_approval() -> None:
    jobs = read("workflows/wheels.yml")["jobs"]
    writing = {name for name, job in jobs.items() if "write" in job["permissions"].values()}
    assert writing == {"pypi", "release"}
    assert "try" in jobs["pypi"]["needs"]
    assert "--report" in jobs["try"]["steps"][-1]["run"]
    for name in writing:
        assert jobs[name]["if"] == "github.ref_type == 'tag'"
        assert jobs[name]["environment"]


def test_forms_ask_for_the_report() -> None:
    forms = {path.name: path.read_text() for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    del forms["config.yml"]
    assert len(forms) == 4
    assert all("`python -m cogview_ops.info --report`" in text for text in forms.values())


def test_a_pull_request_is_asked_little() -> None:
    assert len((ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text().splitlines()) <= 5
