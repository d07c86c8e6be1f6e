"""The whole job at a budget of seconds, and the command line's answers to good and bad input."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from test_train_run import interrupted, trainer

from cogview import cli, pipeline
from cogview.config import TrainConfig
from cogview.data.tokens import TokenDataset
from cogview.demo import demo
from cogview.demo.pace import Pace
from cogview.demo.scenes import render, sample_scenes
from cogview.recipes import RECIPES
from cogview.system import System
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.train import checkpoint
from cogview.train.loop import State
from cogview_ops.bench import machine


def steps_done(folder):
    return checkpoint.read_header(checkpoint.latest(folder))["run"]["step"]


@pytest.fixture(scope="module")
def small():
    """The demo's constants, small enough for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN_SCENES", 48)
        patch.setattr(demo, "TEST_SCENES", 16)
        patch.setattr(demo, "JUDGED", 6)
        patch.setattr(demo.captions, "STEPS", 2)
        patch.setattr(demo.captions, "CANDIDATES", 3)
        patch.setattr(demo, "IMAGE", VQConfig(codebook_size=32, dim=8, hidden=8))
        patch.setattr(demo, "GPT", dataclasses.replace(demo.GPT, num_layers=2, hidden_size=64, num_heads=2))
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A demo folder, made by the command line."""
    out = tmp_path_factory.mktemp("demo") / "run"
    cli.main(["demo", "--out", str(out), "--minutes", str(demo.INSTALLATION + demo.FIXED + 0.05)])
    return out


def test_demo_leaves_everything(finished):
    for name in ("samples.png", "captions.png", "ranked.png", "curves.png", "reconstructions.png"):
        with Image.open(finished / name) as picture:
            assert picture.size[0] > 100
    page = (finished / "report.md").read_text()
    steps = demo.Plan.of(demo.INSTALLATION + demo.FIXED + 0.05).gpt_steps
    assert page.startswith(f"This run had too few steps for good pictures: its GPT had {steps} (good: 2,400)")
    assert "| the emoji asked for |" in page
    assert "samples.png" in page
    figures = json.loads((finished / "figures.json").read_text())["figures"]
    for rates in figures.values():
        assert all(0 <= rate <= 1 for rate in rates.values())
    assert figures["chance"]["all"] < 0.5


def test_demo_goes_on_and_keeps_what_is_done(finished, capsys):
    """The same one is finished, a longer one trains its GPT on and nothing else; a shorter one is finished, too."""

    def stamps(pattern):
        return [path.stat().st_mtime_ns for path in sorted(finished.glob(pattern))]

    minutes = demo.INSTALLATION + demo.FIXED + 0.05
    trained = sorted((finished / "gpt").glob("*.safetensors"))
    kept = stamps("scenes/*.tar") + stamps("tokens/*/*")
    cli.main(["demo", "--out", str(finished), "--minutes", str(minutes)])
    assert sorted((finished / "gpt").glob("*.safetensors")) == trained
    assert "minutes in all" not in capsys.readouterr().out  # nothing is left to be estimated
    longer = demo.Plan.of(minutes + 0.02)
    cli.main(["demo", "--out", str(finished), "--minutes", str(longer.minutes)])
    assert steps_done(finished / "gpt") == longer.gpt_steps
    assert "minutes in all" in capsys.readouterr().out
    cli.main(["demo", "--out", str(finished), "--minutes", str(minutes)])
    assert steps_done(finished / "gpt") == longer.gpt_steps
    assert stamps("scenes/*.tar") + stamps("tokens/*/*") == kept
    for wrong in ("2", "inf", "nan"):
        with pytest.raises(SystemExit, match="minutes: expected more than"):
            cli.main(["demo", "--out", str(finished), "--minutes", wrong])


def test_plans():
    whole, longer, shorter = (demo.Plan.of(minutes) for minutes in (15, 60, 10))
    assert (whole.gpt_steps, whole.image_steps) == (demo.GPT_STEPS, demo.IMAGE_STEPS)
    assert (longer.image_steps, longer.image_seconds) == (whole.image_steps, whole.image_seconds)
    assert longer.gpt_steps / longer.gpt_seconds == pytest.approx(whole.gpt_steps / whole.gpt_seconds, rel=1e-3)
    assert shorter.gpt_steps < demo.GPT_STEPS
    assert whole.image_seconds + whole.gpt_seconds == pytest.approx(60 * (15 - demo.INSTALLATION - demo.FIXED))


def test_verdicts():
    plan, out = demo.Plan.of(15), Path("runs/x")
    good = "This run had the steps that good pictures need: its GPT had 2,500 (good: 2,400)"
    assert demo.verdict(out, plan, (800, 200), (2500, 95)).startswith(good)
    assert demo.verdict(out, plan, (780, 200), (2400, 95)).startswith("This run had the steps")
    assert demo.verdict(out, demo.Plan.of(60), (800, 200), (14000, 95)).startswith("This run had the steps")
    slow = demo.verdict(out, plan, (800, 200), (395, 7.5))
    assert slow.startswith("This run had too few steps for good pictures: its GPT had 395 (good: 2,400)")
    assert "The machine trained 8 captions a second, 111 were planned." in slow
    assert "`cogview demo --out runs/x --minutes 30` trains the GPT on" in slow
    assert "`make demo MINUTES=30` trains" in demo.verdict(Path("runs/demo"), plan, (800, 200), (395, 7.5))
    shorter = demo.Plan.of(13)
    short = demo.verdict(out, shorter, (800, 200), (shorter.gpt_steps, 95))
    assert "Its 13 minutes were planned for no more." in short
    image = demo.verdict(out, plan, (400, 60), (2500, 95))
    assert "too few steps" in image
    assert "The machine trained 60 pictures a second, 248 were planned." in image
    assert "`cogview demo --out runs/x-2 --minutes 30` starts again" in image
    planned = demo.verdict(out, demo.Plan.of(8), (demo.Plan.of(8).image_steps, 200), (2500, 95))
    assert "Its 8 minutes were planned for no more." in planned


def test_what_is_known_before(finished, tmp_path):
    """Of a folder with a short image tokenizer and a GPT of few steps, whose time may be over."""
    shutil.copytree(finished, tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "gpt")
    tensors, header = checkpoint.read(newest)
    minutes = demo.INSTALLATION + demo.FIXED + 0.5
    plan = demo.Plan.of(minutes)
    for elapsed, said in ((1.0, "minutes in all"), (3 * plan.gpt_seconds, "has used the time it has in 6.9 minutes")):
        header["run"]["elapsed"] = elapsed
        checkpoint.save(newest, tensors, header)
        sentences = list(demo._outlook(tmp_path / "run", plan))
        assert len(sentences) == 2
        assert "780 are good, and it stays as it is" in sentences[0]
        assert said in sentences[1]
    assert next(demo._outlook(tmp_path / "none", plan)).startswith("About 6.9 minutes in all")


def test_a_slow_machine_is_told_early_and_once():
    """Of 100 steps planned in 40 seconds: too slow for twice that time, slow, fast enough; and getting worse."""
    training = TrainConfig(steps=100, batch_size=2, seconds=80.0)

    def told(seconds: list[float], good: int = 90) -> str:
        """What is printed when every tenth step took so long."""
        console, elapsed = Console(file=io.StringIO(), width=500), 0.0
        pace = Pace("GPT", training, 40.0, good, console)
        for number, each in enumerate(seconds, 1):
            elapsed += 10 * each
            note = pace(State(step=10 * number, elapsed=elapsed), 2 / each)
        assert note == f", {2 / seconds[-1]:.0f} of 5 samples/s planned"
        return console.file.getvalue()

    stopped = told([2.0] * 5)
    assert stopped.count("\n") == 1
    assert (
        "trains 1 samples a second here, 5 were planned: it will be stopped after 1.3 minutes, at about step 40"
        in stopped
    )
    assert "still good" in told([2.0] * 5, good=40)
    later = told([0.6] * 9)
    assert later.count("\n") == 1
    assert "it will take 1.0 minutes instead of 0.7" in later
    assert told([0.45] * 9) == ""
    resumed = Console(file=io.StringIO(), width=500)
    pace = Pace("GPT", training, 40.0, 90, resumed)
    for step, elapsed in ((20, 60.0), (80, 84.0)):  # fast now, but its time was used
        pace(State(step=step, elapsed=elapsed), 5.0)
    assert "and 1.4 minutes are gone: it will be stopped after 1.3 minutes" in resumed.file.getvalue()
    worse = told([0.6] * 5 + [2.0] * 4)
    assert "it will take" in worse.splitlines()[0]
    assert "it will be stopped" in worse.splitlines()[1]


def test_what_is_said_beside_a_progress_bar_has_a_line_of_its_own(tmp_path, monkeypatch):
    """On a terminal, where the bar is drawn again and again."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr("rich._console", console)
    config = TrainConfig(steps=6, batch_size=2, dtype="float32", log_every=2, seconds=1000.0)
    pace = Pace("GPT", config, 1e-9, 6)
    monkeypatch.setattr("cogview.demo.pace.EARLY", 0.0)
    trainer(tmp_path, config).run(pace)
    lines = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\r", "", line) for line in console.file.getvalue().splitlines()]
    assert [line for line in lines if line.startswith("The GPT trains")]


