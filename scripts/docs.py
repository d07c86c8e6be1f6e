"""`python scripts/docs.py` (`make docs`): the site, from docs/, code and benchmarks/results, into build/site.

docs/ is copied to build/docs. There lines `<!-- make: NAME ARGUMENTS -->` become what a function of MAKERS returns,
formulas `$...$` and `$$...$$` become MathML, and Zensical makes pages of it. Warnings are errors, and so is what
documentation/checks.py finds in the pages.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # where benchmarks are

from documentation import api, checks, formulas, pictures, shared, speed, support, variables

ROOT = Path(__file__).parent.parent
SOURCE, PAGES, SITE = ROOT / "docs", ROOT / "build/docs", ROOT / "build/site"
MAKERS: dict[str, Callable[..., str]] = {
    "api": api.section,
    "changelog": shared.changelog,
    "environment": variables.table,
    "include": shared.include,
    "limits": support.limits,
    "picture": pictures.figure,
    "others": speed.others,
    "speed": speed.tables,
    "support": support.tables,
}


def made(page: Path) -> str:
    """The page's text with what is made in it."""

    def one(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        try:
            text = MAKERS[name](*arguments)
        except (KeyError, TypeError, LookupError) as error:
            raise SystemExit(f"{page.relative_to(PAGES)}: {found[0]}: {error!r}") from error
        return text

    place = page.relative_to(PAGES)
    try:
        text = shared.led(page.read_text(), (SOURCE / place).parent, PAGES / "assets/copied", SOURCE)
    except LookupError as error:
        raise SystemExit(f"{place}: {error}") from error
    text = re.sub(r"^<!-- make: (.+?) -->$", one, text, flags=re.M)
    return formulas.replaced(text.replace("](assets/", "](" + "../" * (len(place.parents) - 1) + "assets/"))


def build() -> None:
    """Raises SystemExit with what is wrong."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCE, PAGES)
    pictures.draw(PAGES / "assets")
    for page in sorted(PAGES.rglob("*.md")):
        page.write_text(made(page))
    config = ROOT / "build/mkdocs.yml"
    config.write_text(f"{(ROOT / 'mkdocs.yml').read_text()}site_url: {shared.project_url('Documentation')}/\n")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", config]
    ended = subprocess.run(command, cwd=config.parent, capture_output=True, text=True)
    if ended.returncode:
        said = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout + ended.stderr)  # colours
        raise SystemExit(said.partition("Traceback")[0] or said)
    if wrong := checks.problems(SITE, PAGES, config):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    build()
    print(SITE / "index.html")
