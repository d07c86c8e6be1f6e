import json

import numpy as np
import pytest
from PIL import Image

from cogview.data.shards import PairDataset
from cogview.demo.scenes import (
    BACKGROUNDS,
    NOUNS,
    PLACES,
    SIZE,
    Scene,
    build_scene_shards,
    caption,
    render,
    sample_scenes,
    split_of,
)
from cogview.emoji import load_emoji


def test_all_emoji_load_with_names():
    emoji = load_emoji()
    assert len(emoji) == 1886
    assert (emoji["1f43c"].en, emoji["1f43c"].zh) == ("panda", "熊猫")
    assert all(e.image.mode == "RGBA" and e.image.size == (64, 64) and e.en and e.zh for e in emoji.values())
    assert len({e.image.tobytes() for e in emoji.values()}) > 0.99 * len(emoji)
    with pytest.raises(ValueError, match="codepoints: expected emoji of"):
        load_emoji(["nonsense"])


def test_splits_share_no_caption_and_no_picture_but_every_word():
    train, test = sample_scenes("train", 17000), sample_scenes("test", 2200)
    assert {split_of(s) for s in train} == {"train"}
    assert {split_of(s) for s in test} == {"test"}
    for language in ("en", "zh"):
        captions = {caption(s, language) for s in train}
        held_out = {caption(s, language) for s in test}
        assert not captions & held_out
        words = str.split if language == "en" else list  # Chinese: characters
        assert {w for text in held_out for w in words(text)} <= {w for text in captions for w in words(text)}
    assert not {render(s).tobytes() for s in set(train)} & {render(s).tobytes() for s in set(test)}
    for scenes in (train, test):
        assert {s.first for s in scenes} == set(NOUNS)
        assert {s.background for s in scenes} == set(BACKGROUNDS)
        assert sum(s.second is not None for s in scenes) == len(scenes) // 2


def test_samples_are_functions_of_the_seed():
    assert sample_scenes("train", 50) == sample_scenes("train", 100)[:50]
    assert sample_scenes("train", 50, seed=1) != sample_scenes("train", 50, seed=2)
    assert len(set(sample_scenes("test", 100))) == 100  # nothing twice before everything once


def test_captions():
    two, one = Scene("panda", "left of", "blue", "star"), Scene("apple", "top", "orange")
    assert caption(two, "en") == "a panda to the left of a star on a blue background"
    assert caption(two, "zh") == "蓝色背景上，熊猫在星星左边"
    assert caption(one, "en") == "an apple at the top of an orange background"
    assert caption(one, "zh") == "橙色背景上方有一个苹果"
    with pytest.raises(ValueError, match='language: expected "en" or "zh"'):
        caption(one, "fr")


@pytest.mark.parametrize(
    "fields",
    [
        ("dragon", "top", "blue"),
        ("panda", "above", "blue"),
        ("panda", "top", "red"),
        ("panda", "top", "blue", "star"),
    ],
)
def test_impossible_scenes_are_refused(fields):
    with pytest.raises(ValueError, match="expected one of"):
        Scene(*fields)


def test_render_puts_emoji_where_the_scene_says():
    picture = np.array(render(Scene("panda", "right of", "pink", "tree"))).astype(int)
    ground = np.array(BACKGROUNDS["pink"][0])
    changed = (np.abs(picture - ground).sum(2) > 30).nonzero()
    assert picture.shape == (SIZE, SIZE, 3)
    assert changed[0].min() >= 16
    assert changed[0].max() < 48
    panda = picture[16:48, 32:]
    assert (panda.max(2) < 90).mean() > 0.1  # its black parts


def test_shards_hold_the_sample_and_resume(tmp_path):
    paths = build_scene_shards(tmp_path, 20, 4, seed=3)
    scenes = sample_scenes("train", 20, seed=3)
    dataset = PairDataset(paths["train"])
    assert len(dataset) == 20
    for number, scene in enumerate(scenes):
        pair = dataset[number]
        assert pair.captions == {"en": caption(scene, "en"), "zh": caption(scene, "zh")}
        assert pair.image.tobytes() == render(scene).tobytes()
    before = paths["train"][0].stat().st_mtime_ns
    contents = paths["test"][0].read_bytes()
    paths["test"][0].unlink()  # as if the run had been killed in between
    build_scene_shards(tmp_path, 20, 4, seed=3)
    assert paths["train"][0].stat().st_mtime_ns == before
    assert paths["test"][0].read_bytes() == contents
    with pytest.raises(ValueError, match="other settings"):
        build_scene_shards(tmp_path, 20, 4, seed=4)
    assert json.loads((tmp_path / "scenes.json").read_text())["seed"] == 3


def test_scenes_of_twice_the_size(tmp_path):
    """The same, of tiles that are as large as the emoji come."""
    paths = build_scene_shards(tmp_path, 4, 1, scale=2)
    dataset = PairDataset(paths["train"])
    for number, scene in enumerate(sample_scenes("train", 4)):
        image = dataset[number].image
        assert image.size == (128, 128)
        assert image.tobytes() == render(scene, 2).tobytes()
        (x, y), colour = PLACES[scene.placed[0][1]][0], BACKGROUNDS[scene.background][0]
        tile = load_emoji([NOUNS[scene.first][0]])[NOUNS[scene.first][0]].image
        expected = Image.new("RGB", (64, 64), colour)
        expected.paste(tile, (0, 0), tile)
        found = image.crop((2 * x, 2 * y, 2 * x + 64, 2 * y + 64))
        assert abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 2  # transparent parts are resampled
    with pytest.raises(ValueError, match="other settings"):
        build_scene_shards(tmp_path, 4, 1)
    with pytest.raises(ValueError, match="scale: expected one of 1, 2, 3, got 4"):
        build_scene_shards(tmp_path / "four", 4, 1, scale=4)
