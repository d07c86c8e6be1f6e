"""Outfits: what captions tell is in the picture, pairs are held out, and the judge finds every part again."""

import json
import random

import numpy as np
import pytest
import torch

from cogview.data.shards import PairDataset
from cogview.demo.outfit_judge import score, shown
from cogview.demo.outfits import (
    BACKGROUNDS,
    COLOURS,
    PARTS,
    SIZE,
    TILE,
    build_outfit_shards,
    caption,
    dyed,
    held_out,
    render,
    sample,
)


def pictures(looks):
    return torch.stack([torch.from_numpy(np.array(render(look))).permute(2, 0, 1) for look in looks])


def test_captions_tell_every_part_in_its_colour():
    outfit = {"head": ("cap", "red"), "body": ("coat", "blue"), "legs": ("jeans", "black"), "feet": ("boots", "green")}
    assert caption(outfit, "en") == "a red cap, a blue coat, black jeans and green boots"
    assert caption(outfit, "zh") == "红色鸭舌帽，蓝色外套，黑色牛仔裤，绿色靴子"


def test_splits_share_no_outfit_and_each_new_one_has_a_pair_that_no_other_has():
    pairs = [(piece, colour) for _, pieces in PARTS.values() for piece in pieces for colour in COLOURS]
    held = {pair for pair in pairs if held_out(*pair)}
    assert 0.08 < len(held) / len(pairs) < 0.25
    assert {colour for _, colour in held} == set(COLOURS)
    assert all(any(piece in pieces for piece, _ in held) for _, pieces in PARTS.values())
    of = {split: sample(split, 300) for split in ("train", "test", "new")}
    for look in of["train"] + of["test"]:
        assert not held & set(look.outfit.values())
    for look in of["new"]:
        assert len(held & set(look.outfit.values())) == 1
    train, test = ({caption(look.outfit, "en") for look in of[split]} for split in ("train", "test"))
    assert not train & test
    with pytest.raises(ValueError, match="split: expected one of train, test, new, got 'validation'"):
        sample("validation", 1)
    assert sample("train", 5) == sample("train", 9)[:5]
    assert sample("train", 5) != sample("train", 5, seed=1)


def test_pieces_are_dyed_and_keep_their_shape():
    for _, pieces in PARTS.values():
        for piece in pieces:
            red, blue = (np.asarray(dyed(piece, colour)).astype(int) for colour in ("red", "blue"))
            assert red.shape == (TILE, TILE, 4)
            assert (red[..., 3] == blue[..., 3]).all()
            inside = red[..., 3] > 200
            assert (red[inside][:, 0] > red[inside][:, 2]).mean() > 0.9
            assert (blue[inside][:, 2] > blue[inside][:, 0]).mean() > 0.9


def test_the_judge_finds_every_part_again_also_in_noise():
    looks = [*sample("test", 6, seed=3), *sample("new", 6, seed=3)]
    true = pictures(looks)
    asked = [look.outfit for look in looks]
    assert shown(true) == asked
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    assert score((true + 25 * noise).clamp(0, 255).to(torch.uint8), asked)["all"] == 1.0


def test_the_judge_tells_what_is_wrong():
    look = next(look for look in sample("train", 50) if len(look.outfit) == 4 and "hand" not in look.outfit)
    piece, colour = look.outfit["body"]
    other = random.Random(0).choice([name for name in COLOURS if name != colour])
    found = score(pictures([look]), [look.outfit | {"body": (piece, other)}])
    assert found["piece"] == 1.0
    assert found["colour"] == found["both"] == 0.75
    assert found["absent"] == 1.0
    assert found["all"] == 0.0
    bag = look.outfit | {"hand": ("handbag", "red")}
    assert score(pictures([look]), [bag])["piece"] == 0.8
    without = {part: pair for part, pair in look.outfit.items() if part != "head"}
    assert score(pictures([look]), [without])["absent"] == 0.5
    empty = torch.tensor(BACKGROUNDS[0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, SIZE, SIZE)
    noise = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert shown(torch.cat([empty, noise])) == [{}] * 3
    with pytest.raises(ValueError, match=r"pictures: expected uint8 \[N, 3, 320, 320\]"):
        shown(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_shards_have_both_captions_and_the_outfit(tmp_path):
    paths = build_outfit_shards(tmp_path, 3, 2)
    looks = sample("train", 3)
    data = PairDataset(paths["train"], languages=("en", "zh"))
    assert [data.captions(n)["en"] for n in range(3)] == [caption(look.outfit, "en") for look in looks]
    assert (tmp_path / "test-00000.tar").exists()
    before = paths["train"][0].read_bytes()
    assert build_outfit_shards(tmp_path, 3, 2) == paths
    assert paths["train"][0].read_bytes() == before
    with pytest.raises(ValueError, match="holds other outfits"):
        build_outfit_shards(tmp_path, 4, 2)
    assert json.loads((tmp_path / "outfits.json").read_text())["train"] == 3
