"""`cogview generate`: every picture in a file, then the sheet; what is wrong is said before anything is drawn."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import NASTY
from test_system import write
from test_transformer import recipe_of

from cogview import cli, labels
from cogview.clusters import Clusters, k_means
from cogview.system import System
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

CAPTIONS = ["a fox above a tree", "蓝色背景", "🦊"]
OWN = np.arange(20) % 4  # clusters of codes


@pytest.fixture
def run(tmp_path, monkeypatch):
    """runs/mine in the folder that the test works in, with a model of two checkpoints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    recipe = recipe_of(text_vocab=300, max_positions=620, num_layers=1)
    text = TextTokenizer.train(CAPTIONS * 3, 300)
    text.save("runs/mine/text.model")
    image = VQVAE(VQConfig(codebook_size=20, dim=4, hidden=4)).eval()
    image.save("runs/mine/vqvae.safetensors")
    system = System(text, image, recipe, recipe.model())
    for step in (1, 2):
        write(tmp_path / "runs/mine/gpt", step, system, best_step=1, best_loss=2.0)
    return tmp_path


def command(*arguments):
    cli.main(["generate", *map(str, arguments)])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels_of(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_pictures_and_sheet(run, capsys):
    """Those that System draws, named by number and caption; of the run trained last, its best checkpoint."""
    (run / "more.txt").write_bytes("\ufeff 🦊\r\n\r\n  \n\u200b\n".encode())
    command(
        "--captions", CAPTIONS[0], "--captions", CAPTIONS[1], "--captions-file", "more.txt", "--count", 2, "--seed", 5
    )
    printed = capsys.readouterr().out
    assert printed.startswith("runs/mine, gpt, step 1 (best held-out loss 2.000)\n")
    assert printed.endswith(f"6 pictures in pictures{os.sep}, all of them on pictures.png\n")
    names = [
        "001-1-a-fox-above-a-tree",
        "001-2-a-fox-above-a-tree",
        "002-1-蓝色背景",
        "002-2-蓝色背景",
        "003-1",
        "003-2",
    ]
    assert files(run / "pictures") == [f"{name}.png" for name in names]
    drawn = System.load(run / "runs/mine").draw(
        [c for c in CAPTIONS for _ in range(2)], seeds=[5, 6] * 3, temperature=0.9
    )
    for name, picture in zip(names, drawn, strict=True):
        assert torch.equal(pixels_of(run / "pictures" / f"{name}.png"), picture)
    sheet = pixels_of(run / "pictures.png")
    large = drawn[0].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(sheet[:, 10:138, 10:138], large)
    assert drawn.unique().numel() > 2


def test_several_after_one_flag_and_a_step(run, capsys):
    command(
        "--captions", *CAPTIONS[:2], "--captions", "c", "--count", 1, "--step", 2, "--name", "gpt", "--run", "runs/mine"
    )
    assert files(run / "pictures") == ["001-1-a-fox-above-a-tree.png", "002-1-蓝色背景.png", "003-1-c.png"]
    command("--captions", "c", "--count", 1, "--out", "one.png")
    assert capsys.readouterr().out.endswith(f"1 picture in one{os.sep}, also on one.png\n")
    command("--captions", "c", "--count", 1, "--seed", 2**63 - 1, "--step", 2)
    assert "runs/mine, gpt, step 2 (as asked for)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="step: expected one that runs/mine/gpt has a checkpoint of: 1, 2, got 3"):
        command("--captions", "a", "--step", 3)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (("--text-attention", 50), {"text_attention": 50.0}),  # of these weights it takes as much to be seen
        (("--clusters", 3), {"clusters": (None, 3, 1.0)}),
        (("--clusters", 2, "--cluster-temperature", 0.5, "--labels", "own.npy"), {"clusters": (OWN, 2, 0.5)}),
    ],
)
def test_cogview2s_ways_to_draw(run, options, how):
    common = ("--captions", "c", "--count", 2, "--temperature", 1.5)
    np.save("own.npy", OWN)
    command(*common, *options)
    system = System.load(run / "runs/mine")
    if "clusters" in how:
        labels, *others = how["clusters"]
        found = k_means(system.image.codebook) if labels is None else torch.from_numpy(labels)
        how = {"clusters": Clusters(found, *others)}
    drawn = system.draw(["c", "c"], seeds=[0, 1], temperature=1.5, **how)
    for path, picture in zip(files(run / "pictures"), drawn, strict=True):
        assert torch.equal(pixels_of(run / "pictures" / path), picture)
    assert not torch.equal(drawn, system.draw(["c", "c"], seeds=[0, 1], temperature=1.5))


