"""What the page over a run's models answers, without the package that shows it."""

import dataclasses
import math
import re
import socket
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cogview2 import HOW, run  # noqa: F401
from test_data_pairs import run as pairs  # noqa: F401

from cogview import cli, completion, page
from cogview.cogview2 import CogView2
from cogview.commands.page import Page
from cogview.commands.page_tabs import TABS
from cogview.commands.stages import Run
from cogview.inputs import images
from cogview.page import Models, describe, draw, edit, opened, painted, sentence, to_paint_on
from cogview.pictures import image_of
from cogview.system import System


@pytest.fixture(scope="module")
def models(run):  # noqa: F811
    return Models.of(CogView2.load(run), HOW)


@pytest.fixture(scope="module")
def older(pairs):  # noqa: F811
    """A run of CogView, with models that rank and enlarge."""
    for recipe, name in (("superresolution", "lens"), ("caption", "judge")):
        more = ["--recipe", recipe, "--from", str(pairs), "--name", name, "--steps", "1"]
        cli.main(["train", "--run", str(pairs), *more, "--batch-size", "2", "--dtype", "float32"])
    return pairs


@pytest.fixture
def given(tmp_path):
    """A file, and what it shows."""
    picture = torch.randint(256, (3, 90, 120), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    image_of(picture).save(tmp_path / "given.png")
    return tmp_path / "given.png", picture


def strokes(picture: torch.Tensor, *box: int, scale: float = 1.0) -> list[Image.Image]:
    """Layers of the copy that people paint on, at another scale, one opaque in a box, in percent of its sides."""
    width, height = (round(side * scale) for side in to_paint_on(picture).size)
    layer = Image.new("RGBA", (width, height))
    left, top, right, bottom = (n * side // 100 for n, side in zip(box, (width, height) * 2, strict=True))
    layer.paste((224, 16, 176, 255), (left, top, right, bottom))
    return [Image.new("RGBA", (width, height)), layer]


def pixels(pictures: list[page.Shown]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(one.picture)).permute(2, 0, 1) for one in pictures])


def test_pictures_are_those_of_the_command(models):
    told: list[tuple[float, str]] = []
    *drawing, first, last = draw(models, " a fox ", 5, 2, 7, lambda *what: told.append(what))
    (expected,) = models.cogview2.draw(["a fox"], HOW, count=2, candidates=5, seed=7)
    assert [len(one.candidates) for one in drawing] == [2, 4, 5]  # by batches, before they are ranked
    assert [one.below for one in drawing[-1].candidates] == [f"seed {seed}" for seed in range(7, 12)]
    assert [one.said for one in drawing] == [f"{n} of 5 pictures drawn …" for n in (2, 4, 5)]
    assert all(one.pictures == [] for one in (*drawing, first))
    before, after = (sorted(map(bytes, pixels(one.candidates).numpy())) for one in (drawing[-1], first))
    assert before == after
    assert torch.equal(pixels(last.pictures), models.base.pictures(expected.fine))
    assert torch.equal(pixels(last.candidates[:2]), models.base.pictures(expected.small))
    assert torch.equal(pixels(first.candidates), pixels(last.candidates))
    assert [one.below for one in last.pictures] == [f"CapLoss {loss:.2f}" for loss in expected.caploss.tolist()]
    assert last.said.startswith("2 pictures in ")
    shares = [share for share, _ in told]
    assert (shares, shares[0], shares[-1]) == (sorted(shares), 0.0, 1.0)
    assert {doing for _, doing in told} == {"drawing 5 pictures", "enlarging the best of them"}


def test_small_pictures_alone(models):
    base = Models.of(dataclasses.replace(models.cogview2, direct=None, iterative=None), HOW)
    *_, found = draw(base, "a fox", 3, 1)
    assert torch.equal(pixels(found.pictures), pixels(found.candidates[:1]))
    assert found.said.startswith("1 picture in ")


def test_a_run_of_cogview(older):
    models = Page(Run(older)).load()
    assert [model.recipe.name for model in models.all] == ["cogview", "caption", "superresolution"]
    assert [tab.title for tab in TABS if tab.there(models)] == ["Text to picture", "Picture to text"]
    alone = dataclasses.replace(models, judge=None, lens=None)
    assert [tab.title for tab in TABS if tab.there(alone)] == ["Text to picture"]
    told: list[float] = []
    *_, first, last = draw(models, "picture number 1", 4, 2, 5, lambda share, _: told.append(share))
    assert (told, told[-1]) == (sorted(told), 1.0)
    assert not first.pictures
    small = pixels(last.candidates)
    judged = models.judge.rerank("picture number 1", models.base.which_draws("pictures").tokenize(small))
    assert len(judged.order) == 4
    assert all(one.below.startswith("CapLoss ") for one in last.candidates)
    assert [one.picture.size for one in last.pictures] == [(64, 64), (64, 64)]
    first, found = draw(alone, "picture number 1", None, 4, 5)
    assert first.pictures == first.candidates == found.candidates  # shown as they are drawn
    drawn = System.load(older, draws="pictures").draw(["picture number 1"] * 4, seeds=[5, 6, 7, 8], temperature=0.9)
    assert torch.equal(pixels(found.pictures), drawn)
    assert sorted(map(hash, map(bytes, small.numpy()))) == sorted(map(hash, map(bytes, drawn.numpy())))
    assert [one.below for one in found.pictures] == ["seed 5", "seed 6", "seed 7", "seed 8"]


