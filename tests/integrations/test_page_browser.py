"""`cogview page` as people use it: a browser draws, has a picture captioned, paints on one and has that drawn anew,
with models of CogView2; and draws and captions with CogView's. What it shows is in build/page, wide and narrow."""

import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from browser import SCREENS, chromium  # noqa: F401
from PIL import Image
from test_caption_command import captioning
from test_cogview2 import HOW, run  # noqa: F401
from test_system import saved_run, small_image, small_text, system_of

from cogview.cogview2 import CogView2
from cogview.commands.page_tabs import laid_out
from cogview.page import Models
from cogview.pictures import image_of

gr: Any = pytest.importorskip("gradio")

SHOTS = Path(__file__).parents[2] / "build" / "page"
SECONDS = 60_000  # thousandths of them: how long anything may take


@contextmanager
def served(folder: Path, places: Path) -> Iterator[str]:
    """Address of a page over a run, which ends in good order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cogview.cli", "page", "--run", str(folder), "--port", str(port)]
    variables = {**os.environ, "TMPDIR": str(places), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said, ready = list[str](), threading.Event()

    def listen() -> None:
        for line in process.stdout:
            said.append(line)
            if "has the page" in line:
                ready.set()

    threading.Thread(target=listen, daemon=True).start()
    until = time.monotonic() + 120
    while not ready.wait(0.1) and process.poll() is None and time.monotonic() < until:
        pass
    assert ready.is_set(), "".join(said)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    assert process.wait(30) == 1
    assert "Traceback" not in "".join(said), "".join(said)
    assert said[-1] == "cogview: stopped\n"
    assert not list(places.glob("cogview-page-*"))  # with all pictures


@pytest.fixture(scope="module")
def address(run, tmp_path_factory) -> Iterator[str]:  # noqa: F811
    with served(run, tmp_path_factory.mktemp("places")) as address:
        yield address


@pytest.fixture(scope="module")
def older_address(tmp_path_factory) -> Iterator[str]:
    """Of a run of CogView, a model that draws and one that captions."""
    folder = tmp_path_factory.mktemp("cogview")
    saved_run(folder, gpt=system_of(small_text(), small_image()), caption=captioning())
    with served(folder, tmp_path_factory.mktemp("places")) as address:
        yield address


@contextmanager
def opened(browser: Any, address: str, screen: str, first: str = "") -> Iterator[Any]:
    """The page, as it is opened; nothing is asked of other hosts. first: of the names of its shots."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(**SCREENS[screen])
    context.set_default_timeout(SECONDS)
    page, hosts, errors = context.new_page(), set[str](), list[str]()
    page.on("request", lambda asked: hosts.add(urlsplit(asked.url).hostname or "here"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    tab(page, "Text to picture").wait_for()
    page.shot = lambda name: page.screenshot(path=SHOTS / f"{screen}-{first}{name}.png", full_page=True)
    yield page
    context.close()
    assert hosts <= {"127.0.0.1", "here"}
    assert not errors


@pytest.fixture(params=SCREENS)
def page(request, chromium, address) -> Iterator[Any]:  # noqa: F811
    with opened(chromium, address, request.param) as page:
        yield page


@pytest.fixture
def older(chromium, older_address) -> Iterator[Any]:  # noqa: F811
    with opened(chromium, older_address, "wide", "cogview-") as page:
        yield page


def tab(page: Any, name: str) -> Any:
    return page.get_by_role("tab", name=name)


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def write(page: Any, text: str) -> None:
    page.get_by_label("Caption").locator("visible=true").fill(text)


def notes(page: Any, text: str) -> Any:
    found = page.locator(".note").locator("visible=true").get_by_text(re.compile(text))
    found.wait_for()
    return found


def shown(page: Any, label: str) -> list[Image.Image]:
    """The pictures of a gallery, as they can be saved."""
    gallery = page.locator(".pictures").locator("visible=true").filter(has_text=label)
    gallery.locator("img").first.wait_for()
    places = [one.get_attribute("src") for one in gallery.locator("img").all()]
    return [Image.open(io.BytesIO(page.request.get(place).body())) for place in places]


def test_pictures_appear(page, run):  # noqa: F811
    page.shot("1-begin")
    press(page, "Draw")
    notes(page, "Write a caption")
    write(page, "a fox")
    press(page, "Draw")
    notes(page, r"2 pictures in [\d.]+ s\.")
    assert [one.size for one in shown(page, "Pictures")] == [(96, 96)] * 2
    small = shown(page, "All that were drawn")
    assert [one.size for one in small] == [(32, 32)] * 8
    texts = page.locator(".small").get_by_text("CapLoss").all_inner_texts()
    losses = [float(text.removeprefix("CapLoss ")) for text in texts]
    assert len(losses) == 8
    assert losses == sorted(losses)
    page.shot("2-drawn")
    page.get_by_role("button", name="Thumbnail 1 of 2", exact=True).click()
    page.shot("3-one")


_WATCH = """() => {
    const labels = () => [...document.querySelectorAll(".small .caption-label")].map(one => one.innerText)
    window.seen = []
    new MutationObserver(() => window.seen.push(labels())).observe(document.body, {childList: true, subtree: true})
}"""


def test_candidates_appear_as_they_are_drawn(page):
    write(page, "a fox")
    page.get_by_label("number input for Pictures to choose from").locator("visible=true").fill("64")
    page.evaluate(_WATCH)
    press(page, "Draw")
    notes(page, r"2 pictures in [\d.]+ s\.")
    before = [names for names in page.evaluate("window.seen") if names and all(n.startswith("seed ") for n in names)]
    assert 8 <= min(map(len, before)) < 64
    assert all(names == [f"seed {n}" for n in range(len(names))] for names in before)


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_a_picture_is_captioned(page, tmp_path, language):
    tab(page, "Picture to text").click()
    press(page, "Caption")
    notes(page, r"Open a picture first\.")
    picture = torch.zeros(3, 90, 120, dtype=torch.uint8)
    picture[0, :, 60:] = 255
    image_of(picture).save(tmp_path / "given.png")
    page.locator("input[type=file]").locator("nth=0").set_input_files(tmp_path / "given.png")
    page.get_by_text("given.png").locator("visible=true").wait_for()
    page.get_by_label(language).check()
    press(page, "Caption")
    notes(page, r"The middle 90 x 90 of 120 x 90 pixels, brought to 32 x 32\. [1-4] captions? in [\d.]+ s\.")
    square, seen = shown(page, "What the model sees")
    assert square.size == seen.size == (32, 32)
    assert (square.getpixel((2, 9)), square.getpixel((29, 9))) == ((0, 0, 0), (255, 0, 0))
    texts = page.locator(".said li span").all_inner_texts()
    losses = [float(text.removeprefix("CapLoss ")) for text in texts]
    assert 1 <= len(losses) <= 4
    assert losses == sorted(losses)
    page.shot(f"8-captioned-{language}")
    page.get_by_role("button", name="Clear").locator("visible=true").first.click()
    page.locator(".said li").first.wait_for(state="hidden")


def test_what_is_wrong_is_a_sentence(page, tmp_path):
    write(page, "лиса")
    press(page, "Draw")
    said = notes(page, "expected English or Chinese")
    assert (
        said.inner_text()
        == "The caption: expected English or Chinese, got 'лиса', which its text tokenizer has not seen."
    )
    write(page, "a fox " * 30)
    press(page, "Draw")
    notes(page, "expected at most 30 tokens")
    page.shot("4-wrong")
    tab(page, "Edit").click()
    write(page, "a fox")
    press(page, "Draw anew")
    notes(page, r"Open a picture first\.")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "broken.png")
    notes(page, r"The file broken\.png: not a readable picture")
    page.shot("5-broken")


def test_a_part_is_drawn_anew(page, tmp_path):
    tab(page, "Edit").click()
    page.shot("6-edit")
    picture = torch.randint(256, (3, 30, 42), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    picture = picture.repeat_interleave(10, 1).repeat_interleave(10, 2)
    image_of(picture).save(tmp_path / "given.png")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "given.png")
    canvas = page.locator("canvas").first
    canvas.wait_for()
    write(page, "a red car")
    page.wait_for_timeout(1500)  # the picture comes into the canvas
    press(page, "Draw anew")
    notes(page, "Nothing is painted")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 25, y)
    page.mouse.down()
    page.mouse.move(x + 25, y + 10, steps=10)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.get_by_label("The whole picture").check()
    press(page, "Draw anew")
    notes(page, r"2 pictures in [\d.]+ s\.")
    before, *after = (torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in shown(page, "Before and after"))
    page.shot("7-edited")
    assert torch.equal(before, picture)
    for one in after:
        changed = (one != picture).any(dim=0)
        rows, columns = changed.nonzero().unbind(1)
        assert 500 < len(rows) < 0.3 * changed.numel()
        height, width = (int(n.max() - n.min()) for n in (rows, columns))
        assert height < width < 300
        assert abs(float(rows.float().mean()) - 150) < 40
        assert abs(float(columns.float().mean()) - 210) < 40
    page.get_by_role("button", name="Clear").locator("visible=true").first.click()
    canvas.wait_for(state="hidden")


