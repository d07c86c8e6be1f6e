"""`cogview train` and `compare`: what they say, refuse and leave."""

import json
import re
import typing

import numpy as np
import pytest
import torch
from common import needs_processes
from PIL import Image
from spread import in_processes
from test_train_best import flip

from cogview import cli
from cogview.commands import Command
from cogview.commands.train import report
from cogview.commands.train_model import dropout_for
from cogview.data.parts import PartWriter, part_name
from cogview.data.tokens import complete
from cogview.recipes import preset
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint
from cogview.train.log import read_log
from cogview.train.loop import Result
from cogview.train.state import State

SMALL = ["--layers", "1", "--hidden-size", "16", "--heads", "2", "--batch-size", "4", "--dtype", "float32"]


def tokens(run, split="train", count=40, length=5, seed=0, grid=4, **meta):
    """Random ones of random captions, without tokenizers."""
    g = np.random.default_rng(seed)
    settings = {"image_size": 8 * grid, "max_text": 64, "languages": ["en"], "grid": [grid, grid]}
    settings |= {"text_sha256": "1" * 64, "image_sha256": "2" * 64, "codebook_size": 20, "text_vocab_size": 300} | meta
    name = part_name(split=split, count=count, length=length, seed=seed, grid=grid, **meta)
    with PartWriter(run / "tokens" / split, name, {"codes": grid**2}) as part:
        for _ in range(count):
            group = int(g.integers(2**63)) * 2
            part.write(
                g.integers(300, size=length).tolist(), {"codes": g.integers(20, size=grid**2).astype(np.int32)}, group
            )
        part.finish({})
    return complete(run / "tokens" / split, [name], settings)


def train(run, *more, steps=3, small=SMALL):
    cli.main(["train", "--run", str(run), "--steps", str(steps), *small, *more])


def header(run, name="gpt"):
    return checkpoint.read_header(checkpoint.latest(run / name))


def test_a_share_is_held_out_and_said(tmp_path, capsys):
    held = tokens(tmp_path, count=200).hold_out(0.1)[1]
    assert 5 < len(held) < 40
    train(tmp_path)
    said = capsys.readouterr().out
    assert f"{200 - len(held)} sequences; held out: {len(held)} of 200 sequences, by their captions" in said
    assert "dropout 0.2, as is good for" in said
    assert "done at step 3; held-out figures of step 3\n" in said
    assert re.search(r"  held-out image_loss \d\.\d{3}\n", said)
    assert re.search(r"best: step 3, held-out loss \d\.\d{3}; generate takes it\n", said)
    assert header(tmp_path)["hold_out"] == 0.1
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    assert (config["hold_out"], config["data"], config["held_out"]) == (0.1, 200 - len(held), len(held))
    assert (config["preset"], config["from"], config["config"]["dropout"]) == ("tiny", None, 0.2)
    train(tmp_path, steps=4)
    assert "going on at step 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"it held out 0\.1 of its samples, and now it would be 0\.2\. --name NAME"):
        train(tmp_path, "--hold-out", "0.2", steps=5)
    train(tmp_path, "--hold-out", "0", "--name", "all")
    assert "200 sequences; held out: nothing\n" in capsys.readouterr().out
    assert header(tmp_path, "all")["data"] == 200
    for wrong in ("1", "-0.1", "nan"):
        with pytest.raises(SystemExit, match="hold_out: expected a share"):
            train(tmp_path, "--hold-out", wrong, "--name", "none")


def test_a_test_split_is_taken_instead(tmp_path, capsys):
    tokens(tmp_path)
    tokens(tmp_path, "test", count=7, seed=1)
    train(tmp_path)
    said = capsys.readouterr().out
    assert (
        f"40 sequences; held out: the 7 sequences of {tmp_path / 'tokens' / 'test'}, so that --hold-out is not" in said
    )
    assert header(tmp_path)["hold_out"] == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_tokens_are_refused(tmp_path, split):
    for name in ("train", "test"):
        tokens(tmp_path, name)
    (path,) = (tmp_path / "tokens" / split).glob("*.codes.npy")
    flip(path)
    with pytest.raises(SystemExit, match=f"{path} is damaged or gone: tokenize again, which makes it anew"):
        train(tmp_path)
    assert not (tmp_path / "gpt").exists()


