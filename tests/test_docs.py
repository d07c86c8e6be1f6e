"""The pages of docs/: every Python snippet runs, what shell lines name exists, variables are those that code reads; and
the site is built, where the tool for it is.

A snippet that needs a package says so in a comment above, `<!-- needs: transformers -->`, and is skipped without it;
under COGVIEW_TESTS=all, where all of them are installed, it must run. So must those below `<!-- heavy -->`, which are
skipped without.
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
from snippets import Snippet, indented_code, snippets

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
            one = self.left[0]
            if one == snippet or (not one.missing and (ALL or not one.heavy)):
                one.run(self.names)
            del self.left[0]


READERS: dict[Path, Reader] = {}


@pytest.mark.parametrize("snippet", [s for page in PAGES for s in snippets(page, "python")], ids=lambda s: s.label)
def test_snippet_runs(
    snippet: Snippet, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = READERS.get(snippet.page) or READERS.setdefault(snippet.page, Reader(snippet.page))
    if snippet.missing and not ALL:
        pytest.skip(f"needs {', '.join(snippet.missing)}: COGVIEW_TESTS=all with it")
    if snippet.heavy and not ALL:
        pytest.skip("takes too long: COGVIEW_TESTS=all")
    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # one for all: what a snippet writes the next may read
    torch.manual_seed(0)
    reader.read(snippet)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: page.stem)
def test_snippets_say_what_to_expect(page: Path) -> None:
    assert any("assert " in snippet.code for snippet in snippets(page, "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_fenced(page: Path) -> None:
    """What is not is not run."""
    assert indented_code(page) == []


def test_indented_code_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    blocks = (
        "text",
        "    code",
        "- item",
        "    more",
        '=== "tab"',
        "    inside",
        "text",
        "```py\n\n    x\n```",
        "    last",
    )
    page.write_text("\n\n".join(blocks))
    assert indented_code(page) == ["    code", "    last"]


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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All pages by the code that makes the site, but figures."""
    from documentation import pages, speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "figures", list)
        copied = tmp_path_factory.mktemp("copied")
        return {name: pages.made(name, copied) for name in (page.relative_to(DOCS).as_posix() for page in PAGES)}


def test_links_between_pages_lead_somewhere(made: dict[str, str]) -> None:
    from documentation import pages

    assert list(pages.astray(made)) == []
    assert sum("](" in text for text in made.values()) > 20


def test_links_that_lead_astray_are_found() -> None:
    from documentation import pages

    good = (
        "# One `thing`\n\n## Again\n\n## Again\n\n### `x` { #own }\n\n[a](#again_1) [b](https://x.y/z.md) [c](sub/b.md)"
    )
    bad = "# B\n\n[a](../a.md#own) [b](../a.md#one-thing) [c](gone.md) [d](#again)\n\n```\n[e](code.md)\n```"
    told = list(pages.astray({"a.md": good, "sub/b.md": bad}))
    assert told == ["sub/b.md: leads nowhere: gone.md", "sub/b.md: no such place: #again"]


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("nothing", SystemExit, "page.md: <!-- make: nothing -->: expected one of api"),
        ("limits_of x", SystemExit, "got limits_of"),
        ("saved", SystemExit, "missing a required argument: 'folder'"),
        ("saved steps twice", SystemExit, "too many positional arguments"),
        ("beside no such", LookupError, "there are no results for a table of machine, shape"),
        ("api nothing", AttributeError, "nothing"),
    ],
)
def test_only_wrong_lines_of_pages_are_said_to_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, error: type[BaseException], said: str
) -> None:
    """What a maker itself raises stays what it is, with the place."""
    from documentation import pages

    (tmp_path / "page.md").write_text(f"<!-- make: {line} -->\n")
    monkeypatch.setattr(pages, "SOURCE", tmp_path)
    with pytest.raises(error, match=re.escape(said)) as raised:
        pages.made("page.md", tmp_path)
    assert error is SystemExit or raised.value.__notes__ == [f"in page.md: <!-- make: {line} -->"]


