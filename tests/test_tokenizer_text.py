import pytest

from cogview.demo.scenes import caption, sample_scenes
from cogview.tokenizers.text import TextTokenizer

CAPTIONS = [caption(s, language) for s in sample_scenes("train", 600) for language in ("en", "zh")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    TextTokenizer.train(CAPTIONS, 600, path)
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
    again = TextTokenizer.train(CAPTIONS, 600, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    assert again.sha256 == TextTokenizer.load(path).sha256


def test_tiny_corpus_shrinks_the_vocabulary(tmp_path):
    tokenizer = TextTokenizer.train(["a panda", "熊猫"], 4000, tmp_path / "tiny.model")
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
        TextTokenizer.train([" "], 600, tmp_path / "x")
    with pytest.raises(ValueError, match="vocab_size: expected at least 300"):
        TextTokenizer.train(["a"], 10, tmp_path / "x")
    assert not list(tmp_path.glob("*x*"))
    with pytest.raises(ValueError, match="ids: expected 0 to"):
        TextTokenizer.load(path).decode([10**6])
    with pytest.raises(TypeError, match="text: expected str"):
        TextTokenizer.load(path).encode(3)
