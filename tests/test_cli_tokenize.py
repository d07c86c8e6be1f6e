"""`cogview tokenize`: what it says, with other shards, stopped, with tokenizers of another run."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_run import interrupted

from cogview import cli
from cogview.data.images import pixels
from cogview.data.parts import group, part_name
from cogview.data.shards import ShardWriter
from cogview.data.tar_index import TarIndex
from cogview.data.tokens import TokenDataset
from cogview.demo.scenes import render, sample_scenes
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

SMALL = ["--codebook", "16", "--code-dim", "8", "--hidden", "8", "--image-size", "32"]
QUICK = [*SMALL, "--image-passes", "2"]


def shard(path, captions):
    with ShardWriter(path) as writer:
        for number, (scene, caption) in enumerate(zip(sample_scenes("train", len(captions)), captions, strict=True)):
            png = io.BytesIO()
            render(scene).save(png, "PNG")
            writer.write(f"{path.stem}-{number:03d}", {"png": png.getvalue(), "txt": caption.encode()})
    return str(path)


def captions(count, first=0):
    return [f"picture number {n}" for n in range(first, first + count)]


def tokenize(*arguments):
    cli.main(["tokenize", *map(str, arguments)])


def sequences(run, split="train"):
    return len(TokenDataset(run / "tokens" / split))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 40 pairs."""
    folder = tmp_path_factory.mktemp("own")
    tokenize(shard(folder / "a.tar", captions(40)), "--run", folder / "run", *QUICK)
    return folder / "run"


def test_what_is_said(tmp_path, capsys):
    a = shard(tmp_path / "a.tar", captions(40))
    tokenize(a, "--run", tmp_path / "run", *QUICK)
    said = capsys.readouterr().out
    assert "text tokenizer: " in said
    assert "pieces, trained on these captions" in said
    assert "image tokenizer: 3 steps, 2.4 passes over 40 pictures of 32 x 32, about 0.0 minutes" in said
    assert "dB on held-out pictures (4)" in said
    assert "of 16 codes used" in said
    assert (
        "2.4 passes over your pictures, 3 steps; more would help (--retrain-tokenizers without --image-passes)" in said
    )
    assert "40 sequences in" in said
    assert "left out: nothing" in said
    assert not (tmp_path / "run" / "pixels").exists()
    tokenize(a, "--run", tmp_path / "run")
    said = capsys.readouterr().out
    assert f"image tokenizer: 16 codes, in {tmp_path / 'run'}" in said.replace("\n", "")
    assert "more would help" not in said


def test_held_out_pictures_are_those_that_the_gpt_holds_out_first(run):
    log = checkpoint.read_header(checkpoint.latest(run / "vqvae"))
    assert log["data"] == 36
    lowest = sorted(group(caption) for caption in captions(40))[:4]
    assert all(value < 0.2 * 2**64 for value in lowest)
    held = TokenDataset(run / "tokens" / "train").hold_out(float(np.nextafter(lowest[-1] / 2**64, 1)))[1]
    assert len(held) in (3, 4)


def test_more_shards_and_fewer(run, tmp_path):
    """By the tokenizers that are there; test pairs in the size of the others."""
    hashes = VQVAE.load(run / "vqvae.safetensors").sha256, TextTokenizer.load(run / "text.model").sha256
    a, b = run.parent / "a.tar", shard(tmp_path / "b.tar", captions(10, 40))
    tokenize(a, b, "--run", run)
    assert sequences(run) == 50
    tokenize(b, "--run", run, "--split", "test")
    assert sequences(run, "test") == 10
    assert TokenDataset(run / "tokens" / "test").meta["image_size"] == 32
    tokenize(a, "--run", run)
    assert sequences(run) == 40
    assert hashes == (VQVAE.load(run / "vqvae.safetensors").sha256, TextTokenizer.load(run / "text.model").sha256)


