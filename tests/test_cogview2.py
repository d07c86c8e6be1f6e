"""CogView2's stages together, as a class and as commands: any batch, the best first, each stage as it is asked."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_editing import mask

from cogview import cli, lopar
from cogview.clusters import Clusters, k_means
from cogview.cogview2 import _ALWAYS, CogView2, Drawn, Settings
from cogview.completion import complete, edit
from cogview.pictures import image_of
from cogview.recipes.coglm import CogLM
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.recipes.direct import Direct
from cogview.recipes.iterative import Iterative
from cogview.sampling import Sampling
from cogview.system import System
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

CAPTIONS = ["a fox", "a red car", "蓝色"]
HOW = Settings(*(Sampling(top_k=5, batch_size=2) for _ in range(3)), top_k=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogview2")
    torch.manual_seed(0)
    text, image = (
        TextTokenizer.train(CAPTIONS * 3, 310, bilingual=True),
        VQVAE(VQConfig(codebook_size=20, dim=4, hidden=4)),
    )
    text.save(folder / "text.model")
    image.eval().save(folder / "vqvae.safetensors")
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "dropout": 0.0, "patch_side": 2}
    sizes: dict[str, Any] = {"image_grid": 4, "image_vocab": 20, "text_vocab": text.vocab_size}
    config = CogLMConfig(**shape, **sizes, max_positions=48, max_caption=30, text_rows=31, chinese_from=1)
    base = CogLM.fit(config, **sizes, max_text=30, chinese_from=text.chinese_from)
    for name, recipe in (
        ("small", CogLM(base)),
        ("larger", Direct(Direct.begun(base))),
        ("finest", Iterative(Iterative.begun(base))),
    ):
        model = recipe.model()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        (folder / name).mkdir()
        header = {"recipe": recipe.name, "config": dataclasses.asdict(recipe.config), "run": {"step": 7}}
        header["tokenizers"] = [text.sha256, image.sha256]
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        checkpoint.save(checkpoint.path_of(folder / name, 7), tensors, header)
    return folder


@pytest.fixture(scope="module")
def models(run):
    return CogView2.load(run)


def drawn(models: CogView2, captions: Any = CAPTIONS, how: Settings = HOW, **about: Any) -> list[Drawn]:
    return list(models.draw(captions, how, **about))


def same(one: Drawn, other: Drawn) -> bool:
    pairs = zip(one[1:], other[1:], strict=True)
    return all(torch.equal(a, b) if a is not None else b is None for a, b in pairs)


def test_stages(models, run):
    assert [stage.recipe.name for stage in models.stages] == ["coglm", "direct", "iterative"]
    assert (models.side, models.rounds) == (96, 6)
    assert CogView2.load(run, stages=1).side == 32
    found = drawn(models, count=2, candidates=5)
    for one, caption in zip(found, CAPTIONS, strict=True):
        assert one.caption == caption
        assert bool((one.caploss.diff() >= 0).all())
        assert (one.small.shape, one.direct.shape, one.fine.shape) == ((2, 4, 4), (2, 12, 12), (2, 12, 12))
        order = models.iterative.recipe.order.view(12, 12)
        assert torch.equal(one.fine[:, order < 1], one.direct[:, order < 1])
        assert one.last is one.fine
    small = drawn(CogView2.load(run, stages=1), count=2, candidates=5)
    assert all(torch.equal(a.small, b.small) for a, b in zip(small, found, strict=True))
    assert small[0].direct is None
    losses = models.base.caploss(CAPTIONS[0], models.base.which_draws("pictures")._codes(found[0].small))
    torch.testing.assert_close(losses, found[0].caploss)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_batch_draws_the_same(models, size):
    how = Settings(*(Sampling(top_k=5, batch_size=size) for _ in range(3)), top_k=None)
    expected = drawn(models, count=3, candidates=5)
    told: list[int] = []
    found = drawn(models, how=how, count=3, candidates=5, update=told.append)
    assert all(map(same, found, expected))
    assert told == sorted(told)
    assert told[-1] == models.work(3, 3, 5)
    assert same(drawn(models, CAPTIONS[1:2], how, count=3, candidates=5)[0], expected[1])


def test_a_seed_draws_the_same_picture_among_others_and_alone(models):
    ranked = drawn(models, CAPTIONS[:1], count=5, seed=7)[0]
    kept = drawn(models, CAPTIONS[:1], count=2, candidates=5, seed=7)[0]
    assert all(torch.equal(a, b[:2]) for a, b in zip(kept[1:], ranked[1:], strict=True))
    alone = [drawn(models, CAPTIONS[:1], seed=seed)[0] for seed in range(7, 12)]
    best = min(alone, key=lambda one: float(one.caploss))
    assert same(best, Drawn(kept.caption, *(part[:1] for part in kept[1:])))


def test_each_stage_draws_as_it_is_asked(models):
    before = drawn(models)[0]
    for name, part in (("base", "small"), ("direct", "direct"), ("iterative", "fine")):
        greedy = dataclasses.replace(HOW, **{name: Sampling(top_k=1, batch_size=2)})
        found = drawn(models, CAPTIONS[:1], greedy)[0]
        assert not torch.equal(getattr(found, part), getattr(before, part))
        assert not same(found, before)
        earlier = {"direct": ("small",), "iterative": ("small", "direct")}.get(name, ())
        assert all(torch.equal(getattr(found, e), getattr(before, e)) for e in earlier)
    rounds = dataclasses.replace(HOW, top_k=(1, 1, 1, 1, 1, 1))
    assert not torch.equal(drawn(models, CAPTIONS[:1], rounds)[0].fine, before.fine)
    tile = dataclasses.replace(models.iterative.recipe.config, tile=lopar.diagonals(4, 4))
    other = dataclasses.replace(models, iterative=dataclasses.replace(models.iterative, recipe=Iterative(tile)))
    assert (other.rounds, drawn(other, CAPTIONS[:1], Settings())[0].fine.shape) == (5, (1, 12, 12))
    labels = k_means(models.base.image.codebook, 4)
    published = Settings.published(labels)
    assert published.base.clusters.top == 16
    assert drawn(models, CAPTIONS[:1], published)[0].fine.shape == (1, 12, 12)
    emphasised = dataclasses.replace(HOW, base=Sampling(top_k=5, batch_size=2, text_attention=3.0))
    assert not torch.equal(drawn(models, CAPTIONS[:1], emphasised)[0].small, before.small)


def test_a_picture_is_edited(models):
    stream = torch.Generator().manual_seed(2)
    picture = torch.randint(256, (3, 130, 150), generator=stream).to(torch.uint8)
    for hidden in (mask(130, 150, (30, 40, 80, 90)), mask(130, 150, (5, 5, 15, 20), (12, 25, 19, 26))):
        found = edit(models, picture, hidden, "a fox", HOW, count=2, candidates=3, around=2)
        assert found.pictures.shape == (2, 3, 130, 150)
        assert torch.equal(found.pictures[:, :, ~hidden], picture[:, ~hidden].expand(2, -1, -1))
        assert not torch.equal(found.pictures[0], found.pictures[1])
        assert bool((found.pictures[0] != picture).any())
        assert bool((found.caploss.diff() >= 0).all())
        again = edit(
            models, image_of(picture), hidden, "a fox", dataclasses.replace(HOW), count=2, candidates=3, around=2
        )
        assert torch.equal(again.pictures, found.pictures)
    guided = dataclasses.replace(HOW, base=Sampling(top_k=5, batch_size=2, guidance=3.0))
    assert not torch.equal(
        edit(models, picture, hidden, "a fox", guided, count=2, candidates=3, around=2).pictures, found.pictures
    )
    one = dataclasses.replace(HOW, base=Sampling(top_k=5, batch_size=8))
    assert torch.equal(
        edit(models, picture, hidden, "a fox", one, count=2, candidates=3, around=2).pictures, found.pictures
    )
    (alone,) = edit(models, picture, mask(130, 150, (5, 5, 15, 15)), "a fox", HOW, around=2).codes
    assert alone.shape == (1, 4, 4)  # all that a square of 20 pixels needs


def test_a_picture_with_transparency_is_edited(models, tmp_path):
    """It keeps it, and hidden colours too."""
    stream = torch.Generator().manual_seed(3)
    values = torch.randint(256, (4, 130, 150), generator=stream).to(torch.uint8)
    hidden = mask(130, 150, (50, 50, 100, 90))
    image_of(values).save(tmp_path / "given.png")
    found = edit(models, tmp_path / "given.png", hidden, "a fox", HOW, around=2)
    assert found.pictures.shape == (1, 4, 130, 150)
    assert torch.equal(found.pictures[0, :, ~hidden], values[:, ~hidden])
    assert bool((found.pictures[0, 3, hidden] == 255).all())
    assert torch.equal(edit(models, values, hidden, "a fox", HOW, around=2).pictures, found.pictures)
    assert [codes.shape[1:] for codes in found.codes] == [(4, 4), (12, 12), (12, 12)]
    Image.fromarray(np.full((130, 150), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="expected 8 bits a channel"):
        edit(models, tmp_path / "deep.png", hidden, "a fox", HOW)


def test_what_cannot_be_edited(models):
    picture = torch.zeros(3, 60, 90, dtype=torch.uint8)
    short = dataclasses.replace(models.direct.recipe.config, max_caption=2)
    direct = dataclasses.replace(models.direct, recipe=Direct(short))
    for some, hidden, caption, said in (
        (
            models,
            mask(60, 90, (0, 0, 60, 60)),
            "a fox",
            "mask: expected less than all 4 x 4 cells of the 60 x 60 pixels",
        ),
        (models, mask(60, 90, (1, 1, 59, 59)), "a fox", "mask: expected less than all 4 x 4 cells"),
        (
            dataclasses.replace(models, direct=direct),
            mask(60, 90, (0, 0, 30, 30)),
            "a red car",
            "expected at most 2 tok",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            edit(some, picture, hidden, caption, HOW)
    grid, cells = models.base.recipe.config.image_grid, torch.zeros(4, 4, dtype=torch.bool)
    codes = torch.zeros(grid, grid, dtype=torch.int64)
    with pytest.raises(ValueError, match="cells: expected some that are drawn, got 'none'"):
        complete(models, "a fox", codes, cells, HOW.base, seeds=[0])
    with pytest.raises(ValueError, match="caption: expected text, got"):
        complete(models, ["a fox"], codes, ~cells, HOW.base, seeds=[0])


def test_what_fits_the_memory(models):
    assert models.fitting(4e9) > models.fitting(2e9) > 8
    with pytest.raises(ValueError, match=r"memory: expected at least 0\.6 GB, for one picture, got '0.1'"):
        models.fitting(1e8)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read where Linux has them")
def test_the_memory_that_is_taken(models):
    """At a width where pictures take most of it: what they are said to take, and not several times less."""
    before = models.base.recipe.config
    wide = dataclasses.replace(before, hidden_size=512, num_heads=8, image_grid=8, max_positions=before.text_rows + 65)
    base = CogLM(wide)
    recipes = [base, Direct(Direct.begun(wide)), Iterative(Iterative.begun(wide))]
    of = [System(models.base.text, models.base.image, recipe, recipe.model().eval()) for recipe in recipes]
    large, count = CogView2(*of), 6
    told = count * 1e12 / large.fitting(1e12)
    small = torch.zeros(count, 8, 8, dtype=torch.int64)
    how = Settings(*(Sampling(top_k=5, batch_size=count) for _ in range(3)), top_k=None)
    large.enlarge(models.base.encode("a fox"), small[:1], how, [0])  # what is made once
    Path("/proc/self/clear_refs").write_text("5")
    begun = peak()
    large.enlarge(models.base.encode("a fox") * count, small, how, range(count))
    assert 0.4 * told < peak() - begun < told + 0.1 * _ALWAYS


def peak() -> float:
    """Bytes, since they were last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * float(line.split()[1])


