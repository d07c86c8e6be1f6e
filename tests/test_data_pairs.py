"""Tokens of pictures at two sizes: `cogview tokenize --pairs`, and a super-resolution model trained on them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_command import SMALL, header

from cogview import cli
from cogview.data.crops import Crops, smaller
from cogview.data.images import pixels
from cogview.data.shards import PairDataset, ShardWriter
from cogview.data.tokens import TokenDataset, read_meta
from cogview.demo.scenes import render, sample_scenes
from cogview.models import load_model
from cogview.pipeline import tokenize_pairs
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

SIZES = ["--codebook", "16", "--code-dim", "8", "--hidden", "8", "--image-size", "32", "--image-passes", "1"]


def shard(path, count=24):
    with ShardWriter(path) as writer:
        for number, scene in enumerate(sample_scenes("train", count)):
            png = io.BytesIO()
            render(scene).save(png, "PNG")
            writer.write(f"{number:03d}", {"png": png.getvalue(), "txt": f"picture number {number}".encode()})
    return path


def test_crops_are_squares_on_the_grid_and_their_halves():
    picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    places = [(y, x) for y in (0, 16, 32) for x in (0, 16, 32)]
    squares = [picture[:, y : y + 32, x : x + 32] for y, x in places]
    large, small = Crops(9).of_picture(picture, 16, 5, 6)
    assert sorted(map(repr, large.tolist())) == sorted(map(repr, (s.tolist() for s in squares)))
    for square, less in zip(large, small, strict=True):
        image = Image.fromarray(square.permute(1, 2, 0).numpy())
        assert torch.equal(less, pixels(image, 16))
    again, _ = Crops(3).of_picture(picture, 16, 5, 6)
    assert torch.equal(again, large[:3])  # more are others beside them
    firsts = {repr(Crops(1, seed).of_picture(picture, 16, 5, n)[0].tolist()) for seed in range(3) for n in range(10)}
    assert len(firsts) > 5
    with pytest.raises(ValueError, match="crops: expected 1 to 9, got 10"):
        Crops(10).check(32, 16)


def test_both_sets_of_tokens_are_of_one_square(tmp_path):
    data = PairDataset([shard(tmp_path / "a.tar", 6)])
    text = TextTokenizer.train([f"picture number {n}" for n in range(30)], 300)
    torch.manual_seed(0)
    vqvae = VQVAE(VQConfig(codebook_size=64, dim=8, hidden=8)).eval()
    whole = {"image_size": 32, "crops": Crops(2, 7)}
    tokens = tokenize_pairs(data, text, vqvae, tmp_path / "tokens", **whole, batch=4)
    assert len(tokens) == 12
    assert {k: tokens.meta[k] for k in ("grid", "small_grid", "image_size", "crops")} == {
        "grid": [4, 4],
        "small_grid": [2, 2],
        "image_size": 32,
        "crops": {"count": 2, "seed": 7, "cut": "pictures"},
    }
    ids, small, large = tokens.batch(range(12))
    key = int(data.shards[0].digest[:15], 16)
    for number in range(6):
        squares, halves = Crops(2, 7).of_picture(data.picture(number, 64), 16, key, number)
        with torch.no_grad():
            assert torch.equal(large[2 * number : 2 * number + 2], vqvae.encode(squares.float() / 255).flatten(1))
            assert torch.equal(small[2 * number : 2 * number + 2], vqvae.encode(halves.float() / 255).flatten(1))
    assert torch.equal(ids[::2], ids[1::2])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    tokenize_pairs(data, text, vqvae, tmp_path / "tokens", **whole)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    path = next((tmp_path / "tokens").glob("*.small.npy"))
    np.save(path, np.load(path)[:, :3])
    with pytest.raises(
        ValueError, match=r"is damaged \(part-.*small.npy: expected int32 \(12, 4\), got 'int32 \(12, 3\)'"
    ):
        TokenDataset(tmp_path / "tokens")
    assert torch.equal(tokenize_pairs(data, text, vqvae, tmp_path / "tokens", **whole).batch(range(12))[1], small)
    with pytest.raises(ValueError, match="image_size: expected a multiple of 16 for pairs, got 24"):
        tokenize_pairs(data, text, vqvae, tmp_path / "tokens", image_size=24, crops=Crops())


def test_squares_of_codes_know_their_surroundings(tmp_path):
    data = PairDataset([shard(tmp_path / "a.tar", 5)])
    text = TextTokenizer.train([f"picture number {n}" for n in range(30)], 300)
    torch.manual_seed(0)
    vqvae, crops = VQVAE(VQConfig(codebook_size=64, dim=8, hidden=8)).eval(), Crops(9, cut="codes")
    tokens = tokenize_pairs(data, text, vqvae, tmp_path / "tokens", image_size=32, crops=crops, batch=2)
    _, small, large = (part.view(5, 9, -1) for part in tokens.batch(range(45)))
    for number in range(5):
        picture = data.picture(number, 64)
        with torch.no_grad():
            codes = vqvae.encode(picture[None].float() / 255)[0]
            less = vqvae.encode(smaller(picture)[None].float() / 255)[0]
        wanted = [
            (
                less[i : i + 2, k : k + 2].flatten().tolist(),
                codes[2 * i : 2 * i + 4, 2 * k : 2 * k + 4].flatten().tolist(),
            )
            for i in range(3)
            for k in range(3)
        ]
        assert sorted(zip(small[number].tolist(), large[number].tolist(), strict=True)) == sorted(wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with tokenizers of both sizes, pairs, tokens, and a model that draws."""
    folder = tmp_path_factory.mktemp("pairs")
    path, run = str(shard(folder / "a.tar")), folder / "run"
    cli.main(["tokenize", path, "--run", str(run), "--pairs", "--crops", "2", *SIZES])
    cli.main(["tokenize", path, "--run", str(run)])
    cli.main(["train", "--run", str(run), "--steps", "2", "--attention", "dense", *SMALL])
    return run


