"""CogView2's demo, small enough for seconds."""

import dataclasses
import json

import pytest
from PIL import Image

from cogview import cli
from cogview.demo import cogview2 as demo
from cogview.demo.scenes import sample_scenes
from cogview.recipes.coglm import CogLM
from cogview.recipes.cogview import CogView
from cogview.tokenizers.image import VQConfig
from cogview.train import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "BASE_SCENES": 24,
            "FINE_SCENES": 8,
            "TEST_SCENES": 8,
            "JUDGED": 6,
            "ENLARGED": 3,
            "EDITED": 2,
            "CANDIDATES": 2,
            "FINE_BATCH": 2,
        }.items():
            patch.setattr(demo, name, value)
        small = {"num_layers": 2, "hidden_size": 64, "num_heads": 2}
        for kind in (CogLM, CogView):
            config, training = kind.presets["tiny"]
            patch.setitem(kind.presets, "tiny", (dataclasses.replace(config, **small), training))
        patch.setattr(demo, "IMAGE", VQConfig(codebook_size=32, dim=8, hidden=8))
        cli.main(["demo", "--system", "cogview2", "--out", str(out), "--minutes", str(demo.FIXED + 0.03)])
    return out


def test_it_leaves_everything(finished):
    for name in ("samples.png", "curves.png", "reconstructions.png"):
        with Image.open(finished / name) as picture:
            assert picture.size[0] > 100
    facts = json.loads((finished / "figures.json").read_text())
    steps = demo.Steps.of(demo.FIXED + 0.03)
    for name, count in (("coglm", steps.base), ("direct", steps.fine), ("iterative", steps.fine)):
        assert facts["models"][name]["steps"] == count
        assert checkpoint.read_header(checkpoint.latest(finished / name))["recipe"] == name
    figures = facts["figures"]
    assert set(figures["fine"]) == {"bicubic", "direct", "direct, then iterative", "bound"}
    assert all(of["psnr"] > 3 for of in figures["fine"].values())
    for name in ("chance", "bound", "en", "zh"):
        assert all(0 <= rate <= 1 for rate in figures["base"][name].values())
    page = (finished / "report.md").read_text()
    assert page.startswith("Of captions never seen ")
    assert "samples.png" in page
    assert f"cogview2 generate --run {finished}" in page


def test_its_run_draws(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.cogview2(["generate", "--run", str(finished), "--captions", "a fox", "--count", "1"])
    assert Image.open(next((tmp_path / "pictures").iterdir())).size == (192, 192)


def test_masks_cover_the_first_emoji():
    for scene in sample_scenes("test", 8):
        for scale, cell in ((1, 8), (3, 8), (3, 1)):
            mask = demo.tile_mask(scene, scale, cell)
            assert mask.shape == (64 * scale // cell,) * 2
            assert int(mask.sum()) == (32 * scale // cell) ** 2


def test_plans():
    assert demo.Steps.of(demo.MINUTES) == demo.Steps(demo.IMAGE_STEPS, demo.BASE_STEPS, demo.FINE_STEPS)
    assert demo.Steps.of(80).image == demo.IMAGE_STEPS
    assert demo.Steps.of(80).base > 2 * demo.BASE_STEPS
    with pytest.raises(SystemExit, match="minutes: expected more than 6, up to 10,000, got 6"):
        cli.main(["demo", "--system", "cogview2", "--minutes", "6"])
