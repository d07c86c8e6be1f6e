"""Words about people in English captions."""

import re
from collections.abc import Callable, Sequence

from cogview.people.words import LONGEST, People

_BEFORE, _BEHIND = 4, 5  # words that may stand between a noun and what tells of it
_WORD = re.compile(r"[A-Za-z]+(?:[-'’][A-Za-z]+)*")
FACE = "face"
"""A noun only where it begins a caption and stands alone, as in "a face, photo"."""
_FACE_ALONE = re.compile(r"\s*(?:(?:an?|the)\s+)?face\s*(?:[,.;]|$)", re.IGNORECASE)
ENDS = frozenset(
    "a an the of in on at with and or by to for from is are as this that some his her their".split()  # noqa: SIM905
)
"""What comes before these tells nothing of a noun behind them."""
SAYS = frozenset(("is", "are", "was", "were", "who"))
"""What comes behind these tells of the noun before them."""


def put_in(caption: str, people: People, draw: Callable[[list[str]], list[str]]) -> str:
    """Before each run of nouns, of which one may tell of the others ("a woman doctor")."""
    words = list(_WORD.finditer(caption))
    lower = [word[0].lower() for word in words]
    pronoun = any(word in people.pronouns.get("en", ()) for word in lower)
    known, others, gender = _nouns(people), set(people.others.get("en", ())), set(people.gendered.get("en", ()))
    written = [word[0] for word in words]
    names = {name for name, own in people.attributes.items() if any(word[0].isupper() for word in own)}
    out, end, place, seen = "", 0, 0, False
    while place < len(words):
        if skipped := _length(lower[place:], others):
            place += skipped
            continue
        start, nouns = place, list[str]()
        while length := _length(lower[place:], known):
            nouns.append(" ".join(lower[place : place + length]))
            place += length
        if not nouns:
            place += 1
            continue
        if seen and _is_said(lower[:start]):  # it is the one before, who has words
            continue
        if nouns == [FACE] and not _FACE_ALONE.match(caption):
            continue
        seen = True
        behind = _behind(lower[place:])
        about = _before(written[:start]) | behind
        told = {name for name in people.attributes if about & people.adjectives(name, "en")}
        told |= names if _is_named(written, start, place) else set()
        told |= {"gender"} if pronoun or any(_known(noun, gender) for noun in {*nouns, *behind}) else set()
        if added := draw([name for name in people.attributes if name not in told]):
            text, end = caption[end : words[start].start()], words[start].start()
            out += f"{_article(text, added[0])}{' '.join(added)} "
    return out + caption[end:]


def _length(words: Sequence[str], known: set[str]) -> int:
    """Words of the longest noun that stands at the beginning, or none."""
    lengths = range(min(LONGEST, len(words)), 0, -1)
    return next((n for n in lengths if _known(" ".join(words[:n]), known)), 0)


def _known(noun: str, known: set[str]) -> bool:
    """In singular or plural."""
    singular = (noun, noun.removesuffix("s"), noun.removesuffix("es"), f"{noun.removesuffix('ies')}y")
    return any(form in known for form in singular)


def _nouns(people: People) -> set[str]:
    return {word.lower() for words in (people.nouns, people.gendered) for word in words.get("en", ())}


def _before(words: Sequence[str]) -> set[str]:
    """The words right before a noun, back to one that ends what is told of it; of names also the parts."""
    found: set[str] = set()
    for word in words[: -_BEFORE - 1 : -1]:
        if word.lower() in ENDS:
            break
        parts = word.split("-") if word[0].isupper() else ()
        found |= {part.lower() for part in (word, *parts)}
    return found


def _behind(words: Sequence[str]) -> set[str]:
    """What is said of a noun right behind it."""
    if words[:1] == ["of"] and words[2:3] in (["descent"], ["origin"], ["heritage"]):
        return {words[1]}
    return set(words[1 : 1 + _BEHIND]) if words and words[0] in SAYS else set()


def _is_named(words: Sequence[str], start: int, end: int) -> bool:
    """Whether a name that no list has tells of the nouns there, as in "a Dutch man" and "a man from Lagos"."""
    if all(word[0].isupper() for word in words if word.lower() not in ENDS):
        return False  # a title
    before = list(words[max(1, start - _BEFORE) : start])
    last = max((n for n, word in enumerate(before) if word.lower() in ENDS), default=-1)
    behind = words[end : end + 2] if words[end : end + 1] == ["from"] else []
    return any(word[0].isupper() for word in (*before[last + 1 :], *behind))


def _is_said(before: Sequence[str]) -> bool:
    """Whether a noun is what these words say of another, as in "a doctor who is a …"."""
    words = [word for word in before if word not in ("a", "an", "the")]
    return bool(words) and words[-1] in SAYS


def _article(text: str, added: str) -> str:
    """What stands before the words put in, with the article that goes with them."""
    article = re.search(r"\b([Aa])n?( +)$", text)
    if article is None:
        return text
    n = "n" if added[0].lower() in "aeiou" else ""
    return f"{text[: article.start()]}{article[1]}{n}{article[2]}"
