"""The study of CogView2, small enough for seconds, and the yardsticks that it brings along."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from test_superresolve import CAPTIONS, base, codes

from cogview import cli
from cogview.demo import cogview2 as demo
from cogview.demo.measure import clarity
from cogview.demo.scenes import sample_scenes
from cogview.generate import fill
from cogview.recipes.coglm import CogLM
from cogview.recipes.cogview import CogView
from cogview.recipes.direct import Direct
from cogview.sampling import Sampling
from cogview.sequence import pad_text
from cogview.studies import cogview2_fine, cogview2_sampling
from cogview.studies.cogview2_fine import Near, Walk
from cogview.studies.cogview2_report import _at
from cogview.tokenizers.image import VQConfig
from cogview_ops import local_attention_2d


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BASE_SCENES": 24, "FINE_SCENES": 8, "TEST_SCENES": 6, "FINE_BATCH": 2}.items():
            patch.setattr(demo, name, value)
        small = {"num_layers": 2, "hidden_size": 64, "num_heads": 2}
        for kind in (CogLM, CogView):
            config, training = kind.presets["tiny"]
            patch.setitem(kind.presets, "tiny", (dataclasses.replace(config, **small), training))
        patch.setitem(Direct.presets, "tiny", (Direct.begun(CogLM.presets["tiny"][0]), Direct.presets["tiny"][1]))
        patch.setattr(demo, "IMAGE", VQConfig(codebook_size=64, dim=8, hidden=8))
        patch.setattr(cogview2_fine, "ROUNDS", 1)
        patch.setattr(cogview2_sampling, "CONSTANTS", (0.0, 3.0))
        patch.setattr(cogview2_sampling, "TEMPERATURES", (0.5, 3.0))
        steps = [f"--{name}-steps" for name in ("image", "base", "early", "domain", "fine")]
        sizes = [part for name in steps for part in (name, "2")]
        cli.main(["study", "cogview2", "--out", str(out), "--tested", "5", "--candidates", "2", *sizes])
    return out


def test_it_leaves_everything(finished):
    for name in ("sampling.png", "constant.png", "constants.png", "beginnings.png"):
        with Image.open(finished / name) as picture:
            assert picture.size[0] > 100
    facts = json.loads((finished / "figures.json").read_text())
    figures = facts["figures"]
    assert {"coglm", "direct", "iterative", "gpt", "early", "early-gpt", "domain", "longer"} == set(facts["models"])
    assert [point["c"] for point in figures["constants"]] == [0, 3]
    assert list(figures["ways"]) == ["top-k", "top-p", "clusters", "clusters, their own"]
    for points in figures["ways"].values():
        assert points[0]["diversity"] < points[1]["diversity"]
    assert {name: set(of) for name, of in figures["domain"].items()} == {
        name: {"one", "two"} for name in ("early", "domain", "longer")
    }
    lost = figures["cut"]["lost"]
    assert lost["1"] >= lost["20"] >= lost["200"] >= 0
    assert figures["cut"]["places"] == 5 * 64
    assert set(figures["local"]) == {"dense", "3 x 3", "5 x 5", "9 x 9", "trained"}
    assert len(set(figures["local"].values())) >= 4
    for line in figures["beginnings"].values():
        assert line[0][0] == 0
        assert line[-1][0] == 2
    rounds = figures["rounds"]
    assert rounds["direct and rounds"]["forwards"] == 7
    assert rounds["one after the other"]["forwards"] == 576
    assert all(seconds > 0 for way in rounds.values() for seconds in way["seconds"].values())
    page = (finished / "report.md").read_text()
    assert page.startswith("Textual attention: ")
    assert "## Rounds against one code after the other" in page


def test_a_walk_draws_what_its_training_saw():
    before, source = base()
    recipe = Walk(Walk.begun(before.config))
    model = recipe.model().eval()
    model.load_state_dict(recipe.inherited(dict(source.state_dict()), before, model.state_dict()))
    text, (coarse, fine) = pad_text(CAPTIONS), codes(recipe)
    batch = recipe.batch(text, coarse, fine)
    assert batch.targets[batch.weights > 0].view(3, -1).tolist() == fine.tolist()
    prompt = recipe.behind(text, coarse)
    drawn = fill(model, prompt, torch.zeros(3, 144), Sampling(top_k=1))
    likeliest = model(drawn, prompt.context)[:, :-1, :40].argmax(dim=-1)
    there = prompt.drawn[:, 1:]
    assert torch.equal(likeliest[there], drawn[:, 1:][there])
    assert int(prompt.drawn.sum()) == 3 * 144


def test_near_is_dense_where_the_window_is_everything():
    recipe, model = base()
    batch = recipe.batch(pad_text([[5, 6, 13], [7, 8, 9]]), codes(Walk(Walk.begun(recipe.config)), 2)[0])
    q, k, v = torch.randn(3, 2, 2, recipe.length, 16)
    dense, layer = model.stack.layers[0].attention.attend(q, k, v, batch.context), Near(recipe.config, 0)
    for window in ((7, 7), (3, 3), (5, 1)):
        layer.window = window
        found = layer.attend(q, k, v, batch.context)
        torch.testing.assert_close(found[:, :, :4], dense[:, :, :4])
        cells, text = ([x[:, :, part] for x in (q, k, v)] for part in (slice(4, 20), slice(4)))
        prefix = {"prefix_key": text[1], "prefix_value": text[2]}
        near = local_attention_2d(*cells, grid=(4, 4), kernel_size=window, raster_causal=True, **prefix)
        torch.testing.assert_close(found[:, :, 4:20], near)
        assert (float((near - dense[:, :, 4:20]).abs().max()) < 1e-5) == (window == (7, 7))


def test_measures():
    scenes = sample_scenes("test", 6)
    assert clarity(demo.pictures_of(scenes)) > 100
    assert clarity(demo.pictures_of(scenes, 3)) > 100
    noise = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert clarity(noise) < 12
    same = torch.zeros(2, 3, 4, 4, dtype=torch.int64)
    codebook = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert cogview2_sampling.diversity(same, codebook) == 0
    anything = torch.randint(8, (2, 6, 16, 16), generator=torch.Generator().manual_seed(0))
    assert cogview2_sampling.diversity(anything, codebook) == pytest.approx(7 / 8, abs=0.05)
    points = [{"diversity": d, "all": a} for d, a in ((0.1, 0.9), (0.3, 0.5))]
    assert _at(points, 0.2) == pytest.approx(0.7)
    assert (_at(points, 0.1), _at(points, 0.3)) == (0.9, 0.5)