def test_a_run_of_before_goes_on_without_holding_out(tmp_path, capsys):
    tokens(tmp_path)
    train(tmp_path, "--hold-out", "0", "--dropout", "0")
    newest = checkpoint.latest(tmp_path / "gpt")
    parts, old = checkpoint.read(newest)
    for name in ("hold_out", "tokens", "preset", "from", "window", "validation"):
        old.pop(name)
    checkpoint.save(newest, parts, old)
    train(tmp_path, steps=5)
    said = capsys.readouterr().out
    assert "40 sequences; held out: nothing, as in this run before" in said
    assert "going on at step 3" in said
    assert header(tmp_path)["hold_out"] == 0


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("text tokenizer", {"text_sha256": "3" * 64}),
        ("text tokenizer", {"text_vocab_size": 301}),
        ("image tokenizer", {"image_sha256": "3" * 64}),
        ("image tokenizer", {"codebook_size": 21}),
        ("image size", {"grid": 5}),
    ],
)
def test_splits_that_do_not_belong_together(tmp_path, what, other):
    tokens(tmp_path)
    tokens(tmp_path, "test", **other)
    folders = [tmp_path / "tokens" / split for split in ("test", "train")]
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == f"cogview: {folders[0]} was made with another {what} than {folders[1]}: tokenize it again"
    assert not (tmp_path / "gpt").exists()


def test_tokenizers_that_were_retrained_after_the_tokens(tmp_path):
    captions = [f"picture number {n} of a fox" for n in range(30)]
    text = TextTokenizer.train(captions, 300)
    text.save(tmp_path / "text.model")
    image = VQVAE(VQConfig(codebook_size=20, dim=4, hidden=4))
    image.save(tmp_path / "vqvae.safetensors")
    made_by = {"text_sha256": text.sha256, "image_sha256": image.sha256}
    tokens(tmp_path, **made_by)
    train(tmp_path, steps=1)
    torch.manual_seed(1)
    VQVAE(image.config).save(tmp_path / "vqvae.safetensors")
    with pytest.raises(
        SystemExit,
        match=r"vqvae\.safetensors: the image tokenizer was retrained after these tokens, or is damaged: tok",
    ):
        train(tmp_path, steps=2)
    image.save(tmp_path / "vqvae.safetensors")
    TextTokenizer.train([c + " here" for c in captions], 300).save(tmp_path / "text.model")
    with pytest.raises(
        SystemExit,
        match=r"text\.model: the text tokenizer was retrained after these tokens, or is damaged: tokenize ag",
    ):
        train(tmp_path, steps=2)


def test_what_changed_since_a_run_began_is_a_sentence(tmp_path):
    tokens(tmp_path)
    train(tmp_path, "--hold-out", "0")
    gpt = tmp_path / "gpt"
    for other, said in (
        ({"seed": 1}, "its tokens were others, though as many"),
        ({"count": 50}, "it was trained on 40 samples, and now there are 50"),
        ({"count": 50, "length": 9}, "it was trained on 40 samples, and now there are 50"),
        ({"length": 9}, "its tokens were others, though as many"),
        ({"image_sha256": "3" * 64}, "its tokens were made by another image tokenizer"),
        ({"text_sha256": "3" * 64, "text_vocab_size": 400}, "its tokens were made by another text tokenizer"),
    ):
        tokens(tmp_path, **other)
        with pytest.raises(SystemExit, match=said) as stop:
            train(tmp_path, "--hold-out", "0", steps=4)
        assert re.search(r"\d{64}", str(stop.value)) is None
        assert f"--from {gpt} --name NAME begins one with its weights" in str(stop.value)
    tokens(tmp_path)
    for option, field, value in (("layers", "layers", 2), ("dropout", "dropout", 0.5)):
        changed = [*SMALL, f"--{option}", str(value)]
        with pytest.raises(SystemExit, match=f"is of another run: {field}: expected {value}, got"):
            train(tmp_path, "--hold-out", "0", steps=4, small=changed)
    train(tmp_path, "--hold-out", "0", steps=4, small=["--batch-size", "4", "--dtype", "float32"])  # sizes are known
    assert header(tmp_path)["run"]["step"] == 4


