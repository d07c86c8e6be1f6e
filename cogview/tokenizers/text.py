"""Text to token ids and back: SentencePiece, trained with byte fallback, so that nothing is ever unknown.

Byte-pair merges, not the unigram model: that one finds its candidate pieces among the distinct words, so from
captions of a few dozen words it learns letters (37 tokens a caption of the demo instead of 12).
"""

import bisect
import hashlib
import io
import itertools
import sys
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from cogview.config import require
from cogview.data.files import written_beside
from cogview.tokenizers import pieces

MAX_MODEL_BYTES = 64 << 20
_BYTES = 257  # pieces that every vocabulary has: the bytes, and one for what is unknown
_OWN = (pieces.ENGLISH, pieces.CHINESE)
_COVERAGE = 0.99999  # of the text by characters that are pieces
_FEW = 300  # characters that are kept in any case
_LONGEST = 4000  # bytes of a caption that the vocabulary is made of
_SEEDING = threading.Lock()


def fitting_size(counts: Counter[str]) -> int:
    """Pieces for captions of these characters: one for each that is kept whatever the size, and a merge for every
    200 characters there are, 300 to 4,000."""
    return _BYTES + len(_kept(counts, None)) + min(4000, max(300, counts.total() // 200))


def _kept(counts: Counter[str], room: int | None) -> set[str]:
    """Characters that get a piece of their own, where there are so many pieces besides the bytes (None: enough)."""
    reached = list(itertools.accumulate(sorted(counts.values(), reverse=True)))
    needed = bisect.bisect_left(reached, _COVERAGE * reached[-1]) + 1
    if room is not None and needed <= room:
        return set(counts)  # SentencePiece leaves out those beyond its coverage
    if room is not None:
        return {character for character, _ in counts.most_common(room // 2)}
    ordered = counts.most_common(8000)
    return {character for rank, (character, n) in enumerate(ordered) if n >= 3 or rank < _FEW}


def _begin(caption: str) -> str:
    return caption if len(caption) <= _LONGEST // 4 else caption.encode()[:_LONGEST].decode(errors="ignore")


def _lowering() -> str:
    """A rule for each letter that has a lower-case one, in hexadecimal, as SentencePiece reads them."""
    rules = []
    for letter in map(chr, range(sys.maxunicode + 1)):
        if (lower := letter.lower()) != letter:
            rules.append(f"{ord(letter):X}\t{' '.join(f'{ord(c):X}' for c in lower)}\n")
    return "".join(rules)


class TextTokenizer:
    """A trained model. Ids are 0 to vocab_size - 1; `sha256` names the model in files made with it."""

    def __init__(self, model: bytes):
        """model: the bytes of a SentencePiece model; ValueError if they are not one."""
        if not model:  # SentencePiece takes no bytes for "no model yet"
            raise ValueError("model: expected a SentencePiece model, got no bytes")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.chinese_from = self._chinese_from()
            """The id from which on pieces are Chinese or rare, so that a text with lower ids only is English; None of a
            vocabulary that is not in CogView2's order."""
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError("model: not a SentencePiece model") from error
        self._model = model
        self.sha256 = hashlib.sha256(model).hexdigest()

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        vocab_size: int | None = None,
        *,
        bilingual: bool = False,
        lowercase: bool = False,
    ) -> "TextTokenizer":
        """Trains on captions.

        vocab_size: an upper limit, since few captions have few pieces; None: by the captions, see `fitting_size`. 256
        pieces are bytes, which spell the rare characters. Where there is no room for all others, half of it is for the
        most frequent ones. The same captions in the same order give the same model.

        bilingual: with <s>, </s> and <pad>, and ids in the order of CogView2's vocabulary (pieces.py); texts are cut
        into the same pieces. lowercase: the model makes lower-case letters of all, as DALL-E does.
        """
        captions = [_begin(c.lower() if lowercase else c) for c in captions if c.strip()]
        if not captions:
            raise ValueError("captions: expected at least one that is not blank")
        require(vocab_size is None or vocab_size >= 300, "vocab_size", "at least 300 (256 are bytes)", vocab_size)
        counts = Counter(character for caption in captions for character in f" {caption}")  # as SentencePiece begins it
        specials: dict[str, Any] = {"bos_id": -1, "eos_id": -1}  # the sequence has commands of its own
        if bilingual:
            specials = pieces.SPECIALS
        more = len(pieces.SPECIALS) if bilingual else 0
        size = fitting_size(counts) + more if vocab_size is None else vocab_size
        if rare := counts.keys() - _kept(counts, None if vocab_size is None else size - _BYTES - more):
            blanks = str.maketrans(dict.fromkeys(rare, " "))
            captions = [caption.translate(blanks) for caption in captions]
        model = io.BytesIO()
        rules: dict[str, Any] = {"normalization_rule_name": "identity"}  # what goes in comes out
        with tempfile.TemporaryDirectory() as folder:
            if lowercase:
                path = Path(folder, "lower.tsv")
                path.write_text(_lowering(), encoding="ascii")
                rules = {"normalization_rule_tsv": str(path)}
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(captions),
                    model_writer=model,
                    model_type="bpe",
                    vocab_size=size,
                    hard_vocab_limit=False,
                    byte_fallback=True,
                    character_coverage=_COVERAGE,
                    remove_extra_whitespaces=False,
                    max_sentence_length=_LONGEST,
                    num_threads=1,  # the result depends on it
                    minloglevel=2,
                    **rules,
                    **specials,
                )
            except RuntimeError as error:
                reason = str(error).rsplit("] ", 1)[-1].strip() or "training failed"
                wanted = f"no tokenizer of {size} pieces from these captions"
                raise ValueError(f"vocab_size: {wanted}: {reason}") from error
        return cls(pieces.ordered(model.getvalue()) if bilingual else model.getvalue())

    def save(self, path: str | Path) -> None:
        """Writes the model, never half of it."""
        with written_beside(path) as beside:
            beside.write_bytes(self._model)

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Reads a SentencePiece model; ValueError if there is none or it is something else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path: no text tokenizer at {str(path)!r}")
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise ValueError(f"path: {str(path)!r} is larger than {MAX_MODEL_BYTES} bytes")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"path: {str(path)!r} is not a SentencePiece model") from error

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def end_id(self) -> int | None:
        """Of </s>, where there is one."""
        return self._id("</s>")

    @property
    def pad_id(self) -> int | None:
        """Of <pad>, where there is one."""
        return self._id("<pad>")

    def _chinese_from(self) -> int | None:
        if self.pad_id is None:
            return None
        return pieces.chinese_from([self._processor.id_to_piece(i) for i in range(self.vocab_size)])

    def _id(self, piece: str) -> int | None:
        number = self._processor.piece_to_id(piece)  # of <unk>, where there is none
        return number if self._processor.id_to_piece(number) == piece else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin or end marks."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        try:
            return self._processor.encode(text)
        except (UnicodeEncodeError, RuntimeError) as error:
            raise ValueError(f"text: expected valid Unicode, got {text!a}") from error

    def sample(self, text: str, dropout: float, seed: int) -> list[int]:
        """The ids of a text with BPE dropout (Provilkov et al., arXiv 1910.13267): each merge is left out with that
        chance, drawn from the seed, from 1 to 2^32 - 1. Of a model that merges, `is_bpe`."""
        found: list[int] = []

        def draw() -> None:
            found.extend(self._processor.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1))

        with _SEEDING:  # the seed is the process's, its numbers are a thread's, from its first on
            sentencepiece.set_random_generator_seed(seed)
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        return found

    @property
    def lowercase(self) -> bool:
        """Whether capital letters are none to it."""
        return self.decode(self.encode("AB")) == "ab"

    @property
    def is_bpe(self) -> bool:
        """Whether it merges pairs of pieces, and is no unigram model."""
        return pieces.is_bpe(self._model)

    def unknown(self, text: str, ids: list[int]) -> str:
        """What of a text, whose ids these are, a model without byte fallback has no id for, as a released one may be;
        else empty."""
        none = self._processor.unk_id()
        if none not in ids:
            return ""
        cut = self._processor.encode(text, out_type=str)
        return "".join(piece for piece, number in zip(cut, ids, strict=True) if number == none)

    def unwritten(self, text: str) -> str:
        """The letters and pictures (emoji, say) of a text that the vocabulary has no pieces for: it spells them in
        bytes, or has nothing for them. Word by word; "" if there are none. Digits and marks do not count."""
        return " ".join(filter(None, map(self._unwritten, text.split())))

    def foreign(self, text: str) -> str:
        """Of those what is neither Latin nor Han: letters of other scripts, and pictures."""
        kept = "".join(c for c in self.unwritten(text) if c == " " or pieces.group(c) not in _OWN)
        return " ".join(kept.split())

    def _unwritten(self, word: str) -> str:
        ids, lost = self.encode(word), bytearray()
        for piece, number in zip(self._processor.encode(word, out_type=str), ids, strict=True):
            if self._processor.is_byte(number):
                lost.append(int(piece[1:-1], 16))
            elif number == self._processor.unk_id():
                lost += piece.encode()
        kinds = [(c, unicodedata.category(c)) for c in lost.decode(errors="ignore")]
        shown = [(c, kind) for c, kind in kinds if kind[0] in "LM" or kind == "So"]
        return "".join(c for c, _ in shown) if any(kind[0] != "M" for _, kind in shown) else ""

    def decode(self, ids: list[int]) -> str:
        """The text of ids; ValueError if one is not of this vocabulary."""
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {wrong[:5]}")
        return self._processor.decode(list(ids))
