"""What was released, a table for each code that wrote and reads it: CogView's models, and CogView2's, which are
SwissArmyTransformer's (v0.2).

    COGVIEW     cogview-base, cogview-caption, cogview-sr
    COGVIEW2    coglm, cogview2-dsr, cogview2-itersr
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cogview import lopar
from cogview.bilingual import COMMANDS as BILINGUAL
from cogview.config import ModelConfig, require
from cogview.parts.published import published_names, sat_names
from cogview.published import cuts
from cogview.recipes.coglm_sizes import BilingualConfig
from cogview.recipes.cogview import CogViewConfig
from cogview.recipes.direct import Direct
from cogview.recipes.fine import FineConfig
from cogview.recipes.iterative import IterativeConfig
from cogview.recipes.recipe import Recipe
from cogview.sequence import COMMANDS, Vocabulary

POSITIONS = "transformer.position_embeddings.weight"
FINE_POSITIONS = "mixins.extra_position_embedding.position_embeddings.weight"
_FINE_PROJECTIONS = "mixins.attention_plus."
_LONGEST = 111  # tokens of a caption in CogView2's samples: 512 with [SOI] and 400 cells
_DIRECT_TEXT = 96  # its script of direct super-resolution has room for, whatever the model


class Release(NamedTuple):
    recipe: str
    folder: str
    """As it is called where it is unpacked."""
    name: str
    """Of the model in a run."""
    own: dict[str, Any]
    """What its config says, whatever the preset."""


class Tables(NamedTuple):
    """Rows of a model's tables, and in how many parts it is."""

    words: int
    """Of all parts together."""
    positions: int
    fine: int
    """Positions of a super-resolution's fine cells."""
    parts: int


class Tokens(NamedTuple):
    """What the run's tokenizers make."""

    codes: int
    pieces: int
    chinese_from: int | None


@dataclass(frozen=True)
class Family:
    """CogView's; others say what they have otherwise."""

    code: str
    """Whose it is, in messages."""
    preset: str
    """That of each of its recipes in the released sizes."""
    tracker: str
    """The file with the iteration's number."""
    words: str
    """The name of the token table."""
    relax: str | None
    """Of the norms."""
    relaxes: str
    """What these do, in messages."""
    text: str
    image: str | None
    """Files of its tokenizers; None: what a run has of it does not make the whole file."""
    releases: tuple[Release, ...]

    def release(self, recipe: str) -> Release:
        return next(release for release in self.releases if release.recipe == recipe)

    def names(self, recipe: Recipe) -> dict[str, str]:
        """Of every parameter the published name, of positions that of the first ones."""
        return published_names(recipe.config.num_layers)

    def sizes(self, config: ModelConfig, tables: Tables, tokens: Tokens, image_grid: int | None) -> dict[str, Any]:
        """What the tables say of a config; ValueError where the tokens do not fit. image_grid: default the largest
        power of two that leaves room for text."""
        vocab = Vocabulary(tokens.codes, tokens.pieces)
        sizes = sorted({vocab.size, cuts.padded(vocab.size, tables.parts)})
        expected = " or ".join(f"{size:,}" for size in sizes)
        require(tables.words in sizes, self.words, f"{expected} {_rows(tables, tokens, len(COMMANDS))}", tables.words)
        if image_grid is None:
            fitting = [1 << n for n in range(20) if (1 << 2 * n) + 5 <= tables.positions]
            require(bool(fitting), POSITIONS, "rows for an image and its text", tables.positions)
            image_grid = fitting[-1]
        return {"image_grid": image_grid, "max_positions": tables.positions}

    def written(self, recipe: Recipe) -> dict[str, str]:
        """Sizes of a model of the recipe that are numbers in its code, in words."""
        return {"image codes": f"{recipe.config.image_vocab:,}", "image grid": _square(recipe.config.image_grid)}

    def differing(self, recipe: Recipe) -> str | None:
        """In a sentence, which of these sizes the released models have otherwise; None: none."""
        here, there = (self.written(r) for r in (recipe, type(recipe)(recipe.presets[self.preset][0])))
        others = ", ".join(f"{name} {size} (here {here[name]})" for name, size in there.items() if size != here[name])
        said = f"{self.code} has sizes written into it that are to be changed for this model: {others}"
        return said if others else None

    def check(self, recipe: Recipe) -> None:
        """ValueError where its code would not compute what a model of the recipe does, whatever sizes it is given."""
        c = recipe.config
        fits = isinstance(c, CogViewConfig) and c.attention != "three_region"
        require(fits, "attention", f"dense, as {self.code} has it", getattr(c, "attention", recipe.name))
        require(c.norms == "sandwich", "norms", f"sandwich, as in {self.code}", c.norms)
        follow = c.image_positions == "following"
        require(follow, "image_positions", f"following, as in {self.code}", c.image_positions)

    def beside(self, recipe: Recipe, rows: int, parts: int) -> dict[str, Any] | None:
        """model_config.json, where there is one. rows: of the token table."""
        return None


