import dataclasses
import json

import pytest
import torch
from PIL import Image

from cogview.cli import main
from cogview.studies import tokenizers
from cogview.studies.tokenizers import Sizes, sharpness
from cogview.studies.tokenizers_report import _verdict
from cogview.tokenizers.image import VQVAE

SMALL = Sizes(pictures=6, held_out=3, seeds=2, steps=2, batch_size=2, codebook=8, code_dim=4, hidden=8)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    told: list[str] = []
    return folder, tokenizers.run(folder, SMALL, told.append), told


def test_report_figures_and_pictures(study):
    folder, verdict, told = study
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["verdict"] == verdict
    assert {way: len(found) for way, found in figures["trainings"].items()} == dict.fromkeys(tokenizers.WAYS, 2)
    assert len(told) == 12
    page = (folder / "report.md").read_text()
    for way in figures["trainings"].values():
        mean = sum(training["psnr"] for training in way) / 2
        assert f"| {mean:.2f} ± {abs(way[0]['psnr'] - way[1]['psnr']) / 2**0.5:.2f} |" in page
    for name in ("curves.png", "reconstructions.png"):
        assert name in page
        assert Image.open(folder / name).width > 300


def test_all_ways_begin_with_the_same_weights_and_see_the_same_pictures(study):
    figures = json.loads((study[0] / "figures.json").read_text())["trainings"]
    first = {way: found[0]["training"][0][0] for way, found in figures.items()}
    assert set(first.values()) == {2}
    for way in tokenizers.WAYS:
        model = VQVAE.load(study[0] / "trainings" / f"{way}-1" / "vqvae.safetensors")
        assert model.config.codebook == (way if way != "vqgan" else "moving_average")


def test_again_trains_nothing_and_other_sizes_are_refused(study, monkeypatch):
    folder, verdict, _ = study
    monkeypatch.setattr(VQVAE, "forward", None)  # validation is in the checkpoint, too
    assert tokenizers.run(folder, SMALL, print) == verdict
    with pytest.raises(ValueError, match="holds a study of other sizes"):
        tokenizers.run(folder, dataclasses.replace(SMALL, steps=3), print)


def test_verdict():
    def trained(psnr: float, squared: float) -> list[dict]:
        return [{"psnr": psnr, "squared": squared, "training": [(1, 0.1)]}] * 3

    alike = {"moving_average_kmeans": trained(20.0, 0.0100), "fixed": trained(19.5, 0.0112)}
    assert "holds here: held out, the best (moving average) and the worst (fixed) are 0.50 dB apart, 1.3%" in _verdict(
        alike
    )
    assert "does not hold" in _verdict(alike | {"gumbel": trained(18.5, 0.0141)})
    assert "does not hold" in _verdict({"gumbel": trained(10.1, 0.0977), "fixed": trained(10.0, 0.1)})


def test_sharpness_is_one_of_the_original_and_less_of_a_blurred_one():
    torch.manual_seed(0)
    true = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert sharpness(true, true) == {"edges": pytest.approx(1), "differences": pytest.approx(1)}
    half = sharpness(true // 2, true)
    assert half == {"edges": pytest.approx(0.5, abs=0.01), "differences": pytest.approx(0.5, abs=0.01)}
    flat = torch.full_like(true, 128)
    made_up = sharpness(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), flat + (true // 128))
    assert made_up["differences"] > 50


def test_bad_sizes_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["study", "tokenizers", "--out", str(tmp_path), "--seeds", "0"])
    assert "seeds: expected at least 1, got 0" in str(error.value)
