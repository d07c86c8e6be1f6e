"""AdamW on float32 master weights of a model that may itself be bfloat16 or float16."""

import math

import torch
from torch import Tensor, nn

from cogview.config import TrainConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")
_FIRST_SCALE = 2.0**16
_PATIENCE = 1000  # good steps after which the loss scale doubles


class Optimizer:
    """Takes over a model's parameters: casts them to config.dtype and keeps float32 masters by name.

    Weight decay falls on matrices and embeddings, not on biases and norms. In float16 the loss is scaled, so that small
    gradients do not vanish: by half as much after a step whose gradients are not finite, twice as much after 1000 good
    ones (the paper's training, "O2" of NVIDIA's apex).
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.low_precision, self.clip = config.dtype != "float32", config.clip
        self.scaled = config.dtype == "float16"
        self.loss_scale = _FIRST_SCALE if self.scaled else 1.0
        self._good_steps = 0  # since the loss scale changed
        model.float()
        self.master: dict[str, Tensor] = dict(model.named_parameters())
        if self.low_precision:
            self.master = {name: p.detach().clone() for name, p in self.master.items()}
            model.to(getattr(torch, config.dtype))
        self._params = dict(model.named_parameters())
        decayed = [p for p in self.master.values() if p.ndim >= 2]
        others = [p for p in self.master.values() if p.ndim < 2]
        groups: list[dict] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the scaled loss to the masters', in float32."""
        (loss * self.loss_scale).backward()
        if not self.low_precision:
            return
        for name, p in self._params.items():
            if p.grad is not None:
                grad, master = p.grad.float(), self.master[name]
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """One clipped step. Returns whether it was taken, and the gradient norm: no step when not finite."""
        if self.scaled:
            torch._foreach_div_([p.grad for p in self.master.values() if p.grad is not None], self.loss_scale)
        norm = float(nn.utils.clip_grad_norm_(self.master.values(), self.clip))
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
            self._publish()
        self._adamw.zero_grad()
        if self.scaled:
            self._adapt_scale(math.isfinite(norm))
        return math.isfinite(norm), norm

    def _adapt_scale(self, taken: bool) -> None:
        self._good_steps = self._good_steps + 1 if taken else 0
        if not taken:
            self.loss_scale /= 2
        elif self._good_steps == _PATIENCE:
            self.loss_scale, self._good_steps = 2 * self.loss_scale, 0

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the masters into the model."""
        if self.low_precision:
            for name, p in self._params.items():
                p.copy_(self.master[name])

    def tensors(self) -> dict[str, Tensor]:
        """Masters as `model.<name>`, AdamW's state as `optimizer.<key>.<name>`: what a checkpoint holds."""
        found = {f"model.{name}": p.detach() for name, p in self.master.items()}
        for name, p in self.master.items():
            found |= {f"optimizer.{key}.{name}": value for key, value in self._adamw.state[p].items()}
        if self.scaled:
            found["optimizer.loss_scale"] = torch.tensor([self.loss_scale, self._good_steps])
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of `tensors()`, whose model part fits; ValueError when the rest does not."""
        for name, p in self.master.items():
            p.copy_(tensors[f"model.{name}"])
            keys = {key: f"optimizer.{key}.{name}" for key in _STATE}
            found = {key: tensors[k] for key, k in keys.items() if k in tensors}
            for key, value in found.items():
                wanted = [] if key == "step" else list(p.shape)
                if list(value.shape) != wanted:
                    raise ValueError(f"{keys[key]}: expected {wanted}, got {list(value.shape)}")
                # in the parameter's strides, which fused AdamW takes for granted
                like = value if key == "step" else p
                found[key] = torch.empty_like(like, device=p.device).copy_(value)
            if len(found) not in (0, len(_STATE)):  # none: saved before the first step
                raise ValueError(f"{name} has only {sorted(found)} of the optimizer's state")
            self._adamw.state[p] = found
        if self.scaled and "optimizer.loss_scale" in tensors:  # a run may go on in another dtype
            self.loss_scale, self._good_steps = tensors["optimizer.loss_scale"].tolist()
        self._publish()
