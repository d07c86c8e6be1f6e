"""The study of words and places: whose tile is whose, which head is chosen, and what is said of it."""

import json
from pathlib import Path

import pytest
import torch
from test_system import saved_run, small_image
from test_transformer import recipe_of

from cogview import cli
from cogview.attention import words
from cogview.attention.look import Seen
from cogview.demo.scenes import caption, sample_scenes
from cogview.studies import attention, attention_centre
from cogview.studies.attention import Cases, Sizes, cases, judged, shown_of
from cogview.studies.attention_centre import PARTS, centre, parts_of, tile, told
from cogview.system import System
from cogview.tokenizers.text import TextTokenizer


def scenes_system() -> System:
    captions = [caption(scene, language) for scene in sample_scenes("test", 60) for language in ("en", "zh")]
    torch.manual_seed(0)
    text, image = TextTokenizer.train(captions, 500), small_image()
    recipe = recipe_of("dense", text_vocab=500, max_positions=70)
    return System(text, image, recipe, recipe.model())


def test_tiles_are_those_of_the_emoji():
    assert tile("left", 4).view(4, 4).int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert tile("bottom", 4).view(4, 4).int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


def test_cases_are_of_each_word(monkeypatch):
    """A head that gives a word nothing but from one place of its tile, and one that gives it as much everywhere."""
    system, scenes = scenes_system(), sample_scenes("test", 2)
    assert (scenes[0].second, scenes[1].second is not None) == (None, True)
    place = {name: tile(where, 4).float() for scene in scenes[1:] for name, where in scene.placed}

    def maps(seen, places, named):
        own = [place.get(word.text, tile(scenes[0].place, 4).float()) for word in named]
        return torch.stack([torch.stack([torch.eye(16)[int(t.argmax())] for t in own]), torch.ones(len(named), 16)])

    monkeypatch.setattr(words, "maps", maps)
    found = cases(system, scenes, torch.zeros(2, 4, 4, dtype=torch.int64), "en")
    assert found.scene.tolist() == [0, 1, 1]
    assert found.inside[:, 0].tolist() == [[1, 0.25]] * 3
    assert found.hit[:, 0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(found.given[:, 0], torch.tensor([[1 / 16, 1.0]] * 3))
    assert found.other[0].isnan().all()
    assert found.other[1:, 0].tolist() == [[0, 0.25]] * 2


def test_the_head_is_chosen_on_one_half_and_judged_on_the_other():
    scene = torch.tensor([0, 1, 1, 2, 3, 3])
    inside = torch.tensor([[[0.9, 0.2]]] * 3 + [[[0.3, 0.8]]] * 3)
    other = torch.tensor([[[torch.nan, torch.nan]]] + [[[0.1, 0.1]]] * 2).repeat(2, 1, 1)
    told = judged(Cases(inside, (inside > 0.25).float(), inside / 3, other, scene))
    assert told["head"] == [0, 0]
    assert told["cases"] == {"chosen_on": 3, "judged_on": 3, "of_two_emoji": 2}
    assert (told["inside"], told["hit"], told["given"]) == (pytest.approx(0.3), 1.0, pytest.approx(0.1))
    assert told["beyond_area"] == pytest.approx([0.05, 0.05])
    assert told["of_two_emoji"]["difference"] == pytest.approx([0.2, 0.2])
    assert told["all_heads"]["inside"] == [[0.3, 0.8]]


def test_words_of_one_scene_count_once():
    """Intervals are over scenes: two names of one are no two cases."""
    scene = torch.tensor([0, 2, 2, 3])
    inside = torch.tensor([0.9, 0.2, 0.4, 0.9]).view(4, 1, 1)
    told = judged(Cases(inside, inside, inside, inside - 0.1, scene))
    assert told["scenes"] == {"judged_on": 2, "of_two_emoji": 2}
    assert told["inside"] == pytest.approx(0.6)
    assert told["all_heads"]["inside"] == [[pytest.approx(0.6)]]
    assert told["beyond_area"] == pytest.approx([0.3 - 0.25, 0.9 - 0.25])


def test_the_centre_apart_from_what_stands_there(monkeypatch):
    """A head that gives all to the last place of the emoji in the centre, and one that gives all keys the same."""
    assert parts_of("left", 8).sum(1).tolist() == [8, 8, 8, 40]
    system, scenes = scenes_system(), sample_scenes("test", 3)
    assert [(scene.place, scene.second is None) for scene in scenes] == [
        ("bottom", True),
        ("below", False),
        ("left", True),
    ]

    def see(system, ids, codes, see):
        places = attention_centre.places_of(system, ids)
        visible = torch.ones(system.recipe.length, system.recipe.length).tril()
        weights = (visible / visible.sum(1, keepdim=True)).expand(2, -1, -1).clone()
        weights[0] = 0.0
        weights[0, :, places.image[9]] = 1.0  # of the bottom's emoji, of the left's; in the centre of 4 x 4
        for layer in range(2):
            see(Seen(layer, slice(0, 2), weights, weights, visible.bool()))

    monkeypatch.setattr(attention_centre, "look", see)
    found = centre(system, scenes, torch.zeros(3, 4, 4, dtype=torch.int64))
    assert found["scenes"] == 2
    first, second = (torch.tensor([found["times"][name][0][head] for name in PARTS]) for head in (0, 1))
    assert first[0] > 2
    assert first[1:].tolist() == [0, 0, 0]
    torch.testing.assert_close(second, torch.ones(4))
    assert "4 of 4 heads give the emoji's part" in " ".join(told(found).split())
    assert "or more, 2 its background" in " ".join(told(found).split())
    assert "No scene" in told(centre(system, scenes[1:2], torch.zeros(1, 4, 4, dtype=torch.int64)))


def test_maps_shown_are_those_of_the_chosen_head():
    system, scenes = scenes_system(), sample_scenes("test", 3)
    codes = torch.randint(20, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    shown = shown_of(system, scenes, codes, "en", (1, 0))
    (ids,) = system.encode(caption(scenes[1], "en"))
    assert [word.text for word in shown[1].words] == [scenes[1].first, scenes[1].second]
    torch.testing.assert_close(shown[1].maps.flatten(1), words.collect(system, ids, codes[1], shown[1].words)[1, 0])
    assert [one.chosen_on for one in shown] == [True, True, False]
    torch.testing.assert_close(shown[1].picture, system.pictures(codes)[1])


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path / "runs/demo", gpt=scenes_system())
    with pytest.raises(SystemExit, match="from: expected the folder of a finished demo, got 'runs/demo'"):
        cli.main(["study", "attention", "--scenes", "8", "--measured", "2", "--shown", "1"])
    Path("runs/demo/scenes").mkdir()
    Path("runs/demo/scenes/scenes.json").write_text("{}")
    asked = dict[str, int]()
    monkeypatch.setattr(attention, "analyse", lambda system, texts, codes, out, **how: asked.update(how) or "All told.")
    cli.main(["study", "attention", "--scenes", "8", "--measured", "4", "--shown", "3", "--out", "out"])
    assert asked["shown"] == 3
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["names-en.png", "names-zh.png"]
    page = Path("out/report.md").read_text(encoding="utf-8")
    assert page.splitlines()[0] in capsys.readouterr().out
    assert page.startswith("Layer ")
    assert all(f"]({name}.png)" in page for name in ("names-en", "names-zh"))
    assert "[What they do](heads/report.md). All told." in page
    figures = json.loads(Path("out/figures.json").read_text(encoding="utf-8"))
    assert figures["area"] == 0.25
    assert figures["languages"]["en"]["cases"]["judged_on"] == 6
    assert f"a name {figures['languages']['en']['given']:.0%} of the head's attention" in page.splitlines()[0]
    cli.main(["study", "attention", "--scenes", "8", "--measured", "4", "--shown", "0", "--out", "none"])
    assert not list(Path("none").glob("*.png"))
    assert "names-en" not in Path("none/report.md").read_text(encoding="utf-8")


def test_sizes():
    for sizes, message in (((2, 1, 1), "scenes: expected at least 4"), ((8, 9, 1), "measured: expected 1 to 8")):
        with pytest.raises(ValueError, match=message):
            Sizes(*sizes)
