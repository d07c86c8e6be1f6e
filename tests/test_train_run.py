"""The trainer: learning, exact resume, bad steps, bad checkpoints."""

import dataclasses
import signal
import sys
import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogview.config import TrainConfig
from cogview.data import files
from cogview.generate import generate
from cogview.models import load_model
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.train import checkpoint
from cogview.train.feed import streams
from cogview.train.log import RunLog, read_log
from cogview.train.loop import State, Trainer
from cogview.train.token_task import TokenTask

CONFIG = CogViewConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    image_grid=4,
    max_positions=25,
    image_vocab=20,
    text_vocab=10,
    attention="three_region",
    block_size=4,
    window_blocks=2,
    num_pivots=12,
    dropout=0.1,
)
TRAIN = TrainConfig(steps=10, batch_size=4, dtype="float32", log_every=1, save_every=1000, validate_every=5)


class Pairs:
    """A tokenised data set in memory."""

    tokenizers = property(lambda self: ["text", "image"])

    def __init__(self, count: int, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.text = torch.randint(10, (count, 5), generator=g)
        self.text[::2, 3:] = -1
        self.codes = torch.randint(20, (count, 16), generator=g)

    def __len__(self):
        return len(self.text)

    def batch(self, indices):
        return self.text[indices], self.codes[indices]

    def order(self, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(self))


def trainer(folder, config=TRAIN, model=CONFIG, data=None, validation=None) -> Trainer:
    torch.manual_seed(0)
    recipe = CogView(model)
    return Trainer(TokenTask(recipe, recipe.model(), data or Pairs(7), config, validation), config, folder)


@contextmanager
def interrupted(monkeypatch, name=None):
    """Ctrl-C in the steps of all trainings, or of those in a folder of this name."""
    step = Trainer.step

    def interrupted_step(self):
        if name in (None, self.folder.name):
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_step)
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resume_is_exact(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("cogview.train.loss_scale.FIRST", 2.0**8)  # no step is skipped
    config = dataclasses.replace(TRAIN, dtype=dtype, accumulate=2, hide_context=0.5)
    straight = trainer(tmp_path / "a", config)
    expected = [straight.step() for _ in range(10)]
    first = trainer(tmp_path / "b", config)
    found = [first.step() for _ in range(5)]
    first.save()
    torch.rand(3)  # whatever happens in between
    second = trainer(tmp_path / "b", config)
    assert second.resume()
    found += [second.step() for _ in range(5)]
    assert found == expected
    assert second.state == straight.state == State(step=10, epoch=5, samples_seen=5)
    for name, p in straight.optimizer.master.items():
        assert torch.equal(p, second.optimizer.master[name])


def test_every_sample_once_an_epoch(tmp_path):
    t, seen = trainer(tmp_path), []
    data = t.task.data
    batch = data.batch
    data.batch = lambda indices: seen.extend(indices) or batch(indices)
    for _ in range(7):
        t.step()
    t.feed.wait()  # the next batch is made ahead
    assert sorted(seen[:28]) == sorted(list(range(7)) * 4)
    assert sorted(seen[:7]) == list(range(7))


def test_hidden_context_is_image_only_and_of_the_asked_share(tmp_path):
    task = trainer(tmp_path, dataclasses.replace(TRAIN, hide_context=0.5)).task
    vocab, draws = task.recipe.vocab, streams(range(400))
    batch = task.recipe.batch(*Pairs(400).batch(np.arange(400)))
    inputs = batch.inputs
    hidden = task._hide_context(batch, draws).inputs
    changed = hidden != inputs
    assert (hidden[changed] == vocab["MASK"]).all()
    assert vocab.is_image(inputs[changed]).all()
    shares = changed.sum(1) / vocab.is_image(inputs).sum(1)
    assert 0.4 < (shares > 0).float().mean() < 0.55  # half of the rows, less those whose rate is near 0
    assert 0.4 < shares[shares > 0].mean() < 0.65  # uniform rates
    assert shares.max() > 0.9
    whole = trainer(tmp_path).task
    assert whole._hide_context(batch, draws) is batch
    held_out = task.batch(Pairs(4), np.arange(4), draws[:4], training=False)  # nothing is hidden from a validation
    assert not (held_out.inputs == vocab["MASK"]).any()


def test_dropped_captions(tmp_path):
    """In training about the share of rows that was asked for have no text, and are laid out so."""
    task = trainer(tmp_path, dataclasses.replace(TRAIN, drop_text=0.25)).task
    rows, draws = np.zeros(2000, np.int64), streams(range(2000))
    kept = task.recipe.batch(*task.data.batch(rows[:1])).inputs
    empty = task.recipe.batch(task.data.text[:1, :0], task.data.codes[:1]).inputs
    inputs = task.batch(task.data, rows, draws).inputs
    dropped = (inputs == empty).all(1)
    assert abs(float(dropped.float().mean()) - 0.25) < 0.04
    assert (inputs == kept).all(1).logical_or(dropped).all()
    assert torch.equal(task.batch(task.data, rows[:1], draws[:1], training=False).inputs, kept)


def test_accumulation_gives_the_same_step(tmp_path):
    """With dropout and hidden context, too: what is drawn for a sample does not depend on the part that it is in."""
    config = dataclasses.replace(TRAIN, text_weight=0.3, hide_context=0.5)
    one, four = (trainer(tmp_path, dataclasses.replace(config, accumulate=n)) for n in (1, 4))
    for _ in range(3):
        assert one.step() == pytest.approx(four.step(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_learns_a_few_pairs_and_draws_them(tmp_path, dtype):
    config = TrainConfig(steps=250, batch_size=4, learning_rate=1e-2, dtype=dtype)
    model = dataclasses.replace(CONFIG, hidden_size=64, dropout=0.0)
    data = Pairs(4)
    result = trainer(tmp_path, config, model, data, data).run()
    assert result.finished
    assert result.validation["image_loss"] < 0.1
    codes = generate(
        *load_model(result.checkpoint),
        [[i for i in t if i >= 0] for t in data.text.tolist()],
        top_k=1,
    )
    assert (codes.flatten(1) == data.codes).float().mean() > 0.98


def test_layers_compile_to_as_many_graphs_however_many_they_are(tmp_path, monkeypatch):
    """Without a break; new seeds, pivots and masks compile nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = dataclasses.replace(TRAIN, hide_context=0.5, checkpoint_activations="selective")
    graphs = []
    for layers in (2, 4):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = dataclasses.replace(CONFIG, num_layers=layers)
        eager, compiled = (trainer(tmp_path, dataclasses.replace(config, compile=c), model) for c in (False, True))
        for _ in range(4):
            assert compiled.step() == pytest.approx(eager.step(), rel=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs[0] == graphs[1] <= 2


def test_learning_rate_schedule(tmp_path):
    config = dataclasses.replace(TRAIN, steps=100, warmup=0.1, learning_rate=1.0)
    t, rates = trainer(tmp_path, config), []
    for t.state.step in range(101):
        rates.append(t.learning_rate())
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    timed = trainer(tmp_path, dataclasses.replace(config, steps=None, seconds=200.0))
    timed.state.elapsed = 110.0
    assert timed.learning_rate() == pytest.approx(0.55)
    timed.state.elapsed = 300.0
    assert timed.progress() == 1.0


def test_weight_decay_spares_biases_and_norms(tmp_path):
    decayed, spared = trainer(tmp_path).optimizer._optimizers[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.04, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(CogView(CONFIG).model().parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("cogview.train.loss_scale.FIRST", 2.0**8)
    t = trainer(tmp_path, dataclasses.replace(TRAIN, dtype=dtype))
    weight = t.task.model.stack.layers[-1].next_norm.weight
    t.step()
    before = {name: p.clone() for name, p in t.optimizer.master.items()}
    kept = weight.detach().clone()
    weight.data[0] = torch.inf
    assert not np.isfinite(t.step()["loss"])
    weight.data.copy_(kept)
    assert (t.state.step, t.state.skipped) == (2, 1)
    for name, p in t.optimizer.master.items():
        assert torch.equal(p, before[name])
    assert np.isfinite(t.step()["loss"])
    assert t.state.skipped == 1


def test_loss_scale_of_float16(tmp_path):
    """Halved by an overflow, doubled after a row of good steps, without effect on what is learned, kept on resuming."""
    config = dataclasses.replace(TRAIN, dtype="float16", scale_patience=3)
    t = trainer(tmp_path, config)
    t.optimizer.scale.value = 2.0**60
    assert np.isfinite(t.step()["loss"])  # the gradients alone overflow
    assert (t.state.skipped, t.optimizer.loss_scale) == (1, 2.0**59)
    norms = {}
    for scale in (2.0**8, 2.0**12):
        t = trainer(tmp_path, config)
        t.optimizer.scale.value = scale
        norms[scale], scales = t.step()["gradient_norm"], [t.optimizer.loss_scale]
        for _ in range(3):
            t.step()
            scales.append(t.optimizer.loss_scale)
        assert scales == [scale, scale, 2 * scale, 2 * scale]
    assert norms[2.0**8] == pytest.approx(norms[2.0**12], rel=0.01)
    t.save()
    again = trainer(tmp_path, config)
    assert again.resume()
    assert (again.optimizer.loss_scale, again.optimizer.scale.good_steps) == (2.0**13, 1)


def test_batches_are_made_by_one_thread(tmp_path, threads):
    torch.set_num_threads(2)
    feed = trainer(tmp_path, TRAIN).feed
    assert feed._thread.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


def test_a_run_that_stays_broken_ends(tmp_path):
    t = trainer(tmp_path, dataclasses.replace(TRAIN, steps=100))
    t.task.model.embedding.words.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the loss was not finite for 20 steps, up to step 20: resume"):
        t.run()
    assert read_log(tmp_path)[-1]["skipped"] == 20


def test_run_logs_validates_saves_and_keeps_the_newest(tmp_path):
    config = dataclasses.replace(TRAIN, save_every=2, keep=3)
    result = trainer(tmp_path, config, validation=Pairs(6, seed=1)).run()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"step-{n:08d}.safetensors" for n in (6, 8, 10)]
    assert result.checkpoint.name == names[-1]
    log = read_log(tmp_path)
    assert [e["step"] for e in log if "loss" in e] == list(range(1, 11))
    validated = [e for e in log if "validation_loss" in e]
    assert [e["step"] for e in validated] == [5, 10]
    assert validated[-1]["validation_image_loss"] == result.validation["image_loss"]
    assert not list(tmp_path.glob(".*"))
    again = trainer(tmp_path, config, validation=Pairs(6, seed=1))
    with pytest.raises(ValueError, match=r"holds a run up to step-00000010\.safetensors: resume it"):
        again.run()
    assert again.resume()
    assert again.validation.measure() == result.validation


def test_a_time_budget_ends_the_run(tmp_path):
    config = dataclasses.replace(TRAIN, steps=None, seconds=0.3)
    result = trainer(tmp_path, config).run()
    assert result.finished
    assert result.state.elapsed >= 0.3
    assert result.state.step >= 1


def test_steps_with_a_time_limit_end_at_whichever_comes_first(tmp_path):
    t = trainer(tmp_path, dataclasses.replace(TRAIN, steps=100, seconds=50.0))
    t.state.step, t.state.elapsed = 20, 5.0
    assert t.progress() == 0.2
    t.state.elapsed = 25.0
    assert t.progress() == 0.5
    t.state.elapsed = 50.0
    assert t.progress() == 1.0


def test_checkpoints_by_time(tmp_path, monkeypatch):
    """One step a second, a checkpoint when three are over, and the last."""
    t, now, saved = trainer(tmp_path, dataclasses.replace(TRAIN, save_seconds=2.5)), [0.0], []
    monkeypatch.setattr("cogview.train.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    step, save = t.step, t._begin_save

    def second():
        now[0] += 1.0
        return step()

    t.step, t._begin_save = second, lambda: saved.append(t.state.step) or save()
    t.run()
    assert saved == [3, 6, 9, 10]


def test_validation_in_parts(tmp_path):
    whole, parts = (
        trainer(tmp_path, dataclasses.replace(TRAIN, accumulate=n), validation=Pairs(6, seed=1)) for n in (1, 4)
    )
    assert whole.validation.measure() == pytest.approx(parts.validation.measure(), rel=1e-5)


def test_a_watch_is_told_of_the_run(tmp_path):
    told = []
    trainer(tmp_path, dataclasses.replace(TRAIN, log_every=4)).run(
        lambda state, rate: told.append((state.step, rate)) or ""
    )
    assert [step for step, _ in told] == [4, 8, 10]
    assert all(rate > 0 for _, rate in told)


@pytest.mark.parametrize(
    "before", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL], ids=["python", "ignored", "system"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_the_callers_again_after_a_run(number, before, tmp_path):
    """Also where they were ignored, as in a shell's background jobs."""
    old = signal.signal(number, before)
    try:
        t = trainer(tmp_path)
        step = t.step
        t.step = lambda: (signal.raise_signal(number), step())[1]
        result = t.run()
        assert signal.getsignal(number) is before
        assert (result.finished, result.state.step) == (False, 1)
    finally:
        signal.signal(number, old)


def test_ctrl_c_saves_and_the_run_goes_on_later(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    expected = trainer(tmp_path / "a").run()
    t = trainer(tmp_path / "b")
    step = t.step

    def interrupted():
        if t.state.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step()

    t.step = interrupted
    result = t.run()
    assert (result.finished, result.state.step) == (False, 4)
    assert signal.getsignal(signal.SIGINT) == before
    rest = trainer(tmp_path / "b")
    assert rest.resume()
    assert rest.run().finished
    a, b = (load_file(tmp_path / x / expected.checkpoint.name) for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[e["loss"] for e in read_log(tmp_path / x)] for x in "ab"]
    assert losses[0] == losses[1]


def test_runs_in_a_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer(tmp_path).run()))
    thread.start()
    thread.join()
    assert results[0].finished


def test_long_captions_are_an_error_or_counted(tmp_path):
    data = Pairs(7)
    data.text = torch.zeros(7, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"text: expected at most 5 tokens beside .* got 6 in caption 0"):
        trainer(tmp_path, data=data).step()
    t = trainer(tmp_path, dataclasses.replace(TRAIN, truncate_text=True), data=data)
    t.step()
    assert t.task.counts == {"truncated": 4}
    t.save()
    again = trainer(tmp_path, dataclasses.replace(TRAIN, truncate_text=True), data=data)
    assert again.resume()
    assert again.task.counts == {"truncated": 4}
    again.step()
    assert again.resume()
    assert again.task.counts == {"truncated": 4}


def test_data_of_another_grid(tmp_path):
    data = Pairs(7)
    data.codes = data.codes[:, :9]
    with pytest.raises(ValueError, match="codes: expected 16 of each image, got 9"):
        trainer(tmp_path, data=data).step()
    with pytest.raises(ValueError, match="data, held_out: expected at least one sample"):
        trainer(tmp_path, validation=Pairs(0))


def test_checkpoints_that_do_not_fit(tmp_path):
    assert not trainer(tmp_path).resume()
    t = trainer(tmp_path)
    t.step()
    path = t.save()
    for other, message in (
        ({"model": dataclasses.replace(CONFIG, num_layers=3)}, "num_layers: expected 3, got 2"),
        ({"data": Pairs(8)}, "it was trained on 7 samples, and now there are 8"),
        ({"config": dataclasses.replace(TRAIN, seed=1)}, "seed: expected 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **other).resume()
    tensors, header = checkpoint.read(path)
    wider = dataclasses.asdict(dataclasses.replace(CONFIG, hidden_size=64))
    checkpoint.save(path, tensors, header | {"config": wider})
    with pytest.raises(ValueError, match=r"does not fit the model: .*: expected \[.*\], got \[.*\]"):
        load_model(path)
    deeper = dataclasses.asdict(dataclasses.replace(CONFIG, num_layers=10**9))
    checkpoint.save(path, tensors, header | {"config": deeper})
    with pytest.raises(ValueError, match="does not fit the model: expected 1000000000 layers"):
        load_model(path)
    for broken in ({"config": {"layers": 1}}, {"recipe": "imagen"}):
        checkpoint.save(path, tensors, header | broken)
        with pytest.raises(ValueError, match="is not a readable checkpoint"):
            load_model(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_model(path)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_model(tmp_path / "none.safetensors")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    path = t.save()
    before = path.read_bytes()

    def full_disk(tensors, beside, metadata):
        beside.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*: No space left on device"):
        t.save()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_log_drops_what_a_resumed_run_writes_again(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in range(1, 5):
        log.write(step, loss=float(step))
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a killed process
    assert [e["step"] for e in read_log(tmp_path)] == [1, 2, 3, 4]
    log = RunLog(tmp_path, 2)
    log.write(3, loss=0.0)
    log.close()
    assert [e["loss"] for e in read_log(tmp_path)] == [1.0, 2.0, 0.0]


def test_log_without_tensorboard_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, 0)
    log.write(1, loss=0.5)
    log.close()
    assert capsys.readouterr().out == "TensorBoard is not installed: this run writes log.jsonl only.\n"
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
