"""Training by several processes: the losses of one, whatever they share; checkpoints that any number of them goes on
from; what does not fit is refused before the first step."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import needs_processes
from spread import CONFIG, CPU, SHARED, blocks, halves, in_processes, losses, of_four, of_two, onward

from cogview.models import load_model
from cogview.train import checkpoint, loss_scale
from cogview.train.ranks import ALONE, Ranks, joined, own_device

pytestmark = needs_processes


def alike(found: list[Any], expected: list[Any], within: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=within)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_processes(2, of_two, folder)


def test_two_processes_have_the_losses_of_one(two: Any, tmp_path: Path) -> None:
    """With dropout, hidden context, pivots and accumulation; of the held-out samples, which they do not divide, too.
    Sharing the batch or the heads."""
    expected = losses(tmp_path, SHARED, 3)
    for found in two[1]:
        alike(found["float32"], expected, 2e-5)
        alike(found["heads"], expected, 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_fewer_bits(two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """As near as roundings allow; the loss scale the same."""
    monkeypatch.setattr(loss_scale, "FIRST", loss_scale.FIRST)
    half = dtype == "float16"
    expected = halves(tmp_path) if half else losses(tmp_path, dataclasses.replace(SHARED, dtype=dtype), 3)
    for found in two[1]:
        for name in (dtype, "heads, float16") if half else (dtype,):
            alike([step["loss"] for step in found[name][:-1]], [step["loss"] for step in expected[:-1]], 3e-3)
            assert found[name][-1] == expected[-1]


def test_scales_of_blocks_and_an_average(two: Any, tmp_path: Path) -> None:
    """The same losses, scales and averages as of one process, also behind a checkpoint, of held-out samples, and behind
    these. An average that begins later begins with the parameters."""
    *expected, scales, average = blocks(tmp_path)
    for found in two[1]:
        *steps, own_scales, own_average = found["blocks"]
        alike([step["loss"] for step in steps], [step["loss"] for step in expected], 3e-3)
        assert own_scales == scales
        assert own_average in ([], pytest.approx(average, rel=1e-2))
        assert found["begun later"] == 0
    assert any(found["blocks"][-1] for found in two[1])
    tensors, header = checkpoint.read(checkpoint.latest(two[0] / "blocks"))
    assert header["averaged"]
    assert tensors["average.embedding.words.weight"].shape == tensors["model.embedding.words.weight"].shape


def test_muon(two: Any, tmp_path: Path) -> None:
    """It orthogonalises in bfloat16."""
    expected = losses(tmp_path, dataclasses.replace(SHARED, optimizer="muon"), 3)
    for found in two[1]:
        alike(found["muon"], expected, 1e-3)
    tensors, _ = checkpoint.read(checkpoint.latest(two[0] / "muon"))
    assert any(name.startswith("optimizer.momentum_buffer.stack") for name in tensors)


def test_what_stays_gathered_is_gathered_once_a_step(two: Any) -> None:
    """The root and both layers; otherwise in each of two parts, layers for their backward once more."""
    for found in two[1]:
        assert found["gathers"] == [2 * (1 + 2 * CONFIG.num_layers), 1 + CONFIG.num_layers]


def test_resume_is_exact(two: Any) -> None:
    for found in two[1]:
        assert found["parts"] == found["straight"]


def test_a_checkpoint_that_is_written_meanwhile_is_of_its_step(two: Any) -> None:
    for found in two[1]:
        first, second, third, written, *again = found["meanwhile"]
        assert not written
        assert [first, second, third] == found["straight"][:3]
        assert again == [second, third]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "batch_size: expected a multiple of 4, of 2 processes and accumulate 2, got 6"),
        (1, "tensor_parallel: expected a divisor of num_heads (1), got 2"),
        (2, "learning_rate: expected 0.001 on all processes, as on rank 0, got 0.002 on rank 1"),
        (3, "hidden_size: expected 64, got 32"),
        (4, "the second cannot read it"),
        (5, "checkpoint_activations: expected none or full where several processes scale gradients by blocks, got"),
    ],
)
def test_what_does_not_fit_is_refused(two: Any, number: int, message: str) -> None:
    for found in two[1]:
        assert message in found["refused"][number]


def test_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == "cuda:1"
    with pytest.raises(ValueError, match="device: expected cuda or cpu under torchrun"):
        own_device("cuda:0")


@pytest.mark.parametrize(("count", "tensor"), [("1", 2), ("4", 3)])
def test_a_layout_that_is_none(monkeypatch: pytest.MonkeyPatch, count: str, tensor: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    said = r"tensor_parallel: expected (1 without torchrun|a divisor of the 4 pro)"
    with pytest.raises(ValueError, match=said), joined(CPU, tensor):
        pass


def test_versions_that_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process of three is told of the others."""
    monkeypatch.setattr(Ranks, "told", lambda self, own: [own, own, {"torch": "2.12.0", "cogview": "1"}])
    with pytest.raises(ValueError, match=r"torch: expected '2\.13\.0' on all .* rank 0, got '2\.12\.0' on rank 2"):
        ALONE.check_same(torch="2.13.0", cogview="1")


