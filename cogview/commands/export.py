"""`cogview export`: a model of a run, or its whole checkpoint, as one safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.config import require
from cogview.data.files import save_tensors


@dataclass(frozen=True)
class Export:
    """Write a model, trained by any number of processes, as one safetensors file: its parameters by their names in
    `recipe.model()`, recipe and sizes as JSON in its metadata. With --all, a checkpoint that training goes on from."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help_behavior_hint="(required)")]
    """Folder of the run."""
    out: Path
    """The file; with --all a folder, for a file named by its step."""
    name: Annotated[str | None, option("NAME", "trained last")] = None
    """Which of the run's models."""
    step: Annotated[int | None, option("INT", "the best, or newest")] = None
    """Which of its checkpoints."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters; not with --all."""
    all: bool = False
    """The optimizer's state, too, and where the run stands."""

    def run(self) -> None:
        from cogview.runs import sources
        from cogview.train import checkpoint

        require(not self.all or self.dtype == "float32", "dtype", "float32 with --all", self.dtype)
        for source in sources(self.run_folder, self.name, self.step):
            try:
                tensors, header = (checkpoint.read if self.all else checkpoint.weights)(source.path)
            except checkpoint.Damaged as error:
                console.print(f"{error}: it is passed over")
                continue
            break
        else:
            raise ValueError(f"{self.run_folder}: no checkpoint can be read")
        if self.all:
            out = checkpoint.path_of(self.out, source.step)
            require(not out.exists(), "out", "a folder without this checkpoint", str(self.out))
            checkpoint.save(out, tensors, header)
        else:
            out, dtype = self.out, getattr(torch, self.dtype)
            about = {name: header[name] for name in ("recipe", "config", "tokenizers") if name in header}
            model = {name: value.to(dtype) for name, value in tensors.items()}
            save_tensors(out, model, {"format": "pt", "model": json.dumps(about)})
        console.print(f"{out}: of {source}")