@dataclass(frozen=True)
class SatFamily(Family):
    """CogView2's."""

    image_grid: int = 20
    """The released one."""
    constants: dict[str, Any] = field(default_factory=dict)
    """What its code has as numbers, of those configs that have it."""
    classes: dict[str, str] = field(default_factory=dict)
    """Of its models, by the recipe."""

    def names(self, recipe: Recipe) -> dict[str, str]:
        return sat_names(recipe.config.num_layers, fine_projections=isinstance(recipe, Direct))

    def sizes(self, config: ModelConfig, tables: Tables, tokens: Tokens, image_grid: int | None) -> dict[str, Any]:
        """Token tables are padded in more than one way, so that any number of rows will do that has all ids."""
        bilingual = "one in the order of CogView2's vocabulary, icetk's ice_text.model"
        require(tokens.chinese_from is not None, "text", bilingual, f"another of {tokens.pieces:,} pieces")
        ids = tokens.codes + tokens.pieces + len(BILINGUAL)
        expected = f"at least {ids:,} {_rows(tables, tokens, len(BILINGUAL))}"
        require(tables.words >= ids, self.words, expected, tables.words)
        made: dict[str, Any] = {
            "image_grid": self.image_grid if image_grid is None else image_grid,
            "max_positions": tables.positions + tables.fine,
            "chinese_from": tokens.chinese_from,
        }
        if isinstance(config, FineConfig):
            side = math.isqrt(tables.fine)
            require(side**2 == tables.fine, FINE_POSITIONS, "the cells of a square", tables.fine)
            made["fine_grid"] = side
        if isinstance(config, IterativeConfig):
            made["tile"] = lopar.fitting(made["fine_grid"])
        return made

    def written(self, recipe: Recipe) -> dict[str, str]:
        """Of shorter text its code computes the same."""
        c = recipe.config
        assert isinstance(c, BilingualConfig)
        made = super().written(recipe) | {
            "first Chinese id": f"{c.image_vocab + c.chinese_from:,}",
            "tokens of the longest caption": str(max(c.max_caption, _LONGEST)),
        }
        if isinstance(c, FineConfig):
            direct = [_DIRECT_TEXT, _DIRECT_TEXT + c.image_tokens]
            before = [c.text_slots] if isinstance(c, IterativeConfig) else direct
            made |= {"fine grid": _square(c.fine_grid), "layout": str([*before, before[-1] + c.fine_grid**2])}
        if isinstance(c, IterativeConfig):
            which = "the published" if c.tile == lopar.PUBLISHED else "another"
            made["tile order"] = f"{which} of {len(c.tile)} x {len(c.tile[0])}"
        return made

    def check(self, recipe: Recipe) -> None:
        for name, value in {"norms": "sandwich", **self.constants}.items():
            got = getattr(recipe.config, name, value)
            require(got == value, name, f"{value}, as in {self.code}", got)

    def beside(self, recipe: Recipe, rows: int, parts: int) -> dict[str, Any] | None:
        c = recipe.config
        return {
            "model_class": self.classes[recipe.name],
            "num_layers": c.num_layers,
            "hidden_size": c.hidden_size,
            "num_attention_heads": c.num_heads,
            "vocab_size": rows,
            "max_sequence_length": c.base_positions if isinstance(c, FineConfig) else c.max_positions,
            "layernorm_order": "sandwich",
            "model_parallel_size": parts,
        }


def _square(side: int) -> str:
    return f"{side} x {side}"


def _rows(tables: Tables, tokens: Tokens, commands: int) -> str:
    parts = f"{tables.parts} part{'s' if tables.parts > 1 else ''}"
    made = f"{tokens.codes:,} image codes, {tokens.pieces:,} text pieces and {commands} commands"
    return f"rows for {made}, of {parts} together"


COGVIEW = Family(
    code="CogView's code",
    preset="cogview-4b",
    tracker="latest_checkpointed_iteration.txt",
    words="word_embeddings.weight",
    relax="tensor",
    relaxes="divides by the largest of the whole tensor instead",
    text="cog-pretrain.model",
    image="vqvae_hard_biggerset_011.pt",
    releases=(
        Release("cogview", "cogview-base", "gpt", {}),
        Release("caption", "cogview-caption", "caption", {"stop": False}),  # they know no end
        Release("superresolution", "cogview-sr", "sr", {}),
    ),
)
COGVIEW2 = SatFamily(
    code="CogView2's code",
    preset="coglm-6b",
    tracker="latest",
    words="transformer.word_embeddings.weight",
    relax=None,
    relaxes="divides by nothing",
    text="ice_text.model",
    image=None,
    releases=(
        Release("coglm", "coglm", "coglm", {"stop": False}),
        Release("direct", "cogview2-dsr", "direct", {}),
        Release("iterative", "cogview2-itersr", "iterative", {}),
    ),
    constants={
        "text_rows": 512,
        "base_positions": 1024,
        "kernel_size": (9, 5),
        "coarse_kernel_size": (5, 5),
        "text_slots": 16,
    },
    classes={"coglm": "BaseModel", "direct": "DsrModel", "iterative": "ItersrModel"},
)
FAMILIES: tuple[Family, ...] = (COGVIEW, COGVIEW2)
RELEASES = {release.folder: release for family in FAMILIES for release in family.releases}
RELEASED = tuple(release.recipe for release in RELEASES.values())
"""The recipes that there are released weights of."""


def of(recipe: str) -> Family:
    """That of a recipe; ValueError where nothing was released."""
    require(recipe in RELEASED, "recipe", f"one of {', '.join(RELEASED)}", recipe)
    return next(family for family in FAMILIES if any(release.recipe == recipe for release in family.releases))


def found(names: Collection[str]) -> tuple[Release, ...]:
    """What tensors of these names can be; none: of no released model."""
    if any(name.startswith(_FINE_PROJECTIONS) for name in names):
        return (COGVIEW2.release("direct"),)
    if FINE_POSITIONS in names:
        return (COGVIEW2.release("iterative"),)
    if COGVIEW2.words in names:
        return (COGVIEW2.release("coglm"),)
    return COGVIEW.releases if COGVIEW.words in names else ()
