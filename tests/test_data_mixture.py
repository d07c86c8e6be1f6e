"""`cogview train --mix`: rows of several splits by their weights, and what a run that goes on must have."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_train_command import header, tokens, train

from cogview.data.mixture import Mixture
from cogview.data.shuffle import hashes, permutation
from cogview.train import checkpoint


@pytest.fixture
def sets(tmp_path):
    return {"icons": tokens(tmp_path, "icons", 10, 3), "photos": tokens(tmp_path, "photos", 7, 5, 1)}


def test_a_row_comes_as_often_as_its_weight_says(sets):
    mixture = Mixture(sets, {"photos": 2.5, "icons": 0.3})
    assert (mixture.names, len(mixture), mixture.rows) == (["icons", "photos"], 3 + 18, 17)
    drawn = Counter()
    for epoch in range(40):
        order = mixture.order(3, epoch)
        assert (len(order), order.dtype) == (21, np.int64)
        counts = Counter(order.tolist())
        assert sum(counts[n] for n in range(10)) == 3
        assert max(counts[n] for n in range(10)) == 1
        assert sorted(counts[n] for n in range(10, 17)) == [2] * 3 + [3] * 4
        drawn.update(n for n in range(10) if counts[n])
    assert set(drawn) == set(range(10))  # another share every time
    assert max(drawn.values()) < 25
    again = Mixture(dict(reversed(sets.items())), {"icons": 0.3, "photos": 2.5})
    assert np.array_equal(again.order(3, 1), mixture.order(3, 1))
    assert not np.array_equal(again.order(4, 1), mixture.order(3, 1))
    assert again.digest == mixture.digest != Mixture(sets, {"icons": 0.3, "photos": 2.0}).digest


def test_a_set_alone_is_what_it_is(sets):
    one = Mixture({"icons": sets["icons"]}, {"icons": 1})
    assert np.array_equal(one.order(5, 2), sets["icons"].order(5, 2))
    assert all(map(torch.equal, one.batch([3, 1]), sets["icons"].batch([3, 1])))


def test_rows_of_all_sets_in_a_batch(sets):
    mixture = Mixture(sets, {"icons": 1, "photos": 1})
    chosen = [16, 2, 10, 2, 9]
    text, codes = mixture.batch(chosen)
    assert text.shape == (5, 5)
    assert mixture.meta["text_length"] == 5
    for row, number in enumerate(chosen):
        ids, expected = sets["icons"].batch([number]) if number < 10 else sets["photos"].batch([number - 10])
        assert text[row].tolist() == ids[0].tolist() + [-1] * (5 - ids.shape[1])
        assert torch.equal(codes[row], expected[0])
    for wrong in ([17], [-1], [[1]]):
        with pytest.raises(ValueError, match="indices: expected a list of 0 to 16"):
            mixture.batch(wrong)


def test_rows_are_held_out_once_as_of_each_set(tmp_path):
    sets = {name: tokens(tmp_path, name, 200, seed=seed) for seed, name in enumerate(("a", "b"))}
    train_on, held = Mixture(sets, {"a": 4, "b": 1.5}).hold_out(0.1)
    parts = [data.hold_out(0.1) for data in sets.values()]
    assert (held.rows, len(held)) == (sum(len(pair[1]) for pair in parts),) * 2
    assert train_on.rows == 400 - held.rows
    assert len(train_on) == 4 * len(parts[0][0]) + int(1.5 * len(parts[1][0]) + 0.5)
    assert torch.equal(held.batch([held.rows - 1])[1], parts[1][1].batch([len(parts[1][1]) - 1])[1])


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("text tokenizer", {"text_sha256": "3" * 64}),
        ("image tokenizer", {"codebook_size": 21}),
        ("image size", {"grid": 5}),
    ],
)
def test_sets_that_do_not_belong_together(tmp_path, what, other):
    tokens(tmp_path)
    tokens(tmp_path, "photos", **other)
    with pytest.raises(SystemExit, match=f"mix: train was made with another {what} than photos: tokenize one of them"):
        train(tmp_path, "--mix", "train=1", "photos=2")


def test_what_is_no_mix(tmp_path):
    tokens(tmp_path)
    tokens(tmp_path, "test", count=7, seed=1)
    for wrong, message in (
        (["train"], "mix: expected NAME=WEIGHT, the name of a split and a positive number, got 'train'"),
        (["train=0"], "mix: expected NAME=WEIGHT"),
        (["train=-1"], "mix: expected NAME=WEIGHT"),
        (["../x=1"], "mix: expected NAME=WEIGHT"),
        (["train=1", "train=2"], "mix: expected train once"),
        (["train=1", "test=2"], "mix: expected splits to train on, of which test is none"),
        (["train=1", "photos=2"], "folder: no tokenised pairs at .*photos"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(tmp_path, "--mix", *wrong)
    assert not (tmp_path / "gpt").exists()


def test_a_run_goes_on_with_its_own_mix(tmp_path, capsys):
    tokens(tmp_path, count=60)
    tokens(tmp_path, "photos", count=50, seed=1)
    train(tmp_path, "--mix", "train=1", "photos=2.5")
    said = capsys.readouterr().out
    assert "in an epoch photos=2.5 train=1 times; held out: " in said
    assert " of 110 sequences, by their captions" in said
    assert header(tmp_path)["mix"] == {"photos": 2.5, "train": 1}
    train(tmp_path, "--mix", "photos=2.5", "train=1.0", steps=4)
    train(tmp_path, steps=5)
    assert capsys.readouterr().out.count("going on at step") == 2
    with pytest.raises(
        SystemExit, match=r"mix: expected photos=2\.5 train=1, as this run began, got photos=2 train=1: -"
    ):
        train(tmp_path, "--mix", "train=1", "photos=2", steps=6)
    train(tmp_path, "--name", "plain")
    with pytest.raises(SystemExit, match="mix: expected none, as this run began, got train=2"):
        train(tmp_path, "--name", "plain", "--mix", "train=2", steps=6)
    assert "mix" not in header(tmp_path, "plain")
    train(tmp_path, "--name", "plain", steps=4)
    assert header(tmp_path, "plain")["run"]["step"] == 4


def test_a_stopped_mix_ends_as_one_that_was_not(tmp_path):
    for name in ("a", "b"):
        tokens(tmp_path / name, count=11)
        tokens(tmp_path / name, "photos", count=5, seed=1)
    mix = ["--mix", "train=1", "photos=1.5", "--hold-out", "0"]
    train(tmp_path / "a", *mix, steps=9)
    train(tmp_path / "b", *mix, "--save-every", "4", steps=9)
    checkpoint.latest(tmp_path / "b" / "gpt").unlink()
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "b" / "gpt")) == 8
    train(tmp_path / "b", *mix, steps=9)
    ours, theirs = (checkpoint.read(checkpoint.latest(tmp_path / name / "gpt"))[0] for name in ("a", "b"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("model."))


def test_a_large_permutation_is_that_of_the_hashes():
    """Of so many some begin alike."""
    for n, keys in ((1_500_000, range(3)), (70, range(40)), (1, [0]), (0, [0])):
        for key in keys:
            assert np.array_equal(permutation(n, key), np.argsort(hashes(n, key), kind="stable"))