def test_a_run_of_cogview(older, tmp_path):
    """Its captioning model ranks what the other draws, and captions a picture; there is nothing that edits."""
    assert older.get_by_role("tab").all_inner_texts() == ["Text to picture", "Picture to text"]
    write(older, "a fox")
    press(older, "Draw")
    notes(older, r"2 pictures in [\d.]+ s\.")
    assert [one.size for one in shown(older, "All that were drawn")] == [(32, 32)] * 8
    texts = older.locator(".small").get_by_text("CapLoss").all_inner_texts()
    losses = [float(text.removeprefix("CapLoss ")) for text in texts]
    assert len(losses) == 8
    assert losses == sorted(losses)
    older.shot("1-drawn")
    write(older, "a fox " * 30)
    press(older, "Draw")
    notes(older, r"The caption: expected at most \d+ tokens")
    tab(older, "Picture to text").click()
    press(older, "Caption")
    notes(older, r"Open a picture first\.")
    image_of(torch.zeros(3, 40, 50, dtype=torch.uint8)).save(tmp_path / "given.png")
    older.locator("input[type=file]").locator("nth=0").set_input_files(tmp_path / "given.png")
    older.get_by_text("given.png").locator("visible=true").wait_for()
    press(older, "Caption")
    notes(older, r"The middle 40 x 40 of 50 x 40 pixels, brought to 32 x 32\. [1-4] captions? in [\d.]+ s\.")
    assert [one.size for one in shown(older, "What the model sees")] == [(32, 32)] * 2
    assert 1 <= len(older.locator(".said li").all()) <= 4
    older.shot("2-captioned")


def test_one_request_at_a_time(run):  # noqa: F811
    page = laid_out(gr, Models.of(CogView2.load(run), HOW))
    answers = [function for function in page.fns.values() if function.concurrency_id == "models"]
    assert len(answers) == 3
    assert all(function.concurrency_limit == 1 for function in answers)
