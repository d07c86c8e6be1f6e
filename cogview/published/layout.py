"""The parameters of a recipe's model as its family's files have them: other names, rows in another order, and the
positions of a super-resolution's fine cells in a table of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.parts.published import by_heads, by_kind
from cogview.published import cuts, families
from cogview.recipes.fine import FineConfig
from cogview.recipes.recipe import POSITIONS, Recipe


class Layout:
    def __init__(self, recipe: Recipe):
        c = recipe.config
        self.recipe, self.base = recipe, c.base_positions if isinstance(c, FineConfig) else None
        names = families.of(recipe.name).names(recipe)
        self.names: dict[str, list[str]] = {ours: [theirs] for ours, theirs in names.items()}
        """Of every parameter the tensors whose rows it has, one after the other."""
        if self.base is not None:
            self.names[POSITIONS].append(families.FINE_POSITIONS)

    def released(self, ours: str, value: Tensor) -> dict[str, Tensor]:
        """A parameter by published names, rows in their order."""
        names = self.names[ours]
        if cuts.is_three(names[0]):
            value = by_kind(value, self.recipe.config.num_heads)
        pieces = [value] if self.base is None or len(names) == 1 else value.tensor_split([self.base])
        return dict(zip(names, pieces, strict=True))

    def parameter(self, ours: str, pieces: Sequence[Tensor]) -> Tensor:
        """The way back."""
        if cuts.is_three(self.names[ours][0]):
            return by_heads(pieces[0], self.recipe.config.num_heads)
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))

    def shapes(self) -> dict[str, list[int]]:
        """Of all tensors, whole, by their published names."""
        with torch.device("meta"):
            state = self.recipe.model().state_dict()
        made = (self.released(ours, state[ours]) for ours in self.names)
        return {theirs: list(value.shape) for pieces in made for theirs, value in pieces.items()}
