"""The part of CHANGELOG.md that is about a version, if its tag, the package and the date agree.

python scripts/release_notes.py v1.2.3
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d|unreleased)$", re.MULTILINE)


def notes(tag: str, changelog: str, version: str) -> str:
    newest = HEADING.search(changelog)
    if newest is None:
        sys.exit("CHANGELOG.md: expected a heading like ## 1.2.3 - 2026-12-24, or - unreleased")
    if not tag == f"v{newest[1]}" == f"v{version}":
        sys.exit(f"tag {tag}: expected v{version}, of the package, and v{newest[1]}, of CHANGELOG.md")
    if newest[2] == "unreleased":
        sys.exit(f"CHANGELOG.md: expected the date of {version}, got unreleased")
    return re.split(r"^## ", changelog[newest.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()


def package_version() -> str:
    """Without importing torch."""
    return re.findall(r'^__version__ = "(.+)"$', (ROOT / "cogview_ops/__init__.py").read_text(), re.MULTILINE)[0]


if __name__ == "__main__":
    print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), package_version()))
