"""Words that captions leave open about people, put in before they are drawn (CogView, arXiv 2105.13290, appendix D).

    specify("a doctor in a garden", seed=3)     ->  "a black female doctor in a garden"
    specify("花园里的医生", seed=3)               ->  "花园里的非裔女性医生"

Each noun for a person gets a word of every attribute that the caption does not tell of it, drawn with the proportions
of the list, so that many pictures of one caption come to these. Left alone is what is told already: by the words before
the noun ("an Asian doctor"), by the noun itself ("a woman"), by a pronoun for the gender. The paper would find the
nouns by a trained model; here they are a list, so that one that names no person there ("a baby bottle") is taken for
one.

The proportions of the list that comes with the package: of gender those of mankind, and of ethnicity the shares of
continents in it (United Nations, World Population Prospects 2024: Asia 59 %, Africa 19 %, Europe and Northern America
14 %, Latin America 8 %), which say little of any one country: give a list of your own.
"""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from cogview.config import require

LIST = Path(__file__).parent / "assets" / "people.json"
MAX_BYTES = 1 << 20
LANGUAGES = ("en", "zh")
_BETWEEN = 4  # English words that may stand between a noun and what tells of it
_BEFORE = 8  # Chinese characters
_ENDS = frozenset(
    "a an the of in on at with and or by to for from is are as this that some his her their".split()  # noqa: SIM905
)
_CHINESE = re.compile(r"[㐀-鿿]")
_WORD = re.compile(r"[A-Za-z]+(?:[-'’][A-Za-z]+)*")


