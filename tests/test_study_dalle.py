"""The study of DALL-E's choices: captions in other forms, its sentences, and all of it in small."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_train_run import TRAIN, trainer

from cogview.commands.study_uses import Dalle
from cogview.demo.scenes import Scene
from cogview.recipes import RECIPES
from cogview.studies import dalle, dalle_scenes, dalle_verdicts, training_runs
from cogview.studies.dalle_memory import memory
from cogview.studies.dalle_scenes import forms
from cogview.tokenizers.image import VQConfig

SIZES = dict.fromkeys(("image_steps", "steps", "attention_steps", "scaling_steps", "deep_steps", "drawn"), 2)
SMALL = dalle.Sizes(scenes=24, seeds=1, **SIZES)


def test_captions_in_other_forms() -> None:
    assert forms(Scene("fox", "left of", "orange", "apple")) == {
        "usual": "a fox to the left of an apple on an orange background",
        "turned": "on an orange background a fox to the left of an apple",
        "terse": "fox to the left of apple orange",
    }
    assert forms(Scene("tree", "top", "blue")) == {
        "usual": "a tree at the top of a blue background",
        "turned": "on a blue background a tree at the top",
        "terse": "tree at the top blue",
    }


def test_ways_differ_in_what_they_are_called_for() -> None:
    """And the attentions that are compared have as many places and losses alike."""
    ways = dalle.choices(SMALL)
    assert ways["masked"].model == {"padding": "masked"}
    assert [ways[f"text {n}"].training["text_weight"] for n in (0, 1)] == [0.0, 1.0]
    for grid in (8, 32):
        some = dalle.attention(SMALL, grid)
        assert {way.model["max_positions"] for way in some.values()} == {grid**2 + 28}
        assert len({json.dumps(way.training) for way in some.values()}) == 1
    assert len(dalle.scaling(SMALL, deep=True)) == 6


def runs(loss: float, drawn: float = 0.5, **more: Any) -> list[dict[str, Any]]:
    """Of three seeds that differ a little."""
    shares = {"usual": drawn, "turned": drawn / 2, "terse": drawn / 4}
    return [
        {
            "held_out": dict.fromkeys(("loss", "image_loss", "text_loss"), loss * (1 + n / 1000)),
            "drawn": {form: value + n / 1000 for form, value in shares.items()},
            "chosen": shares,
            "skipped": 2,
            "left_out": 7,
            **more,
        }
        for n in range(3)
    ]


def test_sentences() -> None:
    found = {"dalle": runs(1.0), "text 0": runs(1.1, 0.1), "text 1": runs(1.0), "masked": runs(0.9, 0.4)}
    found |= {"separate": runs(1.2, 0.3), "nothing hidden": runs(0.8, 0.4), "nothing hidden, text 0": runs(0.8, 0.4)}
    said = dalle_verdicts.text(found)
    assert "so that text has to tell, that is seen: at 0 10% of the captions are drawn right" in said
    assert "Where nothing is hidden, as in the papers, it is not shown: 40% are drawn right at 1/8, 40% at 0" in said
    assert "images +10.00% (95 % interval +10.00% to +10.00%) and +0.00%" in said
    said = dalle_verdicts.padding(found)
    assert "The first is seen, of image and text: learned padding's held-out losses differ from masked" in said
    assert "the second is, for captions turned round and terse." in said
    assert "two whose results are added is seen here: with two the held-out loss of images differs by +20.00%" in (
        dalle_verdicts.softmax(found)
    )
    turned = {**found, "masked": runs(1.0, 0.9), "separate": runs(0.8, 0.9), "text 0": runs(1.0)}
    assert "so that text has to tell, that is not shown" in dalle_verdicts.text(turned)
    assert "The first is not shown" in dalle_verdicts.padding(turned)
    assert "the second is not." in dalle_verdicts.padding(turned)
    assert "two whose results are added does not hold here" in dalle_verdicts.softmax(turned)


def test_sentences_about_float16() -> None:
    names = list(dalle.scaling(SMALL, deep=False))
    part = {name: runs(1.01 if "Sandwich" in name else 1.0) for name in names}
    said = dalle_verdicts.scaling({"tiny": part, "deep": part}, dalle.YARDSTICK)
    assert "Sandwich-LN with PB-relax hardly changes convergence, to 2%, holds in float32" in said
    assert "pre-LN, float16, blocks +0.00%" in said
    assert said.endswith("skipped 2.0 steps a training; scales of blocks 2.0, and they left a block out 7.0 times.")
    part["pre-LN, float16"][1]["held_out"] = {}
    one = dalle_verdicts.scaling({"tiny": dict(part), "deep": dict(part)}, dalle.YARDSTICK)
    assert "pre-LN, float16, blocks +0.00%" in one
    lost = {**part, dalle.YARDSTICK: [{**run, "held_out": {}} for run in part[dalle.YARDSTICK]]}
    said = dalle_verdicts.scaling({"tiny": part, "deep": lost}, dalle.YARDSTICK)
    assert (
        "With 64 layers held-out losses differ from those of pre-LN, float32 by: pre-LN, float16 diverged, 2.0" in said
    )
    assert "pre-LN, float16, blocks carries on" in said
    assert "does not hold in float32: tiny +1.00%" in said
    assert "pre-LN, float16 diverged, 2.0 steps skipped" in (
        dalle_verdicts.scaling({"tiny": part, "deep": part}, dalle.YARDSTICK)
    )


def test_bytes_of_a_training(tmp_path) -> None:
    """float16 has masters beside it; with scales of blocks what is between them is float32."""
    found = {}
    for name, how in {
        "float32": {"dtype": "float32"},
        "float16": {"dtype": "float16"},
        "blocks": {"dtype": "float16", "gradient_scaling": "blocks"},
    }.items():
        found[name] = memory(trainer(tmp_path, dataclasses.replace(TRAIN, **how)))
    count = sum(p.numel() for p in trainer(tmp_path).optimizer.master.values())
    assert found["float32"]["parameters"] == 4 * count
    assert found["float16"]["parameters"] == 6 * count
    assert 4 * count < found["blocks"]["parameters"] < 6 * count
    assert found["float16"]["activations"] < found["blocks"]["activations"] < found["float32"]["activations"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out, told = tmp_path_factory.mktemp("study"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_runs, "ROUNDS", 1)
        patch.setitem(dalle._DEEP, "num_layers", 3)
        patch.setitem(dalle._DEEP, "hidden_size", 64)
        for module in (dalle, dalle_scenes):
            patch.setattr(module, "GRIDS", {8: 8, 16: 4})
        small = {"num_layers": 2, "hidden_size": 64, "num_heads": 1}
        for recipe in (RECIPES["dalle"], RECIPES["cogview"]):
            model, how = recipe.presets["tiny"]
            patch.setitem(recipe.presets, "tiny", (dataclasses.replace(model, **small), how))
        patch.setattr(dalle_scenes, "_IMAGE", VQConfig(codebook_size=32, dim=8, hidden=8))
        patch.setattr(dalle_scenes, "_HELD_OUT", 12)
        first = dalle.run(out, SMALL, told.append, ["choices"])
        assert first == "choices: trained; all parts together are what the report is of"
        assert not (out / "report.md").exists()
        return out, dalle.run(out, SMALL, told.append)


def test_the_study(made: tuple[Path, str]) -> None:
    out, said = made
    figures, report = json.loads((out / "figures.json").read_text()), (out / "report.md").read_text()
    assert figures["trainings"].keys() == {"choices", "attention-8", "attention-16", "tiny", "deep"}
    assert said == "\n".join(figures["verdicts"].values())
    for sentence in figures["verdicts"].values():
        assert sentence in report
    assert "| 16 x 16, three-region |" in report
    assert "| deep, pre-LN, float16, blocks |" in report
    blocks = figures["trainings"]["deep"]["pre-LN, float16, blocks"][0]["blocks"]
    assert len(blocks[0]) == 2 * 3
    assert blocks[0] == [13.0] * 6
    for name in ("choices", "attention", "scaling"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 400
    assert not list(out.glob("trainings/*/*/run"))


def test_again_trains_nothing_and_other_sizes_are_refused(made: tuple[Path, str], monkeypatch) -> None:
    out, _ = made
    monkeypatch.setattr("cogview.train.loop.Trainer.step", lambda self: pytest.fail("it trains"))
    monkeypatch.setattr(dalle_scenes, "GRIDS", {8: 8, 16: 4})
    monkeypatch.setattr(dalle_scenes, "_IMAGE", VQConfig(codebook_size=32, dim=8, hidden=8))
    monkeypatch.setattr(dalle_scenes, "_HELD_OUT", 12)
    assert "choices: trained" in dalle.run(out, SMALL, print, ["choices"])
    with pytest.raises(ValueError, match=re.escape(f"out: {str(out)!r} holds a study of other sizes")):
        dalle.run(out, dataclasses.replace(SMALL, steps=3), print)
    with pytest.raises(ValueError, match="parts: expected some of choices, attention, scaling, got"):
        dalle.run(out, SMALL, print, ["text"])
    with pytest.raises(ValueError, match="seeds: expected at most 5, got 6"):
        dataclasses.replace(SMALL, seeds=6)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        dataclasses.replace(SMALL, steps=0)


def test_the_command_has_the_sizes() -> None:
    fields = {field.name for field in dataclasses.fields(dalle.Sizes)}
    assert fields < {field.name for field in dataclasses.fields(Dalle)}
    assert Dalle().part == dalle.PARTS