def test_retraining_is_explicit_and_loses_nothing(run, tmp_path, capsys):
    b = shard(tmp_path / "b.tar", captions(30, 50))
    folder = tmp_path / "run"
    tokenize(b, "--run", folder, "--from", run)
    old = (folder / "vqvae.safetensors").read_bytes()
    assert old == (run / "vqvae.safetensors").read_bytes()
    tokenize(b, "--run", folder, "--retrain-tokenizers", *QUICK, "--hidden", "16")
    assert (folder / "tokenizers-1" / "vqvae.safetensors").read_bytes() == old
    assert VQVAE.load(folder / "vqvae.safetensors").config.hidden == 16
    assert sequences(folder) == 30
    assert "dB on held-out pictures (3)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="retrain_tokenizers: expected split train"):
        tokenize(b, "--run", folder, "--retrain-tokenizers", "--split", "test")


def test_tokenizers_of_another_run(run, tmp_path):
    b = shard(tmp_path / "b.tar", captions(5, 50))
    with pytest.raises(SystemExit, match=r"from: expected text\.model in it"):
        tokenize(b, "--run", tmp_path / "run", "--from", tmp_path / "nothing")
    tokenize(b, "--run", tmp_path / "run", "--from", run)
    theirs, ours = (TokenDataset(folder / "tokens" / "train") for folder in (run, tmp_path / "run"))
    assert theirs.tokenizers == ours.tokenizers
    tokenize(b, "--run", tmp_path / "other", *QUICK)
    with pytest.raises(SystemExit, match=r"from: .*other has another text\.model than"):
        tokenize(b, "--run", tmp_path / "other", "--from", run)


def stopped(monkeypatch, *arguments):
    """A tokenize that is interrupted in the first step of the image tokenizer's training."""
    with interrupted(monkeypatch), pytest.raises(SystemExit, match="the same command goes on"):
        tokenize(*arguments)


def test_a_stopped_image_tokenizer_goes_on(tmp_path, monkeypatch):
    a, b = shard(tmp_path / "a.tar", captions(20)), shard(tmp_path / "b.tar", captions(20, 20))
    arguments = ["--run", tmp_path / "run", *SMALL, "--image-passes", "4"]
    stopped(monkeypatch, a, *arguments)
    assert not (tmp_path / "run" / "vqvae.safetensors").exists()
    for other in ([b, *arguments], [a, b, *arguments], [a, *arguments, "--image-size", "64"]):
        with pytest.raises(SystemExit, match=r"trained on .*An image tokenizer is half trained there"):
            tokenize(*other)
    with pytest.raises(SystemExit, match=r"codebook_size: expected 32, got 16\. An image tokenizer is half trained"):
        tokenize(a, *arguments, "--codebook", "32")
    with pytest.raises(SystemExit, match="run: expected the tokenizers of a training split"):
        tokenize(a, "--run", tmp_path / "run", "--split", "test")
    tokenize(a, *arguments)
    assert checkpoint.read_header(checkpoint.latest(tmp_path / "run" / "vqvae"))["run"]["step"] == 3
    stopped(monkeypatch, a, *arguments, "--retrain-tokenizers")
    with pytest.raises(SystemExit, match="its tokenizers are being trained: `cogview tokenize` has to go on"):
        cli.main(["train", "--run", str(tmp_path / "run"), "--steps", "1"])
    tokenize(a, *arguments, "--retrain-tokenizers")
    assert [path.name for path in (tmp_path / "run").glob("tokenizers-*")] == ["tokenizers-1"]
    assert not (tmp_path / "run" / "tokenizing.json").exists()


