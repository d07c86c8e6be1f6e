"""Parts of other files of the repository, included and not copied, and links to them."""

import re
import shutil
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = r"^(?P<fence>[ ]*```|[ ]*~~~).*?^(?P=fence)[ ]*$|`+[^`\n]*`+"
# [label](name#anchor) of a file; labels may have brackets in them
LABEL, NAME = r"(?P<label>(?:[^\[\]]|\[[^\]]*\])*)", r"(?!\w+:|#|assets/)(?P<name>[^)#\s]+)"
ADDRESS = rf"(?P<picture>!?)\[{LABEL}\]\({NAME}(?P<anchor>#[^)\s]*)?\)"


def outside_code(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    """re.sub, with named groups only, where Markdown has no code."""
    return re.sub(f"{CODE}|(?P<found>{pattern})", lambda m: replace(m) if m["found"] else m[0], text, flags=re.M | re.S)


def include(name: str, *heading: str) -> str:
    """A Markdown file of the root without its title, or what stands under a heading of its second level."""
    text = (ROOT / name).read_text()
    title = " ".join(heading)
    pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)" if heading else r"\A# [^\n]*\n(.*)"
    found = re.search(pattern, text, flags=re.M | re.S)
    if found is None:
        raise LookupError(f"{name} has no heading {title!r}")
    return led(found[1].strip(), ROOT)


def changelog() -> str:
    return include("CHANGELOG.md")


def led(text: str, folder: Path, pictures: Path | None = None, inside: Path | None = None) -> str:
    """Links and pictures of a text that stands in `folder`. What they name outside of `inside`, where pages are, is the
    repository's: links lead to where it is kept, and pictures are copied to `pictures`."""

    def one(found: re.Match[str]) -> str:
        picture, label, name, anchor = (found[part] or "" for part in ("picture", "label", "name", "anchor"))
        path = (folder / name).resolve()
        if inside and path.is_relative_to(inside):
            return found[0]
        if not path.exists():
            raise LookupError(f"there is no {name}")
        place = path.relative_to(ROOT)
        if not picture:
            return f"[{label}]({project_url('Repository')}/{'tree' if path.is_dir() else 'blob'}/main/{place}{anchor})"
        if pictures is None:
            raise LookupError(f"a picture in what is included: {name}")
        copied = "-".join(place.parts)
        pictures.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, pictures / copied)
        return f"![{label}](assets/copied/{copied}{anchor})"

    return outside_code(ADDRESS, one, text)


@cache
def project_url(name: str) -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"][name]
