"""Checkpoints: checksums, damage, the best one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogview.train import checkpoint
from cogview.train.checkpoint import Damaged
from cogview.train.ranks import ALONE
from cogview.train.saving import Saver
from cogview.train.state import Best, State

TENSORS = {
    "model.a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "model.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "optimizer.step": torch.tensor(7.0),
    "random.draws": torch.arange(9, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
}


def saved(folder, step=1, **run):
    path = checkpoint.path_of(folder, step)
    checkpoint.save(path, TENSORS, {"recipe": "cogview", "run": {"step": step, **run}})
    return path


def change(path, **metadata):
    """Rewrites a checkpoint with other metadata, None for none."""
    with safe_open(path, "pt") as file:
        kept = {name: value for name, value in {**file.metadata(), **metadata}.items() if value is not None}
    save_file(load_file(path), path, kept)


def test_what_is_read_is_what_was_written(tmp_path):
    tensors, header = checkpoint.read(saved(tmp_path))
    assert header == {"recipe": "cogview", "run": {"step": 1}}
    assert tensors.keys() == TENSORS.keys()
    for name, value in tensors.items():
        assert value.dtype == TENSORS[name].dtype
        assert torch.equal(value, TENSORS[name])


def test_every_flipped_bit_is_noticed(tmp_path):
    """Anywhere in the file; or else nothing is different, as with blanks at the end of safetensors' header."""
    path = saved(tmp_path)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    blanks = length - len(whole[:length].rstrip(b" "))
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        if length - blanks <= place < length and flipped[place] in b" \t\n\r":
            continue
        with pytest.raises(Damaged, match=str(path)):
            checkpoint.read(path)


def test_the_tensor_is_named_and_only_what_is_read_is_checked(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    place = whole.index(TENSORS["model.half"].view(torch.uint8).numpy().tobytes(), 8)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(Damaged, match=r"step-00000001\.safetensors is damaged: the checksum of model\.half is wrong"):
        checkpoint.read(path, prefix="model.")
    assert checkpoint.read(path, prefix="optimizer.")[0].keys() == {"optimizer.step"}
    assert checkpoint.read_header(path)["run"] == {"step": 1}


def test_damage_is_told_from_what_is_of_another_kind(tmp_path, monkeypatch):
    path = saved(tmp_path)
    change(path, checksums=None)
    with pytest.raises(Damaged):
        checkpoint.read(path)
    change(path, version="2")  # as they were written before there were checksums
    assert torch.equal(checkpoint.read(path)[0]["model.a"], TENSORS["model.a"])
    change(path, header=json.dumps([1]))
    with pytest.raises(Damaged, match="is not a readable checkpoint"):
        checkpoint.read(path)
    monkeypatch.setattr(checkpoint, "VERSION", "5")
    later = saved(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"expected format cogview-run version 4, got .* version 5") as error:
        checkpoint.read(later)
    assert not isinstance(error.value, Damaged)
    with pytest.raises(ValueError, match="there is no checkpoint") as error:
        checkpoint.read(tmp_path / "none.safetensors")
    assert not isinstance(error.value, Damaged)
    with pytest.raises(Damaged, match="is not a readable checkpoint"):
        checkpoint.read(tmp_path)  # a folder is one of several processes

    def refused(*args, **options):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(checkpoint, "safe_open", refused)
    with pytest.raises(OSError, match="cannot read checkpoint"):
        checkpoint.read(later)
    monkeypatch.undo()
    for content in (b"", b"x", later.read_bytes()[:-1], later.read_bytes() + b"x"):
        later.write_bytes(content)
        with pytest.raises(Damaged, match="is not a readable checkpoint"):
            checkpoint.read(later)


def test_order_is_that_of_steps_and_other_files_are_left_alone(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.best(tmp_path) is None
    other = tmp_path / "step-best.safetensors"
    other.write_bytes(b"")
    aside = tmp_path / "step-00000003.safetensors.damaged"
    aside.write_bytes(b"")
    found = [saved(tmp_path, step) for step in (100_000_000, 99_999_999, 5)]
    assert checkpoint.paths(tmp_path) == found[::-1]
    assert checkpoint.latest(tmp_path) == found[0]
    checkpoint.prune(tmp_path, 1, best_step=5)
    assert checkpoint.paths(tmp_path) == [found[2], found[0]]
    assert other.exists()
    assert aside.exists()


def test_of_a_step_the_last_written_is_kept(tmp_path):
    """Alone, where several processes had come to the same step: theirs is another state by roundings."""
    theirs = checkpoint.path_of(tmp_path, 5, several=True)
    theirs.mkdir()
    first, saver = saved(tmp_path, 4), Saver(tmp_path, ALONE)
    path = saver.begin(5, TENSORS, {"run": {"step": 5}}, keep=2, best=None)
    saver.end()
    assert checkpoint.paths(tmp_path) == [first, path]


def test_a_best_that_was_not_written_is_taken_back():
    state = State(step=5, best_step=5, best_loss=3.0)
    best = Best()
    best.begin(state)
    state.step = 7
    best.begin(state)  # not the best
    best.take_back(state)
    assert (state.best_step, state.best_loss) == (5, 3.0)
    state.step, state.best_step, state.best_loss = 9, 9, 2.0
    best.begin(state)
    for _ in range(2):  # which another process may have found before
        best.take_back(state)
        assert (state.best_step, state.best_loss) == (5, 3.0)


def test_the_best_is_what_the_newest_says(tmp_path):
    first, second = saved(tmp_path, 5), saved(tmp_path, 6)
    assert checkpoint.best(tmp_path) == second  # without held-out data
    third = saved(tmp_path, 7, best_step=5, best_loss=2.0)
    assert checkpoint.best(tmp_path) == first
    saved(tmp_path, 8, best_step=6, best_loss=1.0)
    assert checkpoint.best(tmp_path) == second
    second.unlink()
    assert checkpoint.best(tmp_path) == checkpoint.path_of(tmp_path, 8)
    checkpoint.path_of(tmp_path, 8).write_bytes(b"")
    assert checkpoint.best(tmp_path) == first  # by the newest that can be read
    for path in (first, third):
        path.write_bytes(b"")
    assert checkpoint.best(tmp_path) == checkpoint.path_of(tmp_path, 8)
    with pytest.raises(Damaged):
        checkpoint.read(checkpoint.best(tmp_path))
