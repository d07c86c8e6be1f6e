"""The whole job at a budget of seconds, and the command line's answers to good and bad input."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from cogview import cli, demo, pipeline
from cogview.data.scenes import render, sample_scenes
from cogview.system import System
from cogview.tokenizers.image import VQConfig


@pytest.fixture(scope="module")
def small():
    """The demo's constants, small enough for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN_SCENES", 48)
        patch.setattr(demo, "TEST_SCENES", 16)
        patch.setattr(demo, "JUDGED", 6)
        patch.setattr(demo, "IMAGE", VQConfig(codebook_size=32, dim=8, hidden=8))
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A demo folder, made by the command line."""
    out = tmp_path_factory.mktemp("demo") / "run"
    cli.main(["demo", "--out", str(out), "--minutes", str(demo.INSTALLATION + demo.FIXED + 0.05)])
    return out


def test_demo_leaves_everything(finished):
    for name in ("samples.png", "curves.png", "reconstructions.png"):
        with Image.open(finished / name) as picture:
            assert picture.size[0] > 100
    page = (finished / "report.md").read_text()
    assert "| the emoji asked for |" in page
    assert "samples.png" in page
    figures = json.loads((finished / "figures.json").read_text())["figures"]
    for rates in figures.values():
        assert all(0 <= rate <= 1 for rate in rates.values())
    assert figures["chance"]["all"] < 0.5


def test_demo_goes_on_and_refuses_another_plan(finished, capsys):
    trained = sorted((finished / "gpt").glob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in (finished / "scenes").glob("*.tar")]
    cli.main(["demo", "--out", str(finished), "--minutes", str(demo.INSTALLATION + demo.FIXED + 0.05)])
    assert sorted((finished / "gpt").glob("*.safetensors")) == trained
    assert [path.stat().st_mtime_ns for path in (finished / "scenes").glob("*.tar")] == stamps
    with pytest.raises(SystemExit, match="holds a demo of"):
        cli.main(["demo", "--out", str(finished), "--minutes", "30"])
    with pytest.raises(SystemExit, match="minutes: expected more than"):
        cli.main(["demo", "--out", str(finished), "--minutes", "2"])


def test_generate(finished, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    words = ["--captions", "a fox above a tree on a green background", "--captions", "蓝色背景上，熊猫在星星左边"]
    cli.main(["generate", "--run", str(finished), "--out", str(sheet), "--count", "2", *words])
    with Image.open(sheet) as picture:
        assert picture.size[0] > 2 * 2 * 128
    with pytest.raises(SystemExit, match="caption too long"):
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
    from cogview.tokenizers.image import VQVAE

    VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8)).save(tmp_path / "vqvae.safetensors")
    with pytest.raises(ValueError, match="tokens of other tokenizers"):
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
    with pytest.raises(SystemExit, match=r"text\.model"):
        cli.main(["tokenize", str(shard), "--run", str(run), "--split", "test", *small])
    cli.main(["tokenize", str(shard), "--run", str(run), *small])
    own = tmp_path / "held_out.tar"
    _own_shard(own, count=6)
    cli.main(["tokenize", str(own), "--run", str(run), "--split", "test", *small])
    size = ["--layers", "1", "--hidden-size", "64", "--heads", "2", "--batch-size", "8", "--dtype", "float32"]
    cli.main(["train", "--run", str(run), "--steps", "3", *size])
    assert "done at step 3" in capsys.readouterr().out
    cli.main(["generate", "--run", str(run), "--captions", "picture number 3", "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").exists()


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
    from cogview.config import preset
    from cogview.data.tokens import TokenDataset

    data = TokenDataset(finished / "tokens" / "train")
    config = pipeline.fit(preset("tiny")[0], data)
    assert config.image_vocab == 32
    assert config.max_text == data.meta["text_length"] + pipeline.TEXT_ROOM
