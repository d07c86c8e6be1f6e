"""The tokens that a run trains on and is validated on, checked before anything is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogview.commands.tokenizers import UNFINISHED
from cogview.data.tokens import Rows, TokenDataset, read_meta, tokens_of
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer

SAME = {
    "text tokenizer": ("text_sha256", "text_vocab_size"),
    "image tokenizer": ("image_sha256", "codebook_size"),
    "image size": ("image_size", "grid", "small_grid"),
}
"""What tokens of two splits have in common, and where meta.json says it."""


class Tokens:
    """Of a run folder: `data`, `held_out` or None, both as `TokenDataset`; what they are in words, `said`."""

    def __init__(self, run: Path, hold_out: float, header: dict[str, Any] | None, sizes: int = 1):
        """hold_out: the share to hold out where there is no tokens/test. header: of a checkpoint to go on from. sizes:
        of a picture, as the recipe has them."""
        train, test = (tokens_of(run, split, sizes) for split in ("train", "test"))
        if (run / UNFINISHED).exists():
            raise ValueError(
                f"{run}: its tokenizers are being trained: `cogview tokenize` has to go on to its end first"
            )
        if sizes > 1 and read_meta(train) is None and (run / "tokens").exists():
            raise ValueError(
                f"{run}: this recipe takes pictures at two sizes: `cogview tokenize --pairs` makes {train}"
            )
        self.all = TokenDataset(train)
        self.data: TokenDataset | Rows = self.all
        self.held_out: TokenDataset | Rows | None = None
        before = 0.0 if header is None else header.get("hold_out", 0.0)  # a run goes on as it began
        if test.exists() and not before:
            self.held_out, hold_out = TokenDataset(test), 0.0
            for what, names in SAME.items():
                if any(self.all.meta.get(name) != self.held_out.meta.get(name) for name in names):
                    raise ValueError(f"{test} was made with another {what} than {train}: tokenize it again")
            self.said = f"held out: the {len(self.held_out):,} sequences of {test}, so that --hold-out is not used"
        elif header is not None and "hold_out" not in header:
            hold_out, self.said = 0.0, "held out: nothing, as in this run before"
        else:
            self.data, self.held_out = self.all.hold_out(hold_out)
            count = len(self.held_out)
            self.said = f"held out: {count:,} of {len(self.all):,} sequences, by their captions"
            if count == 0:
                self.held_out = None
                self.said = "held out: nothing" if hold_out == 0 else f"{self.said}, so that no loss is held out"
            if len(self.data) == 0:
                raise ValueError(f"{train}: nothing is left to train on ({self.said}): --hold-out 0 holds out nothing")
        _check_tokenizers(run, self.all)
        self.identity = {"hold_out": hold_out} | ({"tokens": self.all.digest} if self.all.digest else {})

    @property
    def longest(self) -> int:
        """Text of a sequence."""
        return max(part.meta["text_length"] for part in (self.all, self.held_out) if part is not None)

    def sizes(self) -> dict[str, int]:
        """As `Recipe.fit` takes them."""
        from cogview.pipeline import sizes_of

        return sizes_of(*(part for part in (self.data, self.held_out) if part is not None))


def _check_tokenizers(run: Path, data: TokenDataset) -> None:
    """ValueError where those in the run folder, if they are there, did not make the tokens."""
    loads: tuple[Callable[[Path], TextTokenizer | ImageTokenizer], ...] = TextTokenizer.load, load_image_tokenizer
    files = zip(("text", "image"), ("text.model", "vqvae.safetensors"), loads, data.tokenizers, strict=True)
    for kind, name, load, made_by in files:
        if (run / name).exists() and load(run / name).sha256 != made_by:
            raise ValueError(
                f"{run / name}: the {kind} tokenizer was retrained after these tokens, or is damaged: tokenize again"
            )
