"""One version, said by the package, pyproject.toml and CHANGELOG.md; what a tag makes of it."""

import re
import sys
from pathlib import Path

import pytest
from common import python

import cogview_ops

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
import release_notes  # noqa: E402

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_package_and_changelog_have_one_version() -> None:
    assert release_notes.HEADING.search(CHANGELOG)[1] == cogview_ops.__version__ == release_notes.package_version()


def test_the_build_reads_it_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from setuptools.config.pyprojecttoml import read_configuration as read\n"
        "print(read('pyproject.toml')['project']['version'])"
    )
    run = python("-W", "ignore", "-c", code)
    assert run.stdout.strip() == cogview_ops.__version__, run.stderr


def test_versions_of_the_changelog_fall() -> None:
    found = re.findall(r"^## (\d.*)$", CHANGELOG, re.MULTILINE)
    headings = release_notes.HEADING.findall(CHANGELOG)
    assert len(headings) == len(found), "a heading of a version that is none"
    versions = [tuple(map(int, version.split("."))) for version, _ in headings]
    assert versions == sorted(set(versions), reverse=True)
    assert all(date != "unreleased" for _, date in headings[1:])


NOTES = "# Changelog\n\n## 1.2.0 - 2027-01-05\n\n### Added\n\n- A.\n\n## 1.1.0 - 2026-12-01\n\n- B.\n"


def test_notes_of_a_tag() -> None:
    assert release_notes.notes("v1.2.0", NOTES, "1.2.0") == "### Added\n\n- A."


@pytest.mark.parametrize(
    ("tag", "version", "date", "why"),
    [
        ("v1.2.1", "1.2.0", "2027-01-05", "tag v1.2.1: expected v1.2.0, of the package, and v1.2.0, of CHANGELOG.md"),
        ("v1.2.0", "1.3.0", "2027-01-05", "tag v1.2.0: expected v1.3.0, of the package"),
        ("1.2.0", "1.2.0", "2027-01-05", "tag 1.2.0: expected v1.2.0"),
        ("v1.2.0", "1.2.0", "unreleased", "expected the date of 1.2.0, got unreleased"),
        ("v1.2.0", "1.2.0", "soon", "tag v1.2.0: expected v1.2.0, of the package, and v1.1.0, of CHANGELOG.md"),
    ],
)
def test_tags_that_are_wrong_make_no_release(tag: str, version: str, date: str, why: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(why)):
        release_notes.notes(tag, NOTES.replace("2027-01-05", date), version)


def test_nothing_is_released_from_a_changelog_without_versions() -> None:
    with pytest.raises(SystemExit, match="expected a heading"):
        release_notes.notes("v1.2.0", "# Changelog\n", "1.2.0")
