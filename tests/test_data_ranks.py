"""`cogview tokenize` by several processes: who does what, what they wait for, and that the tokens are the same."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_cli_tokenize import captions, shard
from torch.distributed import HashStore

from cogview import cli
from cogview.data.ranks import Ranks
from cogview.data.shards import PairDataset
from cogview.pipeline import finish, make_parts
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizing import Tokenizing

SIZES = (9, 4, 7, 1, 5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Some of different lengths, one cut off, one overwritten in a picture and one that is no tar at all any more."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [Path(shard(folder / f"{k}.tar", captions(n, 10 * k))) for k, n in enumerate(SIZES)]
    paths[1].write_bytes(paths[1].read_bytes()[: -12 * 1024])
    contents = paths[2].read_bytes()
    place = contents.rindex(b"\x89PNG")
    paths[2].write_bytes(contents[:place] + b"no" + contents[place + 2 :])
    (folder / "5.tar").write_bytes(b"garbage" * 1000)
    return [*paths, folder / "5.tar"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tokenizers."""
    folder = tmp_path_factory.mktemp("run")
    TextTokenizer.train(captions(60)).save(folder / "text.model")
    torch.manual_seed(0)
    VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8)).save(folder / "vqvae.safetensors")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def how(run):
    return Tokenizing(TextTokenizer.load(run / "text.model"), VQVAE.load(run / "vqvae.safetensors"), image_size=32)


def by(count, shards, run, out, only=None):
    """Makes the parts by so many processes, or some of them, here threads."""
    store, errors = HashStore(), []

    def one(rank):
        try:
            with Ranks(rank, count, 2, store) as ranks:
                data = PairDataset(shards)
                mine = ranks.share([path.stat().st_size for path in shards])
                make_parts(data, mine, how(run), out, ranks=ranks)
        except (OSError, RuntimeError) as error:
            errors.append(str(error))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (range(count) if only is None else only)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_shares_are_even_and_the_same_for_all():
    weights = [5, 900, 40, 40, 40, 300, 1, 1, 600]
    for count in (1, 2, 3, 20):
        shares = [Ranks(rank, count).share(weights) for rank in range(count)]
        assert sorted(n for share in shares for n in share) == list(range(len(weights)))
        assert all(share == sorted(share) for share in shares)
    loads = [sum(weights[n] for n in Ranks(rank, 2).share(weights)) for rank in range(2)]
    assert max(loads) - min(loads) <= 40
    assert Ranks(3, 20).share([]) == []


def test_alone_or_as_torchrun_says(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Ranks.of_environment()
    assert (alone.rank, alone.count, alone.first, list(alone.others)) == (0, 1, True, [])
    assert [alone.counted("pairs", n) for n in (2, 0, 3)] == [2, 2, 5]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR expected"):
        Ranks.of_environment()
    assert Ranks(0, 64, local=10**6).cores() == 1


def test_who_waits_hears_what_is_said_or_why_nothing_comes():
    store = HashStore()
    first, second = Ranks(0, 2, store=store), Ranks(1, 2, store=store)
    waited = []

    def later():
        waited.append(1)
        second.tell("size", [64, "x"])

    assert first.hear("size", 1, later) == [64, "x"]
    assert waited
    with pytest.raises(ZeroDivisionError), second:
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="process 1: division by zero"):
        first.hear("parts", 1)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_folder(shards, run, tmp_path, count):
    good = shards[:-1]
    for name, ranks in (("one", 1), ("many", count)):
        assert by(ranks, good, run, tmp_path / name) == []
        finish(PairDataset(good), how(run), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_what_a_killed_job_made_is_kept_by_another_number_of_processes(shards, run, tmp_path):
    good, out = shards[:-1], tmp_path / "out"
    by(3, good, run, out, only=[1])
    with pytest.raises(OSError, match="could not be read by the process whose it was: tokenize again"):
        finish(PairDataset(good), how(run), out)
    (out / ".part-x.codes.npy.12ab34cd.tmp").write_bytes(b"of the process that was killed")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert len(before) == 4 * len(Ranks(1, 3).share([path.stat().st_size for path in good]))
    assert by(2, good, run, out) == []
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert before.items() < after.items()
    tokens = finish(PairDataset(good), how(run), out)
    assert len(list(out.iterdir())) == 1 + 4 * len(good)
    by(1, good, run, tmp_path / "one")
    assert len(tokens) == len(finish(PairDataset(good), how(run), tmp_path / "one"))
    assert contents(out) == contents(tmp_path / "one")


def test_a_shard_that_cannot_be_read_at_the_moment_is_named_and_the_rest_done(shards, run, tmp_path, monkeypatch):
    good, out, pread = shards[:-1], tmp_path / "out", os.pread
    broken = good[2].stat().st_ino

    def failing(file, size, offset):
        if os.fstat(file).st_ino == broken:
            raise OSError(5, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    errors = by(2, good, run, out)
    assert any("2.tar': cannot be read (Input/output error); the other shards are done" in error for error in errors)
    assert len(list(out.glob("part-*.json"))) == len(good) - 1
    monkeypatch.undo()
    assert by(1, good, run, out) == []
    assert len(list(out.glob("part-*.json"))) == len(good)


def test_torchrun(shards, run, tmp_path, capsys):
    """Tokenizers that another process trains, a shard that is no tar, and what is said, once more after a resume."""
    arguments = ["tokenize", *map(str, shards), "--image-size", "32", "--codebook", "16", "--code-dim", "8"]
    arguments += ["--hidden", "8", "--image-passes", "0.1", "--run"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    root = str(Path(__file__).parents[1])
    clean = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"PYTHONPATH": root}
    many = subprocess.run(
        [*launch, "cogview", *arguments, str(tmp_path / "many")], env=clean, capture_output=True, text=True
    )
    assert many.returncode == 0, many.stderr
    for name in ("text.model", "vqvae.safetensors"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_bytes((tmp_path / "many" / name).read_bytes())
    cli.main([*arguments, str(tmp_path / "one")])
    assert contents(tmp_path / "one" / "tokens" / "train") == contents(tmp_path / "many" / "tokens" / "train")
    capsys.readouterr()
    cli.main([*arguments, str(tmp_path / "many")])
    again = capsys.readouterr().out
    said = many.stdout[many.stdout.index(" sequences in") :].splitlines()
    assert said == again[again.index(" sequences in") :].splitlines()
    assert said[1] == "left out: 1 pictures that cannot be read"
    assert "  1 picture not readable, first 2.tar:2-006" in said
    assert "  1 truncated tar, first 1.tar:byte" in "\n".join(said)
    assert "  1 shard not readable, first " in "\n".join(said)
    assert "5.tar' is no uncompressed tar of samples" in said[-1]
    assert many.stdout.count("text tokenizer: ") == 1
