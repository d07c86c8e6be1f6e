"""The form of a human evaluation as people use it, in a browser and from a folder: scored by clicks and by keys,
interrupted, gone on with, saved and read. What it shows is in build/human, wide and narrow, light and dark."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import SCREENS, chromium  # noqa: F401

from cogview import cli
from cogview.human.form import Form
from cogview.human.key import SCORES, Key
from cogview.pictures import image_of

SHOTS = Path(__file__).parents[2] / "build" / "human"
CAPTIONS = ["a fox <b>above</b> a tree & a car", "一只狐狸 🦊"]
LEVELS = {"CogView": 3, "GAN": 2, "truth": 5}  # of scores, by model; overall twice as much


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Key]:
    """A form, and its key."""
    folder = tmp_path_factory.mktemp("form")
    for n, name in enumerate(LEVELS):
        (folder / name).mkdir()
        for number in range(1, len(CAPTIONS) + 1):
            torch.manual_seed(10 * n + number)
            image = image_of(torch.randint(256, (3, 8, 8), dtype=torch.uint8)).resize((64, 64))
            image.save(folder / name / f"{number}.png")
    form = Form(CAPTIONS, {name: folder / name for name in LEVELS}, count=2, evaluators=3, seed=0)
    return folder, form.write(folder / "human", folder / "key.json")


@pytest.fixture(params=list(itertools.product(SCREENS, ("light", "dark"))), ids="-".join)
def context(request, chromium) -> Iterator[Any]:  # noqa: F811
    """Where answers are kept; no page of it has an error or asks a host for anything."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    screen, scheme = request.param
    context = chromium.new_context(**SCREENS[screen], color_scheme=scheme)
    context.set_default_timeout(60_000)
    asked, errors = list[str](), list[str]()
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    context.shot = lambda page, name: page.screenshot(path=SHOTS / f"{screen}-{scheme}-{name}.png", full_page=True)
    yield context
    context.close()
    assert all(url.startswith(("file:", "blob:")) for url in asked)
    assert not errors


def opened(context: Any, folder: Path, evaluator: int) -> Any:
    page = context.new_page()
    page.goto((folder / "human" / "index.html").as_uri())
    page.get_by_label("Your number").fill(str(evaluator))
    press(page, "Begin, or go on")
    return page


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name).locator("visible=true").click()


def score(page: Any, of: str, value: int) -> None:
    page.locator(f"#{of}").get_by_role("radio", name=str(value), exact=True).check()


def choose(page: Any, number: int) -> None:
    page.locator("#best").get_by_role("radio").nth(number).check()


