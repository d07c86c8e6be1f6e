"""Which model a training is of: that of a preset, of the run that goes on, or of another run that it begins with."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.commands.console import console
from cogview.commands.train_data import Tokens
from cogview.config import TrainConfig, require
from cogview.models import recipe_of
from cogview.recipes import named, preset
from cogview.recipes.recipe import Recipe
from cogview.runs import model_of, sources
from cogview.train import checkpoint
from cogview.train.identity import other_tokenizers

SHAPE = {
    "attention": "attention",
    "layers": "num_layers",
    "hidden_size": "hidden_size",
    "heads": "num_heads",
    "norms": "norms",
    "padding": "padding",
    "schedule": "schedule",
}
"""Options, and the fields of a config that they are of."""
DROPOUT = {20_000: 0.0, 8_000: 0.1, 0: 0.2}
"""Of the preset tiny, from so many sequences on. Of 3,000 icons in 2,500 steps 0.1 and 0.2 came to a held-out image
loss of 2.083 at best (and rose) and 2.054; 0.3 was 0.08 behind at step 1,800. 24,000 scenes in as many need none."""


def dropout_for(sequences: int) -> float:
    """What keeps a tiny model from learning its pictures by heart: the more there are, the less it takes."""
    return next(value for least, value in DROPOUT.items() if sequences >= least)


@dataclass(frozen=True)
class Before:
    """A checkpoint whose recipe and sizes a training has."""

    path: Path
    header: dict[str, Any]
    own: bool
    """Of the run that goes on; else of another one, whose weights the training begins with."""

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.path, self.header)

    def refuse(self, option: str, asked: Any, has: Any) -> None:
        """ValueError: it has something else than what was asked for."""
        if self.own:
            told = f"{self.path} is of another run: {option}: expected {asked!r}, got {has!r}"
            raise ValueError(f"{told}. {advice(self.path.parent)}")
        raise ValueError(f"{option}: expected {has!r}, as in {self.path}, got {asked!r}")

    def origin(self) -> dict[str, Any] | None:
        """Where the weights that the training began with are from, None: new ones."""
        if self.own:
            return self.header.get("from")
        return {"folder": str(self.path.parent.resolve()), "step": checkpoint.step_of(self.path)}


def advice(folder: Path) -> str:
    """What to do where a run cannot go on."""
    return f"--name NAME begins a new model beside it; --from {folder} --name NAME begins one with its weights"


def before(folder: Path, source: Path | None) -> Before | None:
    """What a training in a model folder goes on from, or begins with, which is read whole; None: new weights."""
    checkpoint.recover(folder)
    begun = next(checkpoint.readable(folder), None)
    if begun is not None:
        if "published" in begun[1]:
            raise ValueError(f"{folder} has released weights, which stay as they are. {advice(folder)}")
        origin = begun[1].get("from")
        same = source is None or (origin is not None and Path(origin["folder"]).resolve() in _meant(source))
        was = "new weights" if origin is None else f"those of {origin['folder']}"
        require(same, "from", f"nothing, since {folder} holds a run that began with {was}", str(source))
        return Before(*begun, own=True)
    if source is None or checkpoint.paths(folder):  # all damaged, as resuming says
        return None
    chosen = model_of(source)
    require(chosen.resolve() != folder.resolve(), "from", f"another model than {folder}, or a --name", str(source))
    return _whole(chosen)


def _whole(folder: Path) -> Before:
    """The best checkpoint of a model, or where that is damaged the newest that is not."""
    damaged: checkpoint.Damaged | None = None
    folder = folder.resolve()
    for found in sources(folder.parent, folder.name):
        try:
            _, header = checkpoint.weights(found.path)
        except checkpoint.Damaged as error:
            damaged = damaged or error
            continue
        if damaged is not None:
            console.print(f"{damaged}: {found.path.name} is taken")
        return Before(found.path, header, own=False)
    raise damaged or ValueError(f"from: expected a checkpoint in {folder}, got none")


def _meant(source: Path) -> list[Path]:
    """Model folders that --from may have meant when the run began, though they may be gone."""
    return [source.resolve(), *(path.resolve() for path in (source.iterdir() if source.is_dir() else ()))]


def chosen_recipe(before: Before | None, asked: str | None) -> type[Recipe]:
    """The one asked for, or that of what goes on."""
    return named(asked or ("cogview" if before is None else before.recipe.name))


def training_of(before: Before | None, name: str, recipe: str) -> TrainConfig:
    """Of a preset. A run of recipe dalle from before it had presets of its own goes on with that of CogView's."""
    old = before is not None and before.own and recipe == "dalle" and "norms" not in before.header["config"]
    return preset(name, "cogview" if old else recipe)[1]