def test_no_caption_loses_a_picture(run):
    captions = [text for text in NASTY if text.strip() and "\ud83d" not in text and len(text) <= 300]
    command("--captions", *captions, "--count", 1, "--out", "new/folder/sheet.png")
    found = files(run / "new/folder/sheet")
    assert [name.partition("-")[0] for name in found] == [f"{n:03d}" for n in range(1, len(captions) + 1)]
    assert len(pixels_of(run / "new/folder/sheet.png")) == 3


@pytest.mark.parametrize(("out", "kind", "suffix"), [("a.jpg", "JPEG", ".jpg"), ("a.webp", "WEBP", ".webp"),
                                                     ("a.GIF", "GIF", ".gif"), ("a", "PNG", ".png")])  # fmt: skip
def test_the_format_is_that_of_out(run, out, kind, suffix):
    command("--captions", "x", "--count", 10, "--out", out)
    assert files(run / "a") == [f"001-{n:02d}-x{suffix}" for n in range(1, 11)]
    sheet = out if "." in out else f"{out}.png"
    for path in (run / sheet, run / "a" / f"001-01-x{suffix}"):
        with Image.open(path) as image:
            assert image.format == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"captions: expected at least one, of --captions or --captions-file"),
        (["--captions"], r"captions: expected at least one"),
        (["--captions", "a", " \t"], "captions: expected one that is not blank, got nothing to draw in caption 2: ''"),
        (["--captions", "a", "half \udc80"], "captions: expected valid Unicode, got half of a character in caption 2"),
        (["--captions", "a" * 20_000], r"captions: expected at most 600 tokens, got \d+ in caption 1: 'aaa"),
        (["--captions", "a", "--count", 0], "count: expected at least 1, got 0"),
        (["--captions", "a", "--temperature", "nan"], "temperature: expected a positive and finite number, got nan"),
        (["--captions", "a", "--top-k", 0], "top_k: expected a whole number, at least 1, got 0"),
        (["--captions", "a", "--clusters", 2, "--top-k", 5], "top_k: expected none with clusters, got 5"),
        (["--captions", "a", "--labels", "own.npy"], "labels: expected none without clusters, got 'own.npy'"),
        (["--captions", "a", "--cluster-temperature", 2], "cluster_temperature: expected none without clusters"),
        (["--captions", "a", "--clusters", 2, "--labels", "none.npy"], "cluster labels: cannot read none.npy"),
        (["--captions", "a", "--batch-size", -1], "batch_size: expected a whole number, at least 1, got -1"),
        (["--captions", "a", "--seed", -1], r"seed: expected a whole number from 0 to 2\^63 - 4, got -1"),
        (["--captions", "a", "--seed", 2**63 - 3], r"seed: expected a whole .* 2\^63 - 4, got 9223372036854775805"),
        (["--captions", "a", "--seed", 10**40], r"seed: expected a whole number from 0 to 2\^63 - 4, got 10{40}$"),
        (["--captions", "a", "--out", "a.xyz"], r"out: expected a name that ends in \.png, \.jpg, .*, got 'a.xyz'"),
        (["--captions", "a", "--out", ".."], r"out: expected a file's name, got '..'"),
        (["--captions", "a", "--out", "file/a.png"], r"out: cannot write file/a.png \(Not a dir"),
        (["--captions", "a", "--out", "folder.png"], r"out: cannot write folder.png \(it is a folder\)"),
        (["--captions", "a", "--out", "x" * 300], r"out: cannot write x+\.png \(File name too long\)"),
        (["--captions-file", "nothing"], r"captions-file: cannot read nothing \(No such file"),
        (["--captions-file", "latin"], r"captions-file: expected UTF-8, got something else in line 2 of latin"),
        (["--captions-file", "empty"], "captions-file: expected at least one caption, got none in empty$"),
        (
            ["--captions", "a", "--captions-file", "nul"],
            "captions-file: expected UTF-8, got a NUL character in line 1 of",
        ),
        (["--captions-file", "utf16"], "captions-file: expected UTF-8, got something else in line 1 of utf16$"),
        (
            ["--captions", "a", "b", "--captions-file", "long"],
            r"captions-file: expected at most 600 tokens, got \d+ in line 4 of long: 'zzz",
        ),
        (["--captions", "a", "z" * 20_000, "--captions-file", "long"], "captions: .* in caption 2: 'zzz"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(run, monkeypatch, arguments, message):
    (run / "file").write_text("mine")
    (run / "latin").write_bytes("a fox\ncaf\xe9\n".encode("latin-1"))
    (run / "empty").write_text("\ufeff\n \n\u200b\u2060\n", encoding="utf-8")
    (run / "nul").write_bytes("a fox\n".encode("utf-16-le"))
    (run / "utf16").write_bytes("a fox\n".encode("utf-16"))
    (run / "long").write_text("fox\n\n\u200b\n" + "z" * 20_000, encoding="utf-8")
    (run / "folder.png").mkdir()
    monkeypatch.setattr(System, "draw_batches", None)  # cannot be called
    with pytest.raises(SystemExit, match=f"^cogview: {message}"):
        command(*arguments)
    assert not list(run.rglob("*.png/*"))
    assert (run / "file").read_text() == "mine"


def test_a_sheet_that_fails_loses_no_picture(run, monkeypatch):
    """Nor does one whose labels fail."""

    def fails(*_, **__):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(labels, "_pieces", fails)
        command("--captions", "a", "--count", 1)
        assert (run / "pictures.png").exists()
    monkeypatch.setattr("cogview.pictures.contact_sheet", fails)
    with pytest.raises(SystemExit, match=r"no sheet could be made \(no room\); the pictures are in again"):
        command("--captions", "a", "--count", 2, "--out", "again.png")
    assert files(run / "again") == ["001-1-a.png", "001-2-a.png"]


def test_a_picture_is_written_as_soon_as_it_is_drawn(run, monkeypatch):
    """What comes before an error in a later batch is there."""
    batches, there = System.code_batches, []

    def two(self, *args, **how):
        drawn = batches(self, *args, **how)
        yield next(drawn)
        there.extend(files(run / "pictures"))
        raise ValueError("the end")

    monkeypatch.setattr(System, "code_batches", two)
    with pytest.raises(SystemExit, match="the end"):
        command("--captions", "a", "b", "--count", 2, "--batch-size", 3)
    assert there == files(run / "pictures") == ["001-1-a.png", "001-2-a.png", "002-1-b.png"]
    assert not (run / "pictures.png").exists()


def test_broken_weights_are_an_error(run):
    path = checkpoint.path_of(run / "runs/mine/gpt", 1)
    tensors, header = checkpoint.read(path)
    tensors["model.embedding.words.weight"][:] = torch.nan
    checkpoint.save(path, tensors, header)
    with pytest.raises(SystemExit, match=r"^cogview: the model's logits are not finite, at token 1 of 16 drawn$"):
        command("--captions", "a")


def test_a_run_that_is_nowhere(run, monkeypatch):
    monkeypatch.chdir(run / "runs")
    with pytest.raises(SystemExit, match="run: expected a folder with a trained model; runs has none either"):
        command("--captions", "a")
    with pytest.raises(SystemExit, match="nowhere holds no trained model"):
        command("--captions", "a", "--run", "nowhere")


def test_what_a_terminal_cannot_show_is_escaped(run, monkeypatch):
    """By all commands: models and their runs have the names that they have, and tables are ASCII."""
    shutil.copytree("runs/mine/gpt", "runs/mine/模型")
    for step in (1, 2):
        os.utime(checkpoint.path_of(run / "runs/mine/模型", step), (1, 1))
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    command("--captions", "狐", "--count", 1, "--name", "模型", "--out", "狐.png")
    cli.main(["compare", "runs/mine"])
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = written.getvalue().decode("ascii").splitlines()
    assert lines[0] == r"runs/mine, \u6a21\u578b, step 1 (best held-out loss 2.000)"
    assert rf"1 picture in \u72d0{os.sep}, also on \u72d0.png" in lines
    table = [line for line in lines if line[:1] in ("+", "|")]
    assert r"| mine/\u6a21\u578b |" in table[1]
    assert len({len(line) for line in table}) == 1  # in columns
    assert "usage: cogview" in written.getvalue().decode()
