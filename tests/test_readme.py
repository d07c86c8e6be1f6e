"""The README's examples run as they stand, and its variables exist."""

import re
from pathlib import Path

import pytest

from cogview_ops._manifest import OPERATORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.findall(r"import .*?(\w+)\n\n", code)[0])
def test_example(code: str) -> None:
    assert "assert " in code  # every example says what to expect
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_an_example_or_a_mention(name: str) -> None:
    assert re.search(rf"\b{name}\b", README.partition("\n## Operators\n")[2].partition("\n## ")[0])


@pytest.mark.parametrize("variable", re.findall(r"^\| `(COGVIEW_\w+)`", README, flags=re.M))
def test_variable_is_read_by_the_code(variable: str) -> None:
    sources = [ROOT / "setup.py", *(ROOT / "cogview_ops").glob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    assert any(variable in path.read_text() for path in sources)


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, flags=re.M))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("image", re.findall(r"!\[.*?\]\((.*?)\)", README))
def test_image_exists(image: str) -> None:
    assert (ROOT / image).is_file()


def test_speed_is_that_of_the_results() -> None:
    from benchmarks.readme import TABLE, filled

    assert len(TABLE.findall(README)) == README.count("<!-- results/") > 0
    assert filled(README) == README, "python -m benchmarks.readme writes it"
