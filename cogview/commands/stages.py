"""Options of CogView2's stages: whose models, and how each draws."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from cogview.commands.console import console
from cogview.commands.pictures import RunFolder, labels_of
from cogview.commands.presets import option
from cogview.config import require

if TYPE_CHECKING:
    from cogview.cogview2 import CogView2, Settings
    from cogview.sampling import Sampling

_OF = "of --settings"


@dataclass(frozen=True)
class Stage:
    """How a stage draws."""

    temperature: Annotated[float | None, option("FLOAT", _OF)] = None
    """Below 1 likely codes become likelier, above 1 less likely."""
    top_k: Annotated[int | None, option("INT", _OF)] = None
    """Of the likeliest codes so many may be drawn; 1: always the likeliest. Instead of clusters."""
    clusters: Annotated[int | None, option("INT", _OF)] = None
    """Of the likeliest clusters of codes so many may be drawn, then a code of one."""
    cluster_temperature: Annotated[float | None, option("FLOAT", _OF)] = None
    """Of the codes in a cluster."""

    def of(self, before: "Sampling", labels: torch.Tensor | None) -> "Sampling":
        """What was chosen before, changed by what is asked for here."""
        from cogview.clusters import Clusters

        how, both = before, self.top_k is not None and self.clusters is not None
        require(not both, "top_k", "none with clusters", self.top_k)
        if self.temperature is not None:
            how = replace(how, temperature=self.temperature)
        if self.top_k is not None:
            how = replace(how, top_k=self.top_k, clusters=None)
        if self.clusters is not None:
            assert labels is not None
            how = replace(how, clusters=Clusters(labels, self.clusters))
        if self.cluster_temperature is not None:
            if how.clusters is None:
                raise ValueError("cluster_temperature: expected none without clusters, see --help")
            how = replace(how, clusters=replace(how.clusters, temperature=self.cluster_temperature))
        return how


@dataclass(frozen=True)
class BaseStage(Stage):
    text_attention: Annotated[float | None, option("FLOAT", _OF)] = None
    """Added to the scores of what is drawn and text: pictures keep closer to their captions. 0 to 3, published 1.4."""

    def of(self, before: "Sampling", labels: torch.Tensor | None) -> "Sampling":
        how = super().of(before, labels)
        return how if self.text_attention is None else replace(how, text_attention=self.text_attention)


@dataclass(frozen=True)
class Run:
    """Whose models, and how they compute."""

    folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    base: Annotated[str | None, option("NAME", "trained last of recipe coglm")] = None
    """Which of its models draws small pictures, and ranks them."""
    direct: Annotated[str | None, option("NAME", "trained last of recipe direct")] = None
    """Which enlarges them."""
    iterative: Annotated[str | None, option("NAME", "trained last of recipe iterative")] = None
    """Which draws most of these anew."""
    stages: Literal[1, 2, 3] = 3
    """1: small pictures alone; 2: and direct super-resolution; 3: and the iterative one."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the models: 16 bits take half the memory and less time."""
    batch_size: int = 8
    """Pictures at once in each stage."""
    memory: Annotated[float | None, option("GB", "no limit")] = None
    """As many pictures at once, up to batch-size, as fit this much memory with the models; a picture that is edited
    comes on top."""

    def load(self) -> "tuple[CogView2, int]":
        """All models, once, and how many pictures at once."""
        from cogview.cogview2 import CogView2
        from cogview.runs import last_run

        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(self.memory is None or 0 < self.memory < math.inf, "memory", "a positive number", self.memory)
        for number, name in enumerate(("direct", "iterative"), 2):
            known = getattr(self, name) is None or self.stages >= number
            require(known, name, f"none with --stages {self.stages}", getattr(self, name))
        folder = last_run() if self.folder is None else self.folder
        names = {"base": self.base, "direct": self.direct, "iterative": self.iterative}
        how: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        found = CogView2.load(folder, stages=self.stages, **names, **how)
        for stage in found.stages:
            console.print(f"{stage.recipe.name}: {stage.source}")
        if self.memory is None:
            return found, self.batch_size
        most = found.fitting(self.memory * 1e9)
        if most < self.batch_size:
            console.print(f"{most} pictures at once fit {self.memory:g} GB")
        return found, min(most, self.batch_size)


@dataclass(frozen=True)
class Ways:
    """How the stages draw."""

    settings: Literal["ours", "published"] = "ours"
    """Of all stages. published: those of the released code, for its weights."""
    labels: Annotated[Path | None, option("FILE", "by k-means")] = None
    """Clusters of the codes, a .npy file of their numbers, as CogView2's cluster_label.npy; default those of the run's
    codebook by k-means, 40 codes in each on average."""
    base: BaseStage = field(default_factory=BaseStage)
    direct: Stage = field(default_factory=Stage)
    iterative: Stage = field(default_factory=Stage)

    def of(self, models: "CogView2", batch_size: int) -> "Settings":
        from cogview.cogview2 import Settings

        stages = self.base, self.direct, self.iterative
        clustered = self.settings == "published" or any(stage.clusters is not None for stage in stages)
        require(self.labels is None or clustered, "labels", "none where no stage draws from clusters", str(self.labels))
        for name in ("direct", "iterative"):
            known = getattr(models, name) is not None or getattr(self, name) == Stage()
            require(known, name, f"no settings with --stages {len(models.stages)}", "some")
        labels = labels_of(models.base, self.labels) if clustered else None
        before = Settings() if labels is None or self.settings == "ours" else Settings.published(labels)
        made = [
            replace(stage.of(how, labels), batch_size=batch_size)
            for stage, how in zip(stages, (before.base, before.direct, before.iterative), strict=True)
        ]
        last, rounds = self.iterative, before.top_k
        if last.top_k is not None or last.clusters is not None:
            rounds = None
        return Settings(made[0], made[1], made[2], rounds)
