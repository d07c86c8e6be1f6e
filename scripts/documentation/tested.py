"""On which torch and Python what is tested, as the Makefile and the workflow of the tests have it."""

import re

from .shared import ROOT

MAKEFILE, WORKFLOW = ROOT / "Makefile", ROOT / ".github/workflows/tests.yml"


def table() -> str:
    make, workflow = MAKEFILE.read_text(), WORKFLOW.read_text()
    python = one(r'python-version: "([\d.]+)"', workflow)  # of lint and all tests
    torch, oldest = one(r"^TORCH \?= torch==([\d.]+)", make), one(r"install torch==([\d.]+) triton", make)
    before = one(r"^PYTHON312 \?= python([\d.]+)", make)  # of the oldest torch
    newest = one(r"findstring ([\d.]+),\$\*\),\$\(FIND313", make)  # has a Python of its own
    rows = [
        ("`make test`", torch, python, "all"),
        ("`make test-all`", oldest, before, "the operators, and the wheel"),
        ("`make test-all`", torch, python, "what takes longer, and the wheel"),
    ]
    for path in one(r"^NEWER := ([^#\n]*)", make).split():
        name = path.rpartition("/")[2]
        rows.append(("`make test-all`", name, "3.13" if name.startswith(newest) else python, "the wheel"))
    rows += [("workflow", *pair, "the operators") for pair in pairs(workflow)]
    head = "| by | torch | Python | what |", "|---|---|---|---|"
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def pairs(workflow: str) -> list[tuple[str, str]]:
    return re.findall(r'- \{ torch: "([\d.]+)", python: "([\d.]+)" \}', workflow)


def one(pattern: str, text: str) -> str:
    if not (found := [x for x in re.findall(pattern, text, re.MULTILINE) if x]):
        raise LookupError(f"there is no {pattern}")
    return found[0]
