"""Things in several styles and people at work: what is drawn, what is held out, and what captions tell."""

from collections import Counter

import numpy as np
import pytest
import torch

from cogview.demo import things, workers
from cogview.demo.things import BACKGROUNDS, FILTERS, PLAIN, STYLES, View, held_out, named, pictures_of, render
from cogview.demo.workers import MOST_ARE, SKINS, WORK, Worker, caption, everyone, sample, shown
from cogview.emoji import PEOPLE, load_icons
from cogview.emoji import STYLES as STYLES_SHARD
from cogview.recipes.cogview import CogView
from cogview.recipes.style import Style, drawn, learned


def test_the_shards_have_what_their_notice_says():
    assert Counter(key.partition("-")[0] for key in load_icons(STYLES_SHARD)) == dict.fromkeys(STYLES, 200)
    people = [tuple(about.values()) for about, _ in load_icons(PEOPLE).values()]
    assert len(set(people)) == len(people) == 200
    assert STYLES_SHARD.stat().st_size + PEOPLE.stat().st_size < 3e6


def test_every_thing_looks_different_in_every_style():
    assert len(things.things()) == 200
    for thing in ("fox", "violin", "house"):
        pictures = pictures_of([View(thing, style, "blue") for style in (PLAIN, *FILTERS, *STYLES)]).float()
        apart = torch.cdist(pictures.flatten(1), pictures.flatten(1)) / pictures[0].numel() ** 0.5
        assert float(apart[~torch.eye(len(pictures), dtype=torch.bool)].min()) > 5  # of 255
    corner = np.asarray(render(View("fox", "flat", "pink")))[0, 0]
    assert tuple(corner) == BACKGROUNDS["pink"]


def test_25_things_are_held_out_in_every_style_others_in_each():
    held = [{thing for thing in things.things() if held_out(thing, style)} for style in STYLES]
    assert [len(some) for some in held] == [25, 25, 25]
    assert all(len(a & b) < 10 for a in held for b in held if a is not b)
    assert named("apple") == "an apple"
    assert named("fox") == "a fox"


def test_captions_of_styles_are_the_papers_in_the_language_of_the_name():
    assert learned("oil painting") == "an image of oil painting style"
    assert drawn("a fox", "oil painting") == "a fox of oil painting style"
    assert learned("油画") == "油画风格的图片"
    assert drawn("一只狐狸", "油画") == "油画风格的一只狐狸"
    for call in (lambda: learned("  "), lambda: drawn("a fox", "")):
        with pytest.raises(ValueError, match="style: expected a name"):
            call()
    for name, (_, training) in Style.presets.items():  # without it pictures were finished before captions were read
        assert training.hide_context == CogView.presets[name][1].hide_context


def test_people_come_in_the_shares_of_the_data_and_captions_tell_what_they_are_to():
    found = sample(2000)
    for name, shares in MOST_ARE.items():
        counts = Counter(getattr(worker, name) for worker in found)
        assert all(abs(counts[word] / 2000 - share) < 0.05 for word, share in shares.items())
    assert all(worker.tone in SKINS[worker.skin] for worker in found)
    one = Worker("office-worker", "female", "dark-skinned", "dark", "blue")
    assert caption(one, "en") == "an office worker"
    assert caption(one, "en", ("gender", "skin")) == "a dark-skinned female office worker"
    assert caption(one, "zh", ("gender",)) == "一位女性上班族"


def test_people_are_recognised_again():
    some = [*everyone()[::97], sample(1)[0]]
    assert shown(workers.pictures_of(some)) == some
    assert {worker.work for worker in everyone()} == set(WORK)
