"""Scales of float16 gradients, one for each attention and MLP: what they save, whom an overflow concerns, how they
move."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_train_run import CONFIG, TRAIN, trainer
from torch import Tensor

from cogview.config import TrainConfig
from cogview.train import block_scales
from cogview.train.block_scales import FIRST, LEAST, MOST, BlockScales, scaled

BLOCKS = dataclasses.replace(TRAIN, dtype="float16", gradient_scaling="blocks")
PLAIN = dataclasses.replace(CONFIG, dropout=0.0, attention="dense")
DEEP = dataclasses.replace(PLAIN, num_layers=6)


def gradients(folder: Any, config: TrainConfig, model: Any = PLAIN, times: float = 1.0) -> dict[str, Tensor]:
    """Of one step's loss `times` something, unscaled, by the parameters' names, before they are clipped."""
    t = trainer(folder, dataclasses.replace(config, clip=math.inf), model)
    batch = t.feed.next(t.state)
    loss, _ = t.task.loss(batch, batch)
    t.optimizer.backward(times * loss)
    names = [name for name, p in t.optimizer.master.items() if p.grad is not None]
    grads = [t.optimizer.master[name].grad for name in names]
    t.optimizer._unscale(names, grads)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("norms", ["sandwich", "pre"])
def test_gradients_are_those_of_float32(tmp_path, norms: Any) -> None:
    model = dataclasses.replace(DEEP, norms=norms)
    expected, found = gradients(tmp_path, TRAIN, model), gradients(tmp_path, BLOCKS, model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        scale = expected[name].norm().clamp_min(1e-5)  # of keys' biases it is 0
        assert (grad - expected[name]).norm() < 0.02 * scale, name


def test_small_gradients_survive(tmp_path) -> None:
    """Where a loss is so small that float16 loses most of what its one scale of 2^4 leaves, as deep models' are."""
    times = 2.0**-16
    expected = gradients(tmp_path, TRAIN, DEEP, times)
    blocks = gradients(tmp_path, BLOCKS, DEEP, times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cogview.train.loss_scale.FIRST", 2.0**4)
        one = gradients(tmp_path, dataclasses.replace(BLOCKS, gradient_scaling="loss"), DEEP, times)

    def error(found: dict[str, Tensor]) -> float:
        names = [name for name in found if name.endswith("h_to_4h.weight")]
        return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in names)

    assert error(blocks) < 0.02
    assert error(one) > 0.2


def test_what_is_float16(tmp_path) -> None:
    """Matrices of the blocks; the main branch, norms, biases, embeddings and what is learned of them are float32."""
    t = trainer(tmp_path, BLOCKS, PLAIN)
    model, layer = t.task.model, t.task.model.stack.layers[0]
    halves = {name for name, p in model.named_parameters() if p.dtype == torch.float16}
    ends = ("query_key_value.weight", "attention.dense.weight", "h_to_4h.weight", "4h_to_h.weight")
    assert halves == {name for name in t.optimizer.master if name.endswith(ends)}
    seen: dict[str, torch.dtype] = {}

    def see(name: str) -> Any:
        return lambda _, inputs, output: seen.update({f"{name} in": inputs[0].dtype, f"{name} out": output.dtype})

    layer.mlp.dense_4h_to_h.register_forward_hook(see("inside"))
    layer.mlp.register_forward_hook(see("mlp"))
    layer.register_forward_hook(lambda _, inputs, output: seen.update({"h": output[0].dtype, "x": output[1].dtype}))
    t.step()
    inside = {"inside in": torch.float16, "inside out": torch.float16, "mlp in": torch.float16}
    assert seen == inside | dict.fromkeys(("mlp out", "h", "x"), torch.float32)
    assert {p.dtype for p in t.optimizer.master.values()} == {torch.float32}


@pytest.mark.parametrize("block", ["attention", "mlp"])
def test_an_overflow_is_its_own_blocks_alone(tmp_path, block: str) -> None:
    """It is left out of the step, which the others take; its scale falls once in a while, and theirs grow."""
    t = trainer(tmp_path, BLOCKS, DEEP)
    before = {name: p.clone() for name, p in t.optimizer.master.items()}
    inner = {"attention": "dense", "mlp": "dense_4h_to_h"}[block]
    module = t.task.model.get_submodule(f"stack.layers.3.{block}.{inner}")
    hook = module.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * torch.inf,))
    assert math.isfinite(t.step()["gradient_norm"])
    assert t.state.skipped == 0
    assert str(t.optimizer.last_not_finite).startswith(f"stack.layers.3.{block}.")
    stayed = {name for name, p in t.optimizer.master.items() if torch.equal(p, before[name])}
    norm = {"attention": "stack.layers.2.next_norm.", "mlp": "stack.layers.3.mlp_norm."}[block]  # which it alone reads
    assert stayed == {name for name in before if name.startswith((f"stack.layers.3.{block}.", norm))}
    scales, number = t.optimizer.scale, 6 + (block == "mlp")
    assert isinstance(scales, BlockScales)
    growth = 2 ** (1 / TRAIN.scale_patience)
    expected = torch.full((12,), FIRST * growth)
    expected[number] = FIRST / math.sqrt(2)
    torch.testing.assert_close(scales.values, expected)
    t.step()  # within the window it does not fall again
    torch.testing.assert_close(scales.values[number], torch.tensor(FIRST / math.sqrt(2)))
    hook.remove()
    t.step()
    assert scales.skipped == [2 * (n == number) for n in range(12)]
    assert scales.logged()["gradient_scale/skipped"] == 2
    torch.testing.assert_close(scales.values[number], torch.tensor(growth * FIRST / math.sqrt(2)))