def test_bad_input(models, run, tmp_path):
    with pytest.raises(ValueError, match="captions: expected English or Chinese, got 'лиса'"):
        models.draw(["лиса"], HOW)
    with pytest.raises(ValueError, match="captions: expected at most 30 tokens, got 43 in caption 2"):
        models.draw(["a fox", "a fox " * 21], HOW)
    with pytest.raises(ValueError, match=r"candidates: expected at least count \(3\), got 2"):
        models.draw(["a fox"], HOW, count=3, candidates=2)
    few = dataclasses.replace(HOW, direct=Sampling(clusters=Clusters(torch.zeros(5, dtype=torch.int64))))
    with pytest.raises(ValueError, match="clusters: expected labels of 20 codes, as the models draw, got '5'"):
        models.draw(["a fox"], few)
    with pytest.raises(ValueError, match="top_k: expected one of each of 6 rounds"):
        models.draw(["a fox"], dataclasses.replace(HOW, top_k=(1,)))
    with pytest.raises(ValueError, match="direct: expected a model of recipe direct, got 'iterative'"):
        CogView2.load(run, direct="finest")
    with pytest.raises(ValueError, match="base: expected a model of recipe coglm, got 'direct'"):
        CogView2.load(run, base="larger")
    with pytest.raises(ValueError, match=r"name: expected a model of .*small, got 'gpt'"):
        CogView2.load(run, base="gpt")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("text.model", "vqvae.safetensors", "small"):
        (alone / name).symlink_to(run / name)
    with pytest.raises(ValueError, match=r"name: expected a model of recipe direct in .*alone, got 'small'"):
        CogView2.load(alone)
    assert CogView2.load(alone, stages=1).rounds == 0


