"""`System.magnify`, `cogview magnify` and `cogview generate --magnify`."""

import re

import pytest
import torch
from PIL import Image
from test_data_pairs import run  # noqa: F401
from test_train_command import SMALL

from cogview import cli
from cogview.data.images import pixels
from cogview.pictures import image_of
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
    expected = lens.magnify(repeated, codes, seeds=[0, 1, 0, 1])
    for path, picture in zip(paths, expected, strict=True):
        assert Image.open(path).size == (64, 64)
        assert torch.equal(pixels(Image.open(path), 64), picture)
    cli.main([*common, "--magnify", "lens", "--magnify-top-k", "200", "--out", "drawn.png"])
    drawn = lens.magnify(repeated, codes, seeds=[0, 1, 0, 1], temperature=0.9, top_k=200)
    assert torch.equal(pixels(Image.open(sorted(tmp_path.glob("drawn/*.png"))[3]), 64), drawn[3])
    assert not torch.equal(drawn, expected)


def test_files_are_magnified_and_a_bad_one_is_named(magnifying, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("a", "c d"):
        image_of(torch.randint(256, (3, 40, 50), dtype=torch.uint8)).save(f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    files, lens = ["a.png", "broken.png", "c d.png"], System.load(magnifying, draws="larger pictures")
    cli.main(["magnify", *files, "--captions", *CAPTIONS, "--run", str(magnifying), "--top-k", "5", "--seed", "7"])
    said = capsys.readouterr().out
    assert re.search(r"lens, step 1 .*\nleft out: broken.png: .*\n", said)
    assert "2 of 3 pictures in magnified/, 1 left out, 2 on magnified.png" in said
    assert sorted(path.name for path in tmp_path.glob("magnified/*")) == ["001-a.png", "003-c-d.png"]
    bad, given = dict[int, str](), [tmp_path / name for name in files]
    expected = lens.magnify(CAPTIONS, given, seeds=[7, 8, 9], top_k=5, bad=bad)
    assert list(bad) == [1]
    assert not expected[1].any()
    for number, name in ((0, "001-a"), (2, "003-c-d")):
        picture = lens.magnify(CAPTIONS[number], given[number], seeds=[7 + number], top_k=5)[0]
        assert torch.equal(expected[number], picture)
        assert torch.equal(pixels(Image.open(tmp_path / f"magnified/{name}.png"), 64), picture)
    sheet = Image.open("magnified.png")
    assert sheet.width > 2 * 3 * 64
    cli.main(["magnify", "a.png", "c d.png", "--captions", "picture", "--run", str(magnifying), "--out", "x.jpg"])
    assert len(list(tmp_path.glob("x/*.jpg"))) == 2
    with pytest.raises(ValueError, match="captions: expected one of each of 2 pictures, got 3"):
        lens.magnify(CAPTIONS, given[:1] * 2)
    for arguments, wrong in (
        (["a.png", "a.png", "a.png", "--captions", "a", "b"], "captions: expected one, or one of each of 3, got 2"),
        (["broken.png", "--captions", "a"], "pictures: expected at least one that can be read, got 'none'"),
        (["a.png", "--captions", " "], "captions: expected one that is not blank"),
        (["a.png", "--captions", "a", "--out", "x.exe"], "out: expected a name that ends in"),
        (["a.png", "--captions", "a", "--out", "a.png"], "out: expected a place where a.png is not written over"),
        (["a.png", "--captions", "a", "--name", "gpt"], "a model that draws larger pictures, got 'gpt, of cogview'"),
    ):
        with pytest.raises(SystemExit, match=wrong):
            cli.main(["magnify", *arguments, "--run", str(magnifying)])


def test_what_cannot_magnify_is_refused(magnifying, tmp_path):
    common = ["generate", "--run", str(magnifying), "--captions", "a", "--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit, match=r"name: expected a model of .*: .*, got 'sr'"):
        cli.main([*common, "--magnify", "sr"])
    with pytest.raises(SystemExit, match="name: expected a model that draws larger pictures, got 'gpt, of cogview'"):
        cli.main([*common, "--magnify", "gpt"])
    with pytest.raises(SystemExit, match="magnify_top_k: expected --magnify NAME, got 5"):
        cli.main([*common, "--magnify-top-k", "5"])
    with pytest.raises(SystemExit, match="expected a model that draws pictures, got 'lens, of superresolution'"):
        cli.main([*common, "--name", "lens"])
    with pytest.raises(SystemExit, match=r"recipe: expected 'cogview', as in .*, got 'dalle'"):
        cli.main(
            ["train", "--run", str(magnifying), "--from", str(magnifying), "--recipe", "dalle", "--name", "d", *SMALL]
        )