def test_an_interrupted_demo_goes_on(small, tmp_path, monkeypatch):
    """Ctrl-C in either training ends the command in one line, its checkpoint written."""
    arguments = ["demo", "--out", str(tmp_path), "--minutes", str(demo.INSTALLATION + demo.FIXED + 0.05)]
    for folder in ("vqvae", "gpt"):
        said = "stopped; the same command goes on from here"
        with interrupted(monkeypatch, folder), pytest.raises(SystemExit, match=said):
            cli.main(arguments)
        assert steps_done(tmp_path / folder) == 1
    assert not (tmp_path / "report.md").exists()
    cli.main(arguments)
    assert (tmp_path / "report.md").exists()


def test_generate(finished, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    words = ["--captions", "a fox above a tree on a green background", "--captions", "蓝色背景上，熊猫在星星左边"]
    cli.main(["generate", "--run", str(finished), "--out", str(sheet), "--count", "2", *words])
    with Image.open(sheet) as picture:
        assert picture.size[0] > 2 * 2 * 128
    for device in ("quantum", "meta", "hpu"):
        with pytest.raises(SystemExit, match=f"device: expected one that torch can use here, got '{device}'"):
            cli.main(["generate", "--run", str(finished), "--device", device, "--captions", "a fox"])
    with pytest.raises(SystemExit, match=r"captions: expected at most .* tokens, got"):
        cli.main(["generate", "--run", str(finished), "--out", str(sheet), "--captions", "word " * 200])
    with pytest.raises(SystemExit, match="holds no trained model"):
        cli.main(["generate", "--run", str(tmp_path), "--captions", "a fox"])


def test_seed_repeats(finished):
    system = System.load(finished)
    captions = ["a fox in the middle of a blue background"] * 2
    first, again = system.draw(captions, seeds=[3, 4]), system.draw(captions[:1], seeds=[3])
    assert torch.equal(first[0], again[0])


def test_system_refuses_a_tokenizer_of_another_run(finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "vqvae.safetensors").unlink()
    VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8)).save(tmp_path / "vqvae.safetensors")
    with pytest.raises(ValueError, match="the image tokenizer was trained again after the tokens of its model gpt"):
        System.load(tmp_path)


