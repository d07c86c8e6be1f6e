"""Code in Markdown: what readers copy, and the tests run."""

import ast
import importlib.util
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

BLOCK = r"^(?P<in>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=in)```[ ]*$"


class Snippet(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    needs: tuple[str, ...] = ()  # packages, of a comment above: <!-- needs: transformers -->

    @property
    def label(self) -> str:
        return f"{self.page.stem}:{self.line}"

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def run(self, names: dict[str, object]) -> None:
        """Errors name the page and its line."""
        tree = ast.parse("\n" * self.line + self.code, str(self.page))
        exec(compile(tree, str(self.page), "exec"), names)


def snippets(page: Path, *languages: str) -> list[Snippet]:
    found = []
    text = page.read_text()
    for block in re.finditer(BLOCK, text, re.M | re.S):
        if block["language"] not in languages:
            continue
        above = text[: block.start()].rstrip("\n").rpartition("\n\n")[2]
        said = re.findall(r"<!-- ([^>]*?) -->", above)
        needs = [name for one in said if one.startswith("needs:") for name in re.split(r"[ ,]+", one[6:].strip())]
        line = text[: block.start()].count("\n") + 1
        code = textwrap.dedent(block["code"])
        found.append(Snippet(page, line, block["language"], code, tuple(needs)))
    return found
