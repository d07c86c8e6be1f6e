"""Evaluation by machine with the packages that compute it: FID and Inception Score are their formulas, a whole command,
and what published networks on disk see, whose weights are random here."""

import json
import pickle
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_evaluation import shard, write_run

from cogview import cli
from cogview.data.images import resized
from cogview.data.shards import ShardWriter
from cogview.evaluation.classifier import Seen
from cogview.evaluation.distances import frechet, inception_score, intervals
from cogview.evaluation.networks import Network

pytest.importorskip("torchmetrics")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def root(matrix):
    """The square root of a symmetric matrix that is not negative."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T


def test_fid_is_its_formula():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6).double() + 2, torch.randn(50, 6).double() @ torch.randn(6, 6).double()
    c, d = torch.cov(x.T), torch.cov(y.T)
    cross = root(root(c) @ d @ root(c)).trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + c.trace() + d.trace() - 2 * cross
    assert frechet(x, y) == pytest.approx(float(expected), rel=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    few = torch.randn(3, 6)  # singular covariances
    assert frechet(few, few + 1) == pytest.approx(6, rel=1e-3)


def test_the_inception_score_is_its_formula():
    torch.manual_seed(1)
    logits = torch.randn(60, 5).double() * 3
    p = logits.softmax(dim=1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert inception_score(logits) == (pytest.approx(float(expected)), None)
    state = torch.get_rng_state()
    mean, deviation = inception_score(logits.repeat(3, 1))
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    parts = [inception_score(part)[0] for part in logits.repeat(3, 1)[order].chunk(3)]  # too few for parts of their own
    assert (mean, deviation) == pytest.approx((statistics.fmean(parts), statistics.pstdev(parts)))
    assert inception_score(logits.repeat(3, 1)) == (mean, deviation)
    assert torch.equal(torch.get_rng_state(), state)
    assert inception_score(20 * torch.eye(4).repeat(5, 1))[0] == pytest.approx(4, rel=1e-3)


def test_intervals_of_fid():
    """Of sets of pictures of the same captions: what is far from the truth is above what is near in all draws."""
    torch.manual_seed(0)
    true = torch.randn(60, 4)
    near = true + 0.1 * torch.randn(60, 4)
    (low, high), (none_low, none_high), last = intervals(true, [true + 1, near, near])
    assert 3 < low < high < 5
    assert (none_low, none_high, last) == (0, 0, None)
    assert intervals(true.repeat(1, 200), [true, true]) == [None, None]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    return tmp_path


COMMAND = ["evaluate", "pairs.tar", "--run", "runs/mine", "--name", "gpt", "--features", "net.safetensors"]


def test_a_whole_evaluation(run, capsys):
    """Its rows, the curve over candidates, and another model's pictures: its own again have its scores."""
    how = ["--judge", "caption", "--candidates", "3", "--count", "6", "--contrast", "1.5", "--radii", "0", "2"]
    cli.main([*COMMAND, *how, "--out", "out"])
    assert capsys.readouterr().out.splitlines()[-1] == "Read out/report.md"
    shutil.copytree("out/drawn/of-3", "theirs")
    cli.main([*COMMAND, *how, "--out", "out", "--compare", "theirs=theirs"])
    figures = json.loads((run / "out/figures.json").read_text(encoding="utf-8"))
    rows = figures["rows"]
    names = ["other true pictures", "recovered ground truth", "gpt, best of 3", "theirs"]
    assert list(rows) == [*names, "gpt, best of 3, contrast × 1.5", "theirs, contrast × 1.5"]
    assert rows["theirs"] == rows["gpt, best of 3"]
    assert rows["theirs, contrast × 1.5"] != rows["theirs"]
    assert [row["pictures"] for row in rows.values()] == [5, 6, 6, 6, 6, 6]
    assert figures["left_out"] == {"pictures that cannot be read": 1}
    assert list(figures["by_candidates"]) == ["1", "2", "3"]
    recovered = sorted(path.name for path in (run / "out/recovered").iterdir())
    assert recovered == [f"{number:06d}.png" for number in range(1, 7)]
    cli.main([*COMMAND, *how, "--out", "again", "--compare", "theirs=out/recovered"])
    again = json.loads((run / "again/figures.json").read_text(encoding="utf-8"))["rows"]
    assert again["theirs"] == again["recovered ground truth"] == rows["recovered ground truth"]
    best = figures["by_candidates"]["3"]
    assert [one["fid_beyond_all"] is None for one in figures["by_candidates"].values()] == [False, False, True]
    assert best["fid"] == rows["theirs"]["fid"]["0"]
    assert best["caploss"] == rows["theirs"]["caploss"]
    ranked = [one["ranked"] for one in figures["by_candidates"].values()]
    assert ranked == sorted(ranked, reverse=True)
    page = (run / "out/report.md").read_text(encoding="utf-8")
    assert "| IS | CapLoss | as ranked |" in page
    assert f"{best['caploss']:.3f} | {ranked[2]:.3f} |" in page
    assert "| Model | pictures | FID-0 | FID-2 | IS | CapLoss | CMMD |" in page
    assert "5 pictures are no more than the network's 8 features" in page
    for name in ("sheet", "candidates"):
        with Image.open(run / f"out/{name}.png") as picture:
            assert picture.width > 300
    cli.main([*COMMAND, "--count", "6", "--out", "alone"])
    alone = json.loads((run / "alone/figures.json").read_text(encoding="utf-8"))
    assert list(alone["rows"]) == ["other true pictures", "recovered ground truth", "gpt"]
    assert alone["rows"]["gpt"]["caploss"] is None
    assert not (run / "alone/candidates.png").exists()