def recipe_for(before: Before | None, tokens: Tokens, asked: dict[str, Any]) -> tuple[Recipe, str, str]:
    """A recipe that fits the tokens, the preset that it is of, and what is to be said of it. asked: the options recipe,
    preset, dropout, max_text, truncate_text and those of SHAPE, None where it was not."""
    chosen = chosen_recipe(before, asked["recipe"])
    own = {f.name for f in dataclasses.fields(chosen.Config)}
    for option, name in SHAPE.items():
        fits = asked[option] is None or name in own
        require(fits, option, f"none with recipe {chosen.name}, which has its own", asked[option])
    for option in ("max_text", "truncate_text") if "max_caption" in own else ():
        require(not asked[option], option, f"none with recipe {chosen.name}", asked[option])
    name = asked["preset"] or ("tiny" if before is None else before.header.get("preset", "tiny"))
    if before is None:
        return _new(chosen, tokens, name, asked)
    recipe, shape = before.recipe, {}
    if chosen is not type(recipe):
        if before.own or recipe.name not in chosen.begins_from:
            before.refuse("recipe", chosen.name, recipe.name)
        recipe = chosen(chosen.begun(recipe.config))
    if asked["preset"] is not None:
        shape = {option: getattr(preset(name, recipe.name)[0], field, None) for option, field in SHAPE.items()}
    for option, value in {**shape, **{option: asked[option] for option in SHAPE if asked[option] is not None}}.items():
        has = getattr(recipe.config, SHAPE[option], None)
        if value not in (None, has):
            before.refuse(option, value, has)
    config, dropout = recipe.config, asked["dropout"]
    if asked["max_text"] not in (None, config.max_text):
        before.refuse("max_text", asked["max_text"], config.max_text)
    if before.own:
        if dropout not in (None, config.dropout):
            before.refuse("dropout", dropout, config.dropout)
        return recipe, name, ""
    _check_tokens(before, recipe, tokens)
    if tokens.longest > config.max_text:
        config = recipe.fit(config, **tokens.sizes())
    config, said = _dropped(config, tokens, name, dropout)
    return type(recipe)(config), name, said


def _new(recipe: type[Recipe], tokens: Tokens, name: str, asked: dict[str, Any]) -> tuple[Recipe, str, str]:
    config, _ = preset(name, recipe.name)
    config = dataclasses.replace(
        config, **{field: asked[option] for option, field in SHAPE.items() if asked[option] is not None}
    )
    config, said = _dropped(config, tokens, name, asked["dropout"])
    sizes = tokens.sizes()
    if asked["max_text"] is not None:
        sizes["max_text"] = asked["max_text"]
        config = dataclasses.replace(config, max_positions=config.max_positions - config.max_text + asked["max_text"])
    return recipe(recipe.fit(config, **sizes)), name, said


def _dropped(config: Any, tokens: Tokens, name: str, asked: float | None) -> tuple[Any, str]:
    """The config with the dropout asked for, or of a tiny model the one that goes with its data."""
    count = tokens.rows
    if asked is None and name == "tiny":
        asked = dropout_for(count)
        return dataclasses.replace(config, dropout=asked), f"dropout {asked:g}, as is good for {count:,} sequences"
    return (config if asked is None else dataclasses.replace(config, dropout=asked)), ""


def _check_tokens(before: Before, recipe: Recipe, tokens: Tokens) -> None:
    """ValueError unless another run's model can read the tokens."""
    folder = before.path.parent
    theirs = before.header.get("tokenizers")
    then = theirs if isinstance(theirs, list) and len(theirs) == 2 else [None, None]
    for kind in other_tokenizers(tokens.all.tokenizers, then):
        raise ValueError(
            f"{tokens.all.folder}: the tokens were made by another {kind} tokenizer than those that {folder} was "
            f"trained on: tokenize with --from {folder.parent} first"
        )
    check_grid(folder, recipe, tokens)


def check_room(folder: Path, recipe: Recipe, tokens: Tokens) -> None:
    """ValueError where captions, of either split, are longer than a model has room for."""
    longest = recipe.config.max_text
    if tokens.longest > longest:
        raise ValueError(
            f"{tokens.all.folder.parent}: the longest caption has {tokens.longest} tokens, and {folder} has places for "
            f"{longest}: tokenize with --max-text {longest}, or train with --truncate-text. {advice(folder)}"
        )


def check_grid(folder: Path, recipe: Recipe, tokens: Tokens) -> None:
    """ValueError where pictures are not those that a model is for."""
    grid, side = tokens.all.meta["grid"], recipe.grids[-1]
    if grid != [side, side]:
        size = tokens.all.meta["image_size"] // grid[0] * side
        raise ValueError(
            f"{tokens.all.folder}: the pictures are {grid[0]} x {grid[1]} tokens, those that {folder} was trained on "
            f"{side} x {side}: tokenize with --image-size {size}"
        )