def test_tokenizers_are_trained_at_both_sizes(run):
    assert read_meta(run / "tokens" / "train")["image_size"] == 32  # as the pairs
    pairs = TokenDataset(run / "tokens" / "pairs-train")
    assert (len(pairs), pairs.meta["small_grid"]) == (48, [2, 2])
    assert checkpoint.read_header(checkpoint.latest(run / "vqvae"))["halves"] is True


def test_super_resolution_begins_with_a_model_that_draws(run, capsys):
    more = ["--recipe", "superresolution", "--from", str(run), "--name", "sr", "--steps", "1"]
    small = ["--batch-size", "2", "--dtype", "float32", "--learning-rate", "1e-30"]
    cli.main(["train", "--run", str(run), *more, *small])
    base, made = header(run), header(run, "sr")
    assert (made["recipe"], made["data"] > len(TokenDataset(run / "tokens" / "train"))) == ("superresolution", True)
    assert made["config"] == base["config"] | {"restart": "on", "dropout": 0.2}
    recipe, model = load_model(checkpoint.latest(run / "sr"))
    assert recipe.grids == (2, 4)
    before = load_model(checkpoint.latest(run / "gpt"))[1].state_dict()
    torch.testing.assert_close(dict(model.state_dict()), dict(before))
    log = (run / "sr" / "log.jsonl").read_text()
    assert "small_loss" in log
    assert "validation_image_loss" in log
    cli.main(["train", "--run", str(run), "--name", "sr", "--steps", "2", *small])
    assert "going on at step 1" in capsys.readouterr().out


def test_tokens_of_one_size_are_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="crops: expected none without --pairs, got 2"):
        cli.main(["tokenize", "x.tar", "--run", str(run), "--crops", "2"])
    with pytest.raises(SystemExit, match="split: expected a name, as train or test, got 'pairs-train'"):
        cli.main(["tokenize", "x.tar", "--run", str(run), "--split", "pairs-train"])
    (tmp_path / "tokens").mkdir()
    with pytest.raises(
        SystemExit, match=r"takes pictures at two sizes: `cogview tokenize --pairs` makes .*pairs-train"
    ):
        cli.main(["train", "--run", str(tmp_path), "--recipe", "superresolution"])
