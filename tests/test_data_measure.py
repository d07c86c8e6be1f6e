import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from cogview.demo.measure import chance, judge, score
from cogview.demo.scenes import Scene, render, sample_scenes

SCENES = sample_scenes("train", 80) + sample_scenes("test", 80)


def test_true_pictures_score_everything():
    pictures = [render(s) for s in SCENES]
    assert score(pictures, SCENES) == {"emoji": 1, "place": 1, "background": 1, "all": 1}
    blurred = [p.filter(ImageFilter.GaussianBlur(1.5)) for p in pictures]
    assert min(score(blurred, SCENES).values()) > 0.97


def test_pictures_of_other_scenes_score_near_chance():
    rates = chance([render(s) for s in SCENES], SCENES)
    assert rates["all"] < 0.02
    assert rates["emoji"] < 0.15
    assert 0.1 < rates["background"] < 0.25
    assert 0.1 < rates["place"] < 0.4


def test_noise_and_empty_pictures_score_low():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 64, 64), np.uint8))
    assert score(noise, SCENES[:50])["all"] == 0
    empty = [Image.new("RGB", (64, 64), (100, 160, 245))] * 100
    rates = score(empty, SCENES[:100])
    assert rates["all"] == 0
    assert rates["emoji"] < 0.2


def test_each_attribute_alone():
    picture = render(Scene("panda", "left of", "blue", "star"))
    assert judge(picture, Scene("panda", "left of", "pink", "star"))["background"] == 0
    swapped = judge(picture, Scene("star", "left of", "blue", "panda"))
    assert swapped == {"emoji": 1, "place": 0, "background": 1, "all": 0}
    one_wrong = judge(picture, Scene("panda", "left of", "blue", "apple"))
    assert (one_wrong["emoji"], one_wrong["background"], one_wrong["all"]) == (0.5, 1, 0)
    moved = judge(render(Scene("fox", "top", "grey")), Scene("fox", "bottom", "grey"))
    assert moved == {"emoji": 1, "place": 0, "background": 1, "all": 0}


def test_float_tensors_and_errors():
    picture = torch.from_numpy(np.array(render(SCENES[0]))).permute(2, 0, 1) / 255
    assert judge(picture, SCENES[0])["all"] == 1
    with pytest.raises(ValueError, match="images: expected 3 x 64 x 64"):
        score(torch.zeros(1, 3, 32, 32), SCENES[:1])
    with pytest.raises(ValueError, match="scenes: expected one for each of 1 images"):
        score([render(SCENES[0])], SCENES[:2])
