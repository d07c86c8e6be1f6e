"""What both of CogView2's super-resolutions have in common (arXiv 2204.14217): a fine grid of codes, all predicted in
place, whose positions are more rows of the base model's table.

These begin as the base's own rows of image cells, repeated over the fine grid like tiles. The released `reinit_slice`
repeats rows 512 to 911, which are [SOI]'s and all cells but the last; here they are those of the cells, 513 to 912.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogview.bilingual import BilingualVocabulary
from cogview.config import ModelConfig, TrainConfig, require
from cogview.recipes.coglm import CogLM
from cogview.recipes.coglm_sizes import BilingualConfig, check_bilingual
from cogview.recipes.recipe import POSITIONS, Recipe, grown
from cogview.sequence import Context

RATIO = 3  # of the grids, published: 20 and 60
# The article has no rates; these are CogView's. Batches and steps are ours.
_TINY: dict[str, Any] = {"seconds": 240.0, "learning_rate": 7e-4, "hide_context": 0.0, "validate_every": 100}
_PUBLISHED: dict[str, Any] = {"steps": 30_000, "batch_size": 512, "accumulate": 64, "learning_rate": 1e-4}


@dataclass(frozen=True)
class FineConfig(BilingualConfig):
    """image_grid is the coarse one's; max_positions counts the fine cells, which are the table's last rows."""

    fine_grid: int = 60
    kernel_size: tuple[int, int] = (9, 5)
    """Of the fine cells' windows; the article has (9, 9), the released code (9, 5)."""

    def __post_init__(self):
        super().__post_init__()
        fine, grid = self.fine_grid, self.image_grid
        require(fine >= grid and fine % grid == 0, "fine_grid", f"a multiple of image_grid ({grid})", fine)
        check_window("kernel_size", self.kernel_size, fine)
        least = self.image_rows_end + fine**2
        require(self.max_positions >= least, "max_positions", f"at least {least}", self.max_positions)

    @property
    def base_positions(self) -> int:
        """Rows of the base model's table."""
        return self.max_positions - self.fine_grid**2


def check_window(name: str, window: tuple[int, int], side: int) -> None:
    fits = len(window) == 2 and all(k % 2 == 1 and 1 <= k < 2 * side for k in window)
    require(fits, name, f"two odd numbers below {2 * side}", window)


class Fine(Recipe):
    """Sequences end with the fine cells."""

    sizes = 2
    begins_from = ("coglm",)
    draws = ()
    config: FineConfig
    vocab: BilingualVocabulary

    def __init__(self, config: FineConfig):
        super().__init__(config)
        self.vocab = BilingualVocabulary(config.image_vocab, config.text_vocab, config.chinese_from)

    @property
    def grids(self) -> tuple[int, ...]:
        return self.config.image_grid, self.config.fine_grid

    @property
    def before(self) -> int:
        """Tokens before the fine cells."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        return self.before + self.config.fine_grid**2

    def kinds(self, targets: Tensor) -> dict[str, Tensor]:
        return {"image": self.vocab.is_image(targets)}

    def input_kinds(self, inputs: Tensor) -> dict[str, Tensor]:
        """[SOI] hides no cell from the losses: it is the cell that is predicted in its place."""
        cells = self.vocab.is_image(inputs) | (inputs == self.vocab["SOI"])
        return {"text": self.vocab.is_caption(inputs), "image": cells}

    def reach(self, context: Context) -> Tensor:
        """Text and windows lie before and behind."""
        return torch.full_like(super().reach(context), context.positions.shape[-1])

    def hideable(self, inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs, dtype=torch.bool)

    def text(self, text: Tensor, slots: int) -> Tensor:
        """Its ids in so many places, [PAD] behind: int64 [B, slots]. The places of longer text are its first."""
        self.vocab.check(text, [], self.config.max_caption, commands=0)
        return self.vocab.join([text], text, slots)

    def placed(self, inputs: Tensor, *before: tuple[int, int]) -> Context:
        """The context of inputs whose parts before the fine cells, text first, have so many rows of the position table
        each, as (first row, count)."""
        c, (_, slots) = self.config, before[0]
        spans = (*before, (c.base_positions, c.fine_grid**2))
        positions = torch.cat([start + torch.arange(count) for start, count in spans]).to(inputs.device)
        return Context(positions, {"text_mask": inputs[:, :slots] != self.vocab["PAD"]})

    def inherited(self, tensors: dict[str, Tensor], before: Recipe, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        c, old = self.config, before.config
        if POSITIONS not in tensors or len(tensors[POSITIONS]) != old.max_positions:
            return tensors
        count = old.base_positions if isinstance(old, FineConfig) else old.max_positions
        base, fine = tensors[POSITIONS].tensor_split([count])
        base = grown(base, old.text_end, c.text_end, new[POSITIONS][: c.base_positions])
        if len(fine) == 0:
            cells = base[c.text_rows + 1 : c.image_rows_end].view(c.image_grid, c.image_grid, -1)
            times = c.fine_grid // c.image_grid
            fine = cells.repeat(times, times, 1).flatten(0, 1)
        return tensors | {POSITIONS: torch.cat([base, fine])}

    @classmethod
    def begun(cls, config: Any) -> Any:
        names = {f.name for f in dataclasses.fields(BilingualConfig)}
        base = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
        fine = RATIO * config.image_grid
        return cls.Config(**base | {"max_positions": config.max_positions + fine**2, "fine_grid": fine})

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        check_bilingual(sizes)
        require("small_grid" in sizes, "tokens", "pictures at two sizes (cogview tokenize --pairs)", "one size")
        longest, grid, fine = sizes.pop("max_text"), sizes.pop("small_grid"), sizes.pop("image_grid")
        rows = max(config.text_rows, longest + 1)
        own = {"max_caption": longest, "text_rows": rows, "image_grid": grid, "fine_grid": fine}
        return dataclasses.replace(config, max_positions=rows + 1 + grid**2 + fine**2, **own, **sizes)


def presets(recipe: type[Fine]) -> dict[str, tuple[ModelConfig, TrainConfig]]:
    """Those of CogLM, gone on from."""
    return {
        name: (recipe.begun(config), dataclasses.replace(training, **(_TINY if name == "tiny" else _PUBLISHED)))
        for name, (config, training) in CogLM.presets.items()
    }
