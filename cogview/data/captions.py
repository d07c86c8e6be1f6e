"""The captions of a sample, from its .txt and its .json."""

import codecs
import json
import unicodedata
from collections.abc import Mapping, Sequence
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
    """
    found: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    fields: Mapping[str, Any] = {}
    try:
        fields = {} if as_json is None else read_object(as_json)
    except ValueError as error:
        problems.append((NO_JSON, str(error)))
    sources: list[tuple[str, str, Any]] = []
    for name in languages:
        if name == "caption" and as_text is not None:
            sources.append((name, ".txt", as_text))
        if fields.get(name) is not None:
            sources.append((name, f'"{name}"', fields[name]))
    for name, source, value in sources:
        try:
            text = clean(value)
        except TypeError as error:
            problems.append((NO_TEXT, f"{source}: {error}"))
        except ValueError as error:
            problems.append((INVALID, f"{source}: {error}"))
        else:
            if not text:
                problems.append((BLANK, source))
            elif found.setdefault(name, text) != text:
                found[f"{name}.json"] = text
    others = dict.fromkeys(k for k, v in fields.items() if k not in languages and isinstance(v, str) and not blank(v))
    if as_text is not None and as_text.strip() and "caption" not in languages:
        others["caption"] = None
    return Captions(found, problems, tuple(others))


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
    value.encode("utf-8")  # a lone surrogate has no code
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