def test_what_a_run_has_is_taken(run, tmp_path, capsys):  # noqa: F811
    for name in ("text.model", "vqvae.safetensors", "small"):
        (tmp_path / name).symlink_to(run / name)
    assert len(Page(Run(tmp_path)).load().all) == 1
    (tmp_path / "larger").symlink_to(run / "larger")
    assert len(Page(Run(tmp_path)).load().all) == 2
    assert len(Page(Run(run)).load().all) == 3
    assert len(Page(Run(run, stages=2)).load().all) == 2
    models = Page(Run(run), settings="published").load()
    assert models.how.base.clusters.top == 16
    assert [tab.title for tab in TABS if tab.there(models)] == ["Text to picture", "Picture to text", "Edit"]
    assert "iterative: " in capsys.readouterr().out


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_those_of_the_command(models, given, language):
    path, picture = given
    told: list[tuple[float, str]] = []
    first, last = describe(models, path, 5, language, 3, lambda *what: told.append(what))
    (expected,) = models.judge.describe(picture, 5, seed=3, language=language, temperature=0.7, top_k=200)
    assert last.captions == expected
    assert len(expected) > 1
    assert [one.caploss for one in last.captions] == sorted(one.caploss for one in last.captions)
    square = images(picture, 32)
    assert torch.equal(pixels(last.pictures), torch.cat([square, models.judge.pictures(models.judge.tokenize(square))]))
    assert (first.captions, first.pictures) == ([], last.pictures)
    cut = "The middle 90 x 90 of 120 x 90 pixels, brought to 32 x 32."
    assert first.said == f"{cut} Writing 5 captions …"
    assert last.said.startswith(f"{cut} {len(expected)} captions in ")
    assert told == [(0.0, "writing 5 captions")]


