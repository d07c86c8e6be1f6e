"""A released transformer: its files, the sizes that they say, its tensors."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import require
from cogview.data.report import printable
from cogview.published import cuts, families
from cogview.published.families import COGVIEW, FAMILIES, FINE_POSITIONS, POSITIONS, Family, Tables, Tokens
from cogview.published.inert import Stored
from cogview.published.layout import Layout
from cogview.published.torch_file import TorchFile
from cogview.recipes import named, preset
from cogview.recipes.fine import FineConfig
from cogview.recipes.recipe import Recipe

CONFIG = "model_config.json"  # of SwissArmyTransformer
HEAD_DIM = 64
_TRACKERS = [family.tracker for family in FAMILIES]
_MAX_CONFIG_BYTES = 1 << 20
_LAYER = re.compile(r"transformer\.layers\.(\d{1,6})\.")


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"mp_rank_{rank:02d}_model_states.pt"


def part_paths(source: Path) -> list[Path]:
    """The files of a released model's folder, or of the folder of one iteration; ValueError where one is missing."""
    if source.is_file():
        unpack = {".tar": "unpack it first (tar xf)", ".zip": "unpack it first (unzip)"}
        what = unpack.get(source.suffix, "name its folder")
        raise ValueError(f"source: expected a folder with {' or '.join(_TRACKERS)}, got the file {source}: {what}")
    folder = source
    if tracker := next((source / name for name in _TRACKERS if (source / name).is_file()), None):
        with tracker.open("rb") as file:
            number = file.read(100).decode("ascii", "replace").strip()
        if not re.fullmatch(r"\d{1,12}|release", number):
            raise ValueError(f"{tracker}: expected the number of an iteration, got {number!r}")
        folder = source / number
    ranks = sorted(
        int(found[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (found := re.fullmatch(r"mp_rank_(\d{2})_model_states\.pt", path.name))
    )
    require(bool(ranks), "source", f"{', '.join(_TRACKERS)} or {part_path(Path(), 0)} in it", str(folder))
    if missing := sorted(set(range(ranks[-1] + 1)) - set(ranks)):
        raise ValueError(f"{folder}: {part_path(Path(), missing[0])} is missing beside {part_path(Path(), ranks[-1])}")
    return [part_path(folder, rank) for rank in ranks]


@dataclass(frozen=True)
class Published:
    """The parts of a model, each `module` by published names, and what else is in the files."""

    files: list[TorchFile]
    modules: list[dict[str, Stored]]
    others: list[str]

    @classmethod
    def read(cls, source: Path) -> "Published":
        """Its descriptions; tensors are read when they are asked for."""
        files = [TorchFile(path) for path in part_paths(source)]
        contents = [file.content if isinstance(file.content, dict) else {} for file in files]
        modules = [file.named(content.get("module"), "module") for file, content in zip(files, contents, strict=True)]
        names = [set(module) for module in modules]
        for file, there in zip(files, names, strict=True):
            if other := sorted(there ^ names[0]):
                raise ValueError(f"{file.path}: {other[0]} is in one of the parts and not in another")
        found = dict.fromkeys(printable(str(key), 40) for content in contents for key in content if key != "module")
        return cls(files, modules, list(found))

    @property
    def iteration(self) -> int:
        """That of the folder's name, or else of the file."""
        name, inner = self.files[0].path.parent.name, self.files[0].content.get("iteration")
        number = int(name) if re.fullmatch(r"\d{1,12}", name) else inner
        return number if type(number) is int and 0 <= number < 10**12 else 0

    @property
    def rows(self) -> int:
        """Of the token table, all parts together."""
        return self._matrix(self.family.words)[0] * len(self.files)

    @cached_property
    def family(self) -> Family:
        """CogView's where the names are of none."""
        kinds = families.found(self.modules[0])
        return families.of(kinds[0].recipe) if kinds else COGVIEW

    def check_stage(self, name: str) -> None:
        """ValueError where these are weights of another recipe than that of the name."""
        kinds = families.found(self.modules[0])
        if kinds and name not in [kind.recipe for kind in kinds]:
            recipes, folders = (_either([getattr(kind, of) for kind in kinds]) for of in ("recipe", "folder"))
            raise ValueError(
                f"recipe: expected {recipes}, since {self.files[0].path.parent} has tensors as {folders} does, "
                f"got {name!r}, whose are those of {families.of(name).release(name).folder}"
            )

    def recipe(self, name: str, tokens: Tokens, *, heads: int | None, image_grid: int | None, **own: Any) -> Recipe:
        """That of the name in the sizes that the tensors have; ValueError where these or the tokens do not fit. heads:
        default those that model_config.json says, or else one for every 64 of the width. image_grid: see
        `Family.sizes`. own: what else its config says."""
        self.check_stage(name)
        config, _ = preset(self.family.preset, name)
        hidden, count = self._matrix(self.family.words)[1], len(self.files)
        fine = self._matrix(FINE_POSITIONS)[0] if isinstance(config, FineConfig) else 0
        tables = Tables(self.rows, self._matrix(POSITIONS)[0], fine, count)
        sizes = self.family.sizes(config, tables, tokens, image_grid)
        if heads is None:
            heads = self._said("num_attention_heads")
        if heads is None:
            require(hidden % HEAD_DIM == 0, "heads", f"--heads, since the width {hidden} is no multiple of 64", heads)
            heads = hidden // HEAD_DIM
        divides = heads >= 1 and hidden % heads == 0 and heads % count == 0
        require(divides, "heads", f"a divisor of the width {hidden} and a multiple of {count} parts", heads)
        layers = 1 + max((int(found[1]) for key in self.modules[0] if (found := _LAYER.match(key))), default=-1)
        require(1 <= layers <= len(self.modules[0]), "layers", "at least 1, none left out", layers)
        sizes |= {"num_layers": layers, "hidden_size": hidden, "num_heads": heads}
        sizes |= {"image_vocab": tokens.codes, "text_vocab": tokens.pieces}
        recipe = named(name)(dataclasses.replace(config, **own, **sizes))
        self._check(recipe)
        return recipe

    def tensors(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """Our names and the whole tensors, one after the other."""
        layout = Layout(recipe)
        for ours, names in layout.names.items():
            value = layout.parameter(ours, [self._whole(name) for name in names])
            if names == [self.family.words]:
                value = F.pad(value[: recipe.vocab.size], (0, 0, 0, max(0, recipe.vocab.size - len(value))))
            yield ours, value

    def _whole(self, name: str) -> Tensor:
        """A tensor of all parts."""
        pieces = [file.weights(module[name], name) for file, module in zip(self.files, self.modules, strict=True)]
        self._check_alike(name, pieces)
        return cuts.merged(name, pieces)

    def _said(self, size: str) -> int | None:
        """By model_config.json, where there is one that says it; ValueError where it is not readable."""
        folder = self.files[0].path.parent
        path = next((p for p in (folder / CONFIG, folder.parent / CONFIG) if p.is_file()), None)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                value = json.loads(file.read(_MAX_CONFIG_BYTES)).get(size)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected sizes by name, got something else") from error
        require(value is None or type(value) is int, f"{path}: {size}", "a whole number", value)
        return value

    def _matrix(self, name: str) -> list[int]:
        """Rows and columns of a table of the first part."""
        if name not in self.modules[0]:
            raise ValueError(f"{self.files[0].path}: {name} is missing")
        shape = self.modules[0][name].shape
        require(len(shape) == 2 and min(shape) >= 1, name, "rows and columns", shape)
        return shape

    def _check(self, recipe: Recipe) -> None:
        """ValueError unless all parts have just the tensors of the recipe's model."""
        wanted = Layout(recipe).shapes() | {self.family.words: [self.rows, recipe.config.hidden_size]}
        for file, module in zip(self.files, self.modules, strict=True):
            for name in sorted(wanted.keys() | module.keys()):
                expected: Any = "absent"
                if name in wanted:
                    expected = cuts.part_shape(name, wanted[name], len(self.files))
                got: Any = module[name].shape if name in module else "absent"
                if expected != got:
                    raise ValueError(f"{file.path}: {name}: expected {expected}, got {got}")

    def _check_alike(self, name: str, pieces: list[Tensor]) -> None:
        """ValueError unless the parts have one dtype, and where they all have the whole tensor, the same one."""
        for file, piece in zip(self.files, pieces, strict=True):
            if piece.dtype != pieces[0].dtype:
                raise ValueError(
                    f"{file.path}: {name}: expected {pieces[0].dtype}, as in the first part, got {piece.dtype}"
                )
            if not cuts.is_cut(name) and not torch.equal(piece, pieces[0]):
                raise ValueError(f"{file.path}: {name}: expected what {self.files[0].path.name} has, got other values")


def _either(names: list[str]) -> str:
    """As in "one, two or three"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
