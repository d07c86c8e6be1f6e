"""`cogview attention`: what it leaves in its folder, of pictures that are drawn or given, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_caption_command import captioning
from test_system import saved_run, small_image, small_text, system_of

from cogview import cli
from cogview.pictures import image_of
from cogview.system import System

CAPTIONS = ["--captions", "a fox", "a <red> car | x", "蓝色"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """runs/mine with a model that draws and one that captions; three pictures."""
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path / "runs/mine", gpt=system_of(small_text(), small_image()), caption=captioning())
    for name in ("a", "b", "c"):
        image_of(torch.randint(256, (3, 40, 50), dtype=torch.uint8)).save(f"{name}.png")
    return tmp_path


def test_report_figures_maps_and_pictures(run, capsys):
    cli.main(["attention", *CAPTIONS, "--shown", "2", "--out", "out"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("runs/mine, gpt, step 1")
    assert said[-1] == "Read out/report.md"
    page = (run / "out/report.md").read_text(encoding="utf-8")
    assert page.splitlines()[0] in said
    assert "| a &lt;red&gt; car \\| x |" in page
    names = sorted(path.name for path in (run / "out").iterdir())
    marked, *others = ["001-a-fox.png", "002-a-red-car-x.png"], "depth.png", "figures.json", "largest-scores.png"
    assert names == [*marked, *others, "maps.safetensors", "offsets.png", "places.png", "report.md", "scores.png"]
    assert all(f"({name})" in page for name in names if name.endswith(".png"))
    figures = json.loads((run / "out/figures.json").read_text(encoding="utf-8"))
    assert figures["captions"] == CAPTIONS[1:]
    assert [(head["layer"], head["head"]) for head in figures["heads"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for head in figures["heads"]:
        assert sum(head["given_to"].values()) == pytest.approx(1, abs=1e-3)
    assert [word["word"] for word in figures["words"]] == ["a", "fox", "a", "<red>", "car", "|", "x"]
    assert len(figures["observations"]) == page.count("(C.1) |") + page.count("(C.3) |") + page.count("(C.4) |") == 9
    maps = load_file(run / "out/maps.safetensors")
    assert {name: list(values.shape) for name, values in maps.items()} == {
        "offsets": [2, 2, 4, 7],
        "places": [2, 2, 4, 4],
        "words/1": [2, 4, 4, 4],
        "words/2": [5, 4, 4, 4],
    }


def test_marked_pictures_of_an_earlier_report_go_and_nothing_else(run):
    cli.main(["attention", *CAPTIONS, "--shown", "2", "--out", "out"])
    for name in ("out/003-mine.png", "004-outside.png"):
        (run / name).write_bytes((run / "a.png").read_bytes())
    figures = json.loads((run / "out/figures.json").read_text(encoding="utf-8"))
    assert figures["marked"] == ["001-a-fox.png", "002-a-red-car-x.png"]
    figures["marked"] += ["../004-outside.png", "report.md", 5, "a.png"]
    (run / "out/figures.json").write_text(json.dumps(figures), encoding="utf-8")
    cli.main(["attention", "--captions", "a fox", "--out", "out"])
    left = sorted(path.name for path in (run / "out").glob("0*.png"))
    assert left == ["001-a-fox.png", "003-mine.png"]
    assert (run / "004-outside.png").exists()


def test_a_place_that_cannot_be_written_is_found_before_drawing(run, monkeypatch):
    (run / "out/report.md").mkdir(parents=True)
    monkeypatch.setattr(System, "code_batches", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises(SystemExit, match="it is a folder"):
        cli.main(["attention", *CAPTIONS, "--out", "out"])


def test_given_pictures_and_a_model_that_captions(run, capsys):
    """Its pictures stand before their text; of the words the chosen ones are shown."""
    how = ["--name", "caption", "--words", "fox", "--shown", "1", "--out", "out", "--pictures", "a.png", "b.png"]
    cli.main(["attention", "--captions", "a fox", "a red car", *how])
    assert "runs/mine, caption, step 1" in capsys.readouterr().out
    figures = json.loads((run / "out/figures.json").read_text(encoding="utf-8"))
    assert [(word["caption"], word["word"]) for word in figures["words"]] == [("a fox", "fox")]
    assert all(head["given_to"]["words"] == 0 for head in figures["heads"])  # that they do not see yet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions", " "], "captions: expected one that is not blank, got nothing to draw in caption 1: ' '"),
        (["--captions", "a fox", "--words", "car"], "words: expected what stands in one of the captions, got 'car'"),
        (
            ["--captions", "a fox", "--pictures", "a.png", "b.png"],
            "pictures: expected none, or one of each of 1",
        ),
        (["--captions", "a fox", "--pictures", "gone.png"], "pictures: cannot read gone.png"),
        (["--captions", "a fox", "--pictures", "a.png", "--out", "."], "out: expected a place where a.png is not writ"),
        (["--captions", "a fox", "--out", "a.png"], "out: expected a folder, or a new one, got 'a.png'"),
        (["--captions", "a fox", "--shown", "-1"], "shown: expected at least 0, got -1"),
        (
            ["--captions", "a fox", "--name", "caption"],
            "name: expected a model that draws pictures, got",
        ),
    ],
)
def test_what_it_refuses(run, arguments, message):
    with pytest.raises(SystemExit) as error:
        cli.main(["attention", "--out", "out", *arguments])
    assert str(error.value).startswith(f"cogview: {message}")
    assert not (run / "out").exists()
