"""Memory of each GPU and seconds of a step, of a training that has not begun: formulas of bytes and operations.

N GPUs for the data times T for each layer's tensors. Of P parameters (of a tensor-parallel rank), e bytes of the
computation's dtype each, one GPU alone holds masters 4 P, gradients 4 P and AdamW's averages 8 P in float32, and below
float32 the model e P and the gradients of one backward e P. Of several, FSDP2 (ZeRO 3, arXiv 1910.02054) shares the
first three out, by N, and gathers the model a layer at a time: the root, which stays, and two layers. Its gradients in
flight are the root's, a layer's, and two layers' in float32 on their way; micro-batches before the last, which are not
communicated, add them up in 4 P. A step takes

    max(compute, gather and reduce) + tensor parallelism + optimizer,   without overlap their sum

    compute              operations, with those that checkpointing does again / (GPUs * peak * utilisation)
    gather and reduce    (N - 1) / N * (2 e P a micro-batch, or e P a step if it stays gathered; 4 P a step) / bandwidth
    tensor parallelism   4 all-reduces of e C S a layer and sample, 6 with checkpointing, 2 (T - 1) / T of it / link
    optimizer            32 P / N / bandwidth of memory: gradients twice, masters and averages read and written

Bandwidth is the link's inside a machine of 8; beyond, of all its network cards that serve the same part of the tensors.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cogview.config import Recompute, require
from cogview.flops import Flops, forward_flops
from cogview.hardware import Gpu
from cogview.memory import MODES, Activations, Parameters, activations, logits, parameters
from cogview.recipes.recipe import Recipe

MACHINE = 8  # GPUs that a fast link joins
SPARE = 0.08  # of a GPU's memory, assumed: CUDA's context, buffers of communication, what the allocator cannot use
ACHIEVED = 0.8  # of the bandwidth on paper, assumed


@dataclass(frozen=True)
class Plan:
    """Of one number of GPUs. Bytes are of each GPU, seconds of a step."""

    gpus: int
    micro_batch: int
    accumulate: int
    bytes: dict[str, int]
    activations: dict[str, int]
    """By checkpointing mode; what is in `bytes` is of the one chosen."""
    limit: float
    compute: float
    gather: float
    tensor: float
    optimizer: float

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def seconds(self) -> float:
        return max(self.compute, self.gather) + self.tensor + self.optimizer

    @property
    def seconds_without_overlap(self) -> float:
        return self.compute + self.gather + self.tensor + self.optimizer


@dataclass(frozen=True)
class Planner:
    """A training on any number of GPUs."""

    recipe: Recipe
    batch_size: int
    gpu: Gpu
    size: int = 2
    """Bytes of an element of the computation's dtype."""
    main_size: int | None = None
    """Those of the main branch and of norms, where gradients are scaled by blocks."""
    averaged: bool = False
    """Whether an average of the parameters is kept."""
    checkpointing: Recompute = "full"
    tensor_parallel: int = 1
    reshard: bool = True
    """Whether FSDP2 frees a layer's gathered parameters behind its forward."""
    utilisation: float = 0.4
    network: float = 50e9
    """Bytes a second and direction of one GPU's share of the network."""

    def __post_init__(self):
        heads, ranks = self.recipe.config.num_heads, self.tensor_parallel
        fits = 1 <= ranks <= MACHINE and heads % ranks == 0
        require(fits, "tensor_parallel", f"a divisor of the {heads} heads, at most {MACHINE}", ranks)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(0 < self.utilisation <= 1, "utilisation", "above 0, at most 1", self.utilisation)
        require(self.network > 0, "network", "above 0", self.network)

    @property
    def parameters(self) -> Parameters:
        return parameters(self.recipe, self.tensor_parallel)

    @cached_property
    def flops(self) -> Flops:
        return forward_flops(self.recipe)

    @cached_property
    def activations(self) -> dict[Recompute, Activations]:
        return {mode: activations(self.recipe, mode, self.size, self.tensor_parallel, self.main_size) for mode in MODES}

    def at(self, gpus: int, micro_batch: int | None = None) -> Plan:
        """With the largest micro-batch that fits, unless one is given; with 1 where none fits."""
        ranks = self._ranks(gpus)
        share = self.batch_size // ranks
        if micro_batch is not None:
            fits = 1 <= micro_batch <= share and share % micro_batch == 0
            require(fits, "micro_batch", f"a divisor of the {share} samples of each data-parallel rank", micro_batch)
            return self._plan(gpus, ranks, micro_batch)
        divisors = (n for n in range(share, 0, -1) if share % n == 0)
        plans = (self._plan(gpus, ranks, n) for n in divisors)
        return next((plan for plan in plans if plan.fits), None) or self._plan(gpus, ranks, 1)

    def _ranks(self, gpus: int) -> int:
        """Data-parallel ones; ValueError where GPUs cannot be laid out so."""
        split, batch = self.tensor_parallel, self.batch_size
        whole = gpus >= 1 and gpus % split == 0 and (gpus <= MACHINE or gpus % MACHINE == 0)
        machines = f"a multiple of tensor_parallel ({split}), and beyond {MACHINE} whole machines of {MACHINE}"
        require(whole, "gpus", machines, gpus)
        ranks = gpus // split
        require(batch % ranks == 0, "batch_size", f"a multiple of the {ranks} data-parallel ranks", batch)
        return ranks

    def _plan(self, gpus: int, ranks: int, micro_batch: int) -> Plan:
        accumulate = self.batch_size // ranks // micro_batch
        kept = {str(mode): micro_batch * sum(found) for mode, found in self.activations.items()}
        return Plan(
            gpus,
            micro_batch,
            accumulate,
            {
                **(self._alone() if gpus == 1 else self._sharded(ranks, accumulate)),
                "activations": kept[self.checkpointing],
                "logits": logits(self.recipe, micro_batch, self.main_size or self.size),
                **({"average": 4 * self.parameters.total // ranks} if self.averaged else {}),
            },
            kept,
            self.gpu.memory * (1 - SPARE),
            **self._seconds(gpus, ranks, micro_batch, accumulate),
        )

    def _alone(self) -> dict[str, int]:
        total, low = self.parameters.total, 0 if self.size == 4 else self.size
        return {
            "parameters": 4 * total,
            "computed with": low * total,
            "gradients": (4 + low) * total,
            "optimizer": 8 * total,
        }

    def _sharded(self, ranks: int, accumulate: int) -> dict[str, int]:
        root, layer, _ = self.parameters
        total = self.parameters.total
        flying = self.size * (root + layer) + 2 * 4 * layer
        return {
            "parameters": 4 * total // ranks,
            "computed with": self.size * (root + 2 * layer if self.reshard else total),
            "gradients": 4 * total // ranks + flying + (4 * total if accumulate > 1 else 0),
            "optimizer": 8 * total // ranks,
        }

    def _seconds(self, gpus: int, ranks: int, micro_batch: int, accumulate: int) -> dict[str, float]:
        c, total, split = self.recipe.config, self.parameters.total, self.tensor_parallel
        peak = 1e12 * (self.gpu.float32 if self.size == 4 else self.gpu.half)
        operations = self.batch_size * (self.flops.total + self._again())
        link, network = ACHIEVED * self.gpu.link, ACHIEVED * self.network
        bandwidth = link if gpus <= MACHINE else min(link, network * MACHINE / split)
        moved = (self.size * (2 * accumulate if self.reshard else 1) + 4) * total * (ranks - 1) / ranks
        state = self.size * c.hidden_size * self.recipe.length * micro_batch * accumulate
        reduces = c.num_layers * (4 if self.checkpointing == "none" else 6)
        return {
            "compute": operations / (gpus * peak * self.utilisation),
            "gather": moved / bandwidth,
            "tensor": reduces * state * 2 * (split - 1) / split / link,
            "optimizer": 32 * total / ranks / self.gpu.bandwidth,
        }

    def _again(self) -> int:
        """Operations of a sample's forward that the backward does once more."""
        flops = self.flops
        if self.checkpointing == "none":
            return 0
        saved = self.activations[self.checkpointing].kept > self.activations["full"].kept  # outputs of attention
        return flops.projections + (0 if saved else flops.attention)


def remedy(planner: Planner, gpus: int) -> str:
    """The first thing that would make a training fit that does not."""
    more = {2**n for n in range(12)} | {3 * 2**n for n in range(2, 10)}
    changes: list[tuple[str, dict[str, Any], int]] = [
        *((f"--checkpoint-activations {mode}", {"checkpointing": mode}, gpus) for mode in MODES),
        *((f"--tensor-parallel {n}", {"tensor_parallel": n}, gpus) for n in (2, 4, 8)),
        *((f"{n} GPUs", {}, n) for n in sorted(more) if n > gpus),
        *((f"{n} GPUs and --checkpoint-activations full", {"checkpointing": "full"}, n) for n in sorted(more)),
    ]
    for words, change, count in changes:
        try:
            if replace(planner, **change).at(count).fits:
                return words
        except ValueError:  # such a layout there is not
            continue
    return "nothing of all this"