def test_a_wrong_first_try_leaves_no_tokenizer(tmp_path, monkeypatch):
    """Stopped, and begun again with the right captions; but a text.model that somebody put there stays."""
    latin, chinese = captions(20), ["红色的狐狸在树上"] * 20
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number, (scene, en, zh) in enumerate(zip(sample_scenes("train", 20), latin, chinese, strict=True)):
            png = io.BytesIO()
            render(scene).save(png, "PNG")
            writer.write(str(number), {"png": png.getvalue(), "json": json.dumps({"url": en, "zh": zh}).encode()})
    stopped(monkeypatch, tmp_path / "a.tar", "--run", tmp_path / "run", *QUICK, "--languages", "url")
    tokenize(tmp_path / "a.tar", "--run", tmp_path / "run", *QUICK, "--languages", "zh", "--image-passes", "4")
    assert len(TextTokenizer.load(tmp_path / "run" / "text.model").encode(chinese[0])) < 4
    own = TextTokenizer.train(latin)
    own.save(tmp_path / "other" / "text.model")
    tokenize(tmp_path / "a.tar", "--run", tmp_path / "other", *QUICK, "--languages", "zh")
    assert TextTokenizer.load(tmp_path / "other" / "text.model").sha256 == own.sha256


def test_damaged_tokens_are_made_again(run, tmp_path):
    b = shard(tmp_path / "b.tar", captions(9, 60))
    folder = tmp_path / "run"
    tokenize(b, "--run", folder, "--from", run)
    out = folder / "tokens" / "train"
    expected = TokenDataset(out).batch(range(9))
    (part,) = out.glob("part-*.json")

    def flip(path):
        contents = bytearray(path.read_bytes())
        contents[-3] ^= 4
        path.write_bytes(contents)

    for damage in (
        lambda: flip(part.with_suffix(".codes.npy")),
        lambda: part.with_suffix(".text.npy").write_bytes(part.with_suffix(".text.npy").read_bytes()[:200]),
        lambda: part.with_suffix(".groups.npy").unlink(),
        lambda: part.write_text("{"),
        lambda: (out / "meta.json").write_text("{"),
        lambda: (out / f".{part.name}.123.tmp").write_bytes(b"of a killed process"),
    ):
        damage()
        tokenize(b, "--run", folder)
        assert all(map(torch.equal, TokenDataset(out).batch(range(9)), expected))
        assert len(list(out.iterdir())) == 5


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / "run" / "pixels").mkdir(parents=True)
    (tmp_path / "run" / "pixels" / ".abc.npy.123.tmp").write_bytes(b"half")
    tokenize(shard(tmp_path / "a.tar", captions(6)), "--run", tmp_path / "run", *QUICK)
    assert sequences(tmp_path / "run") == 6
    assert not (tmp_path / "run" / "pixels").exists()


def test_damaged_tokenizers_make_no_tokens(run, tmp_path):
    b, folder = shard(tmp_path / "b.tar", captions(5, 50)), tmp_path / "run"
    tokenize(b, "--run", folder, "--from", run)
    kept, path = (folder / "vqvae.safetensors").read_bytes(), folder / "vqvae.safetensors"
    for place in (-1, -1000, len(kept) // 2):
        contents = bytearray(kept)
        contents[place] ^= 1
        path.write_bytes(contents)
        with pytest.raises(SystemExit, match=r"vqvae\.safetensors' is damaged: its checksum is wrong"):
            tokenize(b, "--run", folder)
    with pytest.raises(SystemExit, match="is damaged: its checksum is wrong"):
        tokenize(b, "--run", tmp_path / "new", "--from", folder)
    assert not (tmp_path / "new" / "text.model").exists()
    path.write_bytes(kept)
    TextTokenizer.train(captions(9)).save(folder / "text.model")
    with pytest.raises(SystemExit, match=r"made by another text\.model than it has now: is that damaged"):
        tokenize(b, "--run", folder)
    shutil.rmtree(folder / "tokens")
    tokenize(b, "--run", folder)
    assert sequences(folder) == 5


def test_a_shard_that_changes_while_it_is_read(run, tmp_path, monkeypatch):
    """Gives no tokens, and when it is there again it gives all."""
    b, folder, encode = tmp_path / "b.tar", tmp_path / "run", VQVAE.encode
    shard(b, captions(5, 50))
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "encode", lambda self, images: (b.touch(), encode(self, images))[1])
        with pytest.raises(SystemExit, match=r"b\.tar.* changed while it was read"):
            tokenize(b, "--run", folder, "--from", run)
    assert not list((folder / "tokens" / "train").glob("part-*.json"))
    tokenize(b, "--run", folder)
    assert sequences(folder) == 5


