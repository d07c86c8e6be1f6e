"""The average of a model's parameters over its training: its values, what is validated and drawn with, resuming."""

import dataclasses
import math
import re

import pytest
import torch
from test_train_run import TRAIN, Pairs, trainer

from cogview.models import load_model
from cogview.train import checkpoint

AVERAGED = dataclasses.replace(TRAIN, average=0.75)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(tmp_path, dtype, every) -> None:
    """It begins with the parameters of the first time, up to which it is what they are."""
    t = trainer(tmp_path, dataclasses.replace(AVERAGED, dtype=dtype, average_every=every))
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 8):
        t.step()
        for name, p in t.optimizer.master.items() if step <= every or step % every == 0 else ():
            expected[name] = 0.75 * expected[name] + 0.25 * p if step > every else p.clone()
        for name, value in t.optimizer.average.values.items():
            torch.testing.assert_close(value, expected[name])
    for name, value in t.optimizer.average.values.items():
        assert not torch.equal(value, t.optimizer.master[name])


def test_a_validation_that_fails_leaves_the_parameters(tmp_path) -> None:
    t = trainer(tmp_path, dataclasses.replace(AVERAGED, dtype="bfloat16", learning_rate=0.05))
    t.step()
    t.step()
    before = {name: p.clone() for name, p in t.task.model.named_parameters()}
    inside = {}

    def validate() -> None:
        with t.optimizer.averaged():
            inside.update({name: p.clone() for name, p in t.task.model.named_parameters()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate()
    assert any(not torch.equal(inside[name], p) for name, p in before.items())
    for name, p in t.task.model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(p, t.optimizer.master[name].bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_validated_and_drawn_with(tmp_path, dtype) -> None:
    """And training goes on as if nothing was averaged."""
    config = dataclasses.replace(AVERAGED, dtype=dtype, steps=4, validate_every=2, learning_rate=0.05)
    t = trainer(tmp_path / "a", config, validation=Pairs(5, seed=1))
    plain = trainer(tmp_path / "b", dataclasses.replace(config, average=None), validation=Pairs(5, seed=1))
    result = t.run()
    plain.run()
    for name, p in t.optimizer.master.items():
        assert torch.equal(p, plain.optimizer.master[name])
    recipe, model = load_model(result.checkpoint)
    for name, p in model.named_parameters():
        assert torch.equal(p, t.optimizer.average.values[name])
    with t.optimizer.averaged():
        averaged = t.validation.measure()
    assert result.validation == averaged
    assert averaged["loss"] != plain.validation.metrics["loss"]
    tensors, header = checkpoint.weights(result.checkpoint)
    assert header["averaged"]
    assert tensors.keys() == dict(recipe.model().named_parameters()).keys()


def test_resume_is_exact(tmp_path) -> None:
    config = dataclasses.replace(AVERAGED, average_every=2)
    straight, first = trainer(tmp_path / "a", config), trainer(tmp_path / "b", config)
    for _ in range(7):
        straight.step()
    for _ in range(3):
        first.step()
    first.save()
    second = trainer(tmp_path / "b", config)
    assert second.resume()
    for _ in range(4):
        second.step()
    for name, value in straight.optimizer.average.values.items():
        assert torch.equal(value, second.optimizer.average.values[name])


def test_a_run_may_begin_and_end_to_average(tmp_path) -> None:
    """It begins with the parameters as they are; losses of either are not compared."""
    t = trainer(tmp_path)
    t.step()
    t.save()
    later = trainer(tmp_path, AVERAGED)
    assert later.resume()
    for name, value in later.optimizer.average.values.items():
        assert torch.equal(value, later.optimizer.master[name])
    later.step()
    later.save()
    without = trainer(tmp_path)
    assert without.resume()
    assert later.validation._of() != without.validation._of()


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_a_decay_that_is_none(decay) -> None:
    said = f"average: expected a decay above 0 and below 1, or None, got {decay!r}"
    with pytest.raises(ValueError, match=re.escape(said)):
        dataclasses.replace(TRAIN, average=decay)
    with pytest.raises(ValueError, match="average_every: expected at least 1, got 0"):
        dataclasses.replace(TRAIN, average_every=0)
