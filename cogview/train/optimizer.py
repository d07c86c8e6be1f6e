"""AdamW, or Muon for the layers' matrices, on float32 master weights of a model that may be bfloat16 or float16."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogview.config import TrainConfig
from cogview.train.average import Average
from cogview.train.block_scales import BlockScales
from cogview.train.loss_scale import LossScale
from cogview.train.ranks import ALONE, Ranks, local

_STATE: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


class Optimizer:
    """Takes over a model's parameters: casts them to config.dtype and keeps float32 masters by name.

    Of a model that is cut over several processes the masters are its own parameters, in float32, of which each layer's
    computation gets copies in config.dtype (see `sharding`). Weight decay falls on matrices and embeddings, not on
    biases and norms. In float16 the loss is scaled, or the gradients of each block, whose matrices alone are float16
    then.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks = ALONE):
        self.ranks, self.clip, self.reshard = ranks, config.clip, config.reshard
        self.last_not_finite: str | None = None
        """Of the last step, the first in its backward of the parameters whose gradient was not finite."""
        self._model = model
        if ranks.mesh is None:
            model.float()
        self.scale = _scale(model, config)
        params = dict(model.named_parameters())
        self._low: dict[str, Tensor] = {}
        """The model's parameters in config.dtype, by name, beside which there are masters."""
        if config.dtype != "float32" and ranks.mesh is None:
            self._low = {name: p for name, p in params.items() if self.scale is None or self.scale.is_low(name, p)}
        self.master: dict[str, Tensor] = params | {name: p.detach().clone() for name, p in self._low.items()}
        for p in self._low.values():
            p.data = p.data.to(getattr(torch, config.dtype))
        self._of = _optimizers(self.master, config)
        self._optimizers = list(dict.fromkeys(self._of.values()))
        self.average: Average | None = None
        if config.average is not None:
            self.average = Average(self.master, config.average, config.average_every)

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.scale is None else self.scale.of_loss

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradients of the scaled loss to the masters', in float32. Of several processes only the last part of
        a step adds those of all, and parameters that stay gathered do so up to it."""
        if self.ranks.mesh is not None:
            model: Any = self._model
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last or self.reshard)
        (loss * self.loss_scale).backward()
        for name, p in self._low.items():
            if p.grad is not None:
                grad, master = p.grad.float(), self.master[name]
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """One clipped step. Returns whether it was taken, and the gradient norm: no step when not finite. Blocks with
        scales of their own whose gradients are not are left out of it."""
        names = [name for name, p in self.master.items() if p.grad is not None]
        grads = [local(self.master[name].grad) for name in names]
        self._unscale(names, grads)
        norm = self._norm()
        bad = [] if math.isfinite(norm) else self._not_finite()
        self.last_not_finite = bad[-1] if bad else None
        if bad and self.scale is not None and (left_out := self.scale.beside(bad, names)):
            norm = self._without(left_out)
        finite = math.isfinite(norm)
        if finite:
            if norm > self.clip:
                torch._foreach_mul_(grads, self.clip / norm)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
            self._publish()
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        if self.scale is not None:
            self.scale.update(finite, bad)
        return finite, norm

    def _unscale(self, names: list[str], grads: list[Tensor]) -> None:
        """Gradients of the loss, of all processes."""
        scales = [1.0] * len(names) if self.scale is None else self.scale.factors(names)
        factors = [self.ranks.parts / scale for scale in scales]  # FSDP takes the mean over processes
        if set(factors) != {1.0}:
            torch._foreach_mul_(grads, factors)

    def _without(self, names: list[str]) -> float:
        """Forgets the gradients of some parameters; the norm of all others."""
        for name in names:
            self.master[name].grad = None
        return self._norm()

    def _not_finite(self) -> list[str]:
        """The parameters with such gradients on any process, in the order of the forward."""
        there = [(name, p.grad) for name, p in self.master.items() if p.grad is not None]
        bad = {name for name, grad in there if not local(grad).isfinite().all()}
        found = set().union(*self.ranks.told(bad))
        return [name for name in self.master if name in found]

    def _norm(self) -> float:
        """Of all gradients."""
        there = [p for p in self.master.values() if p.grad is not None]
        if self.ranks.mesh is None:
            return float(nn.utils.get_total_norm([local(p.grad) for p in there]))
        squares = torch.zeros((), device=self.ranks.mesh.device_type)
        for cut, share in ((True, 1.0), (False, 1 / self.ranks.tensor)):  # what all of a column have counts once
            grads = [local(p.grad) for p in there if _is_cut(p) == cut]
            squares += share * nn.utils.get_total_norm(grads).square()
        torch.distributed.all_reduce(squares)
        return float(squares.sqrt())

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the masters into the model."""
        for name, p in self._low.items():
            p.copy_(self.master[name])

    def _exchanged(self) -> None:
        """Behind masters that are others now: into the model, where FSDP drops what it has gathered of those before."""
        self._publish()
        units: Any = self._model.modules() if self.ranks.mesh is not None else ()
        for module in units:
            if hasattr(module, "reshard"):
                module.reshard()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averages of its parameters inside, where they are averaged."""
        if self.average is None:
            yield
            return
        try:
            with self.average.swapped():
                self._exchanged()
                yield
        finally:
            self._exchanged()

    def tensors(self) -> dict[str, Tensor]:
        """Masters as `model.<name>`, averages as `average.<name>`, the optimizers' state as `optimizer.<key>.<name>`:
        what a checkpoint holds."""
        found = {f"model.{name}": p.detach() for name, p in self.master.items()}
        for name, p in self.master.items():
            found |= {f"optimizer.{key}.{name}": value for key, value in self._of[name].state[p].items()}
        if self.scale is not None:
            found[f"optimizer.{self.scale.name}"] = self.scale.tensor()
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.values.items()}
        return found

    def places(self, saved: Collection[str]) -> dict[str, Tensor]:
        """As `tensors`, with room for the state that is among these names of a checkpoint, to be read into."""
        for name, p in self.master.items():
            for key in _STATE[type(self._of[name])]:
                if f"optimizer.{key}.{name}" in saved:
                    value = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                    self._of[name].state[p][key] = value.detach()
        return self.tensors()

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of `tensors()`, whose model part fits; ValueError when the rest does not."""
        for name, p in self.master.items():
            optimizer = self._of[name]
            wanted = _STATE[type(optimizer)]
            p.copy_(tensors[f"model.{name}"])
            keys = {key: f"optimizer.{key}.{name}" for key in wanted}
            found = {key: tensors[k] for key, k in keys.items() if k in tensors}
            for key, value in found.items():
                shape = [] if key == "step" else list(p.shape)
                if list(value.shape) != shape:
                    raise ValueError(f"{keys[key]}: expected {shape}, got {list(value.shape)}")
                # in the parameter's strides, which fused AdamW takes for granted
                like = value if key == "step" else p
                found[key] = torch.empty_like(like, device=p.device).copy_(value)
            if len(found) not in (0, len(wanted)):  # none: saved before the first step, or of another optimizer
                raise ValueError(f"{name} has only {sorted(found)} of the optimizer's state")
            optimizer.state[p] = found
        self.load_rest(tensors, tensors)
        self._publish()

    @torch.no_grad()
    def load_rest(self, tensors: dict[str, Tensor], saved: Collection[str]) -> None:
        """Averages and scales, behind the masters. A run may go on in another dtype, or begin to average, with the
        parameters as they are. saved: names in the checkpoint."""
        for name, value in ({} if self.average is None else self.average.values).items():
            key = f"average.{name}"
            local(value).copy_(local(tensors[key] if key in saved else self.master[name]))
        if self.scale is not None and (name := f"optimizer.{self.scale.name}") in saved:
            self.scale.load(tensors[name])


def _scale(model: nn.Module, config: TrainConfig) -> LossScale | BlockScales | None:
    if config.dtype != "float16":
        return None
    patience = config.scale_patience
    return BlockScales(model, patience) if config.gradient_scaling == "blocks" else LossScale(patience)


def _optimizers(master: dict[str, Tensor], config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of each parameter, by name."""
    matrices = {name for name, p in master.items() if p.ndim == 2 and name.startswith("stack.")}
    muon = matrices if config.optimizer == "muon" else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in master.items() if name not in muon and p.ndim >= 2]},
        {"params": [p for name, p in master.items() if p.ndim < 2], "weight_decay": 0.0},
    ]
    how: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=config.betas, fused=True, **how)
    found: dict[str, torch.optim.Optimizer] = dict.fromkeys(master, adamw)
    if muon:
        taken = [master[name] for name in master if name in muon]
        found |= dict.fromkeys(muon, torch.optim.Muon(taken, adjust_lr_fn="match_rms_adamw", **how))
    return found


def _is_cut(p: Any) -> bool:
    """Whether the processes of a column have different parts of it."""
    mesh = p.device_mesh
    return "tensor" in mesh.mesh_dim_names and p.placements[mesh.mesh_dim_names.index("tensor")].is_shard()
