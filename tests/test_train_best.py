"""A run keeps the best by held-out loss, is the same whenever it was stopped, and survives damage."""

import dataclasses
import io
import json
import resource
import signal
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train_run import CONFIG, TRAIN, Pairs, trainer

from cogview.data import files
from cogview.parts.published import THREE, by_kind
from cogview.train import checkpoint, loop
from cogview.train.checkpoint import Damaged
from cogview.train.identity import AnotherRun
from cogview.train.log import RunLog, read_log

# Learns three pairs by heart: what it is validated on gets worse after some steps.
OVERFITS = dataclasses.replace(
    TRAIN, steps=42, learning_rate=2e-2, log_every=5, save_every=9, keep=1, validate_every=3, warmup=0.0
)
MODEL = dataclasses.replace(CONFIG, dropout=0.1, attention="dense", hidden_size=16)
TIMES = ("elapsed", "tokens_per_second", "flops_utilisation")


def run_of(folder, config=OVERFITS):
    return trainer(folder, config, MODEL, Pairs(3), Pairs(6, seed=1))


def log_of(folder):
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(folder)]


def header_of(path):
    header = checkpoint.read_header(path)
    header["run"].pop("elapsed")
    header["window"].pop("begun")
    return header


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and its result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_of(folder).run()


def test_the_best_is_kept_and_told(whole):
    folder, result = whole
    losses = {e["step"]: e["validation_loss"] for e in read_log(folder) if "validation_loss" in e}
    best = min(losses, key=losses.get)
    assert 3 <= best < 30
    assert (result.state.best_step, result.state.best_loss) == (best, losses[best])
    assert (result.validated, result.validation["loss"]) == (42, losses[42])
    assert checkpoint.paths(folder) == [checkpoint.path_of(folder, step) for step in (best, 42)]
    assert checkpoint.best(folder) == checkpoint.path_of(folder, best)
    assert checkpoint.latest(folder) == result.checkpoint
    assert checkpoint.read_header(checkpoint.best(folder))["validation"]["metrics"]["loss"] == losses[best]


