"""`System.magnify`, and `cogview generate --magnify`."""

import re

import pytest
import torch
from PIL import Image
from test_data_pairs import run  # noqa: F401
from test_train_command import SMALL

from cogview import cli
from cogview.sampling import Sampling
from cogview.system import System

CAPTIONS = ["picture number 1", "picture number 2", "picture"]


@pytest.fixture(scope="module")
def magnifying(run):  # noqa: F811
    more = ["--recipe", "superresolution", "--from", str(run), "--name", "lens", "--steps", "1"]
    cli.main(["train", "--run", str(run), *more, "--batch-size", "2", "--dtype", "float32"])
    return run


def test_a_system_magnifies(magnifying):
    base, lens = System.load(magnifying, draws="pictures"), System.load(magnifying, name="lens")
    how = {"temperature": 1.0, "top_k": 5}
    codes = torch.cat(list(base.code_batches(CAPTIONS, Sampling(**how))))
    large = lens.magnify(CAPTIONS, codes, seeds=[3, 4, 5], **how)
    assert (large.dtype, large.shape) == (torch.uint8, (3, 3, 64, 64))
    assert torch.equal(lens.magnify(CAPTIONS[1], codes[1], seeds=[4], **how)[0], large[1])
    pictures = [Image.new("RGB", (70, 50), colour) for colour in ("red", "blue", "grey")]
    assert torch.equal(lens.magnify(CAPTIONS, pictures, **how), lens.magnify(CAPTIONS, lens.tokenize(pictures), **how))
    assert lens.magnify([], codes[:0]).shape == (0, 3, 64, 64)
    with pytest.raises(ValueError, match="name: expected a model that draws larger pictures, got 'gpt, of cogview'"):
        base.magnify(CAPTIONS, codes)
    with pytest.raises(ValueError, match="name: expected a model that draws pictures, got 'lens, of superresolution'"):
        lens.draw(CAPTIONS)
    with pytest.raises(ValueError, match="codes: expected 4 and 16 of each image, got 16"):
        lens.logits(CAPTIONS, codes)
    with pytest.raises(ValueError, match=r"pictures: expected .* codes of whole numbers \[N, 4, 4\]"):
        lens.magnify(CAPTIONS, codes[:, :2, :2])


def test_generated_pictures_are_magnified(magnifying, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["generate", "--run", str(magnifying), "--captions", *CAPTIONS[:2], "--count", "2", "--batch-size", "3"]
    cli.main([*common, "--magnify", "lens"])
    said = capsys.readouterr().out
    assert re.search(r"gpt, step 2 .*\nmagnified by .*lens, step 1 ", said)
    paths = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(paths) == 4
    base, lens = (System.load(magnifying, draws=what) for what in ("pictures", "larger pictures"))
    repeated = [caption for caption in CAPTIONS[:2] for _ in range(2)]
    codes = torch.cat(list(base.code_batches(repeated, Sampling(0.9), seeds=[0, 1, 0, 1])))
    expected = lens.magnify(repeated, codes, seeds=[0, 1, 0, 1], temperature=0.9)
    for path, picture in zip(paths, expected, strict=True):
        assert Image.open(path).size == (64, 64)
        assert list(Image.open(path).tobytes()) == picture.permute(1, 2, 0).flatten().tolist()


def test_what_cannot_magnify_is_refused(magnifying, tmp_path):
    common = ["generate", "--run", str(magnifying), "--captions", "a", "--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit, match=r"name: expected a model of .*: .*, got 'sr'"):
        cli.main([*common, "--magnify", "sr"])
    with pytest.raises(SystemExit, match="name: expected a model that draws larger pictures, got 'gpt, of cogview'"):
        cli.main([*common, "--magnify", "gpt"])
    with pytest.raises(SystemExit, match="expected a model that draws pictures, got 'lens, of superresolution'"):
        cli.main([*common, "--name", "lens"])
    with pytest.raises(SystemExit, match=r"recipe: expected 'cogview', as in .*, got 'dalle'"):
        cli.main(
            ["train", "--run", str(magnifying), "--from", str(magnifying), "--recipe", "dalle", "--name", "d", *SMALL]
        )
