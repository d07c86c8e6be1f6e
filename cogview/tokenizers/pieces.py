"""Pieces of a text vocabulary in the order of CogView2's, which is icetk's: common ones, English, Chinese, rare.

A SentencePiece model is a protobuf message, which is taken apart by its wire format here: the classes that come with
sentencepiece 0.2.3 for it want protobuf 7.36.1 or newer.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

SPECIALS: dict[str, Any] = {"bos_id": 1, "eos_id": 2, "pad_id": 3}
"""Where <s>, </s> and <pad> are, behind <unk>, as SentencePiece's trainer calls them."""
COMMON, ENGLISH, CHINESE, RARE = range(4)
_PIECES = 1  # the field of a model that lists them, and of a piece its text
_TRAINER, _TYPE, _BPE = 2, 3, 2  # the field of a model that tells of its training, of that the kind, and this one
_ON_ITS_SIDE = 0.9  # of the English pieces, and of the Chinese ones, in a vocabulary in this order
_SPECIAL = re.compile("<.+>")  # among them the bytes
_LATIN = re.compile("[A-Za-zÀ-ÖØ-öø-ʯḀ-ỿⱠ-Ɀꜣ-ꟿ\ufb00-\ufb06\uff21-\uff3a\uff41-\uff5a]")
_HAN = re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd]")
_CHINESE_MARK = re.compile("[\u3001-\u303f\uff01-\uffef]")  # of what has no letters: 。「」 and what is as wide


def group(piece: str) -> int:
    """Common, without letters: <specials>, bytes, digits, marks, the mark of a word's begin; English, with Latin
    letters; Chinese, with Han characters; rare, with letters of other scripts."""
    if _SPECIAL.fullmatch(piece):
        return COMMON
    if _HAN.search(piece):
        return CHINESE
    if _LATIN.search(piece):
        return ENGLISH
    return RARE if any(map(str.isalpha, piece)) else COMMON


def ordered(model: bytes) -> bytes:
    """The same SentencePiece model with its pieces group after group, in each as they were."""
    fields = list(_fields(model))
    pieces = [(_text(contents), field) for number, contents, field in fields if number == _PIECES]
    others = [field for number, _, field in fields if number != _PIECES]
    return b"".join([field for _, field in sorted(pieces, key=lambda piece: group(piece[0]))] + others)


def chinese_from(pieces: list[str]) -> int | None:
    """The id from which on pieces are Chinese or rare; None of a vocabulary in another order.

    In this order are those with <unk> at 0, <pad> at 3, and a border with nine tenths of the English pieces before it
    and nine tenths of the Chinese ones behind: icetk's has some of either elsewhere. The border is where most are on
    their side, right behind an English piece. Marks that follow are English too, as icetk's last may be, up to the
    first Chinese one, 。 of icetk's at 63,823, or the first letters.
    """
    if pieces[:1] != ["<unk>"] or pieces[3:4] != ["<pad>"]:
        return None
    groups = np.array([group(piece) for piece in pieces])
    english, chinese = (np.cumsum([0, *(groups == one)]) for one in (ENGLISH, CHINESE))
    border = int(np.argmax(english - chinese))
    if english[border] < _ON_ITS_SIDE * english[-1] or chinese[border] > (1 - _ON_ITS_SIDE) * chinese[-1]:
        return None
    for number in range(border, len(pieces)):
        if groups[number] >= CHINESE or (border > 0 and _CHINESE_MARK.search(pieces[number])):
            return number
    return len(pieces)


def is_bpe(model: bytes) -> bool:
    """Whether a SentencePiece model merges pairs of pieces, and is no unigram model, say."""
    trainer = next((contents for number, contents, _ in _fields(model) if number == _TRAINER), b"")
    return any(number == _TYPE and _varint(contents, 0)[0] == _BPE for number, contents, _ in _fields(trainer))


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, contents, the whole field) of a message's: bytes, texts and messages, or numbers as they are coded."""
    at = 0
    while at < len(message):
        begin = at
        key, at = _varint(message, at)
        if key & 7 == 2:
            size, at = _varint(message, at)
        else:
            size = _varint(message, at)[1] - at if key & 7 == 0 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[at : at + size], message[begin : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, and where the next begins."""
    value, shift = 0, 0
    while message[at] & 128:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1


def _text(piece: bytes) -> str:
    """Of a piece, whose first field that is."""
    number, contents, _ = next(_fields(piece))
    assert number == _PIECES, number
    return contents.decode()
