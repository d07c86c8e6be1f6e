"""Systems and tasks, each a file: its config, its layout, its attention, how it is decoded."""

from typing import Any

from cogview.config import TrainConfig, require
from cogview.recipes.caption import Caption
from cogview.recipes.coglm import CogLM
from cogview.recipes.cogview import CogView
from cogview.recipes.dalle import Dalle
from cogview.recipes.direct import Direct
from cogview.recipes.iterative import Iterative
from cogview.recipes.recipe import Recipe
from cogview.recipes.style import Style
from cogview.recipes.superresolution import SuperResolution

_ALL = (CogView, Dalle, Caption, SuperResolution, Style, CogLM, Direct, Iterative)
RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in _ALL}


def named(name: str) -> type[Recipe]:
    """The recipe of a name; ValueError lists the names."""
    require(name in RECIPES, "recipe", f"one of {', '.join(RECIPES)}", name)
    return RECIPES[name]


def preset(name: str, recipe: str = "cogview") -> tuple[Any, TrainConfig]:
    """The shape and the training of a named preset; ValueError lists the names."""
    presets = named(recipe).presets
    require(name in presets, "preset", f"one of {', '.join(presets)}", name)
    return presets[name]
