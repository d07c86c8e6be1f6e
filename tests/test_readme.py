"""The README's examples run as they stand, and its figures are those of the results."""

import re
from pathlib import Path

import pytest
from snippets import Snippet, snippets

from cogview_ops._manifest import OPERATORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("snippet", snippets(ROOT / "README.md", "python"), ids=lambda snippet: snippet.label)
def test_example(snippet: Snippet) -> None:
    assert "assert " in snippet.code  # every example says what to expect
    snippet.run({})


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_an_example_or_a_mention(name: str) -> None:
    assert re.search(rf"\b{name}\b", README.partition("\n## Operators\n")[2].partition("\n## ")[0])


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
