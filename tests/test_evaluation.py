"""Evaluation by machine, but for what torchmetrics computes: how pictures are prepared, what is asked and drawn, the
network that is trained here, CMMD, the report, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_caption_command import captioning
from test_system import saved_run, small_image, small_text, system_of

from cogview import cli
from cogview.commands import features
from cogview.commands.evaluate import folders_of
from cogview.commands.features import label_of
from cogview.commands.prompts import read_captions
from cogview.config import TrainConfig
from cogview.data.shards import PairDataset, ShardWriter
from cogview.evaluation import classifier, distances, report
from cogview.evaluation.asked import ask, batches_of, compared, write_captions
from cogview.evaluation.classifier import Classifier, ClassifierConfig
from cogview.evaluation.distances import cmmd, frechet, splits_of
from cogview.evaluation.drawing import counts_of, draw
from cogview.evaluation.evaluate import Settings
from cogview.evaluation.networks import Network
from cogview.evaluation.prepare import blurred, contrasted
from cogview.inputs import images
from cogview.pictures import image_of
from cogview.sampling import Sampling
from cogview.system import System
from cogview.tokenizers import stored

WORDS = ("a fox", "a red car", "蓝色")


def shard(path, count=12, captions=WORDS, colour=180):
    """Pairs of two kinds, of one colour each, with a class in their JSON; one picture that is none."""
    draws = np.random.default_rng(0)
    with ShardWriter(path) as made:
        for n in range(count):
            noise = draws.integers(60, size=(40, 40, 3), dtype=np.uint8) + np.uint8(colour * (n % 2))
            Image.fromarray(noise).save(path.with_suffix(".png"))
            png = path.with_suffix(".png").read_bytes()
            fields = {"caption": captions[n % len(captions)], "of": {"kind": n % 2}, "same": 1}
            made.write(f"{n:04d}", {"png": png[:100] if n == 1 else png, "json": json.dumps(fields).encode()})
    return path


def write_run(folder):
    """runs/mine with a model that draws and one that captions; pairs.tar; a network of random weights."""
    saved_run(folder / "runs/mine", gpt=system_of(small_text(), small_image()), caption=captioning())
    shard(folder / "pairs.tar")
    model = Classifier(ClassifierConfig(("a", "b"), side=32, width=8, features=8))
    stored.write(folder / "net.safetensors", classifier.FORMAT, vars(model.config), model.state_dict())


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    return tmp_path


def systems():
    return [System.load("runs/mine", draws=what) for what in ("pictures", "captions")]


def test_blur_is_gaussian_and_its_radius_the_standard_deviation():
    wide = torch.zeros(1, 3, 1, 127, dtype=torch.uint8)
    wide[..., 63:] = 255  # an edge: its slope is the filter
    for radius in (1, 2, 4, 8):
        slope = blurred(wide.expand(1, 3, 64, 127), radius)[0, 0, 32].double().diff() / 255
        place = torch.arange(126.0).double()
        mean = (slope * place).sum()
        assert slope.sum() == pytest.approx(1)
        assert ((slope * (place - mean) ** 2).sum()).sqrt() == pytest.approx(radius, rel=0.08)
    noise = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(blurred(noise, 0), noise)
    for radius in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="radius: expected a finite number of pixels that is not negative"):
            blurred(noise, radius)


def test_contrast_is_around_the_mean_grey():
    picture = torch.tensor([100, 110, 150, 160], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert contrasted(picture, 1.5)[0, 0].flatten().tolist() == [85, 100, 160, 175]  # 130 + 1.5 (x - 130)
    assert torch.equal(contrasted(picture, 1), picture)
    with pytest.raises(ValueError, match="contrast: expected a positive and finite number, got 0"):
        contrasted(picture, 0)


def test_cmmd_is_its_formula_in_blocks(monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(7, 5), torch.randn(9, 5) + 1
    a, b = (f.double() / f.double().norm(dim=1, keepdim=True) for f in (x, y))
    means = [(-torch.cdist(p, q).square() / 200).exp().mean() for p, q in ((a, a), (b, b), (a, b))]
    expected = 1000 * float(means[0] + means[1] - 2 * means[2])
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(distances, "_BLOCK", 3)
    assert cmmd(x, 7 * y) == pytest.approx(expected, rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_features_that_cannot_be_compared(monkeypatch):
    some = torch.randn(4, 3)
    for distance in (cmmd, frechet):
        with pytest.raises(ValueError, match=r"drawn: expected features of at least 2 pictures, .* got 1"):
            distance(some, some[:1])
        with pytest.raises(ValueError, match="drawn: expected 3 features a picture, as the true ones have, got 2"):
            distance(some, some[:, :2])
        with pytest.raises(ValueError, match=r"true: expected features \[N, D\]"):
            distance(some[0], some)
        with pytest.raises(ValueError, match="true: expected finite features"):
            distance(some / 0, some)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"evaluation: expected torchmetrics: pip install '\.\[evaluation\]'"):
        frechet(some, some)
    assert [splits_of(n) for n in (2, 99, 100, 256, 500, 30_000)] == [1, 1, 2, 5, 10, 10]


def test_the_network_learns_classes_and_comes_back_from_its_file(tmp_path):
    data = PairDataset([shard(tmp_path / "pairs.tar", 40)])
    found = dict(data.pictures(32))
    labels = [label_of(data.fields(n), ("of.kind",)) for n in found]
    assert label_of(data.fields(3), ("caption", "of.kind")) == "a fox 1"
    assert label_of(data.fields(3), ("of",)) is label_of(data.fields(3), ("of.kind.more",)) is None
    assert len(found) == 39
    training = TrainConfig(steps=8, **classifier.TRAINING | {"batch_size": 16})
    result, model = classifier.train(tmp_path / "net.safetensors", torch.stack(list(found.values())), labels, training)
    assert result.validation["right"] == 1
    network = Network.load(tmp_path / "net.safetensors")
    assert (network.name, network.features, network.classes) == ("net.safetensors", 64, 2)
    pictures = torch.stack(list(found.values()))
    (seen,) = network.see(pictures.split(7), [lambda some: some])
    torch.testing.assert_close(seen, model(pictures))
    assert seen.logits.argmax(dim=1).tolist() == [int(label) for label in labels]
    larger = torch.nn.functional.interpolate(pictures, scale_factor=2)
    assert network.look(larger).features.shape == (39, 64)
    with pytest.raises(ValueError, match="classes: expected 2 to 10,000 different ones, got 1"):
        classifier.train(tmp_path / "other.safetensors", pictures, ["a"] * 39, training)


def test_training_a_network_by_its_command(run, capsys, monkeypatch):
    cli.main(["train-features", "pairs.tar", "--label", "of.kind", "--steps", "3", "--side", "32", "--pictures", "20"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("features.safetensors: 64 features, 2 classes of of.kind; held out ")
    assert said.endswith("11 pictures, 1 left out")
    assert Network.load(run / "features.safetensors").classes == 2
    for arguments, sentence in (
        (["--label", "size"], "label: expected fields of the pairs' JSON with a text or a number, size"),
        (["--label", "of.kind", "--out", "net.pt"], "out: expected a name that ends in .safetensors, got 'net.pt'"),
        (["--label", "of.kind", "--pictures", "3"], "pictures: expected at least 20, got 3"),
        (["--label", "of.kind", "--side", "4"], "side: expected 32 to 1,024 pixels, got 4"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            cli.main(["train-features", "pairs.tar", *arguments])
    trained = Network.load(run / "features.safetensors").trained
    assert (trained.fields, trained.pictures, trained.held_out) == (("of.kind",), 10, 1)
    shard(run / "others.tar", colour=90)
    with pytest.raises(
        SystemExit, match=r"features/step-00000003\.safetensors is of another run: it was trained on other pictures"
    ):
        cli.main(["train-features", "others.tar", "--label", "of.kind", "--steps", "3", "--side", "32"])
    shard(run / "few.tar", 10)
    for name, label, sentence in (
        (
            "few.tar",
            "of.kind",
            "cogview: shards: expected at least 10 pictures that can be read and have a class, got .9",
        ),
        ("pairs.tar", "same", "cogview: label: expected fields of 2 to 10,000 different classes, same, got 1"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            cli.main(["train-features", name, "--label", label, "--side", "32", "--out", "new.safetensors"])
    monkeypatch.setattr(features, "_MOST_BYTES", 10 * 3 * 32**2)
    with pytest.raises(SystemExit, match=r"pictures: expected at most 10 of 32 pixels a side, .* got 12"):
        cli.main(["train-features", "pairs.tar", "--label", "of.kind", "--side", "32"])


def test_networks_that_are_none(run):
    (run / "folder").mkdir()
    (run / "net.pth").write_bytes(b"text")
    stored.write("other.safetensors", "cogview-vqvae", {}, {"a": torch.zeros(1)})
    model = Classifier(ClassifierConfig(("a", "b"), side=32, width=8, features=16))
    stored.write("wide.safetensors", classifier.FORMAT, vars(model.config) | {"features": 8}, model.state_dict())
    stored.write("odd.safetensors", classifier.FORMAT, {"layers": 3}, {"a": torch.zeros(1)})
    told = {"fields": [], "pictures": 1, "data": "", "held_out": 1, "right": 2.0}
    small = Classifier(ClassifierConfig(("a", "b"), side=32, width=8, features=8))
    where = "told.safetensors"
    stored.write(where, classifier.FORMAT, vars(small.config), small.state_dict(), trained=json.dumps(told))
    kinds = r"a \.safetensors file of cogview train-features, a folder of a vision encoder, or Inception's"
    for name, sentence in (
        ("gone.safetensors", kinds),
        ("pairs.tar", kinds),
        ("other.safetensors", "^features: expected cogview-features in .*, got 'cogview-vqvae'"),
        ("wide.safetensors", r"^features: .*layers\.9\.weight: expected \(8, 32, 3, 3\), got \(16, 32, 3, 3\)"),
        ("odd.safetensors", "features: .* has no valid config"),
        ("told.safetensors", "features: .* has no valid record of its training .*right: expected a share, got 2.0"),
        ("folder", "features: expected a folder with config.json, cannot read"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Network.load(run / name)
    with pytest.raises(ValueError, match=r"^cmmd: expected cogview-features in .*, got 'cogview-vqvae'"):
        Network.load(run / "other.safetensors", option="cmmd")


@pytest.mark.parametrize("name", ["layers.0.weight", "layers.10.bias", "head.bias"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_before_anything_is_made(run, name, value):
    small = Classifier(ClassifierConfig(("a", "b"), side=32, width=8, features=8))
    small.state_dict()[name].view(-1)[0] = float(value)
    stored.write("faulty.safetensors", classifier.FORMAT, vars(small.config), small.state_dict())
    about = ["evaluate", "pairs.tar", "--run", "runs/mine", "--name", "gpt", "--out", "out"]
    for networks, option in (
        (["--features", "faulty.safetensors"], "features"),
        (["--features", "net.safetensors", "--cmmd", "faulty.safetensors"], "cmmd"),
    ):
        sentence = f"cogview: {option}: expected a network that sees finite numbers in pictures, got 'others of faulty"
        with pytest.raises(SystemExit, match=sentence):
            cli.main([*about, *networks])
    assert not (run / "out").exists()


def test_what_is_asked(run):
    """An order of chance; pairs that cannot be read or drawn are counted, and others take their places."""
    shard(run / "long.tar", 4, captions=["a fox " * 40])
    data = PairDataset(["pairs.tar", "long.tar"])
    found, left_out = ask(data, systems(), 99, seed=0)
    assert sorted(found.numbers) == [0, *range(2, 12)]
    assert left_out == {"captions that the models do not take": 4, "pictures that cannot be read": 1}
    assert found.captions == [WORDS[n % 3] for n in found.numbers]
    first, _ = ask(data, systems(), 5, seed=0)
    assert first.numbers == found.numbers[:5] == found[:5].numbers
    assert ask(data, systems(), 5, seed=1)[0].numbers != first.numbers
    pictures = torch.cat(list(found.batches()))
    assert torch.equal(pictures, torch.stack([data.picture(n, 32) for n in found.numbers]))
    assert list(found[11:].batches()) == []


def test_pictures_in_folders(tmp_path):
    pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    for name, picture in zip(("1.png", "000002.png", "03.bmp"), pictures, strict=True):
        image_of(picture).save(tmp_path / name)
    (tmp_path / "settings.json").write_text("{}")
    assert torch.equal(torch.cat(list(batches_of(compared(tmp_path, 3), 32))), pictures)
    with pytest.raises(
        ValueError, match=r"expected pictures 000001\.png to 000009\.png in .*, got none of 4, .* and 1 more"
    ):
        compared(tmp_path, 9)
    (tmp_path / "theirs").mkdir()
    for name in ("001-1-a fox.png", "001-1-a fox-candidates.png", "002-1-a red car.png"):  # as generate leaves them
        image_of(pictures[int(name[2]) - 1]).save(tmp_path / "theirs" / name)
    assert torch.equal(torch.cat(list(batches_of(compared(tmp_path / "theirs", 2), 32))), pictures[:2])
    image_of(pictures[0]).save(tmp_path / "02.png")
    with pytest.raises(ValueError, match=r"compare: expected one picture of each caption, got '000002.png and 02.png"):
        compared(tmp_path, 3)
    with pytest.raises(ValueError, match="compare: expected a folder of pictures"):
        compared(tmp_path / "none", 3)
    write_captions(tmp_path, ["a\n fox\x00", "蓝"])
    lines = (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines][1] == {"file_name": "000002.png", "caption": "蓝"}
    assert read_captions(tmp_path / "captions.txt") == [(1, "a fox"), (2, "蓝")]


def test_the_best_of_the_first_candidates_are_kept(run, monkeypatch):
    """Of 1, 2 and 3 candidates by CapLoss, whatever the batch; what is there is not drawn again."""
    system, judge = systems()
    captions, how = ["a fox", "a red car", "蓝色"], Sampling(temperature=2.0, batch_size=4)
    paths, caploss = found = draw(run, system, judge, captions, how, 3, seed=5)
    ranked = list[list[float]]()
    assert list(paths) == counts_of(3) == [1, 2, 3]
    assert [counts_of(n) for n in (1, 2, 60)] == [[1], [1, 2], [1, 2, 4, 8, 16, 32, 60]]
    for number, caption in enumerate(captions):
        seeds = range(5 + 3 * number, 8 + 3 * number)
        codes = torch.cat(list(system.code_batches([caption] * 3, how, seeds=seeds)))
        losses = judge.caploss(caption, codes)
        ranked.append(losses.tolist())
        for count, files in paths.items():
            assert torch.equal(images(files[number], 32), system.pictures(codes[int(losses[:count].argmin())]))
    kept = run / "drawn/caploss.jsonl"
    lines = kept.read_text().splitlines()
    for line, losses in zip(lines, ranked, strict=True):
        assert json.loads(line) == pytest.approx(losses, abs=1e-5)
    assert caploss == pytest.approx({n: np.mean([min(one[:n]) for one in ranked]) for n in (1, 2, 3)}, abs=1e-5)
    assert caploss[1] >= caploss[2] >= caploss[3]
    assert caploss[1] > caploss[3]
    paths[3][2].unlink()
    drawn = list[str]()
    batches = System.code_batches
    monkeypatch.setattr(
        System,
        "code_batches",
        lambda self, some, *rest, **more: drawn.extend(some) or batches(self, some, *rest, **more),
    )
    before = paths[3][1].stat().st_mtime_ns
    assert draw(run, system, judge, captions, how, 3, seed=5) == found
    assert paths[3][2].is_file()
    assert drawn == ["蓝色"] * 3
    assert paths[3][1].stat().st_mtime_ns == before
    kept.write_text(f"{lines[0]}\n{lines[1][:9]}")  # stopped while it wrote
    assert draw(run, system, judge, captions, how, 3, seed=5) == found
    assert drawn[3:] == ["a red car"] * 3 + ["蓝色"] * 3
    assert kept.read_text().splitlines() == lines
    for change, name in (({"seed": 6}, "seed"), ({"candidates": 4}, "candidates"), ({"judge": None}, "judge")):
        arguments = {"judge": judge, "captions": captions, "how": how, "candidates": 3, "seed": 5} | change
        with pytest.raises(ValueError, match=f"out: expected pictures of the same {name} in .*drawn, got 'others;"):
            draw(run, system, **arguments)
    for text, sentence in (("[]", "a JSON object in .*settings.json"), ("{", "JSON in .*settings.json")):
        (run / "drawn/settings.json").write_text(text)
        with pytest.raises(ValueError, match=f"out: expected {sentence}"):
            draw(run, system, judge, captions, how, 3, seed=5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": 1}, "count: expected at least 2 captions, of whose pictures FID has covariances, got 1"),
        ({"candidates": 0}, "candidates: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number from 0 to"),
        ({"contrast": 0.0}, "contrast: expected a positive and finite number"),
        ({"radii": (0, -1)}, "radius: expected a finite number of pixels that is not negative, got -1"),
        ({"radii": (1, 2)}, "radii: expected different ones, of which the first is 0"),
        ({"radii": (0, 1, 1)}, "radii: expected different ones"),
        ({"radii": ()}, "radii: expected different ones"),
    ],
)
def test_settings_that_are_refused(change, sentence):
    good = {"count": 4, "candidates": 1, "seed": 0, "contrast": 1.5, "radii": (0, 1)}
    Settings(**good)
    with pytest.raises(ValueError, match=sentence):
        Settings(**good | change)


def test_commands_that_are_refused(run):
    about = ["--run", "runs/mine", "--name", "gpt", "--features", "net.safetensors"]
    for more, sentence in (
        (["--candidates", "3"], "candidates: expected --judge NAME, which ranks them, got 3"),
        (["--compare", "folder"], "compare: expected NAME=FOLDER"),
        (["--compare", "a=b", "a=c"], "compare: expected every name once, got 'a'"),
        (["--compare", "<b>=c"], "compare: expected NAME=FOLDER"),
        (["--judge", "gpt"], "name: expected a model that draws captions, got 'gpt, of cogview'"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            cli.main(["evaluate", "pairs.tar", *about, *more])
    assert folders_of(("DM-GAN=a=b",))["DM-GAN"].name == "a=b"


def test_the_report_says_what_is_missing_and_escapes_names(tmp_path):
    row = {"pictures": 4, "fid": {"0": 1.5}, "is": {}, "cmmd": 0.25, "caploss": None}
    network = {"name": "a|<b>.safetensors", "sha256": "f" * 64, "features": 8, "classes": 0, "trained": None}
    trained = {"fields": ["of.<kind>"], "pictures": 9, "data": "e" * 64, "held_out": 4, "right": 0.75}
    figures = {
        "pictures": 4,
        "side": 32,
        "left_out": {"pictures that cannot be read": 1},
        "settings": {"radii": (0.0,), "candidates": 1, "seed": 0},
        "sampling": {"temperature": 0.9},
        "model": "runs/<i>, gpt",
        "judge": None,
        "network": network,
        "cmmd_network": network | {"trained": trained},
        "rows": {report.RECOVERED: row | {"cmmd": 3.504e-5}, "gpt": row, "a": row | {"cmmd": 12.34}},
        "by_candidates": {},
    }
    assert report.write(tmp_path, figures, "gpt").startswith("gpt, of 4 captions, comes to an FID-0 of 1.5 by")
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| gpt | 4 | 1.5 | – | – | 0.250 |" in page
    assert "| recovered ground truth | 4 | 1.5 | – | – | 3.50e-05 |" in page
    assert "| a | 4 | 1.5 | – | – | 12.3 |" in page
    assert "4 pictures are no more than the network's 8 features: their covariance is singular" in page
    assert "There is no Inception Score: a&#124;&lt;b&gt;.safetensors has no classes." in page
    assert "1 pictures that cannot be read" in page
    assert "trained on 9 pictures to tell of.&lt;kind&gt; (data of sha256 `eee" in page
    assert "it has 75.0% of 4 others right" in page
    assert "<" not in page
    assert json.loads((tmp_path / "figures.json").read_text())["rows"]["gpt"]["cmmd"] == 0.25
    assert not (tmp_path / "candidates.png").exists()