@dataclass(frozen=True)
class People:
    """A list of words, as cogview/assets/people.json has them; all of English in lower case but names."""

    attributes: Mapping[str, Mapping[str, float]]
    """By attribute its English words, in the order in which they are put in, and how often each is drawn."""
    chinese: Mapping[str, str]
    """Of these words."""
    told: Mapping[str, Mapping[str, Sequence[str]]]
    """By attribute and language, further words that tell of it."""
    nouns: Mapping[str, Sequence[str]]
    """By language, of people."""
    gendered: Mapping[str, Sequence[str]]
    """Those that tell the gender."""
    pronouns: Mapping[str, Sequence[str]]
    others: Mapping[str, Sequence[str]]
    """By language, what only looks like a noun of people."""

    @classmethod
    def load(cls, path: Path = LIST) -> "People":
        """ValueError in a sentence where a file is no such list."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            require(len(data) <= MAX_BYTES, "people", f"at most {MAX_BYTES:,} bytes", f"more in {path}")
            found = json.loads(data)
        except OSError as error:
            raise ValueError(f"people: cannot read {path} ({error.strerror})") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"people: {path} is no JSON ({error})") from error
        names = ("attributes", "zh", "specified", "nouns", "gendered", "pronouns", "not")
        there = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in names)
        require(there, "people", f"an object with {', '.join(names)}, each an object, in {path}", found)
        attributes, chinese = found["attributes"], found["zh"]
        require(bool(attributes), "people", "at least one attribute", attributes)
        for name, words in attributes.items():
            weights = isinstance(words, dict) and bool(words) and all(_is_weight(w) for w in words.values())
            require(weights, f"people: attributes: {name}", "words and positive numbers", words)
            for word in words:
                require(isinstance(chinese.get(word), str), f"people: zh: {word}", "its Chinese", chinese.get(word))
        for name in names[2:]:
            nested = found[name].values() if name == "specified" else [found[name]]
            lists = [words for of in nested if isinstance(of, dict) for words in of.values()]
            fits = all(isinstance(v, list) and all(isinstance(x, str) and x for x in v) for v in lists)
            require(fits, f"people: {name}", "lists of words", found[name])
        return cls(attributes, chinese, *(found[name] for name in names[2:]))

    def specify(self, caption: str, seed: int) -> str:
        """The caption with words for what it leaves open, which depend on it and on the seed."""
        draws = random.Random(f"{seed}\0{caption}")
        if _CHINESE.search(caption):
            return self._chinese(caption, draws)
        return self._english(caption, draws)

    def _draw(self, attributes: Sequence[str], draws: random.Random) -> list[str]:
        chosen = (self.attributes[name] for name in attributes)
        return [draws.choices(list(words), list(words.values()))[0] for words in chosen]

    def _open(self, told: Sequence[str], by_noun: bool) -> list[str]:
        """Attributes that none of the words `told` tells of."""
        return [name for name in self.attributes if not (name == "gender" and by_noun) and name not in told]

    def _english(self, caption: str, draws: random.Random) -> str:
        words = list(_WORD.finditer(caption))
        lower = [word[0].lower() for word in words]
        pronoun = any(word in self.pronouns.get("en", ()) for word in lower)
        anywhere = {name for name in self.attributes if self._names(name) & {word[0] for word in words}}
        out, end, place = "", 0, 0
        while place < len(words):
            length = next((n for n in (2, 1) if self._is_noun(lower[place : place + n])), 0)
            if not length:
                place += 1
                continue
            noun = " ".join(lower[place : place + length])
            before = self._run(lower[:place])
            told = anywhere | {name for name in self.attributes if before & self._adjectives(name)}
            added = self._draw(self._open(sorted(told), pronoun or noun in self.gendered.get("en", ())), draws)
            if added:
                start = words[place].start()
                text = caption[end:start]
                article = re.search(r"\b([Aa])n?( +)$", text)
                if article:
                    n = "n" if added[0][0].lower() in "aeiou" else ""
                    text = f"{text[: article.start()]}{article[1]}{n}{article[2]}"
                out, end = f"{out}{text}{' '.join(added)} ", start
            place += length
        return out + caption[end:]

    def _run(self, before: Sequence[str]) -> set[str]:
        """The words right before a noun, back to one that ends what is told of it."""
        found: set[str] = set()
        for word in before[: -_BETWEEN - 1 : -1]:
            if word in _ENDS:
                break
            found |= {word, *word.split("-")}
        return found

    def _is_noun(self, words: Sequence[str]) -> bool:
        noun = " ".join(words)
        return noun in self._english_nouns or (noun.endswith("s") and noun[:-1] in self._english_nouns)

    @cached_property
    def _english_nouns(self) -> frozenset[str]:
        return frozenset(word.lower() for words in (self.nouns, self.gendered) for word in words.get("en", ()))

    def _adjectives(self, attribute: str) -> set[str]:
        words = {*self.attributes[attribute], *self.told.get(attribute, {}).get("en", ())}
        return {word.lower() for word in words}

    def _names(self, attribute: str) -> set[str]:
        """Those that tell of it wherever they stand, as they are written."""
        return {word for word in self.told.get(attribute, {}).get("en", ()) if word[0].isupper()}

    def _chinese(self, caption: str, draws: random.Random) -> str:
        pronoun = any(word in caption for word in self.pronouns.get("zh", ()))
        out, place, told_from = "", 0, 0
        while place < len(caption):
            noun = self._at(caption, place)
            start, place = place, place + (len(noun) or 1)
            if not noun or noun in self.others.get("zh", ()):
                out += caption[start:place]
                told_from = place if noun else told_from
                continue
            if self._at(caption, place):  # it tells of what follows, as 黑人 of 男孩
                out += noun
                continue
            before = re.split(r"[，。、；：！？\s和与]", caption[max(told_from, start - _BEFORE) : place])[-1]
            told = [name for name in self.attributes if any(word in before for word in self._chinese_words(name))]
            added = self._draw(self._open(told, pronoun or noun in self.gendered.get("zh", ())), draws)
            out += "".join(self.chinese[word] for word in added) + ("" if noun == "人" and len(added) > 1 else noun)
            told_from = place
        return out

    def _at(self, caption: str, place: int) -> str:
        """The longest noun, or what looks like one, that begins there."""
        return next((word for word in self._chinese_nouns if caption.startswith(word, place)), "")

    @cached_property
    def _chinese_nouns(self) -> list[str]:
        """Longest first."""
        of = (words.get("zh", ()) for words in (self.nouns, self.gendered, self.others))
        return sorted({word for words in of for word in words}, key=lambda word: (-len(word), word))

    def _chinese_words(self, attribute: str) -> set[str]:
        return {*(self.chinese[w] for w in self.attributes[attribute]), *self.told.get(attribute, {}).get("zh", ())}


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@cache
def default() -> People:
    return People.load()


def specify(caption: str, seed: int) -> str:
    """By the list that comes with the package."""
    return default().specify(caption, seed)