def test_any_number_of_processes_goes_on(tmp_path: Path) -> None:
    """Four that share batches and heads, then two or one; one, then two."""
    straight = losses(tmp_path / "straight", SHARED, 4)
    found = in_processes(4, of_four, tmp_path / "of four")
    alike(found[0][:2], straight[:2], 2e-5)
    path = checkpoint.latest(tmp_path / "of four")
    assert path.is_dir()
    for name in ("of four, one", "damaged", "cut"):
        shutil.copytree(tmp_path / "of four", tmp_path / name)
    losses(tmp_path / "of one", SHARED, 2, save=True)
    losses(tmp_path / "damaged", SHARED, 1, save=True)
    newest = checkpoint.latest(tmp_path / "damaged")
    newest.write_bytes(newest.read_bytes()[:-1])
    shutil.copytree(path, tmp_path / "cut" / "step-00000003")
    for shard in (tmp_path / "cut" / "step-00000003").glob("*.safetensors"):
        shard.write_bytes(b"")
    assert [step.name for step, _ in checkpoint.readable(tmp_path / "cut")] == ["step-00000003", path.name]
    both = in_processes(2, onward, tmp_path)
    for found in both:
        alike(found["of four"], straight[2:], 2e-5)
        alike(found["of one"], straight[2:], 2e-5)
        alike(found["damaged"][:1], straight[2:3], 2e-5)
        alike(found["cut"][:1], straight[2:3], 2e-5)
    assert (tmp_path / "damaged" / f"{newest.name}.damaged").exists()
    assert (tmp_path / "cut" / "step-00000003.damaged").exists()
    alike(losses(tmp_path / "of four, one", SHARED, 2), straight[2:], 2e-5)


def test_a_folder_is_read_as_a_file_is(two: Any, tmp_path: Path) -> None:
    """Whole, by one process; every damage is noticed, and none of it makes something of the run."""
    path = checkpoint.latest(two[0] / "parts")
    model = load_model(path)[1]
    tensors, header = checkpoint.read(path)
    assert header["run"]["step"] == 2
    assert torch.equal(model.embedding.words.weight, tensors["model.embedding.words.weight"])
    files = sorted(p.name for p in path.iterdir())
    assert len(files) == 5
    for name in files:
        for change in ("flipped", "cut", "gone"):
            copy = tmp_path / f"{name} {change}" / path.name
            shutil.copytree(path, copy)
            content = bytearray((copy / name).read_bytes())
            if change == "gone":
                (copy / name).unlink()
            elif change == "cut":
                (copy / name).write_bytes(content[:-3])
            else:
                content[len(content) // 2] ^= 4
                (copy / name).write_bytes(content)
            with pytest.raises(checkpoint.Damaged, match=str(copy)):
                checkpoint.read(copy)
