"""The tokens that a run trains on and is validated on, checked before anything is computed."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogview.commands.tokenizers import UNFINISHED
from cogview.config import require
from cogview.data.mixture import Mixture, difference
from cogview.data.parts import damage
from cogview.data.tokens import Rows, TokenDataset, read_meta, tokens_of
from cogview.progress import progress
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.train.ranks import Ranks


class Tokens:
    """Of a run folder: `data`, `held_out` or None, both as `TokenDataset`; what they are in words, `said`."""

    def __init__(
        self, run: Path, hold_out: float, header: dict[str, Any] | None, sizes: int = 1, mix: Sequence[str] = ()
    ):
        """hold_out: the share to hold out where there is no tokens/test. header: of a checkpoint to go on from. sizes:
        of a picture, as the recipe has them. mix: the splits to train on and their weights, as NAME=WEIGHT; none:
        train, or that of the header."""
        weights = mix_of(mix, header)
        train, test = (tokens_of(run, split, sizes) for split in ("train", "test"))
        if (run / UNFINISHED).exists():
            raise ValueError(
                f"{run}: its tokenizers are being trained: `cogview tokenize` has to go on to its end first"
            )
        if not weights and sizes > 1 and read_meta(train) is None and (run / "tokens").exists():
            raise ValueError(
                f"{run}: this recipe takes pictures at two sizes: `cogview tokenize --pairs` makes {train}"
            )
        self.all: TokenDataset | Mixture = TokenDataset(train) if not weights else _mixture(run, weights, sizes)
        self.data: TokenDataset | Rows | Mixture = self.all
        self.held_out: TokenDataset | Rows | Mixture | None = None
        before = 0.0 if header is None else header.get("hold_out", 0.0)  # a run goes on as it began
        if test.exists() and not before:
            self.held_out, hold_out = TokenDataset(test), 0.0
            if what := difference(self.all.meta, self.held_out.meta):
                raise ValueError(f"{test} was made with another {what} than {self.all.folder}: tokenize it again")
            self.said = f"held out: the {len(self.held_out):,} sequences of {test}, so that --hold-out is not used"
        elif header is not None and "hold_out" not in header:
            hold_out, self.said = 0.0, "held out: nothing, as in this run before"
        else:
            self.data, self.held_out = self.all.hold_out(hold_out)
            count = len(self.held_out)
            self.said = f"held out: {count:,} of {_rows(self.all):,} sequences, by their captions"
            if count == 0:
                self.held_out = None
                self.said = "held out: nothing" if hold_out == 0 else f"{self.said}, so that no loss is held out"
            if len(self.data) == 0:
                raise ValueError(
                    f"{self.all.folder}: nothing is left to train on ({self.said}): --hold-out 0 holds out nothing"
                )
        _check_tokenizers(run, self.all)
        self.identity: dict[str, Any] = {"hold_out": hold_out} | (
            {"tokens": self.all.digest} if self.all.digest else {}
        )
        if weights:
            self.identity["mix"] = weights
            self.said = f"in an epoch {_shown(weights)} times; {self.said}"

    @property
    def rows(self) -> int:
        """Different ones to train on."""
        return _rows(self.data)

    @property
    def longest(self) -> int:
        """Text of a sequence."""
        return max(part.meta["text_length"] for part in (self.all, self.held_out) if part is not None)

    def check(self, ranks: Ranks) -> None:
        """Reads all that have checksums, each process some; ValueError, on all, names a file that is not as it was
        written."""
        sets = (self.all, self.held_out)
        parts = dict.fromkeys(part for data in sets if data is not None for part in data.parts)
        mine = list(parts)[ranks.rank :: ranks.count]

        def read() -> None:
            with progress("checking the tokens", len(mine), shown=ranks.first and bool(mine)) as update:
                for number, (folder, name) in enumerate(mine, 1):
                    if file := damage(folder, name):
                        raise ValueError(f"{folder / file} is damaged or gone: tokenize again, which makes it anew")
                    update(number)

        ranks.alike(read)

    def sizes(self) -> dict[str, int]:
        """As `Recipe.fit` takes them."""
        from cogview.pipeline import sizes_of

        return sizes_of(*(part for part in (self.data, self.held_out) if part is not None))


def mix_of(mix: Sequence[str], header: dict[str, Any] | None) -> dict[str, float]:
    """The weights of a mix by the names of the splits, sorted; a run goes on as it began. Empty: no mix."""
    weights: dict[str, float] = {}
    for item in mix:
        found = re.fullmatch(r"(?!pairs-)(\w[\w-]*)=(\d+(?:\.\d*)?|\.\d+)", item)
        fits = found is not None and float(found[2]) > 0
        require(fits, "mix", "NAME=WEIGHT, the name of a split and a positive number", item)
        assert found is not None
        require(found[1] not in weights, "mix", f"{found[1]} once", list(mix))
        weights[found[1]] = float(found[2])
    weights = dict(sorted(weights.items()))
    before = weights if header is None else header.get("mix", {})
    if weights and before != weights:
        raise ValueError(
            f"mix: expected {_shown(before) or 'none'}, as this run began, got {_shown(weights)}: --name NAME begins "
            "another"
        )
    return before


def _shown(weights: dict[str, float]) -> str:
    return " ".join(f"{name}={weight:g}" for name, weight in weights.items())


def _mixture(run: Path, weights: dict[str, float], sizes: int) -> Mixture:
    held_out = "test" in weights and tokens_of(run, "test", sizes).exists()
    require(not held_out, "mix", "splits to train on, of which test is none", _shown(weights))
    return Mixture({name: TokenDataset(tokens_of(run, name, sizes)) for name in weights}, weights)


def _rows(data: TokenDataset | Rows | Mixture) -> int:
    return data.rows if isinstance(data, Mixture) else len(data)


def _check_tokenizers(run: Path, data: TokenDataset | Mixture) -> None:
    """ValueError where those in the run folder, if they are there, did not make the tokens."""
    loads: tuple[Callable[[Path], TextTokenizer | ImageTokenizer], ...] = TextTokenizer.load, load_image_tokenizer
    files = zip(("text", "image"), ("text.model", "vqvae.safetensors"), loads, data.tokenizers, strict=True)
    for kind, name, load, made_by in files:
        if (run / name).exists() and load(run / name).sha256 != made_by:
            raise ValueError(
                f"{run / name}: the {kind} tokenizer was retrained after these tokens, or is damaged: tokenize again"
            )
