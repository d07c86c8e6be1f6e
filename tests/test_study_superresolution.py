"""The study of super-resolution: its measures, and all of it in small."""

import dataclasses
import json

import numpy as np
import torch
from PIL import Image

from cogview.commands.study import Superresolution
from cogview.data.crops import smaller
from cogview.demo.measure import decibels, score
from cogview.demo.scenes import Scene, render, sample_scenes
from cogview.magnify import windows
from cogview.recipes.cogview import CogView
from cogview.sampling import Sampling
from cogview.studies import superresolution
from cogview.studies.seams import KINDS, borders, jumps, owners
from cogview.studies.superresolution_report import error_map, sharpness, tile_masks
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.train_image import Pictures, PictureTask
from cogview.train.feed import streams

SCENES = sample_scenes("test", 40)


def pixels(scenes, scale=2):
    return torch.stack([torch.from_numpy(np.array(render(s, scale))).permute(2, 0, 1) for s in scenes])


def test_scenes_of_twice_the_size_are_recognised():
    large = pixels(SCENES)
    assert large.shape == (40, 3, 128, 128)
    assert score(large, SCENES)["all"] == 1
    assert score(large.roll(1, 0), SCENES)["all"] < 0.1
    halved = torch.stack([smaller(picture) for picture in large])
    assert decibels(halved, pixels(SCENES, 1)).min() > 30  # the same scene, resized once and composed of resized tiles


def test_each_code_belongs_to_the_first_window_that_has_it():
    own = owners(4)
    by_hand = torch.full((16, 16), -1)
    for number, (top, left, rows) in reversed(list(enumerate(windows(4)))):
        by_hand[top : top + rows, left : left + 8] = number
    assert torch.equal(own, by_hand)
    right, below = borders(4, 8)
    assert (right.shape, below.shape) == ((128, 127), (127, 128))
    assert right[0].nonzero().numel() == 127 - 2  # the first row of codes is of three windows
    assert (right[0] == 0).nonzero().flatten().tolist() == [63, 95]
    assert (right[0] == 1).nonzero().flatten().tolist() == [8 * n - 1 for n in range(1, 16) if n not in (8, 12)]
    assert (below[:, 0] == 0).nonzero().flatten().tolist() == [47, 79]
    assert (below[:, 0] == 1).sum() == 13


def test_jumps_are_errors_of_differences():
    true = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    kinds = borders(4, 8)
    assert jumps(true, true, kinds) == dict.fromkeys(KINDS, 0.0)
    edge = true.float()
    edge[..., 64:] += 10  # a seam in the first rows, elsewhere a border of codes or nothing
    found = jumps(edge, true, kinds)
    assert found["elsewhere"] == 0
    seams = int((kinds[0][:, 63] == 0).sum())
    assert found["seams"] == np.float64(10 * seams / sum(int((k == 0).sum()) for k in kinds))
    assert found["code borders"] > 0
    assert error_map(true, true, kinds)[:, 0, 63].tolist() == [255, 0, 0]


def test_figures_of_pictures():
    scenes = [Scene("panda", "left", "blue"), Scene("fox", "above", "grey", "tree")]
    true, inside = pixels(scenes), tile_masks(scenes, 128)
    assert inside.sum(dim=(1, 2)).tolist() == [64**2, 2 * 64**2]
    off = (true.float() + 2).clamp_max(255)
    flat = true.float() + 2
    np.testing.assert_allclose(decibels(flat, true), 20 * np.log10(255 / 2), rtol=1e-5)
    only = torch.where(inside[:, None], true.float(), flat)
    assert decibels(only, true, inside).min() > 100 > decibels(only, true, ~inside).max()
    blurred = superresolution.bicubic(torch.stack([smaller(picture) for picture in true]))
    assert sharpness(blurred, inside) < sharpness(true, inside)
    assert decibels(blurred, true).max() < decibels(off, true).min()


def test_codes_are_repeated():
    codes = torch.tensor([[[1, 2], [3, 4]]])
    assert superresolution.repeated(codes).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]


def test_an_image_tokenizer_learns_two_sizes():
    """Half of a step's pictures at half the size, all of them squares on the grid of codes."""
    images = torch.arange(32).view(1, 1, 1, 32).expand(6, 3, 32, 32).to(torch.uint8) * 4
    model = VQVAE(VQConfig(codebook_size=8, dim=4, hidden=4)).train()
    task = PictureTask(model, Pictures(images), times=2)
    batch = task.batch(task.data, np.arange(6), streams(range(6))) * 255
    assert batch.shape == (6, 3, 16, 16)
    slopes = batch[:, 0, 0].diff(dim=1)[:, 4:12].mean(dim=1)
    assert slopes.round().tolist() == [8, 8, 8, 4, 4, 4]
    assert set((batch[3:, 0, 0, 0] / 4).round().tolist()) <= {0, 8, 16}
    assert task.identity()["halves"] is True
    assert "halves" not in PictureTask(model, Pictures(images)).identity()


def test_the_study_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(superresolution, "_IMAGE", VQConfig(codebook_size=16, dim=4, hidden=4))

    config, training = CogView.presets["tiny"]
    small = dataclasses.replace(config, num_layers=1, hidden_size=32, num_heads=2)
    monkeypatch.setitem(CogView.presets, "tiny", (small, training))
    monkeypatch.setattr(superresolution, "_HELD_OUT", 4)
    monkeypatch.setattr(superresolution, "HOW", {"greedy": Sampling(top_k=1)})
    sizes = {"scenes": 12, "crops": 1, "tested": 2, "image_steps": 2, "base_steps": 1, "steps": 1}
    dataclasses.replace(Superresolution(), out=tmp_path, **sizes).run()
    found = json.loads((tmp_path / "figures.json").read_text())
    drawn = {"cut from pictures, greedy", "cut from codes, greedy"}
    assert found["figures"].keys() == {"bicubic", "codes repeated", "true small, bicubic", "bound", *drawn}
    assert found["best"] in drawn
    assert found["figures"]["bound"]["seam"] == 0
    low, high = found["best_above"]["bicubic"]["interval"]
    assert low <= found["best_above"]["bicubic"]["difference"] <= high
    assert Image.open(tmp_path / "errors.png").width > 2 * 3 * 128
    for name in ("sheet.png", "seams.png"):
        assert name in (tmp_path / "report.md").read_text()
        assert Image.open(tmp_path / name).width > 256