def _own_shard(path, count=24):
    """A user's own pairs: PNG and plain text."""
    with tarfile.open(path, "w") as tar:
        for n, scene in enumerate(sample_scenes("train", count)):
            png = io.BytesIO()
            render(scene).resize((80, 70)).save(png, "PNG")
            for name, data in ((f"{n:03d}.png", png.getvalue()), (f"{n:03d}.txt", f"picture number {n}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_own_pairs_from_shards_to_pictures(tmp_path, capsys):
    shard, run = tmp_path / "own.tar", tmp_path / "run"
    _own_shard(shard)
    cli.main(["data", "inspect", str(shard), "--sheet", str(tmp_path / "sheet.png")])
    assert "24 of 24 pairs can be read" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()
    vocabulary = ["--text-pieces", "300", "--codebook", "16", "--code-dim", "8", "--hidden", "8"]
    small = ["--languages", "caption", "--image-seconds", "0.5", "--image-size", "32", *vocabulary]
    with pytest.raises(SystemExit, match="run: expected the tokenizers of a training split in it"):
        cli.main(["tokenize", str(shard), "--run", str(run), "--split", "test", *small])
    cli.main(["tokenize", str(shard), "--run", str(run), *small])
    own = tmp_path / "held_out.tar"
    _own_shard(own, count=6)
    cli.main(["tokenize", str(own), "--run", str(run), "--split", "test", *small])
    size = ["--layers", "1", "--hidden-size", "64", "--heads", "2", "--batch-size", "8", "--dtype", "float32"]
    meta = run / "tokens" / "test" / "meta.json"
    kept = meta.read_text()
    meta.write_text(json.dumps(json.loads(kept) | {"image_sha256": "0"}))
    with pytest.raises(SystemExit, match=r"was made with another image tokenizer than .*train: tokenize it again"):
        cli.main(["train", "--run", str(run), "--steps", "3", *size])
    meta.write_text(kept)
    cli.main(["train", "--run", str(run), "--steps", "3", *size])
    assert "done at step 3" in capsys.readouterr().out
    cli.main(["generate", "--run", str(run), "--captions", "picture number 3", "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").exists()
    with pytest.raises(SystemExit, match="of another run: recipe: expected 'dalle', got 'cogview'"):
        cli.main(["train", "--run", str(run), "--recipe", "dalle", "--steps", "3", *size])
    with pytest.raises(SystemExit, match="attention: expected none with recipe dalle, which has its own, got 'dense'"):
        cli.main(["train", "--run", str(run), "--recipe", "dalle", "--attention", "dense", "--steps", "3", *size])
    for path in (run / "gpt").glob("step-*"):
        path.unlink()
    cli.main(["train", "--run", str(run), "--recipe", "dalle", "--steps", "3", *size])
    cli.main(["generate", "--run", str(run), "--captions", "a", "--out", str(tmp_path / "d.png"), "--device", "cpu"])
    assert (tmp_path / "d.png").exists()


def test_inspect_counts_damage(tmp_path, capsys):
    shard = tmp_path / "own.tar"
    _own_shard(shard)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    cli.main(["data", "inspect", str(shard)])
    assert "of 24 pairs" not in (printed := capsys.readouterr().out)
    assert "truncated" in printed or "unreadable" in printed or "damaged" in printed, printed
    with pytest.raises(SystemExit, match=r"nothing\.tar"):
        cli.main(["data", "inspect", str(tmp_path / "nothing.tar")])


@pytest.mark.parametrize(
    "command", ["demo", "data", "data build", "data inspect", "tokenize", "train", "generate", "info"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "show this help" in capsys.readouterr().out


def test_info_lists_presets_and_operators(capsys):
    cli.main(["info"])
    printed = capsys.readouterr().out
    assert "3,928,849,920" in printed
    assert "three_region_attention" in printed


def test_unknown_preset_names_the_known(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--run", str(tmp_path), "--preset", "huge"])
    assert "cogview-4b" in capsys.readouterr().err


def test_fit_takes_sizes_from_the_tokens(finished):
    data = TokenDataset(finished / "tokens" / "train")
    own = {"coglm": {"chinese_from": 9}, "direct": {"chinese_from": 9, "small_grid": 4}}
    for recipe in RECIPES.values():
        sizes = pipeline.sizes_of(data) | own.get(recipe.name, own["direct"] if recipe.name == "iterative" else {})
        config = recipe.fit(recipe.presets["tiny"][0], **sizes)
        assert config.image_vocab == 32
        longest = data.meta["text_length"] + pipeline.TEXT_ROOM
        assert config.max_text == max(longest, recipe.presets["tiny"][0].max_text if recipe.name == "dalle" else 0)


def test_threads_that_wait_spin_shortly_unless_told_otherwise():
    """Which has to be known before torch is imported. The benchmarks note the same, where cogview is not installed."""
    assert machine.WAITING == cli.WAITING
    code = """
import os, sys
from cogview import cli

class Torch:  # its import ends the command
    def find_spec(self, name, *more):
        if name == "torch":
            print(*(os.environ.get(name) for name in cli.WAITING))
            sys.exit()

assert "torch" not in sys.modules
sys.meta_path.insert(0, Torch())
cli.main(["--help"])
"""
    clean = {name: value for name, value in os.environ.items() if name not in cli.WAITING}
    for given, expected in (
        ({}, f"None {cli.SPINS}"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "9"}, "None 9"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True
        )
        assert run.stdout == f"{expected}\n"