def test_what_is_of_no_block_skips_the_step(tmp_path) -> None:
    t = trainer(tmp_path, BLOCKS, DEEP)
    before = {name: p.clone() for name, p in t.optimizer.master.items()}
    t.task.model.stack.layers[2].mlp_norm.weight.register_hook(lambda grad: grad * torch.nan)
    t.step()
    assert t.state.skipped == 1
    assert all(torch.equal(p, before[name]) for name, p in t.optimizer.master.items())
    assert t.optimizer.scale.numbers == [FIRST] * 12


def test_scales_fall_once_in_a_window_and_stay_in_bounds() -> None:
    model = trainer("unused", BLOCKS, PLAIN).task.model
    scales, bad = BlockScales(model, 1000), ["stack.layers.1.mlp.dense_h_to_4h.bias"]
    scales.update(False, bad)  # for which blocks are not to blame
    assert scales.numbers == [FIRST] * 4
    for _ in range(126):
        scales.update(True, bad)
    assert float(scales.values[3]) == pytest.approx(FIRST / 2)  # in the first step, and in the 126th
    assert scales.stuck(126) == "the gradients of mlp of layer 2 were not finite for 126 steps"
    assert scales.stuck(125) == scales.stuck(127) == ""
    for _ in range(3000):
        scales.update(True, bad)
    assert float(scales.values[3]) == LEAST
    for _ in range(12_000):
        scales.update(True, [])
    assert float(scales.values[0]) == MOST
    least = pytest.approx(LEAST * 2**12, rel=1e-4)
    assert scales.logged() == {
        "gradient_scale/least": least,
        "gradient_scale/largest": MOST,
        "gradient_scale/skipped": 3126,
    }


def test_resume_is_exact(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(block_scales, "FIRST", MOST)  # some steps are skipped
    config = dataclasses.replace(BLOCKS, accumulate=2, average=0.9)
    straight, first = (trainer(tmp_path / name, config) for name in "ab")
    for t in (straight, first):
        t.optimizer.scale.load(torch.tensor([[2.0**13, 2.0**30, 2.0**14, 2.0**15], [0, 125, 3, 4], [0, 9, 0, 0]]))
    expected = [straight.step() for _ in range(6)]
    found = [first.step() for _ in range(3)]
    first.save()
    second = trainer(tmp_path / "b", config)
    assert second.resume()
    found += [second.step() for _ in range(3)]
    assert [step["loss"] for step in found] == [step["loss"] for step in expected]
    assert straight.optimizer.scale.skipped[1] > 9
    assert torch.equal(second.optimizer.scale.tensor(), straight.optimizer.scale.tensor())


@pytest.mark.parametrize("compiled", [False, True])
def test_computed_again_or_compiled(tmp_path, compiled: bool) -> None:
    again = dataclasses.replace(BLOCKS, checkpoint_activations="none" if compiled else "full")
    plain, other = (trainer(tmp_path, how, PLAIN) for how in (BLOCKS, again))
    for layer in other.task.model.stack.layers if compiled else ():
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert other.step() == pytest.approx(plain.step(), rel=2e-3)
    assert torch.equal(plain.optimizer.scale.values, other.optimizer.scale.values)


def test_any_module() -> None:
    """Two linear layers and what is between them, alone."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.GELU(), torch.nn.Linear(8, 8, bias=False))
    x = torch.randn(5, 8, requires_grad=True)
    block(x).sum().backward()
    expected, x.grad = x.grad, None
    scaled(block.half(), torch.tensor(2.0**10))
    block.zero_grad()
    out = block(x)
    out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(x.grad, expected, rtol=0.01, atol=1e-3)
    block.zero_grad()
    (1e9 * block(x)).sum().backward()  # too much for the scale
    assert not x.grad.isnan().any()
    assert not block[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_float16_needs_them(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"gradient_scaling: expected loss with dtype {dtype}, which needs none, got"):
        dataclasses.replace(BLOCKS, dtype=dtype)


def test_windows_are_as_much_shorter_as_scales_grow_faster() -> None:
    """So that one that overflows has fallen to where it does not before it has grown back."""
    scales = BlockScales(trainer("unused", BLOCKS, PLAIN).task.model, 10)
    for _ in range(300):
        scales.update(True, ["stack.layers.0.mlp.dense_h_to_4h.bias"] if scales.numbers[1] > 2.0**16 else [])
    assert scales.skipped[1] < 300 / 4
    assert 2.0**14 < scales.numbers[1] < 2.0**17


def test_a_block_that_is_left_out_all_the_time_is_named(tmp_path, capsys) -> None:
    t = trainer(tmp_path, dataclasses.replace(BLOCKS, steps=21), PLAIN)
    module = t.task.model.get_submodule("stack.layers.1.mlp.dense_4h_to_h")
    module.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * torch.nan,))
    t.run()
    said = "step 20: the gradients of mlp of layer 2 were not finite for 20 steps, which they are left out of"
    assert capsys.readouterr().out.count(said) == 1
