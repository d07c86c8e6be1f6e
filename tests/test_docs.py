"""The pages of docs/: every Python snippet runs, what shell lines name exists, variables are those that code reads; and
the site is built, where the tool for it is.

A snippet that needs a package says so in a comment above, `<!-- needs: transformers -->`, and is skipped without it;
under COGVIEW_TESTS=all, where all of them are installed, it must run.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from snippets import Snippet, snippets

from cogview import cli
from cogview_ops._environment import VARIABLES
from cogview_ops._manifest import OPERATORS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = os.environ.get("COGVIEW_TESTS") == "all"
sys.path.insert(0, str(ROOT / "scripts"))  # of documentation


class Reader:
    """Runs a page's snippets in their order, with the names of those before."""

    def __init__(self, page: Path) -> None:
        self.left, self.names = snippets(page, "python"), dict[str, object]()
        for name in [name for name in sys.modules if name.partition(".")[0] == "natten"]:
            if sys.modules[name].__name__.startswith("cogview_ops."):  # in its place, for the page before
                del sys.modules[name]

    def read(self, snippet: Snippet) -> None:
        while self.left and self.left[0].line <= snippet.line:
            if not self.left[0].missing or self.left[0] == snippet:
                self.left[0].run(self.names)
            del self.left[0]


READERS: dict[Path, Reader] = {}


@pytest.mark.parametrize("snippet", [s for page in PAGES for s in snippets(page, "python")], ids=lambda s: s.label)
def test_snippet_runs(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = READERS.get(snippet.page) or READERS.setdefault(snippet.page, Reader(snippet.page))
    if snippet.missing and not ALL:
        pytest.skip(f"needs {', '.join(snippet.missing)}: COGVIEW_TESTS=all with it")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    reader.read(snippet)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: page.stem)
def test_snippets_say_what_to_expect(page: Path) -> None:
    assert any("assert " in snippet.code for snippet in snippets(page, "python"))


def shell_lines() -> list[tuple[str, str]]:
    found = []
    for page in [ROOT / "README.md", *PAGES]:
        for snippet in snippets(page, "sh", "bash", "shell", "console"):
            for line in re.sub(r"\\\n\s*", " ", snippet.code).splitlines():
                parts = line.partition("  #")[0].split("&&")
                found += [(snippet.label, part.strip()) for part in parts if part.strip(" #") and part[0] != "#"]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_command_exists(page: str, line: str) -> None:
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        assert words[0].partition("=")[0] in known_variables(), words[0]
        words = words[1:]
    if words[:1] == ["torchrun"] and "--" in words:  # what is behind it is the program's
        words = words[words.index("--") + 1 :]
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            for target in targets:
                name = target.partition("=")[0]  # a target, perhaps beside others, or a variable
                assert re.search(rf"^{name} \?=|^([\w -]* )?{name}( [\w -]*)?:", makefile, re.M), target
        case ["python", "-m", module, *rest] if module != "pip":
            path = ROOT / module.replace(".", "/")
            path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            if path.is_file():  # it is read, not run: modules of benchmarks start themselves anew
                assert all(f'"{option}"' in path.read_text() for option in options_of(rest)), line
            else:
                assert importlib.util.find_spec(module), module
        case ["python", path, *_] if path.endswith(".py"):
            assert (ROOT / path).is_file(), path
        case ["cogview" | "cogview2" as command, *rest]:
            subcommands = [word for word in rest[:2] if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
            shown = help_of(command, *of_command(command, tuple(subcommands)))
            for option in options_of(rest):
                positive = option.replace("--no-", "--", 1)
                assert any(re.search(rf"{one}(?![\w-])", shown) for one in (option, positive)), option
        case ["pip", "install", *packages] | ["uv", "pip", "install", *packages]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for package in packages:
                for extra in re.findall(r"^(?:\.|cogview-ops)\[(.*)\]$", package):
                    assert set(extra.split(",")) <= set(extras), package
        case _:
            assert words[0] in ("source", "git", "cd", "uv", "pip", "python", "cmake", "export", "tar"), line


def known_variables() -> set[str]:
    return {variable.name for group in VARIABLES.values() for variable in group} | {"OMP_NUM_THREADS"}


def options_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def of_command(command: str, words: tuple[str, ...]) -> list[str]:
    """Those of the words that are subcommands: the longest for which there is help."""
    for count in range(len(words), 0, -1):
        with contextlib.suppress(AssertionError):
            help_of(command, *words[:count])
            return list(words[:count])
    raise AssertionError(f"{command} has no command {words}")


@cache
def help_of(command: str, *words: str) -> str:
    """Of `cogview` or `cogview2`, in this process, which has imported what they need."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        (cli.main if command == "cogview" else cli.cogview2)([*words, "--help"])
    assert "--help" in out.getvalue(), out.getvalue()[-500:]
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


READS = (
    r"environ(?:\.(?:get|setdefault|pop))?[\[(][\"'](\w+)[\"']",
    r"getenv\(\"(\w+)\"\)",
    r"(?:VARIABLE|kStrips\[\]) = \"(\w+)\"",
    r"WAITING = \(\"(\w+)\", \"(\w+)\"\)",
    r"patch\.setenv\(\"([A-Z]\w+)\"",
)
OTHERS = {"PATH", "PYTHONPATH", "SECONDS_A_STEP"}  # every program's, and what a test tells its own processes


def variables_read() -> set[str]:
    files = [ROOT / "setup.py"]
    for folder in ("cogview", "cogview_ops", "benchmarks", "scripts", "tests", "csrc"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    found: set[str] = set()
    for file in files:
        if file != Path(__file__):
            for pattern in READS:
                for match in re.finditer(pattern, file.read_text()):
                    found |= set(match.groups())
    return found - OTHERS


def test_table_of_variables_is_whole() -> None:
    """MAX_JOBS is read by torch's extension builder, which setup.py calls."""
    table = {variable.name for group in VARIABLES.values() for variable in group}
    assert variables_read() <= table, "cogview_ops/_environment.py lacks these"
    assert table <= variables_read() | {"MAX_JOBS"}, "nothing reads these"


def test_every_operator_has_a_page() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "operators").glob("*.md"))
    for name in OPERATORS:
        assert re.search(rf"<!-- make: api {name} -->", pages), name


