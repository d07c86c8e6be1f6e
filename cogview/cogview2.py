"""CogView2 as a whole (arXiv 2204.14217): small pictures of captions, the best of them by their captions' perplexity,
and these enlarged, at once and then in rounds. `cogview.completion` draws parts of pictures anew with it.

    cogview2 = CogView2.load("runs/cogview2")
    best = next(cogview2.draw(["a fox above a tree"], count=1, candidates=8))

Codes int64: small [n, h, w], direct and fine [n, m, m]; pictures uint8 [n, 3, H, W].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.clusters import Clusters
from cogview.config import require
from cogview.generate import Update
from cogview.inputs import Captions, texts
from cogview.lopar import PUBLISHED_TOP_K, top_k
from cogview.progress import Sum
from cogview.recipes.coglm import CogLM
from cogview.recipes.iterative import Iterative
from cogview.reranking import Ranked, draw_ranked
from cogview.sampling import Sampling, check_seeds
from cogview.superresolve import fine_batches
from cogview.system import System

_STATES = 16  # times the width, of each token: main branch, its norm, projections, attention, both ends of the MLP
_ALWAYS = 6e8  # bytes: torch, logits of some cells, the image tokenizer and pictures in it


@dataclass(frozen=True)
class Settings:
    """How each stage draws."""

    base: Sampling = field(default_factory=Sampling)
    direct: Sampling = field(default_factory=Sampling)
    iterative: Sampling = field(default_factory=Sampling)
    top_k: tuple[int, ...] | None = PUBLISHED_TOP_K
    """Of the iterative rounds; None: the stage's own in all. The published ones are spread over as many rounds as there
    are."""

    @classmethod
    def published(cls, labels: Tensor, batch_size: int = 8) -> "Settings":
        """Those of the released code; labels: int64 [V], of the clusters of codes."""
        base = Sampling(temperature=1.15, text_attention=1.4, clusters=Clusters(labels, 16), batch_size=batch_size)
        direct = Sampling(clusters=Clusters(labels, 100, 0.89), batch_size=batch_size)
        return cls(base, direct, Sampling(batch_size=batch_size))


class Drawn(NamedTuple):
    """Of one caption, the best first."""

    caption: str
    caploss: Tensor
    """float32 [n], of the small pictures."""
    small: Tensor
    direct: Tensor | None = None
    fine: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """The codes of the last stage."""
        return next(codes for codes in (self.fine, self.direct, self.small) if codes is not None)


@dataclass(frozen=True)
class CogView2:
    """The models of one run, which share its tokenizers; without the others only small pictures are drawn."""

    base: System
    direct: System | None = None
    iterative: System | None = None

    def __post_init__(self):
        require(isinstance(self.base.recipe, CogLM), "base", "a model of recipe coglm", self.base.recipe.name)
        fits = self.iterative is None or self.direct is not None
        require(fits, "direct", "a model, which iterative goes on from", None)
        for name, system in (("direct", self.direct), ("iterative", self.iterative)):
            if system is not None:
                require(system.recipe.name == name, name, f"a model of recipe {name}", system.recipe.name)
                theirs, ours = system.recipe.config, self.base.recipe.config
                fits = theirs.image_grid == ours.image_grid
                require(fits, name, f"a model for pictures of {ours.image_grid} x {ours.image_grid}", theirs.image_grid)
        if self.direct is not None and self.iterative is not None:
            grids = self.direct.recipe.grids, self.iterative.recipe.grids
            require(grids[0] == grids[1], "iterative", f"grids {grids[0]}, as direct", grids[1])

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | None = None,
        direct: str | None = None,
        iterative: str | None = None,
        stages: int = 3,
        **how: Any,
    ) -> "CogView2":
        """Of a run's folder, once. base, direct, iterative: names of its models, default those of these recipes trained
        last. stages: 1 to 3 of them. how: as in `System.load`. ValueError where one is missing."""
        require(stages in (1, 2, 3), "stages", "1, 2 or 3", stages)
        first = System.load(folder, name=base, recipe="coglm", **how)
        others = [("direct", direct), ("iterative", iterative)][: stages - 1]
        return cls(first, *(first.beside(recipe, name=name, **how) for recipe, name in others))

    @property
    def stages(self) -> list[System]:
        return [stage for stage in (self.base, self.direct, self.iterative) if stage is not None]

    @property
    def side(self) -> int:
        """Of the pictures of the last stage, in pixels."""
        return self.stages[-1].recipe.grids[-1] * self.base.image.config.downsample

    @property
    def rounds(self) -> int:
        """Of the iterative stage."""
        recipe = None if self.iterative is None else self.iterative.recipe
        return int(recipe.order.max()) if isinstance(recipe, Iterative) else 0

    def fitting(self, memory: float) -> int:
        """How many pictures at once so many bytes hold beside the models; ValueError where not one does. By formula: a
        layer's states, projections and MLP for all tokens of a stage, and the cache of the first."""
        used, most = float(_ALWAYS), 0.0
        for stage in self.stages:
            c, size = stage.recipe.config, stage.model.embedding.words.weight.element_size()
            used += sum(p.numel() * p.element_size() for p in stage.model.parameters())
            cached = 2 * c.num_layers * c.hidden_size * size if stage is self.base else 0
            most = max(most, stage.recipe.length * (_STATES * c.hidden_size * size + cached))
        least = (used + most) / 1e9
        require(memory >= used + most, "memory", f"at least {least:.2g} GB, for one picture", f"{memory / 1e9:g}")
        return int((memory - used) // most)

    def draw(
        self,
        captions: Captions,
        how: Settings | None = None,
        *,
        count: int = 1,
        candidates: int | None = None,
        seed: int = 0,
        update: Update = lambda done: None,
    ) -> Iterator[Drawn]:
        """Of each caption `count` pictures, the best of so many candidates (default as many), by CapLoss. seed: of the
        first candidate, the others have the following ones; a picture depends on its seed, whatever the batch. `update`
        is told cells done of `work(...)`. What is asked for is checked before anything is drawn."""
        how, captions = Settings() if how is None else how, texts(captions)
        seeds = candidate_seeds(seed, count, candidates)
        for stage in self.stages[1:]:
            stage.encode(captions)
        self.check(how)
        ids = self.base.encode(captions)
        told = Sum(update)
        found = draw_ranked(self.base, self.base, captions, how.base, seeds=seeds, update=told.part())
        return self._enlarged(captions, ids, found, how, count, seeds, told)

    def work(self, captions: int, count: int, candidates: int | None = None) -> int:
        """Cells in all."""
        cells = captions * (count if candidates is None else candidates) * self.base.recipe.config.image_tokens
        return cells + sum(captions * count * stage.recipe.grids[-1] ** 2 for stage in self.stages[1:])

    def check(self, how: Settings) -> None:
        """ValueError where settings do not fit the models."""
        codes = self.base.recipe.config.image_vocab
        for name, stage in vars(how).items():
            if isinstance(stage, Sampling) and stage.clusters is not None:
                count = len(stage.clusters.labels)
                require(count == codes, "clusters", f"labels of {codes:,} codes, as the models draw", f"{count:,}")
            if isinstance(stage, Sampling) and name != "base":
                require(stage.guidance == 1, "guidance", f"1 for {name}", stage.guidance)
        if self.iterative is not None and (each := self._top_k(how)) is not None:
            require(len(each) == self.rounds, "top_k", f"one of each of {self.rounds} rounds", each)

    def _top_k(self, how: Settings) -> tuple[int, ...] | None:
        """Of each round."""
        return top_k(self.rounds) if how.top_k == PUBLISHED_TOP_K else how.top_k

    def _enlarged(
        self, captions, ids, found: Iterator[Ranked], how: Settings, count: int, seeds, told: Sum
    ) -> Iterator[Drawn]:
        """Batches of how.direct.batch_size pictures at least, of several captions where one has fewer."""
        waiting, first = list[Ranked](), 0
        for number, candidates in enumerate(found, 1):
            waiting.append(Ranked(*(part[:count] for part in candidates)))
            if len(waiting) * count < how.direct.batch_size and number < len(captions):
                continue
            rows = [ids[first + k] for k in range(len(waiting)) for _ in range(count)]
            small = torch.cat([one.codes for one in waiting])
            chosen = [seeds[n] for one in waiting for n in one.order.tolist()]
            direct, fine = self.enlarge(rows, small, how, chosen, told)
            for k, (codes, caploss, _) in enumerate(waiting):
                part = slice(k * count, (k + 1) * count)
                larger = (None if c is None else c[part] for c in (direct, fine))
                yield Drawn(captions[first + k], caploss, codes, *larger)
            first, waiting = first + len(waiting), []

    def enlarge(
        self,
        ids: Sequence[Sequence[int]],
        small: Tensor,
        how: Settings,
        seeds: Sequence[int],
        told: Sum | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Direct and fine codes of small ones, with captions as raw text ids and seeds, one each."""
        told = Sum(lambda cells: None) if told is None else told
        if self.direct is None:
            return None, None
        recipe, model = self.direct.recipe, self.direct.model
        about: dict[str, Any] = {"seeds": seeds, "update": told.part()}
        direct = torch.cat(list(fine_batches(recipe, model, ids, small, how.direct, **about)))
        if self.iterative is None:
            return direct, None
        return direct, self.refined(ids, direct, how, seeds, told)

    def refined(
        self,
        ids: Sequence[Sequence[int]],
        direct: Tensor,
        how: Settings,
        seeds: Sequence[int],
        told: Sum,
        **of_rounds: Any,
    ) -> Tensor:
        """Direct codes after the iterative rounds. of_rounds: as in `superresolve.refine`."""
        assert self.iterative is not None
        recipe, model = self.iterative.recipe, self.iterative.model
        about: dict[str, Any] = {"seeds": seeds, "update": told.part(), "top_k": self._top_k(how), **of_rounds}
        return torch.cat(list(fine_batches(recipe, model, ids, direct, how.iterative, **about)))


def candidate_seeds(seed: int, count: int, candidates: int | None) -> list[int]:
    """Of so many candidates, None: `count`, from which the best `count` are taken; ValueError where they are fewer."""
    drawn = count if candidates is None else candidates
    require(count >= 1, "count", "at least 1", count)
    require(drawn >= count, "candidates", f"at least count ({count})", drawn)
    return check_seeds(range(seed, seed + drawn), drawn)