def test_a_test_split_that_does_not_fit_is_said_before_the_first_step(tmp_path):
    """Though the run began with another one."""
    tokens(tmp_path)
    tokens(tmp_path, "test", count=7)
    train(tmp_path)
    before = (tmp_path / "gpt" / "log.jsonl").read_bytes()
    tokens(tmp_path, "test", count=7, length=20)
    with pytest.raises(SystemExit, match=r"the longest caption has 20 tokens, and .*gpt has places for 9: token"):
        train(tmp_path, steps=9)
    assert (tmp_path / "gpt" / "log.jsonl").read_bytes() == before
    newest = checkpoint.latest(tmp_path / "gpt")
    parts, old = checkpoint.read(newest)
    old.pop("tokens")
    checkpoint.save(newest, parts, old)
    for split in ("train", "test"):
        tokens(tmp_path, split, grid=5)
    with pytest.raises(
        SystemExit, match=r"the pictures are 5 x 5 tokens, those that .* was trained on 4 x 4: tokenize w"
    ):
        train(tmp_path, steps=9)


def test_several_models_in_a_run_and_names_that_are_none(tmp_path, capsys):
    tokens(tmp_path)
    for kind in ("dense", "three_region"):
        train(tmp_path, "--name", kind, "--attention", kind)
        assert header(tmp_path, kind)["config"]["attention"] == kind
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for name in ("tokens", "vqvae", "text.model", "Pixels", "", ".", "..", "a/b", ".hidden", "-x", "mine"):
        with pytest.raises(SystemExit, match="name: expected"):
            cli.main(["train", "--run", str(tmp_path), f"--name={name}", "--steps", "1", *SMALL])
    out = tmp_path / "compare.png"
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    cli.main(["compare", str(tmp_path), str(tmp_path / "dense"), str(tmp_path / "empty"), "--out", str(out)])
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in re.split("[│┃]", x)[1:-1]] for x in said.splitlines() if x[:1] in ("│", "┃")]
    names = [name.rpartition("/")[2] for name in lines[0][1:]]
    rows = {title: dict(zip(names, cells, strict=True)) for title, *cells in lines}
    for kind in ("dense", "three_region"):
        held = [e for e in read_log(tmp_path / kind) if "validation_loss" in e][-1]
        for title in ("loss", "text loss", "image loss"):
            assert rows[f"held-out {title}"][kind] == f"{held['validation_' + title.replace(' ', '_')]:.3f}"
        assert [rows[title][kind] for title in ("attention", "steps", "batch")] == [kind, "3", "4"]
    assert f"left out: {tmp_path / 'empty'} holds no model" in said
    with Image.open(out) as picture:
        assert picture.size[0] > 3 * picture.size[1]
    for path in checkpoint.paths(tmp_path / "dense"):
        path.write_bytes(b"")
    (tmp_path / "three_region" / "log.jsonl").write_bytes(b"\xff\n")
    cli.main(["compare", str(tmp_path), "--out", str(out)])
    said = capsys.readouterr().out
    assert f"left out: {tmp_path / 'dense'}: no checkpoint can be read" in said
    assert "no curves" in said
    with pytest.raises(SystemExit, match="runs: expected at least one model that can be read"):
        cli.main(["compare", str(tmp_path / "dense"), str(tmp_path / "nothing"), "--out", str(out)])


@needs_processes
def test_by_two_processes_from_a_model_of_one(tmp_path, capfd):
    tokens(tmp_path, count=200)
    train(tmp_path)
    words = ["train", "--run", str(tmp_path), "--from", str(tmp_path), "--name", "second", "--steps", "3"]
    capfd.readouterr()
    in_processes(2, cli.main, [*words, "--batch-size", "4", "--dtype", "float32"], heard=True)
    said = capfd.readouterr().out
    for sentence in (
        "2 processes, 2 parts of each batch, 1 of each layer",
        "beginning with the weights of",
        "done at step 3",
    ):
        assert said.count(sentence) == 1
    assert header(tmp_path, "second")["from"] == {"folder": str(tmp_path / "gpt"), "step": 3}
    assert checkpoint.latest(tmp_path / "second").is_dir()
    train(tmp_path, "--name", "second", "--batch-size", "4", "--dtype", "float32", steps=4, small=[])  # and alone again
    assert "going on at step 3" in capfd.readouterr().out