def test_summaries_are_of_the_results(made: dict[str, str]) -> None:
    """Every row that another one beats clearly is under "Where it is slower", and the least is at the ends of spans."""
    from documentation import summaries

    bias = [
        row["baselines"]["no table"]["ratio"]
        for row in summaries.results()
        if row["device"].startswith("AMD EPYC 25-17") and "ratio" in row["baselines"].get("no table", {})
    ]
    assert f"`8x56x56x32-7x7-bias` | {min(bias):.2f} to {max(bias):.2f} |" in made["speed.md"]
    slower = made["speed.md"].partition("\n## Where it is slower\n")[2].partition("\n## ")[0]
    beaten = [row for row in summaries.results() if any(x.get("ratio", 1) < 0.95 for x in row["baselines"].values())]
    assert len(beaten) == slower.count("\n| ") - 2
    for row in beaten:
        assert f"`{row['shape']}` | {row['dtype']} |" in slower


def test_table_of_what_is_tested_on_what() -> None:
    import test_wheel
    from documentation import tested

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tested.table().splitlines()[2:]]
    [here] = [torch for by, torch, *_ in rows if by == "`make test`"]
    wheel = [torch for _, torch, _, what in rows if "the wheel" in what]
    assert len(wheel) == len(test_wheel.WITH)
    assert {Path(name).name for name in test_wheel.WITH if "/torches/" in name} | {here} == set(wheel[1:])
    assert sum(by == "workflow" for by, *_ in rows) == len(tested.pairs(tested.WORKFLOW.read_text())) > 0
    assert all(re.fullmatch(r"2\.\d+\.\d", torch) and re.fullmatch(r"3\.\d+", python) for _, torch, python, _ in rows)


@pytest.mark.skipif(not ALL, reason="draws figures for half a minute: COGVIEW_TESTS=all")
def test_site_is_built_without_a_warning(made: dict[str, str]) -> None:
    from documentation import checks, pages

    ended = subprocess.run([sys.executable, "scripts/docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name, text in made.items():  # places are those of the generator of pages
        assert pages.places(text) <= checks.Page((ROOT / "build/site" / name).with_suffix(".html")).ids, name


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('<a href="gone.html">x</a>', "leads nowhere: gone.html"),
        ('<a href="b.html#gone">x</a>', "no such place: b.html#gone"),
        ('<img src="gone.png">', "no such file: gone.png"),
        ('<script src="https://cdn.example/x.js"></script>', "asks another host: https://cdn.example/x.js"),
        ("<div markdown>*a*</div>", "was not made: <!-- make: div -->"),
        ("<!-- make: speed x -->", "was not made: <!-- make: speed x -->"),
        ('<img srcset="b.html 1x, https://cdn.example/x.png 2x">', "asks another host: https://cdn.example/x.png"),
        ('<img srcset="gone.png 2x">', "no such file: gone.png"),
        ("<p style=\"background: url('https://cdn.example/x.png')\">", "asks another host: https://cdn.example/x.png"),
        ("<style>@import '//cdn.example/x.css';</style>", "asks another host: //cdn.example/x.css"),
        ("<style>a { background: url(#here) url(data:image/png;base64,x) url(b.html) }</style>", ""),
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


def test_checks_find_an_empty_site_and_other_hosts_in_its_styles(tmp_path: Path) -> None:
    from documentation import checks

    site, sources, config = tmp_path / "site", tmp_path / "docs", tmp_path / "mkdocs.yml"
    (sources / "deep").mkdir(parents=True)
    (sources / "deep/a.md").touch()
    config.write_text("nav:\n  - deep/a.md\n")
    site.mkdir()
    assert checks.problems(site, sources, config) == ["deep/a.md: no page was made of it"]
    (site / "deep").mkdir()
    (site / "deep/a.html").touch()
    css = '@import "https://cdn.example/y.css"; a { src: url(//cdn.example/f) url("deep/a.html") url(\'gone\') }'
    (site / "x.css").write_text(css)
    told = [f"x.css: asks another host: {address}" for address in ("https://cdn.example/y.css", "//cdn.example/f")]
    told.append("x.css: no such file: gone")
    assert checks.problems(site, sources, config) == told