def test_pictures_of_any_kind_are_captioned(older, tmp_path):
    models, judge = Page(Run(older)).load(), System.load(older, draws="captions")
    assert models.languages == []
    Image.new("LA", (50, 50), (9, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((judge.side, judge.side), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (5000, 4000), 7).save(tmp_path / "large.jpg")  # larger than one that is edited may be
    for name, cut in (
        ("clear.png", f"The whole picture, brought to {judge.side} x {judge.side}."),
        ("deep.png", "The whole picture."),
        ("large.jpg", f"The middle 4000 x 4000 of 5000 x 4000 pixels, brought to {judge.side} x {judge.side}."),
    ):
        _, found = describe(models, tmp_path / name, 2)
        assert found.said.startswith(cut)
        assert found.captions == judge.describe(tmp_path / name, 2, temperature=0.7)[0]
    assert bool((pixels(found.pictures)[0] == 7).all())
    with pytest.raises(ValueError, match="language: expected none with recipe caption"):
        list(describe(models, tmp_path / "clear.png", 2, "en"))


def test_a_model_may_say_nothing(older, given, monkeypatch):
    models = Page(Run(older)).load()
    monkeypatch.setattr(System, "describe", lambda *given, **how: [[]])
    _, found = describe(models, given[0])
    assert re.fullmatch(r"The middle 90 x 90 .* No caption: the model ends it at once, in [\d.]+ s\.", found.said)
    assert found.captions == []


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_what_is_painted_is_drawn_anew(models, given, scale):
    path, picture = given
    layers, told = strokes(picture, 25, 20, 60, 70, scale=scale), list[float]()
    found = edit(models, path, layers, "a fox", 3, 2, 4, around=math.inf, update=lambda share, _: told.append(share))
    mask = painted(layers, picture)
    assert abs(int(mask.sum()) - 120 * 90 * 0.35 * 0.5) < 250
    before, *after = pixels(found.pictures)
    assert torch.equal(before, picture)
    for one in after:
        assert torch.equal(one[:, ~mask], picture[:, ~mask])
        assert bool((one[:, mask] != picture[:, mask]).any())
    expected = completion.edit(
        models.cogview2, picture, mask, "a fox", HOW, count=2, candidates=3, seed=4, around=math.inf
    )
    assert torch.equal(torch.stack(after), expected.pictures)
    assert [one.below for one in found.pictures] == [
        "as it was",
        *(f"CapLoss {x:.2f}" for x in expected.caploss.tolist()),
    ]
    assert told == sorted(told)
    soft = edit(models, path, layers, "a fox", 3, 1, 4, 5, math.inf)
    assert torch.equal(pixels(soft.pictures)[1][:, ~mask], picture[:, ~mask])
    assert not torch.equal(pixels(soft.pictures)[1], after[0])


@pytest.mark.parametrize("size", [(3, 5), (1, 400), (2000, 30), (900, 1600)])
def test_pictures_of_any_size_are_painted_on(size):
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    copy = to_paint_on(picture)
    assert max(copy.size) == page.PAINTED
    layer = Image.new("RGBA", copy.size, (255, 0, 255, 255))
    with pytest.raises(ValueError, match="Everything is painted"):
        painted([layer], picture)


def test_what_is_wrong_is_said(models, given, tmp_path):
    path, picture = given
    some = strokes(picture, 20, 20, 50, 50)
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    Image.new("1", (5000, 4000)).save(tmp_path / "large.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "larger.png")
    calls: list[tuple[Any, str]] = [
        (lambda: next(draw(models, "  ")), "Write a caption: what the picture is to show."),
        (lambda: next(draw(models, None)), "Write a caption"),  # type: ignore[arg-type]
        (
            lambda: next(draw(models, "лиса")),
            "The caption: expected English or Chinese, got 'лиса', which its text tokenizer has not seen.",
        ),
        (lambda: next(draw(models, "a fox " * 21)), "The caption: expected at most 30 tokens, got 42."),
        (lambda: next(draw(models, "a fox", 1, 2)), "Candidates: expected at least as many as are kept (2), got 1."),
        (lambda: next(draw(models, "a fox", 2, 1, None)), "Seed: expected a whole number"),  # type: ignore[arg-type]
        (lambda: next(draw(models, "a fox", 2, 1, -1)), "Seed: expected a whole number, at least 0, got -1."),
        (lambda: next(draw(models, "a fox", 2, 1, 1.5)), "Seed: expected a whole number"),  # type: ignore[arg-type]
        (lambda: next(draw(models, "a fox", 2, 1, 2**63 - 1)), "Seeds: expected whole numbers from 0 to 2^63 - 1"),
        (lambda: next(describe(models, None)), "Open a picture first."),
        (lambda: next(describe(models, tmp_path / "cut.png")), "The file cut.png: not a readable picture ("),
        (lambda: next(describe(models, path, 0)), "Captions: expected a whole number, at least 1, got 0."),
        (lambda: next(describe(models, path, 1, None, -1)), "Seed: expected a whole number, at least 0, got -1."),
        (lambda: list(describe(models, path, 1, "fr")), "Language: expected en or zh, got 'fr'."),
        (lambda: edit(models, None, [], "a fox"), "Open a picture first."),
        (lambda: edit(models, path, [], "a fox"), "Nothing is painted: paint over"),
        (lambda: edit(models, path, strokes(picture, 0, 0, 0, 0), "a fox"), "Nothing is painted: paint over"),
        (lambda: edit(models, path, strokes(picture, 0, 0, 100, 100), "a fox"), "Everything is painted: leave"),
        (
            lambda: edit(models, path, strokes(picture, 0, 40, 100, 50), "a fox"),
            "Too much is painted: what is drawn anew is to be no higher or wider than 90 pixels",
        ),
        (lambda: edit(models, path, some, ""), "Write a caption"),
        (lambda: edit(models, path, some, "лиса"), "The caption: expected English or Chinese"),
        (lambda: edit(models, path, strokes(picture[:, :, :60], 1, 1, 2, 2), "a fox"), "What is painted is of another"),
        (lambda: edit(models, tmp_path / "cut.png", some, "a fox"), "The file cut.png: not a readable picture ("),
        (
            lambda: opened(tmp_path / "text.png"),
            "The file text.png: not a readable picture (no PNG, JPEG, WEBP, GIF or BMP).",
        ),
        (lambda: opened(tmp_path / "large.png"), "The file large.png: expected a picture of at most 17 million pixels"),
        (lambda: opened(tmp_path / "larger.png"), "The file larger.png: expected at most 67108864 pixels"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        said = sentence(caught.value)
        assert said.startswith(words)
        assert str(tmp_path) not in said
        assert said[-1] == "."
    assert sentence(RuntimeError("out of\n memory")) == "That did not work: out of memory."
    assert sentence(MemoryError()) == "That did not work: MemoryError."
    assert len(sentence(RuntimeError("x" * 1000))) < 400


def test_the_command_says_what_is_missing(run, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        SystemExit, match=r"page: needs the package gradio, which is missing here: `pip install 'gradio>=6'`"
    ):
        cli.main(["page", "--run", str(run)])
    monkeypatch.setitem(sys.modules, "gradio", object())  # is not needed before the port is known to be free
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"port: expected a free one, got '{port} of 127.0.0.1 \(Address already"):
            cli.main(["page", "--run", str(run), "--port", str(port)])
    with pytest.raises(SystemExit, match="port: expected 1 to 65535, got 0"):
        cli.main(["page", "--run", str(run), "--port", "0"])
