"""The processes that train one model together, as torchrun starts them: their mesh, and what they tell each other."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogview.config import briefly, require
from cogview_ops import __version__


@dataclass(frozen=True)
class Ranks:
    """One of them. Those of a column of the mesh share a model's heads, and have the same samples; those of a row have
    different samples."""

    rank: int = 0
    count: int = 1
    tensor: int = 1
    """Processes that share the heads of each layer."""
    mesh: Any = None
    """DeviceMesh (data, tensor); None: a process alone."""
    talking: Any = None
    """The group in which they tell each other what is no tensor."""
    saving: Any = None
    """The group in which checkpoints are written, beside all else."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def parts(self) -> int:
        """In which a batch is cut."""
        return self.count // self.tensor

    def rows(self, count: int) -> range:
        """This process's of `count`: as many as the others', but for the last ones."""
        each, part = -(-count // self.parts), self.rank // self.tensor
        return range(min(count, part * each), min(count, (part + 1) * each))

    def sum(self, values: Tensor) -> Tensor:
        """Over the parts of a batch, the same on all processes."""
        if self.mesh is not None:
            torch.distributed.all_reduce(values, group=self.mesh.get_group("data"))
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Of those of all processes, the same on all."""
        if self.mesh is not None:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    def told(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self.talking)
        return found

    def alike(self, work: Callable[[], Any]) -> list[Any]:
        """What work() gives on each process, by rank; where it was a ValueError or OSError on any, the first on all."""
        found = wrong = None
        try:
            found = work()
        except (ValueError, OSError) as error:
            wrong = error
        told = self.told((found, wrong))
        for _, wrong in told:
            if wrong is not None:
                raise wrong
        return [value for value, _ in told]

    def of_first(self, work: Callable[[], Any]) -> Any:
        """What work() gives on the first process, which alone does it; its ValueError or OSError on all."""
        return self.alike(lambda: work() if self.first else None)[0]

    def check_same(self, **values: Any) -> None:
        """ValueError names the first value that is not the same on all processes."""
        first, *others = self.told(values)
        for rank, theirs in enumerate(others, 1):
            for name, value in first.items():
                if (got := theirs.get(name)) != value:
                    wanted = f"{briefly(value)} on all processes, as on rank 0"
                    raise ValueError(f"{name}: expected {wanted}, got {briefly(got)} on rank {rank}")


ALONE = Ranks()


def local(x: Any) -> Tensor:
    """What this process has of a tensor, in its memory."""
    return x.to_local() if hasattr(x, "to_local") else x


def launched() -> bool:
    """By torchrun, or what sets the same variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: torch.device, tensor: int = 1) -> Iterator[Ranks]:
    """This process among those that torchrun started; ALONE where there are no others.

    ValueError where tensor-parallel groups do not fit, or where versions differ.
    """
    if not launched():
        require(tensor == 1, "tensor_parallel", "1 without torchrun, which starts several processes", tensor)
        yield ALONE
        return
    count = int(os.environ["WORLD_SIZE"])
    fits = tensor >= 1 and count % tensor == 0
    require(fits, "tensor_parallel", f"a divisor of the {count} processes", tensor)
    distributed = torch.distributed
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA is in use by now, and then a mesh leaves the current device as it is
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, _ = next(distributed.rendezvous("env://"))
    # a process that was started again would find what those that died have left in torchrun's store
    store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        sizes = count // tensor, tensor
        mesh = distributed.init_device_mesh(device.type, sizes, mesh_dim_names=("data", "tensor"))
        groups = [distributed.new_group(backend="gloo") for _ in range(2)]
        ranks = Ranks(rank, count, tensor, mesh, *groups)
        ranks.check_same(torch=torch.__version__, cogview=__version__)
        yield ranks
    finally:
        distributed.destroy_process_group()


def own_device(device: str) -> str:
    """A device as asked for, of several processes on a machine each its own."""
    if not launched():
        return device
    require(":" not in device, "device", "cuda or cpu under torchrun: each process has its own", device)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
