"""`cogview style`, from pictures without captions to a model that draws in their style, and what is no style."""

import dataclasses
import json
import shutil
import zipfile

import pytest
import torch
from PIL import Image
from test_system import saved_run, small_image, small_text, system_of
from test_train_run import interrupted

from cogview import cli
from cogview.commands.prompts import Prompts
from cogview.data.shards import PairDataset
from cogview.people.specify import specify
from cogview.pictures import image_of
from cogview.recipes.style import Style
from cogview.system import System


@pytest.fixture
def run(tmp_path, monkeypatch):
    """runs/mine with a model that draws, a folder of drawings in two formats, and an archive of others."""
    monkeypatch.chdir(tmp_path)
    system = system_of(small_text(), small_image())
    saved_run(tmp_path / "runs/mine", gpt=system)
    torch.manual_seed(0)
    pictures = [image_of(torch.randint(256, (3, 40, 40), dtype=torch.uint8)) for _ in range(5)]
    (tmp_path / "drawings/more").mkdir(parents=True)
    pictures[0].save("drawings/a.png")
    pictures[1].save("drawings/more/b.jpg")
    (tmp_path / "drawings/broken.png").write_bytes((tmp_path / "drawings/a.png").read_bytes()[:100])
    (tmp_path / "drawings/notes.txt").write_text("not a caption")
    with zipfile.ZipFile("oil.zip", "w") as archive:
        for number, picture in enumerate(pictures[2:]):
            picture.save("one.png")
            archive.write("one.png", f"oil/{number}.png")
    return system.side


def style(*arguments):
    size = ["--batch-size", "2", *(() if "--steps" in arguments else ("--steps", "2"))]
    cli.main(["style", *map(str, arguments), *size])


def test_one_style_becomes_a_model_beside_the_other(run, tmp_path, capsys):
    style("ink sketch=drawings")
    said = capsys.readouterr().out
    assert "2 pictures of ink sketch" in said
    assert "1 picture not readable, first broken.png" in said
    assert "few: the paper takes 1,000" in said
    assert 'next: cogview generate --run runs/mine --name ink-sketch --style "ink sketch"' in said.replace("\n", " ")
    data = PairDataset(sorted((tmp_path / "runs/mine/shards/ink-sketch").glob("*.tar")))
    assert [data.captions(n) for n in range(2)] == [{"caption": "an image of ink sketch style"}] * 2
    system = System.load("runs/mine", name="ink-sketch")
    assert isinstance(system.recipe, Style)
    before = System.load("runs/mine", name="gpt")
    changed = {
        n: bool((a != b).any())
        for (n, a), (_, b) in zip(system.model.named_parameters(), before.model.named_parameters(), strict=True)
        if a.shape == b.shape
    }
    assert sum(changed.values()) > len(changed) / 2
    config = json.loads((tmp_path / "runs/mine/ink-sketch/config.json").read_text())
    assert config["mix"] == {"style-ink-sketch": 1.0}
    assert config["from"]["folder"].endswith("gpt")
    draw = ["generate", "--run", "runs/mine", "--captions", "a fox", "--count", "1", "--style"]
    cli.main([*draw, "ink sketch", "--name", "ink-sketch"])
    assert Image.open("pictures/001-1-a-fox-of-ink-sketch-style.png").size == (run, run)
    for name, known in (("ink-sketch", "ink-sketch"), ("gpt", "none")):
        with pytest.raises(SystemExit, match=rf"style: expected one that {name} was finetuned to \({known}\), .*'oil'"):
            cli.main([*draw, "oil", "--name", name])
    with pytest.raises(
        SystemExit, match=r"style: expected captions in the language of '油画风格的图片', which .* 'a fox'"
    ):
        cli.main([*draw, "油画", "--name", "ink-sketch"])


def test_a_finetuning_keeps_the_dropout(run, tmp_path):
    style("sketch=drawings")
    system = System.load("runs/mine", name="sketch")
    assert system.recipe.config.dropout == System.load("runs/mine", name="gpt").recipe.config.dropout == 0


