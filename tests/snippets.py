"""Code in Markdown: what readers copy, and the tests run."""

import ast
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from cogview_ops.bench.packages import installed

BLOCK = r"^(?P<in>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=in)```[ ]*$"


class Snippet(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    needs: tuple[str, ...] = ()  # packages, of a comment above: <!-- needs: transformers -->
    heavy: bool = False  # by a comment above, <!-- heavy -->: takes too long for every change

    @property
    def label(self) -> str:
        return f"{self.page.stem}:{self.line}"

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if not installed(name)]

    def run(self, names: dict[str, object]) -> None:
        """Errors name the page and its line."""
        tree = ast.parse("\n" * self.line + self.code, str(self.page))
        exec(compile(tree, str(self.page), "exec"), names)


def indented_code(page: Path) -> list[str]:
    """Lines that Markdown takes for code without fences, which `snippets` does not see: indented, after an empty line,
    and in no list and no tab."""
    text = re.sub(BLOCK, lambda found: re.sub(r".+", "fenced", found[0]), page.read_text(), flags=re.M | re.S)
    found, above = [], ""  # the last line that began a paragraph at the margin
    for before, line in pairwise(["", *text.splitlines()]):
        if line.startswith("    ") and not before.strip() and not re.match(r"([-*+]|\d+\.) |===|!!!|\?\?\?", above):
            found.append(line)
        elif line.strip() and not line.startswith(" ") and not before.strip():
            above = line
    return found


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
        found.append(Snippet(page, line, block["language"], code, tuple(needs), "heavy" in said))
    return found
