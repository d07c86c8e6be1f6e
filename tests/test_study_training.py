"""The study of training: what its runs tell of gradients, its sentences, and all of it in small."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_run import Pairs

from cogview.commands.study import Training
from cogview.config import TrainConfig
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.studies import training, training_runs, training_verdicts
from cogview.studies.paired import over_seeds
from cogview.studies.training_runs import Watched, share_seen
from cogview.studies.training_verdicts import SHRINK
from cogview.tokenizers.image import VQConfig
from cogview.train.token_task import TokenTask

SIZES = {"scenes": 24, "image_steps": 2, "steps": 2, "deep_steps": 2, "seeds": 1}


def test_intervals_over_seeds():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["interval"] == pytest.approx([2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)])
    assert over_seeds([1.0]) == {"mean": 1.0, "interval": None}


def config(**changed):
    data = Pairs(4)
    sizes = {"image_grid": 4, "max_positions": data.text.shape[1] + 20, "image_vocab": 20, "text_vocab": 20}
    return CogViewConfig(num_layers=2, hidden_size=64, num_heads=1, dropout=0.0, **sizes, **changed), data


def watched(tmp_path, **changed):
    """One step of float16, and the gradients that its optimizer had."""
    (model, data), how = config(**changed), TrainConfig(steps=2, batch_size=4, dtype="float16", clip=math.inf)
    torch.manual_seed(0)
    recipe = CogView(model)
    trainer = Watched(TokenTask(recipe, recipe.model(), data, how), how, tmp_path)
    seen = {}
    step = trainer.optimizer.step

    def spy(rate):
        seen.update({name: p.grad.abs().max().item() for name, p in trainer.optimizer.master.items()})
        return step(rate)

    trainer.optimizer.step = spy
    return trainer.step(), seen


def test_watched_steps_tell_the_largest_gradients(tmp_path):
    told, seen = watched(tmp_path, embedding_grad_scale=1.0)
    scale = told["loss_scale"]
    assert scale == 2.0**16
    assert told["words"] == pytest.approx(seen["embedding.words.weight"] / scale)
    assert told["positions"] == pytest.approx(seen["embedding.positions.weight"] / scale)
    layers = max(value for name, value in seen.items() if not name.startswith("embedding"))
    assert told["other"] == pytest.approx(layers / scale)
    shrunk, _ = watched(tmp_path, embedding_grad_scale=0.1)
    for group in ("read", "positions"):
        assert shrunk[group] == pytest.approx(0.1 * told[group], rel=0.02)
    nothing, only_head = watched(tmp_path, embedding_grad_scale=0.0)
    assert nothing["read"] == 0
    assert nothing["words"] == pytest.approx(only_head["embedding.words.weight"] / scale)


def test_share_of_the_pairs_that_three_region_attention_sees():
    three_region = {"attention": "three_region", "block_size": 4, "window_blocks": 2}
    model, data = config(**three_region, num_pivots=18)
    recipe = CogView(model)
    inputs = recipe.batch(*data.batch(np.arange(4))).inputs
    pivots, tokens = recipe.draw_pivots(inputs, torch.Generator().manual_seed(0)), inputs.shape[1]
    seen = 0
    for chosen in pivots.flatten(0, 1).tolist():
        for i in range(tokens):
            near = [j for j in range(i + 1) if j // 4 > i // 4 - 2]
            seen += len(near) + sum(p >= 0 and p // 4 <= i // 4 - 2 for p in chosen)
    expected = seen / (pivots.shape[0] * pivots.shape[1] * tokens * (tokens + 1) / 2)
    assert share_seen(recipe, inputs) == pytest.approx(expected)


def test_sentences_follow_the_figures():
    def of(*losses, **more):
        return [{"held_out": {"loss": loss}, "skipped": 1, "steps": 10, **more} for loss in losses]

    found = {"float32": of(2.0, 2.1), "bfloat16": of(2.0, 2.1), "float16": of(2.01, 2.12, scale=[16.0, 15.0])}
    assert "2% of the held-out loss, holds" in training_verdicts.precision(found)
    found["float16"] = of(2.01, 2.2, scale=[16.0, 15.0])
    assert "does not hold" in training_verdicts.precision(found)
    scales = {"shrunk": [17.0] * 4, "not shrunk": [16.0] * 4}
    levels = {name: of(2.0, 2.1, scale=scales["shrunk" if "not" not in name else "not shrunk"]) for name in SHRINK}
    assert "On the preset tiny it is seen: its exponent differs by +1.00 (95 %" in training_verdicts.shrink(levels)
    levels["shrunk"][0]["scale"] = [16.0] * 4
    assert "On the preset tiny it may be there" in training_verdicts.shrink(levels)
    levels |= dict.fromkeys(SHRINK, levels["not shrunk"])
    assert "On the preset tiny it is not seen" in training_verdicts.shrink(levels)


def test_the_study_of_training(monkeypatch, tmp_path, capsys):
    """Everything once; again nothing is trained, and the same comes out."""
    for name, value in {"_HELD_OUT": 8, "_IMAGE": VQConfig(codebook_size=32, dim=8, hidden=8)}.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setitem(training._DEEP, "num_layers", 2)
    model, how = CogView.presets["tiny"]
    model = dataclasses.replace(model, num_layers=1, hidden_size=64, num_heads=1)
    monkeypatch.setitem(CogView.presets, "tiny", (model, how))
    monkeypatch.setattr(training_runs, "ROUNDS", 1)
    Training(out=tmp_path, **SIZES).run()
    assert "That float16 trains as float32 does" in capsys.readouterr().out
    for name in ("precision", "shrink", "attention", "batch", "optimizer"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size[0] > 100
        assert f"![{name}]({name}.png)" in (tmp_path / "report.md").read_text()
    figures = json.loads((tmp_path / "figures.json").read_text())
    steps = {name: trainings[0]["steps"] for name, trainings in figures["trainings"].items()}
    assert (steps["x1"], steps["bfloat16"], steps["x4"], steps["deep, shrunk"]) == (4, 2, 1, 2)
    assert 0 < figures["share_seen"] < 1
    assert not list(tmp_path.glob("trainings/*/run"))
    monkeypatch.setattr(training, "step_seconds", None)
    Training(out=tmp_path, **SIZES).run()
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    with pytest.raises(ValueError, match="holds a study of other sizes"):
        Training(out=tmp_path, **SIZES | {"steps": 3}).run()
    with pytest.raises(ValueError, match="seeds: expected at most 5, got 6"):
        Training(out=tmp_path, **SIZES | {"seeds": 6}).run()
