"""Which pairs are good enough, and captions that a function of the user's translates."""

import io
import json
import sys

import pytest
import torch
from PIL import Image

from cogview import cli
from cogview.commands.pair_options import PairOptions
from cogview.data.filters import Filters
from cogview.data.shards import UNREADABLE, PairDataset, ShardWriter
from cogview.data.tokens import TokenDataset
from cogview.data.translation import BATCH, Translation
from cogview.pipeline import decode, some_captions, tokenize_pairs
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer

CHOICE = ["--languages", "en", "zh", "--translate-from", "zh"]


def shard(path, *samples):
    """Each a size, and a JSON of captions."""
    with ShardWriter(path) as writer:
        for number, (size, fields) in enumerate(samples):
            png = io.BytesIO()
            Image.new("RGB", size, (number * 9, 200, 30)).save(png, "PNG")
            writer.write(f"{number:02d}", {"png": png.getvalue(), "json": json.dumps(fields).encode()})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tokenizers."""
    folder = tmp_path_factory.mktemp("run")
    TextTokenizer.train(["a red square", "红色的方块", "a very long caption of a red square"], 400).save(
        folder / "text.model"
    )
    torch.manual_seed(0)
    VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8)).save(folder / "vqvae.safetensors")
    return folder


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Writes a module of the user's into the current folder and forgets it again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(code):
        monkeypatch.delitem(sys.modules, "theirs", raising=False)
        (tmp_path / "theirs.py").write_text(code)

    yield write
    sys.modules.pop("theirs", None)


def tokenize(*arguments):
    cli.main(["tokenize", *map(str, arguments)])


def words(folder, run):
    text = TextTokenizer.load(run / "text.model")
    tokens = TokenDataset(folder)
    return [text.decode(row[row >= 0].tolist()) for row in tokens.batch(range(len(tokens)))[0]]


def test_small_long_and_wordless_pairs_are_left_out_and_counted(run, tmp_path, capsys):
    a = shard(
        tmp_path / "a.tar",
        ((64, 64), {"en": "a red square"}),
        ((64, 31), {"en": "a flat one"}),
        ((200, 64), {"en": "a long one"}),
        ((32, 96), {"en": "a tall one"}),
        ((64, 64), {"en": "ab", "zh": "红色的方块"}),
        ((64, 64), {"en": "a very long caption of a red square"}),
    )
    limits = ["--min-size", "32", "--max-aspect", "3", "--min-caption", "3", "--max-caption", "30"]
    out = ["--run", run, "--image-size", "32", "--split"]
    tokenize(a, *out, "some", *limits)
    said = capsys.readouterr().out
    assert "3 sequences in" in said
    assert words(run / "tokens" / "some", run) == ["a red square", "a tall one", "红色的方块"]
    assert TokenDataset(run / "tokens" / "some").meta["skipped"] == {
        "captions of fewer than 3 characters": 1,
        "captions of more than 30 characters": 1,
        "pictures of fewer than 32 pixels": 1,
        "pictures longer than 3 : 1": 1,
    }
    assert "1 pictures of fewer than 32 pixels, 1 pictures longer than 3 : 1" in said
    (part,) = (run / "tokens" / "some").glob("part-*.json")
    tokenize(a, *out, "some", *limits)
    assert list((run / "tokens" / "some").glob("part-*.json")) == [part]
    tokenize(a, *out, "some", *limits[:-1], "40")
    assert list((run / "tokens" / "some").glob("part-*.json")) != [part]
    tokenize(a, *out, "all")
    assert len(words(run / "tokens" / "all", run)) == 7
    for option, wrong in (("--min-size", "0"), ("--max-aspect", "0.5"), ("--max-caption", "0")):
        with pytest.raises(SystemExit, match=f"{option[2:].replace('-', '_')}: expected at least 1"):
            tokenize(a, *out, "some", option, wrong)
    with pytest.raises(SystemExit, match="max_caption: expected at least min_caption, 9, got 3"):
        tokenize(a, *out, "some", "--min-caption", "9", "--max-caption", "3")


def test_tokenizers_are_trained_on_what_is_left(tmp_path):
    path = shard(tmp_path / "a.tar", ((64, 64), {"en": "a red square"}), ((20, 64), {"en": "x"}))
    data = PairDataset([path], filters=Filters(min_size=32, min_caption=2))
    assert some_captions(data) == ["a red square"]
    assert decode(data, tmp_path, 32).numbers.tolist() == [0]
    assert decode(PairDataset([path]), tmp_path, 32).numbers.tolist() == [0, 1]
    assert not data.report.counts
    assert [pair.key for pair in data.readable()] == ["00"]


def test_a_picture_that_cannot_be_read_is_none_that_is_too_small(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("x", {"png": b"none", "txt": b"a fox"})
    data = PairDataset([tmp_path / "a.tar"], filters=Filters(min_size=32))
    assert data.picture(0, 8) == UNREADABLE
    assert data.report.counts == {"picture not readable": 1}


def test_translations_are_captions_of_pairs_that_have_none(run, tmp_path, user, capsys):
    user(
        "given = []\ndef english(texts):\n    given.append(len(texts))\n"
        "    return [f'{len(text)} signs' for text in texts]\n"
    )
    a = shard(
        tmp_path / "a.tar",
        ((64, 64), {"zh": "红色的方块"}),
        ((64, 64), {"zh": "红", "en": "a red square"}),
        ((64, 64), {"zh": ["方块", "红色"]}),
        ((64, 64), {"en": "a red square"}),
    )
    out = ["--run", run, "--image-size", "32", "--split", "translated", "--translate", "theirs:english"]
    tokenize(a, *out, *CHOICE)
    folder = run / "tokens" / "translated"
    both = ["红色的方块", "5 signs", "a red square", "红", "方块", "红色", "2 signs", "2 signs", "a red square"]
    assert words(folder, run) == both
    assert set(sys.modules["theirs"].given) == {3}
    kept = {path.name for path in folder.glob("part-*")}
    tokenize(a, *out, *CHOICE)
    assert {path.name for path in folder.glob("part-*")} == kept
    tokenize(a, *out, "--languages", "en", "--translate-from", "zh")
    assert words(folder, run) == ["5 signs", "a red square", "2 signs", "2 signs", "a red square"]
    user("def english(texts):\n    return ['' for text in texts]\nenglish.version = 2\n")
    tokenize(a, *out, *CHOICE)
    assert not {path.name for path in folder.glob("part-*")} & kept
    assert words(folder, run) == ["红色的方块", "a red square", "红", "方块", "红色", "a red square"]


def test_a_translation_that_fails_is_a_sentence(run, tmp_path, user):
    a = shard(tmp_path / "a.tar", ((64, 64), {"zh": "红色的方块"}), ((64, 64), {"zh": "红"}))
    user(
        "few = lambda texts: texts[1:]\nnone = lambda texts: [None] * len(texts)\nnumber = 3\n"
        "def fails(texts):\n    raise KeyError('x')\n"
    )
    out = ["--run", run, "--image-size", "32", "--split", "wrong", *CHOICE, "--translate"]
    for name, message in (
        ("theirs", "translate: expected MODULE:FUNCTION, got 'theirs'"),
        ("nowhere:x", r"translate: nowhere:x cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("theirs:x", r"translate: theirs:x cannot be imported \(AttributeError: module 'theirs' has no"),
        ("theirs:number", "translate: expected a function, got 'theirs:number'"),
        ("theirs:few", "translate: theirs:few gave 1 texts for 2 captions"),
        ("theirs:none", r"translate: theirs:none made of '红色的方块' no text \(caption: expected text, got None\)"),
        ("theirs:fails", r"translate: theirs:fails failed \(KeyError: 'x'\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            tokenize(a, *out, name)
    with pytest.raises(SystemExit, match="translate_to: expected one of the languages en, zh, got 'fr'"):
        tokenize(a, *out, "theirs:few", "--translate-to", "fr")
    with pytest.raises(SystemExit, match="translate_to: expected another field than zh, got 'zh'"):
        tokenize(a, *out, "theirs:few", "--translate-to", "zh")
    with pytest.raises(SystemExit, match="translate_from: expected none without --translate, got 'fr'"):
        tokenize(a, "--run", run, "--translate-from", "fr")
    user("def broken(:")
    with pytest.raises(SystemExit, match=r"cannot be imported \(SyntaxError"):
        tokenize(a, *out, "theirs:broken")


def test_as_a_library_in_batches(run, tmp_path):
    count, given = BATCH + 10, []

    def english(texts):
        given.append(len(texts))
        return [text.upper() for text in texts]

    path = shard(tmp_path / "a.tar", *[((8, 8), {"zh": f"number {n}"}) for n in range(count)])
    with pytest.raises(ValueError, match="name: expected a name of the function, got ''"):
        Translation(english, "")
    data = PairDataset([path], languages=["en"], translation=Translation(english, "upper", "zh", "en"))
    assert data.captions(3) == {"en": "NUMBER 3"}
    given.clear()
    text, image = TextTokenizer.load(run / "text.model"), VQVAE.load(run / "vqvae.safetensors")
    tokens = tokenize_pairs(data, text, image, tmp_path / "out", image_size=8)
    assert len(tokens) == count
    assert given == [BATCH, 10]
    assert tokens.meta["translation"] == ["upper", "zh", "en"]


def test_nothing_chosen_gives_the_names_of_before(run, tmp_path):
    """So that parts that were made before there were filters are kept."""
    path = shard(tmp_path / "a.tar", ((64, 64), {"en": "a red square"}))
    data, bad = PairOptions(languages=("en",)).open([path])
    assert data is not None
    assert (data.chosen(), bad) == ({}, [])