def test_support_matrix_has_every_option() -> None:
    from documentation import support

    assert support.missing() == []
    assert set(support.CALLS) == {name for name, operator in OPERATORS.items() if operator.made_of == "kernels"}


def test_support_matrix_asks_the_kernels() -> None:
    from documentation import support

    call = support.CALLS["local_attention_2d"]
    assert support.cuda(call, torch.bfloat16, 64, {}) is None
    assert "odd sizes" in (support.cuda(call, torch.bfloat16, 64, {"kernel_size": (4, 4)}) or "")
    assert "head_dim 32, 64" in (support.cuda(call, torch.bfloat16, 48, {}) or "")


def test_pictures_are_those_of_the_patterns(tmp_path: Path) -> None:
    from documentation import pictures

    pictures.draw(tmp_path)
    light, dark = (tmp_path / f"local-2d-{theme}.svg" for theme in ("light", "dark"))
    assert light.read_text() != dark.read_text()
    seen = light.read_text().count(pictures.Drawing("light", "").colours["window"])
    assert seen == 24 + 8 + 24 + 24 + 12 + 26 + 1  # of six windows but their queries, and the legend


@pytest.mark.skipif(not ALL, reason="draws figures for half a minute: COGVIEW_TESTS=all")
def test_site_is_built_without_a_warning() -> None:
    ended = subprocess.run([sys.executable, "scripts/docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('<a href="gone.html">x</a>', "leads nowhere: gone.html"),
        ('<a href="b.html#gone">x</a>', "no such place: b.html#gone"),
        ('<img src="gone.png">', "no such file: gone.png"),
        ('<script src="https://cdn.example/x.js"></script>', "asks another host: https://cdn.example/x.js"),
        ("<div markdown>*a*</div>", "was not made: <!-- make: div -->"),
        ("<!-- make: speed x -->", "was not made: <!-- make: speed x -->"),
        ('<a href="b.html#here">x</a><img src="data:image/png;base64,x">', ""),
    ],
)
def test_checks_of_the_site(tmp_path: Path, body: str, expected: str) -> None:
    from documentation import checks

    site, sources = tmp_path / "site", tmp_path / "docs"
    site.mkdir()
    sources.mkdir()
    (site / "a.html").write_text(body)
    (site / "b.html").write_text('<h2 id="here"></h2>')
    for name in ("a", "b"):
        (sources / f"{name}.md").touch()
    (tmp_path / "mkdocs.yml").write_text("nav:\n  - a.md\n  - gone.md\n")
    found = checks.problems(site, sources, tmp_path / "mkdocs.yml")
    assert found[-2:] == ["mkdocs.yml: the navigation lacks b.md", "mkdocs.yml: there is no gone.md"]
    assert found[:-2] == ([f"a.html: {expected}"] if expected else [])
