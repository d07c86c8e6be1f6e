"""The site in a browser, every page: nothing asked of another host, pictures there, no wider than the screen, light and
dark. What it shows is in build/site-shots."""

import functools
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENS, chromium  # noqa: F401

pytest.importorskip("zensical")
ROOT = Path(__file__).parents[2]
SITE, SHOTS = ROOT / "build/site", ROOT / "build/site-shots"
PAGES = sorted(str(page.relative_to(ROOT / "docs").with_suffix(".html")) for page in (ROOT / "docs").rglob("*.md"))
SHOWN = "index.html", "operators/local_attention_2d.html", "support.html", "speed.html"  # those that shots are kept of
BROKEN = "[...document.images].filter(x => x.offsetParent && !(x.complete && x.naturalWidth)).map(x => x.src)"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    ended = subprocess.run([sys.executable, "scripts/docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=list(itertools.product(SCREENS, ("light", "dark"))), ids="-".join)
def opened(request, chromium, address) -> Iterator[tuple[Any, str]]:  # noqa: F811
    """A page of the browser, whose requests and errors are looked at in the end."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    screen, scheme = request.param
    context = chromium.new_context(**SCREENS[screen], color_scheme=scheme)
    asked, errors = list[str](), list[str]()
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield context.new_page(), f"{screen}-{scheme}"
    context.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert not errors


def test_pages(opened: tuple[Any, str], address: str) -> None:
    page, how = opened
    for name in PAGES:
        page.goto(f"{address}/{name}", wait_until="load")
        assert page.locator("h1").count() == 1, name
        assert page.evaluate(BROKEN) == [], name
        assert page.evaluate(WIDER) <= 0, name
        if name in SHOWN:
            page.screenshot(path=SHOTS / f"{name.replace('/', '-')[:-5]}-{how}.png", full_page=True)


def test_figures_follow_the_theme(opened: tuple[Any, str], address: str) -> None:
    page, how = opened
    page.goto(f"{address}/operators/local_attention_2d.html", wait_until="load")
    scheme = how.partition("-")[2]
    shown = page.evaluate("[...document.querySelectorAll('.figure img')].filter(x => x.offsetParent).map(x => x.src)")
    assert shown
    assert all(f"-{scheme}.svg" in source for source in shown)
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[:3]
    assert (red + green + blue > 600) == (scheme == "light")


def test_formulas_and_search(opened: tuple[Any, str], address: str) -> None:
    page, _ = opened
    page.goto(f"{address}/operators/three_region_attention.html", wait_until="load")
    box = page.locator("math").first.bounding_box()
    assert box["height"] > 20  # it is drawn, with its fraction
    page.keyboard.press("/")
    page.keyboard.type("raster_causal")
    page.get_by_role("link", name="2D local attention").last.wait_for(timeout=10_000)
