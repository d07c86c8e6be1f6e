"""Options that say their default in words, as where it depends on the preset: None until it is chosen."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from cogview.config import TrainConfig
from cogview.recipes import RECIPES


def option(metavar: str, default: str, **how: Any) -> Any:
    """An option that says its default in words."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})", **how)


def chosen(command: Any, sizes: type) -> Any:
    """A dataclass of sizes, of a command's fields of the same names."""
    return sizes(**{field.name: getattr(command, field.name) for field in fields(sizes)})


def of_preset(name: str, shown: Callable[[Any], str] | None = None) -> Any:
    """An option for a field of the preset's model or training."""
    return option(_metavar(name), words(_values(name), shown or _shown))


def _values(name: str) -> dict[str, Any]:
    """Of a field, by the preset."""
    parts = [(p, part) for recipe in RECIPES.values() for p, both in recipe.presets.items() for part in both]
    found = {preset: getattr(part, name) for preset, part in reversed(parts) if hasattr(part, name)}
    return {preset: found[preset] for preset, _ in parts if preset in found}


def words(values: dict[str, Any], shown: Callable[[Any], str]) -> str:
    """Of presets' values, as "tiny and fashion-tiny 0.001, others 0.0003"."""
    names: dict[str, list[str]] = {}
    for preset, value in values.items():
        names.setdefault(shown(value), []).append(preset)
    if len(names) == 1:
        return next(iter(names))
    most = max(names, key=lambda value: len(names[value]))
    few = [f"{' and '.join(those)} {value}" for value, those in names.items() if value != most or len(those) == 1]
    return ", ".join(few if len(names[most]) == 1 else [*few, f"others {most}"])


def _shown(value: Any) -> str:
    if value is None or value == math.inf:
        return "no limit"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(name: str) -> str:
    hints = [
        part for recipe in RECIPES.values() for part in (get_type_hints(recipe.Config), get_type_hints(TrainConfig))
    ]
    kind = next(hint[name] for hint in hints if name in hint)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if kind is bool:
        return "{True,False}"
    return "INT" if kind is int or int in get_args(kind) else "FLOAT"