def test_what_is_drawn_is_the_last_step_and_not_the_one_nearest_to_what_was_before(run, tmp_path, monkeypatch):
    config, training = Style.presets["tiny"]
    monkeypatch.setitem(Style.presets, "tiny", (config, dataclasses.replace(training, validate_every=1, log_every=1)))
    style("sketch=drawings")
    shards = sorted(map(str, (tmp_path / "runs/mine/shards/sketch").glob("*.tar")))
    cli.main(["tokenize", *shards, "--run", "runs/mine", "--split", "test", "--image-size", str(run)])
    style("oil=oil.zip", "--steps", "3")
    lines = map(json.loads, (tmp_path / "runs/mine/oil/log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "validation_loss" in line] == [3]


def test_a_style_that_others_pictures_had_before(run, tmp_path):
    style("sketch=drawings")
    with pytest.raises(
        SystemExit, match=r"pictures of sketch: oil\.zip is not .* before; remove runs/mine/shards/sketch"
    ):
        style("sketch=oil.zip", "--name", "second")
    shutil.rmtree("runs/mine/shards/sketch")
    shutil.rmtree("runs/mine/tokens/style-sketch")
    style("sketch=oil.zip", "--name", "second")


def test_a_stopped_finetuning_goes_on(run, monkeypatch, capsys):
    with interrupted(monkeypatch):
        style("sketch=drawings")
    said = capsys.readouterr().out
    assert "stopped at step 1" in said
    assert "the same command goes on" in said
    assert "next:" not in said
    style("sketch=drawings")
    said = capsys.readouterr().out
    assert "going on at step 1" in said
    assert "next: cogview generate" in said


def test_several_styles_are_learned_by_one_model(run, tmp_path, capsys):
    style("油画=oil.zip", "sketch=drawings", "--name", "both", "--seed", "3")
    data = PairDataset([tmp_path / "runs/mine/shards/油画/00000.tar"])
    assert [data.captions(n) for n in range(3)] == [{"caption": "油画风格的图片"}] * 3
    config = json.loads((tmp_path / "runs/mine/both/config.json").read_text())
    assert config["mix"] == {"style-sketch": 1.0, "style-油画": 1.0}
    assert config["training"]["seed"] == 3
    style("油画=oil.zip", "sketch=drawings", "--name", "both", "--seed", "3")  # finished: nothing to do
    said = capsys.readouterr().out
    assert "going on at step 2" in said
    assert '--style "油画" --captions "一只狐狸"' in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["drawings"], "pictures: expected STYLE=PATH, as sketch=drawings, got 'drawings'"),
        (["=drawings"], "pictures: expected STYLE=PATH"),
        (["...=drawings"], "pictures: expected a style's name of 1 to 60 letters, got '...'"),
        (["x" * 61 + "=drawings"], "pictures: expected a style's name of 1 to 60 letters"),
        (["gpt=drawings"], "name: expected another than that of the model to begin with, got 'gpt'"),
        (["tokens=drawings"], "name: expected a plain name, none of tokens"),
        (["ink=drawings", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["ink=drawings", "INK=oil.zip"], "pictures: expected one path for style INK"),
        (["ink=nothing"], "pictures of ink: expected a folder or an archive, got 'nothing'"),
        (["ink=empty"], "pictures of ink: folder: expected at least 2 pictures that can be read in 'empty', got 0"),
        (["ink=one"], "pictures of ink: .* at least 2 pictures that can be read in 'one', got 1"),
        (["ink=drawings", "--from", "nothing"], "nothing is no folder of a run or of a model"),
    ],
)
def test_what_is_no_style_is_said_in_a_sentence(run, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save("one/a.png")
    with pytest.raises(SystemExit, match=sentence):
        style(*arguments)
    left = sorted(path.name for path in (tmp_path / "runs/mine").iterdir() if path.name != "shards")
    assert left == ["gpt", "text.model", "vqvae.safetensors"]
    assert not list((tmp_path / "runs/mine").glob("shards/*/*.tar"))


def test_of_several_sets_all_are_read_before_any_is_tokenized(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"pictures of bad: .* got 0"):
        style("ink=drawings", "bad=empty")
    assert not (tmp_path / "runs/mine/tokens").exists()


def test_a_caption_of_all_pictures_is_for_packing_alone(run, tmp_path, capsys):
    cli.main(["data", "pack", "drawings", "--out", "packed", "--caption", "a scribble"])
    assert [PairDataset([tmp_path / "packed/00000.tar"]).captions(n)["caption"] for n in range(2)] == ["a scribble"] * 2
    for more, sentence in (
        (["--caption-columns", "text"], "caption: expected none with captions of their own"),
        (["--caption", "  "], "caption: expected one that is not blank"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            cli.main(["data", "pack", "drawings", "--out", "other", "--caption", "a scribble", *more])


def test_people_are_told_in_what_is_drawn(run, tmp_path, capsys):
    draw = ["--run", "runs/mine", "--captions", "a nurse", "a fox", "--count", "2"]
    cli.main(["generate", *draw, "--people", "world", "--seed", "1"])
    lines = [line.split("\t") for line in (tmp_path / "pictures/captions.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    asked = [caption for _, caption in lines]
    assert asked == [specify("a nurse", 1), specify("a nurse", 2), "a fox", "a fox"]
    (tmp_path / "own.json").write_text("[]")
    with pytest.raises(SystemExit, match="people: expected an object with attributes"):
        cli.main(["generate", *draw, "--people", "own.json"])
    with pytest.raises(SystemExit, match="captions: expected one that is not blank, got nothing to draw in caption 1"):
        cli.main(["generate", "--run", "runs/mine", "--captions", " ", "--style", "sketch"])


def test_candidates_of_a_caption_have_its_words():
    asked = Prompts((("a nurse", "a guard"),), people="world").read(1, 5)
    assert asked.captions == ["a nurse", "a guard"]
    assert asked.pictures == [specify("a nurse", 5), specify("a guard", 5)]
    asked = Prompts((("a nurse", "a fox"),), people="world", style="old painter").read(2, 5)  # painters are people, too
    assert asked.captions == ["a nurse of old painter style", "a fox of old painter style"]
    nurses = [f"{specify('a nurse', seed)} of old painter style" for seed in (5, 6)]
    assert asked.pictures == [*nurses, *["a fox of old painter style"] * 2]
