"""A released transformer: its files, the sizes that they say, its tensors."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.data.report import printable
from cogview.parts.published import THREE, by_heads, published_names
from cogview.published import cuts
from cogview.published.inert import Stored
from cogview.published.torch_file import TorchFile
from cogview.recipes import named, preset
from cogview.recipes.recipe import Recipe
from cogview.sequence import COMMANDS, Vocabulary

PRESET = "cogview-4b"  # of each recipe that there are released weights of
TRACKER = "latest_checkpointed_iteration.txt"
WORDS, POSITIONS = "word_embeddings.weight", "transformer.position_embeddings.weight"
HEAD_DIM = 64
_LAYER = re.compile(r"transformer\.layers\.(\d{1,6})\.")


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"mp_rank_{rank:02d}_model_states.pt"


def part_paths(source: Path) -> list[Path]:
    """The files of a released model's folder, or of the folder of one iteration; ValueError where one is missing."""
    if source.is_file():
        what = "unpack it first (tar xf)" if source.suffix == ".tar" else "name its folder"
        raise ValueError(f"source: expected a folder with {TRACKER}, got the file {source}: {what}")
    folder = source
    if (tracker := source / TRACKER).is_file():
        with tracker.open("rb") as file:
            number = file.read(100).decode("ascii", "replace").strip()
        if not re.fullmatch(r"\d{1,12}", number):
            raise ValueError(f"{tracker}: expected the number of an iteration, got {number!r}")
        folder = source / number
    ranks = sorted(
        int(found[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (found := re.fullmatch(r"mp_rank_(\d{2})_model_states\.pt", path.name))
    )
    require(bool(ranks), "source", f"{TRACKER}, or {part_path(Path(), 0)}, in it", str(folder))
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
        return self._matrix(WORDS)[0] * len(self.files)

    def recipe(
        self, name: str, codes: int, text: int, *, heads: int | None, image_grid: int | None, **own: Any
    ) -> Recipe:
        """That of the name in the sizes that the tensors have, with so many image codes and text pieces; ValueError
        where these or those do not fit. heads: default one for every 64 of the width. image_grid: default the largest
        power of two that leaves room for text. own: what else its config says."""
        hidden, positions = self._matrix(WORDS)[1], self._matrix(POSITIONS)[0]
        rows, vocab, count = self.rows, Vocabulary(codes, text), len(self.files)
        sizes = sorted({vocab.size, cuts.padded(vocab.size, count)})
        expected = " or ".join(f"{size:,}" for size in sizes)
        wanted = f"{expected} rows for {codes:,} image codes, {text:,} text pieces and {len(COMMANDS)} commands"
        wanted += f", of {count} part{'s' if count > 1 else ''} together"
        require(rows in sizes, WORDS, wanted, rows)
        if heads is None:
            require(hidden % HEAD_DIM == 0, "heads", f"--heads, since the width {hidden} is no multiple of 64", heads)
            heads = hidden // HEAD_DIM
        divides = heads >= 1 and hidden % heads == 0 and heads % count == 0
        require(divides, "heads", f"a divisor of the width {hidden} and a multiple of {count} parts", heads)
        if image_grid is None:
            fitting = [1 << n for n in range(20) if (1 << 2 * n) + 5 <= positions]
            require(bool(fitting), POSITIONS, "rows for an image and its text", positions)
            image_grid = fitting[-1]
        layers = 1 + max((int(found[1]) for key in self.modules[0] if (found := _LAYER.match(key))), default=-1)
        require(1 <= layers <= len(self.modules[0]), "layers", "at least 1, none left out", layers)
        config, _ = preset(PRESET, name)
        config = dataclasses.replace(
            config,
            **own,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            image_grid=image_grid,
            max_positions=positions,
            image_vocab=codes,
            text_vocab=text,
        )
        recipe = named(name)(config)
        self._check(recipe, rows)
        return recipe

    def tensors(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """Our names and the whole tensors, one after the other."""
        for ours, theirs in published_names(recipe.config.num_layers).items():
            pieces = [f.weights(module[theirs], theirs) for f, module in zip(self.files, self.modules, strict=True)]
            self._check_alike(theirs, pieces)
            whole = cuts.merged(theirs, pieces)
            if theirs.endswith(THREE):
                whole = by_heads(whole, recipe.config.num_heads)
            yield ours, whole[: recipe.vocab.size] if theirs == WORDS else whole

    def _matrix(self, name: str) -> list[int]:
        """Rows and columns of a table of the first part."""
        if name not in self.modules[0]:
            raise ValueError(f"{self.files[0].path}: {name} is missing")
        shape = self.modules[0][name].shape
        require(len(shape) == 2 and min(shape) >= 1, name, "rows and columns", shape)
        return shape

    def _check(self, recipe: Recipe, rows: int) -> None:
        """ValueError unless all parts have just the tensors of the recipe's model."""
        wanted = cuts.shapes(recipe) | {WORDS: [rows, recipe.config.hidden_size]}
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
