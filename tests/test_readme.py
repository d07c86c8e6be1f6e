"""The README's examples run as they stand, and its figures are those of the results."""

import re
import tomllib
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


def test_links_are_absolute_and_what_they_lead_to_is_there() -> None:
    """Also where README is shown without the repository; pictures are taken from its newest commit."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    files = {f"{urls['Repository']}/blob/main": "", urls["Documentation"]: "docs"}
    files[urls["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main"] = ""
    links = re.findall(r"\]\((.*?)\)", README)
    assert len(links) > 20
    for link in links:
        if link.startswith("#"):
            assert f"\n## {link[1:].capitalize()}\n" in README
            continue
        start = next((url for url in files if link.startswith(url)), None)
        assert start is not None, link
        path = link.removeprefix(start).strip("/").replace(".html", ".md")
        assert (ROOT / files[start] / path).exists(), link


def test_speed_is_that_of_the_results() -> None:
    from benchmarks.readme import TABLE, filled

    assert len(TABLE.findall(README)) == README.count("<!-- results/") > 0
    assert filled(README) == README, "python -m benchmarks.readme writes it"
