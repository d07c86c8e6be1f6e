"""Checkpoints of several processes: a folder each, by torch.distributed.checkpoint, in safetensors files.

    step-00000100/shard-00001-model-00001-of-00001.safetensors    what rank 0 had, with the places of its parts
    step-00000100/shard-00001-model-00001-of-00001.safetensors.json    CRC-32s of these
    step-00000100/checkpoint.json                                 header, the files' names, CRC-32; written last

It is written beside and renamed when all of it is there, so none is ever half-written. Any number of processes reads
it, of any layout, and one alone. Nothing in it is code.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from cogview.data.files import sync_folder, write_json
from cogview.train.checkpoint import ASIDE
from cogview.train.ranks import Ranks
from cogview.train.sums import json_sum, tensor_sum

HEADER = "checkpoint.json"


class Writer(HuggingFaceStorageWriter):
    """Writes the parts of all processes, checksums beside them, and then, on the first, what makes them one."""

    def __init__(self, path: Path, header: dict[str, Any], published: Callable[[], None]):
        """published: called on the first process when the checkpoint is there."""
        super().__init__(str(_beside(path)), save_distributed=True)
        self.final, self.header, self.published = path, header, published

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)
        future.wait()
        for name in {result.storage_data.relative_path for result in future.value()}:
            write_json(Path(self.path) / f"{name}.json", _sums(Path(self.path) / name))
        return future

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        folder, names = Path(self.path), {part.storage_data.relative_path for parts in results for part in parts}
        for path in folder.iterdir():  # of a process that was killed
            if path.name.removesuffix(".json") not in names:
                path.unlink()
        header = [self.header, sorted(names)]
        write_json(folder / HEADER, [*header, json_sum(header)])
        before = self.final.with_name(f".{self.final.name}{ASIDE}")
        if self.final.exists():  # of as many steps: of a run that went on from before it, or stopped there
            os.rename(self.final, before)
        os.rename(folder, self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(before, ignore_errors=True)
        self.published()


class Reader(HuggingFaceStorageReader):
    """Of such a folder, or of a file of one process."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        if path.is_file():
            self.fs = _OneFile()


class _OneFile(FileSystem):
    def ls(self, path: Any) -> list[str]:
        return [str(path)]


def shapes(path: Path) -> dict[str, list[int]]:
    """Of all tensors of a checkpoint, whole."""
    return {name: list(found.size) for name, found in _tensors(Reader(path).read_metadata()).items()}


def read(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors whose names begin so, in this process alone."""
    there = _tensors(Reader(path).read_metadata())
    wanted = {name: found for name, found in there.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in wanted.items()}
    if tensors:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
            load(dict(tensors), storage_reader=Reader(path), no_dist=True)
    return tensors


def load_into(places: dict[str, Tensor], path: Path, ranks: Ranks) -> None:
    """Fills tensors, cut over the processes in any way, with what a checkpoint has under their names."""
    load(places, storage_reader=Reader(path), process_group=ranks.talking)


def read_header(path: Path) -> dict[str, Any]:
    """ValueError where it is damaged."""
    return _listed(path)[0]


def damage(path: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the files of a checkpoint, "" if nothing; of every `parts`-th from `part` on."""
    for name in _listed(path)[1][part::parts]:
        sums, found = json.loads((path / f"{name}.json").read_bytes()), _sums(path / name)
        for tensor in sorted(found.keys() | sums.keys()):
            if found.get(tensor) != sums.get(tensor):
                return f"the checksum of {tensor} in {name} is wrong"
    return ""


def _listed(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The header, and the files' names."""
    header, names, checksum = json.loads((path / HEADER).read_bytes())
    if checksum != json_sum([header, names]) or any(Path(name).name != name for name in names):
        raise ValueError("the checksum of its header is wrong")
    return header, names


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return dict(metadata.state_dict_metadata)  # type: ignore[arg-type]


def _sums(path: Path) -> dict[str, int]:
    """Of every tensor of a file, and of where they belong."""
    with safe_open(path, framework="pt") as file:
        sums = {name: tensor_sum(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, no dict
        return sums | {"places": json_sum(sorted((file.metadata() or {}).items()))}


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
