"""Lists of words about people: what may be put in, in which proportions, and what tells of people already.

The proportions of the list that comes with the package: of gender those of mankind, and of ethnicity the shares of
continents in it (United Nations, World Population Prospects 2024: Asia 59 %, Africa 19 %, Europe and Northern America
14 %, Latin America 8 %), which say little of any one country: give a list of your own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.config import require
from cogview.data.files import read_bytes

LIST = Path(__file__).parents[1] / "assets" / "people.json"
MAX_BYTES = 1 << 20
LANGUAGES = ("en", "zh")
LONGEST = 3  # words of an English noun
_OF_WORDS = ("nouns", "gendered", "pronouns", "not")

Words = Mapping[str, Sequence[str]]
"""By language, "en" and "zh"."""


@dataclass(frozen=True)
class People:
    """A list, as cogview/assets/people.json has it; English in lower case but names."""

    attributes: Mapping[str, Mapping[str, float]]
    """By attribute its English words, in the order in which they are put in, and how often each is drawn."""
    chinese: Mapping[str, str]
    """Of these words."""
    told: Mapping[str, Words]
    """By attribute, further words that tell of it."""
    nouns: Words
    """Of people."""
    gendered: Words
    """Those that tell the gender."""
    pronouns: Words
    """Likewise."""
    others: Words
    """What only looks like one of these."""

    @classmethod
    def load(cls, path: Path = LIST) -> "People":
        """ValueError in a sentence where a file is no such list."""
        found = _read(path)
        names = ("attributes", "zh", "specified", *_OF_WORDS)
        there = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in names)
        require(there, "people", f"an object with {', '.join(names)}, each an object, in {path}", found)
        attributes, chinese = found["attributes"], found["zh"]
        require(bool(attributes), "people", "at least one attribute", attributes)
        for name, words in attributes.items():
            fits = isinstance(words, dict) and bool(words) and _are_words(words)
            fits = fits and all(map(_is_weight, words.values()))
            require(fits, f"people: attributes: {name}", "words and positive numbers", words)
            for word in words:
                fits = _are_words([chinese.get(word)])
                require(fits, f"people: zh: {word}", "its Chinese", chinese.get(word))
        for name, of in found["specified"].items():
            require(name in attributes, "people: specified", f"attributes ({', '.join(attributes)})", name)
            _check_words(f"specified: {name}", of)
        for name in _OF_WORDS:
            _check_words(name, found[name])
        for noun in (noun for name in ("nouns", "gendered", "not") for noun in found[name].get("en", ())):
            fits = 1 <= len(noun.split()) <= LONGEST
            require(fits, "people", f"English nouns of at most {LONGEST} words", noun)
        return cls(attributes, chinese, found["specified"], *(found[name] for name in _OF_WORDS))

    def adjectives(self, attribute: str, language: str) -> set[str]:
        """All that tell of an attribute, in lower case."""
        own = set(self.attributes[attribute])
        words = own if language == "en" else {self.chinese[word] for word in own}
        return {word.lower() for word in {*words, *self.told.get(attribute, {}).get(language, ())}}


def _read(path: Path) -> Any:
    data = read_bytes(path, "people", MAX_BYTES)
    try:
        return json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"people: {path} is no JSON ({error})") from error


def _check_words(name: str, of: Any) -> None:
    fits = isinstance(of, dict) and of.keys() <= {*LANGUAGES} and all(map(_are_words, of.values()))
    require(fits, f"people: {name}", f"lists of words by language, {' and '.join(LANGUAGES)}", of)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53


def _are_words(values: Any) -> bool:
    return not isinstance(values, str) and all(isinstance(word, str) and bool(word.strip()) for word in values)