def test_damaged_checkpoints_of_a_run(tmp_path, capsys):
    tokens(tmp_path)
    train(tmp_path, "--save-every", "2", steps=5)
    newest = checkpoint.latest(tmp_path / "gpt")
    flip(newest)
    capsys.readouterr()
    train(tmp_path, steps=6)
    said = capsys.readouterr().out.replace("\n", "")
    assert f"it is kept as {newest.name}.damaged, and step 4 taken" in said
    assert "going on at step 4" in said
    for path in checkpoint.paths(tmp_path / "gpt"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"no checkpoint can be read: .*step-00000006\.safetensors is not a readable"):
        train(tmp_path, steps=7)


def test_what_is_reported():
    def lines(step, best, loss, last, validated, finished=True):
        state = State(step=step, best_step=best, best_loss=loss)
        return list(report(Result(state, "CHECKPOINT", finished, {"loss": last}, validated)))

    over = lines(2400, 1800, 2.945, 3.133, 2400)
    assert over == [
        "done at step 2,400; held-out figures of step 2,400",
        "  held-out loss 3.133",
        "best: step 1,800, held-out loss 2.945; generate takes it",
        "held-out loss has risen since step 1,800: more pictures, dropout or fewer steps",
        "CHECKPOINT",
    ]
    stopped = lines(1234, 1200, 2.945, 2.945, 1200, finished=False)
    assert stopped[0] == "stopped at step 1,234; held-out figures of step 1,200"
    assert stopped[-1] == "CHECKPOINT; the same command goes on"
    assert not any("risen" in line for line in [*stopped, *lines(9, 8, 2.0, 2.001, 9)])
    assert list(report(Result(State(step=3), "CHECKPOINT", True, {}))) == ["done at step 3", "CHECKPOINT"]


def test_dropout_by_the_size_of_the_data():
    values = [dropout_for(n) for n in (1, 3_300, 10_000, 24_000, 10**7)]
    assert values == sorted(values, reverse=True)
    assert values[:2] == [0.2, 0.2]
    assert values[2] == 0.1
    assert values[3:] == [0, 0]
    assert preset("tiny")[0].dropout == 0  # the demo's, of 24,000


def commands(union, before=""):
    """The names of all, those inside others too."""
    for part in typing.get_args(union):
        kind, how = typing.get_args(part)
        inner = typing.get_type_hints(kind, include_extras=True).get("command")
        yield from [f"{before}{how.name}"] if inner is None else commands(inner, f"{before}{how.name} ")


COMMANDS = list(commands(Command))


