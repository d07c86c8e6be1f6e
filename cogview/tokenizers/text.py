"""Text to token ids and back: SentencePiece with byte fallback, so that nothing is ever unknown.

Byte-pair merges, not the unigram model: that one finds its candidate pieces among the distinct words, so from
captions of a few dozen words it learns letters (37 tokens a caption of the demo instead of 12).
"""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from cogview.data.files import written_beside

MAX_MODEL_BYTES = 64 << 20


class TextTokenizer:
    """A trained model. Ids are 0 to vocab_size - 1; `sha256` names the model in files made with it."""

    def __init__(self, model: bytes):
        """model: the bytes of a SentencePiece model; ValueError if they are not one."""
        if not model:  # SentencePiece takes no bytes for "no model yet"
            raise ValueError("model: expected a SentencePiece model, got no bytes")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError("model: not a SentencePiece model") from error
        self.sha256 = hashlib.sha256(model).hexdigest()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, path: str | Path) -> "TextTokenizer":
        """Trains on captions and writes the model to `path`.

        vocab_size is an upper limit: few captions have few pieces. It counts 256 bytes and the characters
        that cover all but 1 / 100,000 of the text, and must hold them. The same captions in the same order
        give the same bytes.
        """
        captions = [c for c in captions if c.strip()]
        if not captions:
            raise ValueError("captions: expected at least one that is not blank")
        if vocab_size < 300:
            raise ValueError(f"vocab_size: expected at least 300 (256 are bytes), got {vocab_size}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=0.99999,
                normalization_rule_name="identity",  # what goes in comes out
                remove_extra_whitespaces=False,
                bos_id=-1,  # the sequence has commands of its own
                eos_id=-1,
                num_threads=1,  # the result depends on it
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rsplit("] ", 1)[-1].strip() or "training failed"
            raise ValueError(
                f"vocab_size: no tokenizer of {vocab_size} pieces from these captions: {reason}"
            ) from error
        tokenizer = cls(model.getvalue())
        with written_beside(path) as beside:
            beside.write_bytes(model.getvalue())
        return tokenizer

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

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin or end marks."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; ValueError if one is not of this vocabulary."""
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {wrong[:5]}")
        return self._processor.decode(list(ids))