def test_without_held_out_data_there_is_no_best(tmp_path):
    result = trainer(tmp_path, dataclasses.replace(OVERFITS, steps=12), MODEL).run()
    assert (result.state.best_step, result.validation, result.validated) == (None, {}, None)
    assert checkpoint.best(tmp_path) == result.checkpoint


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["before saving", "after saving", "before the log", "in a step"])
def test_killed_again_and_again_it_is_the_same_run(whole, tmp_path, monkeypatch, when):
    """Nothing is done any more where a process is killed; the best may be older or newer than what is saved in turn."""
    calls, killed = 0, []

    def dies(do):
        def call(*args, **how):
            nonlocal calls
            calls += 1
            dead = calls in (2, 3, 5, 6, 9, 14)
            if dead and when != "after saving":
                killed.append(calls)
                raise Killed
            result = do(*args, **how)
            if when == "after saving":
                args[0].saver.end()
            if dead:
                killed.append(calls)
                raise Killed
            return result

        return call

    owner, name = {
        "before saving": (loop.Trainer, "_begin_save"),
        "after saving": (loop.Trainer, "_begin_save"),
        "before the log": (RunLog, "write"),
        "in a step": (loop.Trainer, "step"),
    }[when]
    monkeypatch.setattr(owner, name, dies(getattr(owner, name)))
    while True:
        t = run_of(tmp_path)
        t.resume()
        try:
            result = t.run()
        except Killed:
            continue
        break
    assert len(killed) >= 4
    folder, expected = whole
    assert dataclasses.replace(result.state, elapsed=0) == dataclasses.replace(expected.state, elapsed=0)
    assert log_of(tmp_path) == log_of(folder)
    assert checkpoint.paths(tmp_path) == [tmp_path / path.name for path in checkpoint.paths(folder)]
    for path in checkpoint.paths(folder):
        ours, theirs = load_file(tmp_path / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert header_of(tmp_path / path.name) == header_of(path)


def test_an_entry_of_a_resumed_log_is_of_a_whole_window(tmp_path):
    """Stopped between two entries: the log is that of a run that was not, but for times and speeds."""
    for folder, stops in (("a", ()), ("b", (3, 4, 11))):
        for stop in (*stops, None):
            t = run_of(tmp_path / folder, dataclasses.replace(OVERFITS, steps=20))
            t.resume()
            step = t.step

            def stopping(t=t, step=step, stop=stop):
                values = step()
                if t.state.step == stop:
                    import signal

                    signal.raise_signal(signal.SIGINT)
                return values

            t.step = stopping
            result = t.run()
            assert result.finished == (stop is None)
            assert result.validated == {3: 3, 4: 3, 11: 9, None: 20}[stop]
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert [e["step"] for e in read_log(tmp_path / "b") if "loss" in e] == [5, 10, 15, 20]


def test_figures_of_other_held_out_data_are_not_compared(tmp_path):
    config = dataclasses.replace(OVERFITS, steps=12)
    first = run_of(tmp_path, config).run()
    assert first.state.best_loss is not None
    other = trainer(tmp_path, dataclasses.replace(config, steps=14), MODEL, Pairs(3), Pairs(5, seed=2))
    assert other.resume()
    assert (other.state.best_step, other.validation.step) == (None, None)
    result = other.run()
    assert result.state.best_step == 14
    assert result.state.best_loss == result.validation["loss"]


def test_a_best_that_is_gone_is_another(tmp_path):
    result = run_of(tmp_path).run()
    checkpoint.path_of(tmp_path, result.state.best_step).unlink()
    again = run_of(tmp_path, dataclasses.replace(OVERFITS, steps=45))
    assert again.resume()
    assert again.state.best_step is None
    assert again.run().state.best_step == 45


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    return bytes(content)


def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_taken(whole, tmp_path, capsys):
    config = dataclasses.replace(OVERFITS, keep=4)
    run_of(tmp_path, config).run()
    *_, older, before, newest = checkpoint.paths(tmp_path)
    content = flip(newest)
    before.write_bytes(before.read_bytes()[:100])
    again = run_of(tmp_path, config)
    assert again.resume()
    step = checkpoint.step_of(older)
    assert again.state.step == step
    said = capsys.readouterr().out
    assert f"{newest} is damaged: the checksum of random.cpu is wrong; it is kept as {newest.name}.damaged" in said
    assert f"{before} is not a readable checkpoint" in said
    assert f"and step {step} taken" in said
    aside = newest.with_name(f"{newest.name}.damaged")
    assert aside.read_bytes() == content
    result = again.run()
    assert result.finished
    assert dataclasses.replace(result.state, elapsed=0) == dataclasses.replace(whole[1].state, elapsed=0)
    assert log_of(tmp_path) == log_of(whole[0])
    flip(newest)
    assert run_of(tmp_path, config).resume()
    assert aside.read_bytes() == content  # none is written over another
    assert aside.with_name(f"{aside.name}.2").exists()


def test_where_none_is_good_all_are_named_and_left(tmp_path):
    run_of(tmp_path, dataclasses.replace(OVERFITS, steps=12, keep=2)).run()
    found = checkpoint.paths(tmp_path)
    for path in found:
        flip(path)
    with pytest.raises(Damaged, match="no checkpoint can be read: ") as error:
        run_of(tmp_path).resume()
    assert all(str(path) in str(error.value) for path in found)
    assert checkpoint.paths(tmp_path) == found
    with pytest.raises(ValueError, match="holds a run up to"):
        run_of(tmp_path).run()


def test_a_wrong_run_is_an_error_and_nothing_is_moved(tmp_path):
    run_of(tmp_path, dataclasses.replace(OVERFITS, steps=12, keep=2)).run()
    flip(checkpoint.latest(tmp_path))
    found = checkpoint.paths(tmp_path)
    other = trainer(tmp_path, OVERFITS, MODEL, Pairs(4), Pairs(6, seed=1))
    with pytest.raises(AnotherRun, match="it was trained on 3 samples, and now there are 4"):
        other.resume()
    assert checkpoint.paths(tmp_path) == found


def test_other_tokenizers_are_a_sentence(tmp_path, monkeypatch):
    run_of(tmp_path, dataclasses.replace(OVERFITS, steps=1)).run()
    for now, said in ((["text", "9" * 64], "another image tokenizer"), (["a", "b"], "another text tokenizer and an")):
        monkeypatch.setattr(Pairs, "tokenizers", property(lambda self, now=now: now))
        with pytest.raises(AnotherRun, match=f"its tokens were made by {said}") as error:
            run_of(tmp_path).resume()
        assert "999" not in str(error.value)


def test_checkpoints_of_version_2_go_on(whole, tmp_path):
    """Without checksums, best, windows and the last validation."""
    config = dataclasses.replace(OVERFITS, keep=1)
    t = run_of(tmp_path, config)
    for _ in range(20):
        t.step()
    path = t.save()
    tensors, header = checkpoint.read(path)
    run = {key: header["run"][key] for key in ("step", "epoch", "samples_seen", "elapsed", "skipped")}
    old = {key: header[key] for key in ("recipe", "config", "data", "tokenizers", "seed", "counts")} | {"run": run}
    for name in (name for name in tensors if name.endswith(THREE) and tensors[name].ndim):
        tensors[name] = by_kind(tensors[name], MODEL.num_heads)
    files.save_tensors(path, tensors, {"format": "cogview-run", "version": "2", "header": json.dumps(old)})
    again = run_of(tmp_path, config)
    assert again.resume()
    assert (again.state.step, again.state.best_step) == (20, None)
    result = again.run()
    assert result.validation == whole[1].validation
    assert result.state.best_step > 20


@pytest.mark.parametrize("at", ["best", "newest"])
def test_a_full_disk_leaves_the_last_good_checkpoints(whole, tmp_path, monkeypatch, at):
    best, save = whole[1].state.best_step, files.save_file
    full = best if at == "best" else 36

    def on_a_full_disk(tensors, beside, metadata):
        if json.loads(metadata["header"])["run"]["step"] >= full:
            beside.write_bytes(b"half")
            raise OSError("No space left on device")
        save(tensors, beside, metadata)

    monkeypatch.setattr(files, "save_file", on_a_full_disk)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*: No space left on device"):
        run_of(tmp_path).run()
    left = checkpoint.paths(tmp_path)
    assert left
    assert not list(tmp_path.glob(".*"))
    assert max(map(checkpoint.step_of, left)) < full
    assert at == "best" or checkpoint.path_of(tmp_path, best) in left
    monkeypatch.undo()
    again = run_of(tmp_path)
    assert again.resume()
    assert dataclasses.replace(again.run().state, elapsed=0) == dataclasses.replace(whole[1].state, elapsed=0)
    assert log_of(tmp_path) == log_of(whole[0])


GOOD = '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (GOOD + '{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n', 2),
        (GOOD + "\x00\x01\x02\n", 2),
        ('{"loss": 1.0}\n' + GOOD, 1),
        ('{"step": "2", "loss": 1.0}\n' + GOOD, 1),
        ('{"step": true}\n' + GOOD, 1),
        ('{"step": 2, "loss": "low"}\n' + GOOD, 1),
        ("[1]\n" + GOOD, 1),
        (GOOD + "no newline", 2),
        (GOOD + "[" * 100_000 + "\n", 2),
        (GOOD + f'{{"step": 2, "loss": {10**400}}}\n', 2),
        (f'{{"step": -{10**400}, "loss": 1}}\n' + GOOD, 1),
        (GOOD + f'{{"step": 2, "loss": {"9" * 5000}}}\n', 2),
    ],
)
def test_a_damaged_log_is_kept_aside_and_what_is_good_stays(tmp_path, capsys, content, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content.encode("latin1"))
    assert {"step": 1, "loss": 2.0} in read_log(tmp_path)
    RunLog(tmp_path, 10).close()
    assert f"{path}: line {line} cannot be read; the file is kept as log.jsonl.damaged\n" in capsys.readouterr().out
    assert path.with_name("log.jsonl.damaged").read_bytes() == content.encode("latin1")
    kept = read_log(tmp_path)
    assert [entry["step"] for entry in kept] == ([1, 3] if '"step": 3' in content else [1])
    RunLog(tmp_path, 10).close()
    assert "cannot be read" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, of the full disk