def test_evaluations_that_are_refused(run):
    shard(run / "one.tar", 1)
    with ShardWriter(run / "empty.tar"):
        pass
    (run / "theirs").mkdir()
    (run / "damaged").mkdir()
    for number in range(1, 7):
        (run / f"damaged/{number}.png").write_bytes(b"none")
    for name, more, sentence in (
        ("one.tar", [], r"shards: expected at least 2 pairs that can be read and drawn \(no problems\), got 1"),
        ("empty.tar", [], "shards: expected at least 2 pairs that can be read and drawn .*, got 0"),
        (
            "pairs.tar",
            ["--compare", "a=theirs"],
            "compare: expected pictures whose names begin with .*, got .none in theirs",
        ),
        ("pairs.tar", ["--compare", "a=damaged"], r"damaged/1\.png: image: not a readable picture"),
        ("pairs.tar", ["--compare", "gpt=theirs"], "compare: expected names that no other row has, got 'gpt'"),
        ("pairs.tar", ["--compare", "other true pictures=theirs"], "got 'other true pictures'"),
        ("pairs.tar", ["--out", "net.safetensors"], "net.safetensors"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            cli.main([COMMAND[0], name, *COMMAND[2:], "--count", "6", *more])
    assert not (run / "runs/evaluation/drawn").exists()
    cli.main([*COMMAND, "--count", "2", "--out", "out"])
    before = {path: path.read_bytes() for path in (run / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"out: expected pictures of the same captions in out/drawn, got 'others;"):
        cli.main([*COMMAND, "--count", "3", "--out", "out"])
    assert {path.name for path in before} > {"captions.jsonl", "captions.txt", "report.md", "000001.png"}
    assert {path: path.read_bytes() for path in (run / "out").rglob("*") if path.is_file()} == before


def encoder(folder, kind):
    """A small vision encoder of random weights, in a folder."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    made, config, more = {
        "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 12, "intermediate_size": 20}),
        "dinov2": ("Dinov2Model", "Dinov2Config", {}),
        "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {"intermediate_size": 20}),
    }[kind]
    model = getattr(transformers, made)(getattr(transformers, config)(**sizes, **more)).eval()
    model.save_pretrained(folder)
    says = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}}
    (folder / "preprocessor_config.json").write_text(json.dumps(says | {"image_mean": MEAN, "image_std": STD}))
    return model


OUTPUTS = {"clip": "image_embeds", "dinov2": "pooler_output", "siglip": "pooler_output"}


@pytest.mark.parametrize(("kind", "output"), OUTPUTS.items())
def test_vision_encoders(tmp_path, kind, output):
    model = encoder(tmp_path, kind)
    network = Network.load(tmp_path)
    assert (network.features, network.classes) == (12 if kind == "clip" else 16, 0)
    pictures = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    pixels = (resized(pictures, 32) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = getattr(model(pixel_values=pixels), output)
    torch.testing.assert_close(network.look(pictures).features, expected)
    assert network.look(pictures).logits is None
    config = json.loads((tmp_path / "config.json").read_text())
    named = dict.fromkeys(("attn_implementation", "_attn_implementation"), "somebody/kernel")
    (tmp_path / "config.json").write_text(json.dumps(config | named))  # which nobody gets from a hub
    torch.testing.assert_close(Network.load(tmp_path).look(pictures).features, expected)
    before = network.sha256
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    assert Network.load(tmp_path).sha256 != before
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is no whole .*: 1 missing tensors, as "):
        Network.load(tmp_path)
    save_file(weights | {name: weights[name][..., None]}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^features: .*(mismatched tensors|cannot read)[^\n]*$"):
        Network.load(tmp_path)


def test_folders_that_are_no_encoder(tmp_path):
    encoder(tmp_path, "clip")
    config = json.loads((tmp_path / "config.json").read_text())
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for name, says, sentence in (
        ("config.json", config | {"model_type": "bert"}, "features: expected an encoder of clip, .*, got 'bert in "),
        ("preprocessor_config.json", processor | {"image_mean": [1]}, "features: expected image_mean of three numbers"),
        ("preprocessor_config.json", processor | {"crop_size": 8}, "features: expected a size of 16 to 4,096 pixels"),
    ):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(json.dumps(says))
        with pytest.raises(ValueError, match=sentence):
            Network.load(tmp_path)
        (tmp_path / name).write_text(kept)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="features: expected plain names of files, got 'others in"):
        Network.load(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"features: expected weights as \*\.safetensors, got 'none in"):
        Network.load(tmp_path)


def test_a_run_without_classes_says_so(run):
    encoder(run / "clip", "clip")
    cli.main([*COMMAND[:-1], "clip", "--count", "4", "--out", "out"])
    assert "There is no Inception Score: clip has no classes." in (run / "out/report.md").read_text()
    cli.main([*COMMAND, "--cmmd", "clip", "--count", "4", "--out", "both"])
    one, both = (json.loads((run / f"{name}/figures.json").read_text()) for name in ("out", "both"))
    assert both["cmmd_network"] == one["network"]
    assert both["rows"]["gpt"]["cmmd"] == pytest.approx(one["rows"]["gpt"]["cmmd"])


class Harm:
    def __reduce__(self):
        return print, ("executed",)


def test_inception(tmp_path, capsys):
    """Features and logits of torchmetrics' own, of weights that are read as tensors alone."""
    fidelity: Any = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "inception.pth"

    class Empty(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None: ...

    torch.manual_seed(0)
    torch.save({}, path)
    torch.save(Empty("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    network = Network.load(path)
    assert (network.features, network.classes) == (2048, 1008)
    pictures = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    fid: Any = pytest.importorskip("torchmetrics.image.fid")
    seen = network.look(pictures)
    for name, found in (("2048", seen.features), ("logits_unbiased", seen.logits)):
        torch.testing.assert_close(fid.NoTrainInceptionV3("inception-v3-compat", [name], str(path))(pictures), found)
    for wrong in ({"a": torch.zeros(1)}, Harm()):
        with open(path, "wb") as file:
            pickle.dump(wrong, file) if isinstance(wrong, Harm) else torch.save(wrong, file)
        with pytest.raises(ValueError, match=r"^features: .* holds no weights of Inception v3 \([^\n]*\)$"):
            Network.load(path)
    assert "executed" not in capsys.readouterr().out


def test_a_network_that_fails_on_true_pictures_is_told_before_any_is_drawn(run, monkeypatch):
    seen = Network.see

    def infinite(self, batches, changes):
        return seen(
            replace(self, look=lambda some: Seen(self.look(some).features / (len(some) == 1), None)), batches, changes
        )

    monkeypatch.setattr(Network, "see", infinite)
    with pytest.raises(SystemExit, match="features: expected a network that sees finite numbers in pictures, got"):
        cli.main([*COMMAND, "--count", "4", "--out", "out"])
    assert not (run / "out/drawn").exists()