def options_of(command, capsys):
    """What --help says of each option or argument: its name, and the rest in one line."""
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    inside = [found[1] for line in printed.splitlines() if (found := re.match(r"[│| ] (.*?)\s*[│|]?$", line))]
    begins = [n for n, line in enumerate(inside) if re.match(r"-|\[|[A-Z]+ ", line)]
    blocks = ["  ".join(inside[a:b]) for a, b in zip(begins, [*begins[1:], None], strict=True)]
    found = [re.split(" {2,}", block, maxsplit=1) for block in blocks]
    return printed, {name: re.sub(" +", " ", "".join(text)) for name, *text in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_text_and_a_default(command, capsys):
    printed, options = options_of(command, capsys)
    assert "None" not in printed
    assert len(options) > (0 if command == "info" else 1)
    for name, text in options.items():
        assert re.match(r"[^(]", text), f"{name} has no text: {text}"
        if not name.startswith("-h"):
            assert re.search(r"\((default: .+|required|repeatable.*)\)", text), f"{name} has no default: {text}"


def test_help_shows_the_presets_values(capsys):
    _, options = options_of("train", capsys)
    for option, default in (
        ("--learning-rate FLOAT", "tiny and fashion-tiny 0.001, dalle-12b 0.00045, others 0.0003"),
        ("--layers INT", "cogview-4b and coglm-6b 48, cogview-large 72, fashion-3b 36, dalle-12b 64, others 5"),
        ("--minutes FLOAT", "tiny 6.5, fashion-tiny 20, others no limit"),
        ("--hold-out FLOAT", "0.1"),
        ("--keep INT", "2"),
    ):
        assert options[option].endswith(f"(default: {default})")


def test_a_run_that_holds_out_goes_on_so_when_there_is_a_test_split(tmp_path, capsys):
    held = tokens(tmp_path, count=200).hold_out(0.1)[1]
    train(tmp_path)
    tokens(tmp_path, "test", count=7, seed=1)
    train(tmp_path, steps=4)
    said = capsys.readouterr().out
    assert said.count(f"held out: {len(held)} of 200 sequences") == 2
    assert header(tmp_path)["run"]["step"] == 4
    train(tmp_path, "--name", "new")
    assert "held out: the 7 sequences" in capsys.readouterr().out


def test_other_test_tokens_have_another_best(tmp_path, capsys):
    """Though they are as many."""
    tokens(tmp_path)
    tokens(tmp_path, "test", count=7, seed=1)
    train(tmp_path)
    tokens(tmp_path, "test", count=7, seed=2)
    train(tmp_path, steps=4)
    assert "held-out losses are of something else now: step 3 is the best no more" in capsys.readouterr().out
    assert header(tmp_path)["run"]["best_step"] == 4
    loss = header(tmp_path)["run"]["best_loss"]
    judged = [e for e in read_log(tmp_path / "gpt") if "validation_loss" in e]
    assert (judged[-1]["step"], judged[-1]["validation_loss"]) == (4, loss)


def test_another_batch_size_keeps_the_best_and_is_said(tmp_path, capsys):
    tokens(tmp_path)
    tokens(tmp_path, "test", count=30, seed=1)
    train(tmp_path, "--learning-rate", "1e-9")
    best = header(tmp_path)["run"]["best_loss"]
    small = ["--batch-size", "2", "--dtype", "float32", "--learning-rate", "1e-9"]
    train(tmp_path, small=small, steps=4)
    said = capsys.readouterr().out
    assert "other settings than before: steps was 3, batch_size was 4" in said
    assert "best no more" not in said
    assert header(tmp_path)["run"]["best_loss"] <= best


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("minutes", "0"),
        ("minutes", "nan"),
        ("layers", "0"),
        ("heads", "-1"),
        ("learning-rate", "inf"),
        ("weight-decay", "inf"),
        ("text-weight", "inf"),
        ("seed", "-1"),
        ("seed", str(2**63)),
    ],
)
def test_options_that_make_no_sense_are_named(tmp_path, option, value):
    tokens(tmp_path)
    with pytest.raises(SystemExit, match=f"cogview: {option.replace('-', '_')}: expected"):
        cli.main(["train", "--run", str(tmp_path), "--steps", "1", f"--{option}={value}"])
    assert not (tmp_path / "gpt").exists()


def test_flags_need_no_values(tmp_path):
    """As the README has them."""
    tokens(tmp_path)
    train(tmp_path, "--no-reshard", "--no-compile", "--watch")
    training = json.loads((tmp_path / "gpt" / "config.json").read_text())["training"]
    assert (training["reshard"], training["compile"], training["watch"]) == (False, False, True)


def test_a_model_that_diverged_is_no_success(tmp_path):
    tokens(tmp_path)
    with pytest.raises(SystemExit, match="the held-out loss is no number: this model has diverged; try a lower"):
        train(tmp_path, "--learning-rate", "1e38", "--warmup", "0", "--clip", "inf")


def test_what_was_aside_for_a_new_one_is_put_back(tmp_path):
    """Killed after the old checkpoint of a step was put aside and before the new one was there."""
    for step in (2, 3):
        (tmp_path / f".step-{step:08d}.old.tmp").mkdir()
    (tmp_path / "step-00000002").mkdir()
    checkpoint.recover(tmp_path)
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    tokens(tmp_path)
    left = tmp_path / "gpt" / ".step-00000001.safetensors.123.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    train(tmp_path)
    assert not left.exists()
