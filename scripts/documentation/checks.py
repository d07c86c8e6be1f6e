"""What must hold of the site that no generator of pages looks at: links, anchors, pictures, pages that nobody can find,
other hosts, what was to be made and was not."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

ASKED = {"link": "href"} | dict.fromkeys(("script", "img", "source", "iframe", "video", "audio"), "src")
STYLE = r"""(?:url\(\s*|@import\s+)(?:"(?P<a>[^"]+)"|'(?P<b>[^']+)'|(?P<c>[^\s'")]+))"""
OTHER = r"(https?:)?//"


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.asked, self.text = set[str](), list[str](), list[str](), ""
        self.skipped = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if "markdown" in found:
            self.text += f"<!-- make: {tag} -->"  # whose inside is Markdown still
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        canonical = found.get("rel") in ("canonical", "next", "prev", "alternate", "edit")
        if tag in ASKED and found.get(ASKED[tag]) and not canonical:
            self.asked.append(found[ASKED[tag]])
        self.asked += [one.split()[0] for one in found.get("srcset", "").split(",") if one.strip()]
        self.asked += styled(found.get("style", ""))
        if tag in ("code", "pre", "script", "style", "math"):
            self.skipped = self.skipped or tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self.skipped:
            self.skipped = ""

    def handle_data(self, data: str) -> None:
        if self.skipped == "style":
            self.asked += styled(data)
        elif not self.skipped:
            self.text += data

    def handle_comment(self, data: str) -> None:
        if data.strip().startswith("make:"):
            self.text += f"<!--{data}-->"


def styled(css: str) -> list[str]:
    """What it asks for."""
    return [found[found.lastgroup or 0] for found in re.finditer(STYLE, css)]


def problems(site: Path, sources: Path, config: Path) -> list[str]:
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = [f"{path.relative_to(site)}: {what}" for path in pages for what in _of(path, pages, site)]
    for path in sorted(site.rglob("*.css")):
        found += [f"{path.relative_to(site)}: {what}" for what in _asked(styled(path.read_text()), path, site)]
    for source in sorted(sources.rglob("*.md")):
        name = source.relative_to(sources)
        if site / name.with_suffix(".html") not in pages:
            found.append(f"{name}: no page was made of it")
    return found + _outside(config, sources)


def _asked(addresses: list[str], path: Path, site: Path) -> Iterator[str]:
    for address in addresses:
        if re.match(OTHER, address):
            yield f"asks another host: {address}"
        elif not address.startswith(("data:", "#")) and not _target(path, address, site)[0].exists():
            yield f"no such file: {address}"


def _of(path: Path, pages: dict[Path, Page], site: Path) -> Iterator[str]:
    page = pages[path]
    yield from _asked(page.asked, path, site)
    for address in page.links:
        if re.match(r"(https?|mailto):", address) or address in ("", "#", "."):
            continue
        target, anchor = _target(path, address, site)
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"leads nowhere: {address}"
        elif anchor and target in pages and anchor not in pages[target].ids:
            yield f"no such place: {address}"
    for left in re.findall(r"<!-- ?make:.*?-->|\$\$|\]\([\w./#-]+\)", page.text):
        yield f"was not made: {left}"


def _target(path: Path, address: str, site: Path) -> tuple[Path, str]:
    name, anchor = urldefrag(address)
    name = unquote(name.partition("?")[0])
    if name.startswith("/"):  # of the page for addresses that are none: from the root of the host
        return site.joinpath(*Path(name).parts[2:]), unquote(anchor)
    return (path.parent / name).resolve() if name else path, unquote(anchor)


def _outside(config: Path, sources: Path) -> list[str]:
    """Pages that the navigation lacks, and what it names and is not there."""
    named = set(re.findall(r"[\w./-]+\.md$", config.read_text(), flags=re.M))
    there = {str(path.relative_to(sources)) for path in sources.rglob("*.md")}
    return [f"{config.name}: the navigation lacks {name}" for name in sorted(there - named)] + [
        f"{config.name}: there is no {name}" for name in sorted(named - there)
    ]
