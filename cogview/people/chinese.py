"""Words about people in Chinese captions."""

import re
from collections.abc import Callable

from cogview.people.words import People

_AROUND = 8  # characters that may stand between a noun and what tells of it
_CHINESE = re.compile(r"[㐀-鿿]")
_ENDS = re.compile(r"[，。、；：！？\s和与]")
PERSON, MEASURES = "人", "个位名群些的两几"
"""A noun only behind these: most words with this character are none, or others."""
FACE = "脸"
"""A noun only where it begins a caption and stands alone, as in 一张脸，照片."""
_FACE_ALONE = re.compile(rf"(?:一张)?{FACE}(?:[，。、,.]|$)")


def is_chinese(caption: str) -> bool:
    return bool(_CHINESE.search(caption))


def put_in(caption: str, people: People, draw: Callable[[list[str]], list[str]]) -> str:
    """Before each noun; what tells of one right behind it, as 黑人 and 女 of 医生, stays beside it."""
    others = set(people.others.get("zh", ()))
    plain = re.sub("|".join(map(re.escape, others)), "", caption) if others else caption
    pronoun = any(word in plain for word in people.pronouns.get("zh", ()))
    known = sorted({*people.nouns.get("zh", ()), *people.gendered.get("zh", ()), *others}, key=lambda w: (-len(w), w))

    def at(place: int) -> str:
        found = next((word for word in known if caption.startswith(word, place)), "")
        if found == FACE:
            return found if _FACE_ALONE.match(caption) else ""
        return "" if found == PERSON and caption[place - 1 : place] not in tuple(MEASURES) else found

    out, place, told_from = "", 0, 0
    while place < len(caption):
        noun = at(place)
        start, place = place, place + (len(noun) or 1)
        if not noun or noun in others:
            out += caption[start:place]
            told_from = place if noun else told_from
            continue
        if at(place) or (caption[place : place + 1] in ("男", "女") and at(place + 1)):
            out += noun
            continue
        about = _ENDS.split(caption[max(told_from, start - _AROUND) : place])[-1]
        if caption.startswith("是", place):
            about += _ENDS.split(caption[place : place + _AROUND])[0]
        told = {name for name in people.attributes if any(word in about for word in people.adjectives(name, "zh"))}
        told |= {"gender"} if pronoun or any(word in about for word in people.gendered.get("zh", ())) else set()
        added = draw([name for name in people.attributes if name not in told])
        words = "".join(people.chinese[word] for word in added)
        lead = out[-1:] if out[-1:] in ("男", "女") else ""  # of 女医生
        out = f"{out[: len(out) - len(lead)]}{words}{lead}{'' if noun == PERSON and len(added) > 1 else noun}"
        told_from = place
    return out