def test_generate(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["generate", "--run", str(run), "--captions", *CAPTIONS[:2], "--count", "2", "--candidates", "3"]
    cli.cogview2([*common, "--batch-size", "3", "--base.top-k", "5", "--direct.top-k", "1", "--keep-stages"])
    said = capsys.readouterr().out
    assert re.search(r"coglm: .*small, step 7 .*\ndirect: .*\niterative: ", said)
    paths = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(paths) == 2 * 2 * 3
    sizes = {path.stem.rpartition("-")[2]: Image.open(path).size for path in paths}
    assert sizes == {"small": (32, 32), "direct": (96, 96), "fox": (96, 96), "car": (96, 96)}
    assert Image.open(tmp_path / "pictures.png").width > 96
    cli.cogview2([*common, "--stages", "1", "--base.clusters", "3", "--memory", "2", "--out", "small.jpg"])
    assert len(list((tmp_path / "small").glob("*.jpg"))) == 4
    for more, message in (
        (["--base.clusters", "3", "--base.top-k", "5"], "top_k: expected none with clusters, got 5"),
        (["--base.cluster-temperature", "2"], "cluster_temperature: expected none without clusters"),
        (["--memory", "0.01"], "memory: expected at least 0.6 GB"),
        (["--base.clusters", "3", "--labels", "none.npy"], "cluster labels: cannot read none.npy"),
        (["--memory", "inf"], "memory: expected a positive number, got inf"),
        (["--out", "x.mp4"], "out: expected a name that ends in"),
        (["--labels", "labels.npy"], "labels: expected none where no stage draws from clusters, got 'labels.npy'"),
        (["--stages", "1", "--direct", "larger"], "direct: expected none with --stages 1, got 'larger'"),
        (["--stages", "2", "--iterative.top-k", "3"], "iterative: expected no settings with --stages 2, got 'some'"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.cogview2([*common, *more])
    assert not (tmp_path / "x").exists()


def test_edit(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = torch.randint(256, (3, 120, 140)).to(torch.uint8)
    image_of(given).save("given.png")
    image_of(given[:, :50]).save("small.png")
    hidden = mask(120, 140, (10, 10, 60, 60), (70, 30, 80, 40))
    Image.fromarray(mask(120, 140, (10, 10, 60, 60)).numpy()).save("mask.png")
    common = ["edit", "given.png", "--run", str(run), "--caption", "a fox", "--count", "2", "--around", "inf"]
    cli.cogview2([*common, "--mask", "mask.png", "--box", "70", "30", "80", "40", "--out", "done.jpg", "--keep-stages"])
    paths = sorted((tmp_path / "done").glob("*-fox.png"))
    assert len(paths) == 2
    for path in paths:
        found = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert torch.equal(found[:, ~hidden], given[:, ~hidden])
        assert bool((found[:, hidden] != given[:, hidden]).any())
    assert Image.open("done.jpg").width > 4 * 140
    sizes = {path.stem.rpartition("-")[2]: Image.open(path).size for path in (tmp_path / "done").iterdir()}
    assert sizes == {"small": (32, 32), "direct": (96, 96), "fine": (96, 96), "fox": (140, 120)}
    before = (tmp_path / "given.png").read_bytes()
    for out in ("given.png", "given", "mask.png"):
        with pytest.raises(SystemExit, match=r"out: expected a place where \w+.png is not written over"):
            cli.cogview2([*common, "--mask", "mask.png", "--out", out])
    with pytest.raises(SystemExit, match=r"out: expected a place where .* is not written over"):
        cli.cogview2([*common, "--mask", "mask.png", "--out", str(tmp_path.with_suffix(".png"))])
    assert (tmp_path / "given.png").read_bytes() == before
    for more, message in (
        ([], "mask: expected some of the picture, which is drawn anew, got 'nothing of it'"),
        (["--box", "0", "0", "140", "120"], "mask: expected a part of the picture; all of it is `cogview2 generate`"),
        (["--mask", "small.png"], "mask: expected 140 x 120 pixels, as the picture, got '140 x 50'"),
        (["--box", "0", "0", "141", "5"], "box: expected LEFT TOP RIGHT BOTTOM inside 140 x 120 pixels"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.cogview2([*common, *more, "--out", "no.png"])
    with pytest.raises(SystemExit, match=r"cannot read nothing\.png"):
        cli.cogview2(["edit", "nothing.png", "--run", str(run), "--caption", "a fox"])
    assert not (tmp_path / "no").exists()


def test_the_models_caption(models, run):
    base = System.load(run, recipe="coglm")
    pictures = base.pictures(drawn(models, count=2)[0].small)
    assert len(base.caption(pictures, top_k=1)) == 2
    assert base.caption(pictures, top_k=1, language="zh") != base.caption(pictures, top_k=1, language="en")
    assert base.describe(pictures, 3, language="zh")[0]
    for bad, said in (
        ({"language": "fr"}, "language: expected en or zh, got 'fr'"),
        ({"text_attention": 1.0}, r"text_attention: expected 0 for captions, got 1\.0"),
    ):
        with pytest.raises(ValueError, match=said):
            base.caption(pictures, **bad)
    assert base.rerank("a fox", pictures).caploss.shape == (2,)
