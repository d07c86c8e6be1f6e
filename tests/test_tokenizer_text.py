import random
from collections import Counter

import pytest

from cogview.demo.scenes import caption, sample_scenes
from cogview.tokenizers.text import TextTokenizer, fitting_size

CAPTIONS = [caption(s, language) for s in sample_scenes("train", 600) for language in ("en", "zh")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    TextTokenizer.train(CAPTIONS, 600).save(path)
    return path


def test_round_trip_and_few_tokens(path):
    tokenizer = TextTokenizer.load(path)
    assert tokenizer.vocab_size <= 600
    for text in CAPTIONS[:100]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
    lengths = [len(tokenizer.encode(text)) for text in CAPTIONS]
    assert max(lengths) <= 14


@pytest.mark.parametrize("text", ["", " ", "a  b ", "龘𠮷🐼‍\u200d", "né ﬁ Ⅷ", "line\nbreak\ttab", "\u0000x"])
def test_rare_characters_round_trip(path, text):
    tokenizer = TextTokenizer.load(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic(path, tmp_path):
    again = TextTokenizer.train(CAPTIONS, 600)
    again.save(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    assert again.sha256 == TextTokenizer.load(path).sha256


def test_tiny_corpus_shrinks_the_vocabulary():
    tokenizer = TextTokenizer.train(["a panda", "熊猫"], 4000)
    assert tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("a panda 熊")) == "a panda 熊"


def test_errors(path, tmp_path):
    with pytest.raises(ValueError, match="path: no text tokenizer"):
        TextTokenizer.load(tmp_path / "missing")
    for garbage in (b"", b"garbage" * 100, path.read_bytes()[:1000]):
        (tmp_path / "garbage").write_bytes(garbage)
        with pytest.raises(ValueError, match=r"path: .* is not a SentencePiece model"):
            TextTokenizer.load(tmp_path / "garbage")
    with pytest.raises(ValueError, match="captions: expected"):
        TextTokenizer.train([" "], 600)
    with pytest.raises(ValueError, match="vocab_size: expected at least 300"):
        TextTokenizer.train(["a"], 10)
    with pytest.raises(ValueError, match="ids: expected 0 to"):
        TextTokenizer.load(path).decode([10**6])
    with pytest.raises(TypeError, match="text: expected str"):
        TextTokenizer.load(path).encode(3)
    with pytest.raises(ValueError, match=r"text: expected valid Unicode, got 'half \\ud83d'"):
        TextTokenizer.load(path).encode("half \ud83d")


def test_more_characters_than_there_is_room_for():
    """Chinese with the defaults, and with fewer pieces than it has characters: the rare ones are spelled in bytes."""
    draw = random.Random(0)
    common, rare = [chr(0x4E00 + k) for k in range(300)], [chr(0x6000 + k) for k in range(900)]
    captions = ["".join(draw.choices(common, k=12)) for _ in range(2000)]
    captions = [caption + rare[n] if n < len(rare) else caption for n, caption in enumerate(captions)]
    fitting, small = TextTokenizer.train(captions), TextTokenizer.train(captions, 600)
    assert 257 + 301 < fitting.vocab_size <= 257 + 301 + 300
    assert small.vocab_size <= 600
    for tokenizer, pieces in ((fitting, 300), (small, 160)):
        lone = [len(tokenizer.encode(character)) for character in common]
        assert sum(n <= 2 for n in lone) >= pieces  # the mark of a beginning, and the character
        for text in captions[:50]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(fitting.encode(rare[0])) == 4  # the mark, and three bytes


def test_vocabulary_grows_with_the_captions():
    few, many = (Counter({"a": n, "b": n, "c": 2}) for n in (100, 10**6))
    assert fitting_size(few) == 257 + 3 + 300
    assert fitting_size(many) == 257 + 3 + 4000


def test_captions_longer_than_sentencepiece_takes():
    """4,192 bytes; longer ones would leave the training, all of them would fail it."""
    captions = ["a fox " * 2000, "panda 熊猫" * 3000]
    tokenizer = TextTokenizer.train(captions, 400)
    assert tokenizer.decode(tokenizer.encode("a fox")) == "a fox"
    assert len(tokenizer.encode("a fox a fox")) <= 4