def answer(page: Any, key: Key, evaluator: int, caption: int) -> None:
    """To all about a caption, by clicks: the picture of the truth is the best."""
    shown = key.shown[evaluator - 1][caption]
    for n, number in enumerate(shown, 1):
        page.get_by_text(f"Caption {caption + 1} of 2, picture {n} of 3").wait_for()
        assert page.locator(".picture img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
        assert page.locator(".picture img").get_attribute("src") == f"pictures/{number:04d}.png"
        level = LEVELS[key.pictures[number].model]
        for name in list(SCORES)[:-1]:
            assert page.locator("#overall:disabled").count() == 1
            score(page, name, level)
        score(page, "overall", 2 * level)
        press(page, "Next")
    choose(page, [key.pictures[number].model for number in shown].index("truth"))


def downloaded(page: Any, button: str) -> str:
    with page.expect_download() as got:
        press(page, button)
    assert got.value.suggested_filename == "answers-2.json"
    return got.value.path().read_text()


def test_a_form_is_filled_in_interrupted_and_read(context, made, tmp_path):
    folder, key = made
    page = opened(context, folder, 2)
    assert page.locator("#score .caption").inner_text() == CAPTIONS[0]
    assert page.locator("#score .caption b").count() == 0
    score(page, "clarity", 1)
    score(page, "clarity", 4)  # may be changed
    context.shot(page, "1-score")
    answer(page, key, 2, 0)
    context.shot(page, "2-best")
    page.close()

    page = opened(context, folder, 2)  # where it stopped
    page.get_by_text("Caption 2 of 2, picture 1 of 3").wait_for()
    page.get_by_text("13 of 26 answers").wait_for()
    press(page, "To the end")
    page.get_by_text("13 answers are missing.").wait_for()
    context.shot(page, "3-holes")
    part = json.loads(downloaded(page, "Save what there is"))
    assert [bool(of["scores"]) for of in part["answers"]] == [True, False]
    press(page, "Go to the first that is missing")
    answer(page, key, 2, 1)
    press(page, "Next")
    page.get_by_text("All answers are there.").wait_for()
    context.shot(page, "4-end")
    (tmp_path / "answers.json").write_text(downloaded(page, "Save answers-2.json"))
    assert page.locator("#text").input_value() == (tmp_path / "answers.json").read_text()

    out = tmp_path / "results"
    cli.main(["human", "results", str(tmp_path / "answers.json"), "--key", str(folder / "key.json"), "--out", str(out)])
    models = json.loads((out / "figures.json").read_text())["models"]
    for name, level in LEVELS.items():
        means = [score["mean"] for score in models[name]["scores"].values()]
        assert means == [level, level, level, 2 * level]
        assert models[name]["best"] == (name == "truth")


def test_keys_and_holes(context, made):
    """Digits answer what is open next, Enter goes on; nothing is chosen before all is scored."""
    folder, key = made
    page = opened(context, folder, 1)
    for pressed in ("4", "9", "3", "2", "0"):  # no aspect has 9, which is nothing; 0 is 10
        page.keyboard.press(pressed)
    page.keyboard.press("Enter")
    page.get_by_text("picture 2 of 3").wait_for()
    for pressed in ("Enter", "Enter", "1"):
        page.keyboard.press(pressed)
    page.get_by_text("First score all pictures of this caption.").wait_for()
    assert page.locator("#best fieldset:disabled").count() == 1
    context.shot(page, "5-unscored")
    press(page, "Go there")
    page.get_by_text("picture 2 of 3").wait_for()
    for pressed in ("5", "5", "5", "9", "Enter", "1", "1", "1", "1", "Enter", "2", "Backspace"):
        page.keyboard.press(pressed)
    page.get_by_text("picture 3 of 3").wait_for()
    page.keyboard.press("Enter")
    assert page.locator("#best").get_by_role("radio").nth(1).is_checked()
    press(page, "To the end")
    first = json.loads(page.locator("#text").input_value())["answers"][0]
    given = [first["scores"][str(number)] for number in key.shown[0][0]]
    assert [list(scores.values()) for scores in given] == [[4, 3, 2, 10], [5, 5, 5, 9], [1, 1, 1, 1]]
    assert first["best"] == key.shown[0][0][1]


def test_numbers_of_others(context, made):
    """Each has answers of their own on the same device; a number that nobody was given is refused."""
    folder, _ = made
    page = opened(context, folder, 4)
    assert page.locator("#start").is_visible()
    assert page.locator("#number").evaluate("input => input.validity.rangeOverflow")
    context.shot(page, "6-start")
    page.get_by_label("Your number").fill("3")
    page.keyboard.press("Enter")
    page.get_by_text("0 of 26 answers").wait_for()
    page.keyboard.press("1")
    assert opened(context, folder, 3).get_by_text("1 of 26 answers").is_visible()
    assert opened(context, folder, 1).get_by_text("0 of 26 answers").is_visible()


def test_a_browser_that_keeps_nothing_says_so(context, made):
    context.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full') }")
    page = opened(context, made[0], 1)
    assert page.locator("#unkept").is_hidden()
    page.keyboard.press("3")
    page.locator("#unkept").wait_for()
