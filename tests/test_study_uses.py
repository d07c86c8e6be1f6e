"""Studies of styles, of a single domain and of words about people, each from its beginning on, in small."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from cogview import pipeline
from cogview.commands.study_uses import Fashion, People, Styles
from cogview.demo.things import BACKGROUNDS, STYLES, held_out, things
from cogview.people.specify import specify
from cogview.recipes.cogview import CogView
from cogview.recipes.style import Style
from cogview.studies import fashion, people, styles, styles_judges
from cogview.tokenizers.image import PRESETS, VQConfig

SMALL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2}
IMAGE = VQConfig(codebook_size=16, dim=8, hidden=8)


@pytest.fixture
def small(monkeypatch):
    """Models that are made in no time, with room for captions of words that these few pictures do not have."""
    monkeypatch.setattr(pipeline, "TEXT_ROOM", 30)
    for kind in (CogView, Style):
        for name in ("tiny", "fashion-tiny"):
            config, training = kind.presets[name]
            shape = dataclasses.replace(config, **SMALL)
            monkeypatch.setitem(kind.presets, name, (shape, dataclasses.replace(training, batch_size=2)))


def test_the_study_of_a_single_domain(tmp_path, small, monkeypatch):
    coarse = VQConfig(codebook_size=16, dim=8, hidden=8, downsample=64)  # 5 x 5 codes
    monkeypatch.setitem(PRESETS, "fashion-tiny", (320, coarse))
    monkeypatch.setattr(fashion, "_HELD_OUT", 4)
    study = Fashion(out=tmp_path, outfits=6, tested=2, image_steps=1, steps=2)
    study.run()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens"] >= 5 * 5 + 3 + 30
    assert figures["image"]["downsample"] == 64
    new = (fashion.NEW, fashion.NEW_TRUE, fashion.NEW_OTHER)
    for name in ("drawn, en", "drawn, zh", fashion.TRUE, fashion.OTHER, *new):
        assert 0 <= figures["found"][name]["piece"] <= 1
        assert ("held out" in figures["found"][name]) == (name in new)
    assert figures["verdict"] in (tmp_path / "report.md").read_text()
    for name in ("sheet.png", "new.png"):
        assert Image.open(tmp_path / name).width > 640
    study.run()  # which finds all that is there
    assert json.loads((tmp_path / "figures.json").read_text())["gpt"] == figures["gpt"]
    with pytest.raises(ValueError, match="tested: expected at least 2, got 1"):
        dataclasses.replace(study, tested=1).run()


def test_the_study_of_words_about_people(tmp_path, small, monkeypatch):
    monkeypatch.setattr(people, "IMAGE", IMAGE)
    monkeypatch.setattr(people, "_HELD_OUT", 4)
    People(out=tmp_path, pictures=40, drawn=1, image_steps=1, steps=2).run()
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, of in figures["found"].items():
        assert ("as told" in of) == (name.startswith("after") or name == "true, as judged")
        assert sum(of["gender"].values()) == pytest.approx(1)
        assert sum(of["skin"].values()) == pytest.approx(1)
    assert figures["verdict"] in (tmp_path / "report.md").read_text()
    for language in ("en", "zh"):  # every caption tells one of each
        [dark, women] = [
            figures["found"][f"in the captions, {language}"][k][w]
            for k, w in (("skin", "dark-skinned"), ("gender", "female"))
        ]
        assert (0 < dark < 0.7, 0.2 < women < 0.8) == (True, True)
    words = people.word_list()
    for seed in range(5):
        _, skin, gender, work = specify("a pilot", seed, words).split()
        assert (skin in people.EVEN["skin"], gender in people.EVEN["gender"], work) == (True, True, "pilot")
        assert specify("一位飞行员", seed, words)[2:-3] in (
            "浅肤色男性",
            "浅肤色女性",
            "棕肤色男性",
            "棕肤色女性",
            "深肤色男性",
            "深肤色女性",
        )


def test_the_study_of_styles(tmp_path, small, monkeypatch):
    some = []
    for style in STYLES:
        held = [thing for thing in things() if held_out(thing, style)]
        some += held[:1]
    some += [thing for thing in things() if not any(held_out(thing, style) for style in STYLES)][:5]
    for module in (styles, styles_judges):
        monkeypatch.setattr(module, "things", lambda: sorted(set(some)))
        monkeypatch.setattr(module, "BACKGROUNDS", dict(list(BACKGROUNDS.items())[:3]))
    monkeypatch.setattr(styles, "_HELD_OUT", 8)
    monkeypatch.setattr(styles, "IMAGE", IMAGE)
    monkeypatch.setattr(styles, "POINTS", (0, 1))
    Styles(out=tmp_path, drawn=1, image_steps=1, base_steps=2, style_steps=2, judge_steps=2).run()
    figures = json.loads((tmp_path / "figures.json").read_text())
    for style in STYLES:
        for kind in ("held out", "seen"):
            for name in ("before", "own", "all"):
                assert figures["figures"][style][kind][name]["pictures"] >= 1
        for name in ("own", "all"):
            assert [point["steps"] for point in figures["figures"][style]["along"][name]] == [0, 1]
        meta = json.loads((tmp_path / "tokens" / style / "meta.json").read_text())
        shown = [thing for thing in sorted(set(some)) if not held_out(thing, style)]
        assert meta["rows"] == len(shown) * 3
    assert figures["verdict"] in (tmp_path / "report.md").read_text()


def test_captions_of_a_style_never_name_a_thing():
    for style in STYLES:
        rows = styles._views(style)
        assert {caption for _, caption in rows} == {f"an image of {style} style"}
        assert not any(held_out(view.thing, style) for view, _ in rows)
        asked = styles.asked(style)
        assert all(held_out(view.thing, style) for view in asked["held out"])
        assert not any(held_out(view.thing, style) for view in asked["seen"])
        assert len(asked["held out"]) == len(asked["seen"])
    known = styles._known()
    assert not {view for view, _ in known["train"]} & {view for view, _ in known["test"]}
    assert not {view.style for rows in known.values() for view, _ in rows} & set(STYLES)
    assert not any(style in caption for rows in known.values() for _, caption in rows for style in STYLES)


def test_judges_count_what_is_right():
    class Says(torch.nn.Module):
        def __init__(self, classes, numbers):
            super().__init__()
            self.config = dataclasses.make_dataclass("Config", ["classes"])(classes)
            self.numbers = numbers

        def forward(self, pictures):
            logits = torch.nn.functional.one_hot(torch.tensor(self.numbers), len(self.config.classes))
            return dataclasses.make_dataclass("Seen", ["logits"])(logits.float())

    views = [styles.View(thing, "flat", "white") for thing in ("fox", "fox", "owl", "owl")]
    judges = styles.Judges(Says(("blob", "flat"), [1, 1, 0, 1]), Says(("fox", "owl"), [0, 1, 1, 1]), [], torch.empty(0))
    found = judges.score(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), views)
    assert {name: found[name] for name in ("style", "thing", "both", "pictures")} == {
        "style": 0.75,
        "thing": 0.75,
        "both": 0.5,
        "pictures": 4,
    }
    assert found["style error"] == pytest.approx(0.25)  # of 1 and a half
    assert found["both error"] == 0
