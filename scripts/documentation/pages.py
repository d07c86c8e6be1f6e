"""Pages of docs/ with what is made in them, as Markdown; and where their links lead."""

import inspect
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath

from . import api, pictures, shared, speed, summaries, support, tested, variables

SOURCE = shared.ROOT / "docs"
MAKERS: dict[str, Callable[..., str]] = {
    "api": api.section,
    "beside": summaries.beside,
    "changelog": shared.changelog,
    "dense": summaries.dense,
    "environment": variables.table,
    "floors": summaries.floors,
    "include": shared.include,
    "limits": support.limits,
    "memory": summaries.memory,
    "others": speed.others,
    "picture": pictures.figure,
    "reads": summaries.reads,
    "saved": summaries.saved,
    "slower": summaries.slower,
    "speed": speed.tables,
    "support": support.tables,
    "tested": tested.table,
}
LINK = r"\]\((?P<address>[^)\s]+)\)"
HEADING = r"^#+ (?P<heading>[^\n{]+)$|(?:\bid=\"|\{ ?#)(?P<id>[\w-]+)"


def made(name: str, copied: Path) -> str:
    """A page's text; SystemExit where it names what is not there. Pictures of other folders go into `copied`."""

    def one(found: re.Match[str]) -> str:
        maker, *arguments = found[1].split()
        if maker not in MAKERS:
            raise SystemExit(f"{name}: {found[0]}: expected one of {', '.join(MAKERS)}, got {maker}")
        try:
            inspect.signature(MAKERS[maker]).bind(*arguments)
        except TypeError as error:
            raise SystemExit(f"{name}: {found[0]}: {error}") from error
        try:
            return MAKERS[maker](*arguments)
        except Exception as error:  # the maker's own
            error.add_note(f"in {name}: {found[0]}")
            raise

    page = SOURCE / name
    try:
        text = shared.led(page.read_text(), page.parent, copied, SOURCE)
    except LookupError as error:
        raise SystemExit(f"{name}: {error}") from error
    text = re.sub(r"^<!-- make: (.+?) -->$", one, text, flags=re.M)
    return text.replace("](assets/", "](" + "../" * name.count("/") + "assets/")


def astray(texts: dict[str, str]) -> Iterator[str]:
    """Links between pages, by their names, that lead to no page or to no heading of it."""
    anchors = {name: places(text) for name, text in texts.items()}
    for name, text in texts.items():
        for address in found(LINK, text, "address"):
            if re.match(r"\w+:", address):
                continue
            path, _, anchor = address.partition("#")
            target = normpath(PurePosixPath(name).parent / path) if path else name
            if target.endswith(".md") and target not in texts:
                yield f"{name}: leads nowhere: {address}"
            elif target.endswith(".md") and anchor and anchor not in anchors[target]:
                yield f"{name}: no such place: {address}"


def places(text: str) -> set[str]:
    """Ids of a page, as Markdown's table of contents gives them to headings."""
    seen = set(found(HEADING, text, "id"))
    for heading in found(HEADING, text, "heading"):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)|<[^>]*>", r"\1", heading)  # labels of links, no tags
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
        count = 0
        while (one := f"{slug}_{count}" if count else slug) in seen:
            count += 1
        seen.add(one)
    return seen


def found(pattern: str, text: str, group: str) -> list[str]:
    """In a text without its blocks of code."""
    fences = re.sub(r"^(?P<fence>[ ]*```|[ ]*~~~).*?^(?P=fence)[ ]*$", "", text, flags=re.M | re.S)
    return [match[group] for match in re.finditer(pattern, fences, re.M) if match[group]]