def test_contents_given_twice_count_once(run, tmp_path, capsys):
    b = shard(tmp_path / "b.tar", captions(5, 50))
    shutil.copyfile(b, tmp_path / "copy.tar")
    tokenize(b, tmp_path / "copy.tar", "--run", tmp_path / "run", "--from", run)
    assert sequences(tmp_path / "run") == 5
    assert "1 shard of the same contents as another, first copy.tar" in capsys.readouterr().out


def test_what_is_lost_is_said(run, tmp_path, capsys):
    png = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(png, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, contents in (
            ("1.png", png.getvalue()),
            ("1.json", b'{"en": "a fox", "zh": "half \\ud83d"}'),
            ("IMG_2021.05.1.png", png.getvalue()),
            ("IMG_2021.05.1.txt", b"lost"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    tokenize(tmp_path / "a.tar", "--run", tmp_path / "run", "--from", run, "--image-passes", "7", "--codebook", "5")
    said = capsys.readouterr().out
    assert "1 sequences in" in said
    assert "1 caption not valid Unicode, first a.tar:1" in said
    assert "2 name with dots before its extension, first a.tar:IMG_2021.05.1.png" in said
    assert "not used, since the tokenizers are there: --codebook, --image-passes" in said


def test_captions_that_are_all_too_long_are_told_before_anything_is_trained(tmp_path):
    a = shard(tmp_path / "a.tar", captions(9))
    with pytest.raises(SystemExit, match=r"max_text: expected at least \d, of the shortest caption, got 1"):
        tokenize(a, "--run", tmp_path / "run", *QUICK, "--max-text", "1")
    assert not (tmp_path / "run" / "vqvae").exists()


def test_chinese_with_the_defaults(tmp_path):
    """More characters than a small vocabulary holds; and with --text-pieces below their number."""
    words = ["".join(chr(0x4E00 + (n * 37 + k * k * 11) % 1100) for k in range(12)) for n in range(200)]
    path = shard(tmp_path / "a.tar", words)
    for name, more in (("default", []), ("few", ["--text-pieces", "400"])):
        tokenize(path, "--run", tmp_path / name, *QUICK, *more)
        assert sequences(tmp_path / name) == 200
    text = TextTokenizer.load(tmp_path / "few" / "text.model")
    assert text.vocab_size <= 400
    assert text.decode(text.encode(words[5])) == words[5]


BOTH = [*captions(10), *(f"树上有{n}只红色的狐狸" for n in range(10))]


def test_lower_case_letters(tmp_path):
    """For good; asked for of a run with capitals, or beside a model that is given, it is refused."""
    a, folder = shard(tmp_path / "a.tar", [c.upper() for c in captions(20)]), tmp_path / "run"
    tokenize(a, "--run", folder, *QUICK, "--text-lowercase")
    text = TextTokenizer.load(folder / "text.model")
    assert text.decode(text.encode("A Red FOX")) == "a red fox"
    rows, _ = TokenDataset(folder / "tokens" / "train").batch([0])
    assert text.decode([i for i in rows[0].tolist() if i >= 0]) == captions(20)[0].lower()
    tokenize(a, "--run", folder)
    tokenize(a, "--run", tmp_path / "capitals", *QUICK)
    with pytest.raises(SystemExit, match=r"text_lowercase: .*capitals has a text tokenizer that knows capital letters"):
        tokenize(a, "--run", tmp_path / "capitals", "--text-lowercase")
    given = ["--text-model", folder / "text.model", "--text-lowercase"]
    with pytest.raises(SystemExit, match="text_lowercase: expected none with --text-model, which has its own, got"):
        tokenize(a, "--run", tmp_path / "third", *QUICK, *given)


def test_a_bilingual_vocabulary(tmp_path, capsys):
    """Goes on without being asked for again; another one is refused, trained anew or not, and changes nothing."""
    a, b, folder = shard(tmp_path / "a.tar", BOTH), shard(tmp_path / "b.tar", BOTH[5:]), tmp_path / "run"
    tokenize(a, "--run", folder, *QUICK, "--text-vocabulary", "bilingual")
    text = TextTokenizer.load(folder / "text.model")
    said = f"pieces, trained on these captions; Chinese from {text.chinese_from} on"
    assert said in capsys.readouterr().out.replace("\n", " ")
    tokens = TokenDataset(folder / "tokens" / "train")
    assert tokens.meta["chinese_from"] == text.chinese_from
    rows, _ = tokens.batch(range(20))
    assert (rows < text.chinese_from).all(1).tolist() == [True] * 10 + [False] * 10
    tokenize(a, b, "--run", folder)
    tokenize(b, "--run", folder, "--split", "test", "--text-vocabulary", "bilingual")
    assert (sequences(folder), sequences(folder, "test")) == (35, 15)
    assert TokenDataset(folder / "tokens" / "test").meta["chinese_from"] == text.chinese_from
    plain = ["--text-vocabulary", "plain"]
    refusal = r"text_vocabulary: .*run has a bilingual text tokenizer, not a plain one: name another run, or --retrain"
    for more in (["--run", folder], ["--run", tmp_path / "other", "--from", folder]):
        with pytest.raises(SystemExit, match=refusal):
            tokenize(a, *more, *plain)
    assert not (tmp_path / "other").exists()
    assert TextTokenizer.load(folder / "text.model").sha256 == text.sha256
    tokenize(a, "--run", folder, *QUICK, *plain, "--retrain-tokenizers")
    assert TextTokenizer.load(folder / "tokenizers-1" / "text.model").sha256 == text.sha256
    assert TextTokenizer.load(folder / "text.model").chinese_from is None
    assert "chinese_from" not in TokenDataset(folder / "tokens" / "train").meta
    with pytest.raises(SystemExit, match=r"text_vocabulary: .*run has a plain text tokenizer, not a bilingual one"):
        tokenize(a, "--run", folder, "--text-vocabulary", "bilingual")


def test_tokens_are_named_as_before(tmp_path):
    """Where the vocabulary is plain, and by the text tokenizer's hash alone where it is not."""
    a = shard(tmp_path / "a.tar", BOTH)
    for name in ("plain", "bilingual"):
        tokenize(a, "--run", tmp_path / name, *QUICK, "--text-vocabulary", name)
    plain, bilingual = (TokenDataset(tmp_path / name / "tokens" / "train").meta for name in ("plain", "bilingual"))
    assert set(bilingual) - set(plain) == {"chinese_from"}
    for name, meta in (("plain", plain), ("bilingual", bilingual)):
        text, image = (TextTokenizer.load(tmp_path / name / "text.model"), tmp_path / name / "vqvae.safetensors")
        made_with = {"languages": meta["languages"], "image_size": 32, "max_text": 64}
        made_by = {"text_sha256": text.sha256, "image_sha256": VQVAE.load(image).sha256}
        assert meta["parts"] == [part_name(version=2, shard=TarIndex.open(a).digest, **made_with, **made_by)]


def test_another_vocabulary_while_tokenizers_are_trained(tmp_path, monkeypatch):
    """The text tokenizer of the stopped command is not the one that is asked for now."""
    a, arguments = shard(tmp_path / "a.tar", BOTH), ["--run", tmp_path / "run", *SMALL, "--image-passes", "4"]
    stopped(monkeypatch, a, *arguments)
    assert TextTokenizer.load(tmp_path / "run" / "text.model").chinese_from is None
    stopped(monkeypatch, a, *arguments, "--text-vocabulary", "bilingual")
    bilingual = TextTokenizer.load(tmp_path / "run" / "text.model")
    assert bilingual.chinese_from is not None
    (tmp_path / "run" / "tokenizing.json").write_text("{")  # so that whose that is is not known
    with pytest.raises(SystemExit, match=r"text_vocabulary: .*run has a bilingual text tokenizer, not a plain one"):
        tokenize(a, *arguments, "--text-vocabulary", "plain")
    tokenize(a, *arguments, "--text-vocabulary", "bilingual")
    assert TextTokenizer.load(tmp_path / "run" / "text.model").sha256 == bilingual.sha256
    assert sequences(tmp_path / "run") == 20


def test_a_text_model_of_ones_own(tmp_path, monkeypatch, capsys):
    a, folder, own = shard(tmp_path / "a.tar", BOTH), tmp_path / "run", tmp_path / "ice_text.model"
    TextTokenizer.train([*BOTH, "other words"], bilingual=True).save(own)
    stopped(monkeypatch, a, "--run", folder, *SMALL, "--image-passes", "4")
    take = ["--run", folder, *QUICK, "--image-passes", "4", "--text-model", own]
    stopped(monkeypatch, a, *take)
    assert (folder / "text.model").read_bytes() == own.read_bytes()
    tokenize(a, *take)
    said = " ".join(capsys.readouterr().out.split())
    assert f"in {folder}, of {own}; Chinese from " in said
    tokenize(a, *take, "--split", "test")
    assert (folder / "text.model").read_bytes() == own.read_bytes()
    assert sequences(folder) == sequences(folder, "test") == 20
    assert TokenDataset(folder / "tokens" / "train").tokenizers[0] == TextTokenizer.load(own).sha256
    other = tmp_path / "other.model"
    TextTokenizer.train(["entirely other words"]).save(other)
    refusal = r"text_model: .*run has another text tokenizer than .*other\.model: name another run, or --retrain-"
    with pytest.raises(SystemExit, match=refusal):
        tokenize(a, "--run", folder, "--text-model", other)
    assert (folder / "text.model").read_bytes() == own.read_bytes()
    tokenize(a, "--run", folder, *QUICK, "--text-model", other, "--retrain-tokenizers")
    assert (folder / "text.model").read_bytes() == other.read_bytes()
    assert (folder / "tokenizers-1" / "text.model").read_bytes() == own.read_bytes()


def test_text_models_that_cannot_be_taken(run, tmp_path, monkeypatch):
    b, folder, wrong = shard(tmp_path / "b.tar", captions(3)), tmp_path / "run", tmp_path / "wrong.model"
    with pytest.raises(SystemExit, match=r"text_model: no text tokenizer at .*wrong\.model"):
        tokenize(b, "--run", folder, "--text-model", wrong)
    wrong.write_bytes(b"no model" * 9)
    with pytest.raises(SystemExit, match=r"text_model: .*wrong\.model' is not a SentencePiece model"):
        tokenize(b, "--run", folder, "--text-model", wrong)
    monkeypatch.setattr("cogview.tokenizers.text.MAX_MODEL_BYTES", 50)
    with pytest.raises(SystemExit, match=r"text_model: .*wrong\.model' is larger than 50 bytes"):
        tokenize(b, "--run", folder, "--text-model", wrong)
    for more, said in (
        (["--from", run], "text_model: expected no --from"),
        (["--text-pieces", "400"], "text_pieces: expected none with --text-model"),
        (["--text-vocabulary", "plain"], "text_vocabulary: expected none with --text-model"),
    ):
        with pytest.raises(SystemExit, match=said):
            tokenize(b, "--run", folder, "--text-model", wrong, *more)
    assert not folder.exists()


def test_what_cannot_be_tokenised(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(SystemExit, match="shards: expected at least one pair, got 'none"):
        tokenize(tmp_path / "empty.tar", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    a = shard(tmp_path / "a.tar", captions(3))
    with pytest.raises(SystemExit, match="image_size: expected a multiple of 8"):
        tokenize(a, "--run", tmp_path / "run", "--image-size", "30")
    for option, wrong in (("text-pieces", 299), ("image-passes", "nan"), ("codebook", 0), ("split", "../x")):
        with pytest.raises(SystemExit, match=f"{option.replace('-', '_')}: expected"):
            tokenize(a, "--run", tmp_path / "run", f"--{option}", wrong)
    with pytest.raises(SystemExit, match="dataset: expected captions in title"):
        tokenize(a, "--run", tmp_path / "run", "--languages", "title")
    assert not (tmp_path / "run").exists()
    broken = tmp_path / "broken.tar"
    with ShardWriter(broken) as writer:
        writer.write("x", {"png": b"none", "txt": b"a fox"})
    with pytest.raises(SystemExit, match=r"no readable picture \(1 picture not readable\)"):
        tokenize(broken, "--run", tmp_path / "run", *QUICK)


def test_a_single_picture(tmp_path, capsys):
    png = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(png, "PNG")
    with ShardWriter(tmp_path / "one.tar") as writer:
        writer.write("x", {"png": png.getvalue(), "txt": b"a red square"})
    tokenize(tmp_path / "one.tar", "--run", tmp_path / "run", *QUICK)
    assert "on pictures that it was trained on" in capsys.readouterr().out
    assert sequences(tmp_path / "run") == 1


def test_other_ways_to_train_the_image_tokenizer(tmp_path, capsys):
    a, folder = shard(tmp_path / "a.tar", captions(12)), tmp_path / "run"
    how = ["--codebook-training", "gumbel", "--adversarial"]
    tokenize(a, "--run", folder, *QUICK, *how)
    model = VQVAE.load(folder / "vqvae.safetensors")
    assert model.config.codebook == "gumbel"
    assert checkpoint.read_header(checkpoint.latest(folder / "vqvae"))["recipe"] == "vqgan"
    codes = model.encode(torch.rand(1, 3, 32, 32))
    assert codes.shape == (1, 4, 4)
    assert sequences(folder) == 12
    capsys.readouterr()
    tokenize(a, "--run", folder, *how)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "not used, since the tokenizers are there: --codebook-training, --adversarial" in said


def test_dalles_image_tokenizer(tmp_path, capsys):
    a, folder = shard(tmp_path / "a.tar", captions(12)), tmp_path / "run"
    dalle = ["--image-preset", "dalle-tiny", *QUICK]
    tokenize(a, "--run", folder, *dalle, "--kl-weight", "2.5")
    model = VQVAE.load(folder / "vqvae.safetensors")
    assert (model.config.codebook, model.config.reconstruction) == ("relaxed", "logit_laplace")
    assert model.config.kl_weight == 2.5
    _, codes = TokenDataset(folder / "tokens" / "train").batch(range(12))
    images = torch.stack([pixels(render(scene), 32) for scene in sample_scenes("train", 12)]).float() / 255
    assert torch.equal(model.encode(images).flatten(1), codes)
    capsys.readouterr()
    tokenize(a, "--run", folder, "--reconstruction", "pixels", "--codebook-training", "relaxed", "--kl-weight", "1")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "not used, since the tokenizers are there: --codebook-training, --reconstruction, --kl-weight" in said
    mixed = ["--codebook-training", "fixed", "--reconstruction", "pixels"]
    tokenize(a, "--run", tmp_path / "other", *dalle, *mixed)
    config = VQVAE.load(tmp_path / "other" / "vqvae.safetensors").config
    assert (config.codebook, config.reconstruction) == ("fixed", "pixels")


def test_presets_of_the_image_tokenizer(tmp_path):
    a = shard(tmp_path / "a.tar", captions(6))
    small = ["--codebook", "16", "--code-dim", "8", "--hidden", "4", "--image-passes", "0.001"]
    tokenize(a, "--run", tmp_path / "run", "--image-preset", "fashion-800", *small)
    config = VQVAE.load(tmp_path / "run" / "vqvae.safetensors").config
    assert (config.downsample, config.codebook_size, config.dim, config.hidden) == (16, 16, 8, 4)
    meta = TokenDataset(tmp_path / "run" / "tokens" / "train").meta
    assert (meta["image_size"], meta["grid"]) == (800, [50, 50])
    with pytest.raises(SystemExit) as error:
        tokenize(a, "--run", tmp_path / "other", "--image-preset", "fashion-800", "--image-size", "72")
    assert "image_size: expected a multiple of 16, got 72" in str(error.value)
