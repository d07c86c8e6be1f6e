import random
import string
import struct
from collections import Counter

import pytest

from cogview.demo.scenes import caption, sample_scenes
from cogview.tokenizers import pieces
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
    for tokenizer, kept in ((fitting, 300), (small, 160)):
        lone = [len(tokenizer.encode(character)) for character in common]
        assert sum(n <= 2 for n in lone) >= kept  # the mark of a beginning, and the character
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


# --- CogView2's order ------------------------------------------------------------------------------------------------


def all_pieces(tokenizer: TextTokenizer) -> list[str]:
    return [tokenizer._processor.id_to_piece(number) for number in range(tokenizer.vocab_size)]


def cut(tokenizer: TextTokenizer, text: str) -> list[str]:
    found = all_pieces(tokenizer)
    return [found[number] for number in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def bilingual():
    texts = ["a café on the 24th, isn't it?", "红色的狐狸。", "лиса и дом", "きつね"] * 9
    return TextTokenizer.train([*CAPTIONS, *texts], 700, bilingual=True)


def test_pieces_stand_in_groups(bilingual):
    found = all_pieces(bilingual)
    assert found[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert found[4:260] == [f"<0x{byte:02X}>" for byte in range(256)]
    groups = [pieces.group(piece) for piece in found]
    assert set(groups) == {pieces.COMMON, pieces.ENGLISH, pieces.CHINESE, pieces.RARE}
    assert groups == sorted(groups)
    assert bilingual.chinese_from == groups.index(pieces.CHINESE)
    assert (bilingual.end_id, bilingual.pad_id) == (2, 3)


@pytest.mark.parametrize(
    ("group", "members"),
    [
        (pieces.COMMON, ["<pad>", "<0x41>", "▁", "。", "▁(", "2021", "½", "🐼", "\ufe0f", "\u0301"]),
        (pieces.ENGLISH, ["a", "▁The", "é", "ﬁ", "Ａ", "z7", "ñandú"]),
        (pieces.CHINESE, ["狐狸", "▁红", "〇", "々", "𠮷", "T恤", "きつね座"]),
        (pieces.RARE, ["α", "▁лиса", "きつね", "ไ", "한국"]),
    ],
)
def test_group_of_a_piece(group, members):
    assert {piece: pieces.group(piece) for piece in members} == dict.fromkeys(members, group)


def test_the_order_does_not_change_how_texts_are_cut(path, bilingual):
    """Three ids more than the plain vocabulary, of the same pieces."""
    plain, ordered = TextTokenizer.load(path), TextTokenizer.train(CAPTIONS, 603, bilingual=True)
    assert set(all_pieces(ordered)) - set(all_pieces(plain)) == {"<s>", "</s>", "<pad>"}
    assert set(all_pieces(plain)) < set(all_pieces(ordered))
    for text in [*CAPTIONS[:200], "龘𠮷🐼 é", "<pad></s>", "лиса"]:
        assert cut(ordered, text) == cut(plain, text)
        assert ordered.decode(ordered.encode(text)) == text
    assert (plain.end_id, plain.pad_id, plain.chinese_from) == (None, None, None)
    assert TextTokenizer.train(CAPTIONS).vocab_size + 3 == TextTokenizer.train(CAPTIONS, bilingual=True).vocab_size
    again = TextTokenizer.train(CAPTIONS, 603, bilingual=True)
    assert again.sha256 == ordered.sha256 != plain.sha256


def test_english_is_what_has_lower_ids_only(bilingual):
    english, chinese = (caption(sample_scenes("train", 1)[0], language) for language in ("en", "zh"))
    for text, expected in ((english, True), ("3 + 4 。", True), (chinese, False), (f"{english} {chinese}", False)):
        assert all(number < bilingual.chinese_from for number in bilingual.encode(text)) == expected


@pytest.mark.parametrize("size", range(457, 464))
def test_hardly_room_for_all_characters(size):
    """200 with the mark of a word's begin; the specials and bytes are 260."""
    captions = ["".join(chr(0x4E00 + (start + k) % 199) for k in range(40)) for start in range(0, 1990, 10)]
    tokenizer = TextTokenizer.train(captions, size, bilingual=True)
    assert tokenizer.vocab_size <= size
    alone = [piece for piece in all_pieces(tokenizer) if len(piece) == 1]
    assert len(alone) == (200 if size >= 460 else (size - 260) // 2)
    assert tokenizer.decode(tokenizer.encode(captions[0])) == captions[0]


def test_vocabularies_of_one_language():
    english, chinese, russian = (
        TextTokenizer.train([text] * 20, bilingual=True) for text in ("a red fox, 1", "红色的狐狸。「树」", "лиса, дом")
    )
    assert english.chinese_from == english.vocab_size
    assert all_pieces(chinese)[chinese.chinese_from - 1] in "。「」▁"
    assert max(chinese.encode("「。")) < chinese.chinese_from <= chinese.encode("狐狸")[-1]
    assert pieces.group(all_pieces(russian)[russian.chinese_from]) == pieces.RARE
    assert max(russian.encode(",")) < russian.chinese_from <= russian.encode("дом")[-1]


def field(number: int, contents: bytes) -> bytes:
    """Of a protobuf message, of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(contents)]) + contents


def unigram(found: list[str], kinds: dict[str, int]) -> bytes:
    """A SentencePiece model of these pieces, the later the less likely. kinds: of those that are not normal ones."""
    written = b""
    for number, piece in enumerate(found):
        score = struct.pack("<f", -1 - number / 100)
        written += field(1, field(1, piece.encode()) + b"\x15" + score + bytes([3 << 3, kinds.get(piece, 1)]))
    return written + field(2, bytes([3 << 3, 1])) + field(3, field(1, b"identity"))


COMMON = ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁", *string.punctuation.replace("/", ""), *string.digits]
COMMON += [chr(0x2190 + number) for number in range(100 - len(COMMON))]
ENGLISH = ["▁Hello", "▁World", "▁a", "▁fox", "▁app", "les", *string.ascii_letters, "▁//", "/"]
CHINESE = ["。", "「", "你好", "世界", "T恤", "qq", "狐", "狸", "的", *(chr(0x5000 + number) for number in range(40))]
RARE = ["α", "é", "--------", "が", "abbé"]
KINDS = {"<unk>": 2, "<s>": 3, "</s>": 3, "<pad>": 3, "<n>": 4}


def test_a_vocabulary_as_icetks():
    """Without bytes. The last English pieces have no letters, nor have the first Chinese ones; some are astray."""
    tokenizer = TextTokenizer(unigram([*COMMON, *ENGLISH, *CHINESE, *RARE], KINDS))
    border = 100 + len(ENGLISH)
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.chinese_from) == (3, 2, border)
    assert tokenizer.encode("Hello World!") == [100, 101, COMMON.index("!")]
    assert tokenizer.encode("你好世界。") == [5, border + 2, border + 3, border]
    assert tokenizer.decode([100, 101, border]) == "Hello World。"
    text = "a fox 龘лис α"
    ids = tokenizer.encode(text)
    assert 0 in ids
    assert tokenizer.unknown(text, ids) == tokenizer.unwritten(text) == "龘лис"
    assert tokenizer.unknown("世界 ~ α", tokenizer.encode("世界 ~ α")) == tokenizer.unwritten("世界 ~ α") == ""
    with_commands = [*COMMON, *ENGLISH, *CHINESE, *RARE, "<start_of_image>", "<start_of_english>", "<start_of_chinese>"]
    assert TextTokenizer(unigram(with_commands, KINDS)).chinese_from == border


MIXED = random.Random(0).sample([*ENGLISH, *CHINESE, *RARE], len([*ENGLISH, *CHINESE, *RARE]))


@pytest.mark.parametrize(
    "found",
    [[*COMMON, *CHINESE, *ENGLISH, *RARE], [*COMMON, *MIXED], ["<unk>", "<pad>", *COMMON[4:], *ENGLISH, *CHINESE]],
    ids=["Chinese before English", "mixed", "pad elsewhere"],
)
def test_vocabularies_in_another_order(found):
    tokenizer = TextTokenizer(unigram(found, KINDS))
    assert tokenizer.chinese_from is None
    assert tokenizer.pad_id == found.index("<pad>")
    assert tokenizer.encode("你好") == [found.index("▁"), found.index("你好")]


def test_a_piece_that_is_no_unicode():
    model = unigram([*COMMON, *ENGLISH, *CHINESE], KINDS)
    with pytest.raises(ValueError, match="model: not a SentencePiece model"):
        TextTokenizer(model.replace("狐".encode(), b"\xff\xfe\x80"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a red fox in the middle", ""),
        ("有一只狐狸在红色背景上", "红"),
        ("есть лиса", "есть лиса"),
        ("лиса, a fox; 狐狸 и дом 1/2", "лиса и дом"),
        ("a 🦊 fox 👩\u200d🚀", "🦊 👩🚀"),
        ("हिन्दी fox", "हिन्दी"),
        ("a\tfox; \u0000 ½ ¿ e\u0301", ""),
    ],
)
def test_what_the_vocabulary_has_no_pieces_for(path, text, expected):
    assert TextTokenizer.load(path).unwritten(text) == expected


def test_what_is_neither_english_nor_chinese(bilingual):
    assert bilingual.unwritten("龘 ёж œuvre 🦊") == "龘 ёж œ 🦊"
    assert bilingual.foreign("龘 ёж œuvre 🦊") == "ёж 🦊"
    assert bilingual.foreign("a red fox") == ""


def test_scripts_that_the_vocabulary_has(bilingual):
    assert bilingual.unwritten("лиса и дом, café きつね") == ""
    assert bilingual.unwritten("лиса ёж") == "ёж"
