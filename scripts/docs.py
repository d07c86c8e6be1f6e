"""`python scripts/docs.py` (`make docs`): the site, from docs/, code and benchmarks/results, into build/site.

docs/ is copied to build/docs. There lines `<!-- make: NAME ARGUMENTS -->` become what a function of MAKERS in
documentation/pages.py returns, formulas `$...$` and `$$...$$` become MathML, and Zensical makes pages of it. Warnings
are errors, and so is what documentation/checks.py finds in the pages.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # where benchmarks are

from documentation import checks, formulas, pages, pictures, shared

ROOT = Path(__file__).parent.parent
PAGES, SITE = ROOT / "build/docs", ROOT / "build/site"


def build() -> None:
    """Raises SystemExit with what is wrong."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pages.SOURCE, PAGES)
    pictures.draw(PAGES / "assets")
    names = sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))
    texts = {name: pages.made(name, PAGES / "assets/copied") for name in names}
    if wrong := list(pages.astray(texts)):
        raise SystemExit("\n".join(wrong))
    for name, text in texts.items():
        (PAGES / name).write_text(formulas.replaced(text))
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
