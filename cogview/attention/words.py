"""Where in the picture a word counts (CogView paper, appendix C.2).

The map of a word is, of each place of the picture, what the query that draws it gives the word's tokens; where the
picture stands before its text, what the queries that write the word give the place. L layers, H heads, W words,
N = g x g places.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.attention.look import Places, Seen, look, places_of
from cogview.config import require
from cogview.system import System
from cogview.tokenizers.text import TextTokenizer


class Word(NamedTuple):
    text: str
    tokens: list[int]
    """Their numbers among the caption's tokens."""


def words_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[Word]:
    """What blanks part in a caption of these ids; of scripts without blanks, every token."""
    text, spans = _spans(tokenizer, ids)
    parts = [list(run) for blank, run in itertools.groupby(range(len(text)), lambda n: text[n].isspace()) if not blank]
    found = list[Word]()
    for letters in parts:
        tokens = _within(spans, letters[0], letters[-1] + 1)
        if _without_blanks(text[letters[0] : letters[-1] + 1]):
            own = dict.fromkeys(spans[n] for n in tokens)
            found += [Word(text[slice(*span)].strip(), _within(spans, *span)) for span in own]
        else:
            found.append(Word(text[letters[0] : letters[-1] + 1], tokens))
    return [word for word in found if word.text]


def find(tokenizer: TextTokenizer, ids: Sequence[int], wanted: str) -> Word | None:
    """The first place of a word, or of several, in a caption of these ids, with all tokens that have a part of it."""
    (text, spans), wanted = _spans(tokenizer, ids), " ".join(wanted.split())
    whole = re.escape(wanted) if _without_blanks(wanted) else rf"(?<!\w){re.escape(wanted)}(?!\w)"
    found = re.search(whole, text)
    return None if found is None else Word(wanted, _within(spans, *found.span()))


def check_words(tokenizer: TextTokenizer, captions: Sequence[Sequence[int]], wanted: Sequence[str]) -> None:
    """ValueError for one that is blank, or stands in none of the captions' ids."""
    for word in wanted:
        require(bool(word.strip()), "words", "none that is blank", word)
        there = any(find(tokenizer, ids, word) for ids in captions)
        require(there, "words", "what stands in one of the captions", word)


def maps(seen: Seen, places: Places, words: Sequence[Word]) -> Tensor:
    """float32 [h, W, N]."""
    found, first = list[Tensor](), int(places.text[0]) < int(places.image[0])
    for word in words:
        tokens = places.text[word.tokens]
        if first:
            found.append(seen.weights[:, places.image - 1][:, :, tokens].sum(-1))
        else:
            found.append(seen.weights[:, tokens - 1][:, :, places.image].mean(1))
    return torch.stack(found, dim=1).cpu()


def collect(
    system: System,
    ids: Sequence[int],
    codes: Tensor,
    words: Sequence[Word],
    *,
    seed: int = 0,
    see: Callable[[Seen], None] = lambda seen: None,
) -> Tensor:
    """float32 [L, H, W, N]: the maps of all heads of words of a caption of ids, and its picture of codes int64 [g, g].
    see: is shown what they are taken from, too, see `look`."""
    c, places = system.recipe.config, places_of(system, ids)
    found = torch.zeros(c.num_layers, c.num_heads, len(words), c.image_tokens)

    def keep(seen: Seen) -> None:
        see(seen)
        if words:
            found[seen.layer, seen.heads] = maps(seen, places, words)

    look(system, ids, codes, keep, seed=seed)
    return found


def contrast(maps: Tensor) -> Tensor:
    """[...] of maps [..., N]: how much more than their mean the places above it get, on average over all places. Large
    where a head gives a word much, and some places far more than others."""
    return (maps - maps.mean(-1, keepdim=True)).clamp_min(0).mean(-1)


def _without_blanks(text: str) -> bool:
    """Whether it has letters of scripts that do not part words, as Chinese."""
    return any(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def _spans(tokenizer: TextTokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of ids, and from where to where in it each stands; bytes of one character all stand where it does."""
    text, ends = tokenizer.decode(list(ids)), [0]
    for n in range(1, len(ids) + 1):
        some = tokenizer.decode(list(ids[:n]))
        ends.append(len(some) if text.startswith(some) else ends[-1])  # within a character: where it begins
    behind = [next((end for end in ends[n:] if end > begin), begin) for n, begin in enumerate(ends[:-1])]
    return text, list(zip(ends[:-1], behind, strict=True))


def _within(spans: Sequence[tuple[int, int]], begin: int, end: int) -> list[int]:
    """Tokens of which a part stands from begin to end."""
    return [n for n, (first, last) in enumerate(spans) if max(first, begin) < min(last, end)]