def test_what_a_full_disk_has_no_room_for_is_in_the_log_later(tmp_path, capsys):
    log = RunLog(tmp_path, 0)
    log.write(1, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, limits[1]))
        for step in (2, 3):
            log.write(step, loss=1.0)
        assert [entry["step"] for entry in read_log(tmp_path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = f"cannot write {log.path}: [Errno 27] File too large; training goes on, and its lines wait\n"
    assert capsys.readouterr().out.count(said) == 1
    log.write(4, loss=1.0)
    log.close()
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]
    assert "lost" not in capsys.readouterr().out


def test_a_log_that_is_none_is_nothing_to_a_report(tmp_path):
    assert read_log(tmp_path) == []
    (tmp_path / "log.jsonl").write_bytes(bytes(range(256)) * 5)
    assert read_log(tmp_path) == []
    (tmp_path / "log.jsonl").write_text(GOOD + '{"step": 2, "loss": 1.0}')  # whole, though it has no newline
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    assert read_log(tmp_path) == []


def test_config_json_has_what_holds_and_what_was_before(tmp_path):
    config = dataclasses.replace(OVERFITS, steps=6)
    run_of(tmp_path, config).run()
    path = tmp_path / "config.json"
    first = json.loads(path.read_text())
    assert first["recipe"] == "cogview"
    assert first["config"] == dataclasses.asdict(MODEL)
    assert first["training"]["learning_rate"] == 2e-2
    assert first["training"]["save_seconds"] == "inf"
    assert (first["data"], first["held_out"], first["tokenizers"]) == (3, 6, ["text", "image"])
    assert first["versions"]["torch"] == torch.__version__
    assert "before" not in first
    stamp = path.stat().st_mtime_ns
    again = run_of(tmp_path, config)
    again.resume()
    again.run()
    assert path.stat().st_mtime_ns == stamp  # nothing is different
    for steps in (9, 12):
        again = run_of(tmp_path, dataclasses.replace(config, steps=steps, learning_rate=1e-2))
        again.resume()
        again.run()
    changed = json.loads(path.read_text())
    assert changed["training"]["steps"] == 12
    assert changed.pop("before") == [
        {"until_step": 6, "training.steps": 6, "training.learning_rate": 0.02},
        {"until_step": 9, "training.steps": 9},
    ]
    path.write_text("{")
    again = run_of(tmp_path, dataclasses.replace(config, steps=12, learning_rate=1e-2))
    again.resume()
    again.run()
    assert json.loads(path.read_text()) == changed
    assert (tmp_path / "config.json.damaged").read_text() == "{"


def test_progress_is_there_before_the_first_step(tmp_path, monkeypatch):
    """The first step waits until it has been read."""
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr("rich._console", console)
    monkeypatch.setattr("cogview.progress.FIRST", 0.01)
    t = run_of(tmp_path, dataclasses.replace(OVERFITS, steps=3, log_every=2))
    step, deadline = t.step, time.monotonic() + 20

    def patient():
        while "step 0 of 3" not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        return step()

    t.step = patient
    t.run()
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("training: 0%, ")
    assert lines[0].endswith("step 0 of 3")
    assert "step 3 of 3, loss " in lines[-1]
    assert "tokens/s" in lines[-1]
