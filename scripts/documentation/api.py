"""Interfaces of public functions and layers: signatures and docstrings as Markdown."""

import inspect
import re
import textwrap
from functools import reduce

import cogview_ops

SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def section(name: str) -> str:
    """Of `cogview_ops.<name>`."""
    thing = reduce(getattr, name.split("."), cogview_ops)
    parts = [f"### `{name}` {{ #{name.rpartition('.')[2]} }}", *described(name, thing)]
    if inspect.isclass(thing):
        parts += described("forward", thing.forward)
    return "\n\n".join(parts)


def described(name: str, thing: object) -> list[str]:
    doc = inspect.getdoc(thing)
    if doc is None:
        raise LookupError(f"{name} has no docstring")
    return [f"```python\n{signature(name, thing)}\n```", docstring(doc)]


def signature(name: str, thing: object) -> str:
    """A parameter a line."""
    found = inspect.signature(thing)  # type: ignore[arg-type]
    parts, named_only = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not named_only:
            parts.append("*")
            named_only = True
        parts.append(str(parameter))
    out = found.return_annotation
    returns = "" if out in (inspect.Signature.empty, None) else f" -> {inspect.formatannotation(out)}"
    lines = "".join(f"    {part},\n" for part in parts)
    return f"{name}(\n{lines}){returns}".replace("torch.", "").replace("cogview_ops.kv_cache.", "")


def docstring(text: str) -> str:
    """What stands under Args, Returns and Raises becomes lists; the rest is Markdown as it is."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", escaped(text), flags=re.M)
    out = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        body = textwrap.dedent(body).strip()
        out += [f"**{title}**", body if title == "Returns" else _entries(body)]
    return "\n\n".join(out)


def escaped(text: str) -> str:
    """`H*W` outside of code is a product, no emphasis; $ begins no formula."""
    return re.sub(r"(`+)[^`]+\1|[*$]", lambda found: found[0] if found[1] else "\\" + found[0], text)


def _entries(body: str) -> str:
    """`names: text`, continued by what is indented; other lines are text of their own."""
    items: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line)
    return "\n".join(re.sub(r"^([\w, ]+): ", lambda found: f"- {_code(found[1])}: ", item) for item in items)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" if re.fullmatch(r"\w+", name) else name for name in names.split(", "))
