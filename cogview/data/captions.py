"""The captions of a sample, from its .txt and its .json."""

import codecs
import json
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any, NamedTuple

INVALID, BLANK, NO_TEXT = "caption not valid Unicode", "blank caption", "caption is no text"
NO_JSON = "JSON not readable"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like the next
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# fillers and variation selectors, which Unicode counts as letters, marks and symbols
_UNSEEN = {*"\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))}


class Captions(NamedTuple):
    found: dict[str, str]
    problems: list[tuple[str, str]]  # kind, detail
    others: tuple[str, ...]  # fields that hold text and were not asked for


def read_captions(as_json: bytes | None, as_text: bytes | None, languages: Sequence[str]) -> Captions:
    """The captions of one sample in the languages asked for, in that order; nothing is raised.

    The .txt is "caption", whatever the JSON has. A "caption" of the JSON that differs comes as "caption.json" after it.
    Further ones of a language, of a list or of the fields "en.2", "en.3" and so on, come under such names.
    """
    found: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    fields: Mapping[str, Any] = {}
    try:
        fields = {} if as_json is None else read_object(as_json)
    except ValueError as error:
        problems.append((NO_JSON, str(error)))
    taken: set[str] = set()
    for language in languages:
        if language in taken:
            continue  # "en.2", where "en" is asked for too
        sources = [(".txt", as_text)] if language == "caption" and as_text is not None else []
        for name in _fields(fields, language):
            taken.add(name)
            sources += texts_of(name, fields[name])
        _add(found, problems, language, sources)
    others = dict.fromkeys(name for name, value in fields.items() if name not in taken and _has_text(value))
    if as_text is not None and as_text.strip() and "caption" not in languages:
        others["caption"] = None
    return Captions(found, problems, tuple(others))


def _fields(fields: Mapping[str, Any], language: str) -> list[str]:
    """Fields with captions of a language: "en", "en.2", "en.3" and so on; "captions" too is "caption"."""
    names = [language] + ["captions"] * (language == "caption")
    names += takewhile(fields.__contains__, (f"{language}.{number}" for number in count(2)))
    return [name for name in names if fields.get(name) is not None]


def _add(found: dict[str, str], problems: list[tuple[str, str]], language: str, sources: list[tuple[str, Any]]) -> None:
    """The texts of a language as language, language.2 and so on; the same text again is left out."""
    texts: dict[str, str] = {}
    for source, value in sources:
        try:
            text = clean(value)
        except TypeError as error:
            problems.append((NO_TEXT, f"{source}: {error}"))
        except ValueError as error:
            problems.append((INVALID, f"{source}: {error}"))
        else:
            if text:
                texts.setdefault(text, source)
            else:
                problems.append((BLANK, source))
    for number, text in enumerate(texts, 1):
        second = ".json" if ".txt" in texts.values() else ".2"
        found[language + {1: "", 2: second}.get(number, f".{number}")] = text


def texts_of(name: str, value: Any) -> list[tuple[str, Any]]:
    """The texts of a field, one or a list of them, each with how it is called."""
    if not isinstance(value, list) or not value:
        return [(f'"{name}"', "" if value == [] else value)]
    return [(f'"{name}"[{number}]', text) for number, text in enumerate(value)]


def _has_text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, str) and not blank(v) for v in values)


def none_in(captions: Captions, languages: Sequence[str]) -> str:
    """Why a sample has no caption, and which fields may be one."""
    others = f"; other fields with text: {', '.join(captions.others[:8])}" if captions.others else ""
    return f"none in {', '.join(languages)}{others}"


def read_object(data: bytes | str) -> Mapping[str, Any]:
    """A JSON object; ValueError if it is something else. Bytes that are no UTF-8 become lone surrogates."""
    try:
        fields = json.loads(decoded(data) if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {_article(fields)}")
    return fields


def decoded(data: bytes) -> str:
    """Text in the encoding that its byte order mark says, else UTF-8, of which what is not becomes lone surrogates."""
    mark, encoding = _mark(data)
    return data[len(mark) :].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")


def clean(value: Any) -> str:
    """A caption as it is used: str, or the bytes of a text file, without white space and byte order marks around it.

    "" if nothing of it can be seen; TypeError if it is no text, ValueError if it is no valid Unicode or holds a NUL.
    """
    if isinstance(value, bytes):
        mark, encoding = _mark(value)
        value = value[len(mark) :].decode(encoding)
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {_article(value)}")
    try:
        value.encode("utf-8")  # a lone surrogate has no code
    except UnicodeEncodeError as error:
        if 0xDC80 <= (code := ord(value[error.start])) <= 0xDCFF:  # as `decoded` gives what is no UTF-8
            raise ValueError(f"not UTF-8: byte 0x{code - 0xDC00:02x} at position {error.start}") from error
        raise
    if (at := value.find("\0")) >= 0:
        raise ValueError(f"NUL at position {at}")
    return "" if blank(value) else value.strip().strip("\ufeff").strip()


def blank(text: str) -> bool:
    """Whether a text holds nothing that can be seen: white space, zero-width characters, fillers."""
    return all(c in _UNSEEN or unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in text)


def _mark(data: bytes) -> tuple[bytes, str]:
    return next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8"))


def _article(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        int: "a number",
        float: "a number",
        bool: "a truth value",
        str: "a text",
    }
    return names.get(type(value), "null")
