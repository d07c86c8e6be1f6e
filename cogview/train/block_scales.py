"""Scales of float16 gradients, one for each attention and each MLP, "per-resblock gradient scaling" (DALL-E, arXiv
2102.12092, section 2.4 and figure 4).

Gradients fall from block to block of a deep model, so that no scale of the loss suits all: of late blocks they
overflow, of early ones they vanish. Here what runs along the main branch, forward and backward, is float32, as are
norms, biases, embeddings and head with their gradients (of several processes biases in a block are float16, as FSDP
casts whole units); a block's matrices and all that it computes are float16. The gradient that enters a block is
multiplied by its scale, the one that leaves it is divided by it, and what is not finite in that is 0, so that an
overflow in a block is none of the blocks before it. A block whose own gradients are not finite is left out of the step,
and its scale alone falls.

The rule for the scales is that of the paper's appendix, for one replica: they begin at 2^13 and stay within 2^7 and
2^24; after a good step a scale grows by 2^(1 / 1000), otherwise it falls by the root of 2, but not twice within 125
steps (an eighth of the steps in which one doubles). What is ours: attention and MLP are a block each, behind its norm,
which is computed with the main branch; of a step that "is skipped" the other blocks take part, since of 128 that try
larger scales one overflows every few steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIRST, LEAST, MOST = 2.0**13, 2.0**7, 2.0**24
WINDOWS = 8  # between two doublings, in each of which a scale falls once at most


class _Enter(torch.autograd.Function):
    """Into float16; the gradient out of it is divided by the scale, and 0 where it is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.half()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return torch.nan_to_num(grad.float() / scale, 0.0, 0.0, 0.0), None


class _Leave(torch.autograd.Function):
    """Out of float16; the gradient into it is multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return (grad * scale).half(), None


def scaled(block: nn.Module, scale: Tensor) -> None:
    """Has a module, whose first input and output are float32 [...], compute in float16 with gradients times a scale,
    float32 []. Its matrices are to be float16, its other parameters float32."""
    # both ahead of what FSDP does, which wants no views
    block.register_forward_pre_hook(lambda _, inputs: (_Enter.apply(inputs[0], scale), *inputs[1:]), prepend=True)
    block.register_forward_hook(lambda _, inputs, output: _Leave.apply(output, scale), prepend=True)


class BlockScales:
    """Those of a Transformer's blocks, in the order of the forward: `values`, float32 [2 L], and the same in `numbers`,
    which no device has to be waited for."""

    name, of_loss = "block_scales", 1.0

    def __init__(self, model: nn.Module, patience: int):
        """patience: good steps after which a scale has doubled; the paper's is 1,000."""
        layers: Any = model.get_submodule("stack.layers")
        self.names = [f"stack.layers.{n}.{part}" for n in range(len(layers)) for part in ("attention", "mlp")]
        device = next(model.parameters()).device
        self.numbers = [FIRST] * len(self.names)
        self.values = torch.full((len(self.names),), FIRST, device=device)
        self._growth, self._places = 2 ** (1 / patience), {name: n for n, name in enumerate(self.names)}
        self._window = max(1, patience // WINDOWS)
        self._since = [self._window] * len(self.names)  # steps since the last fall
        self.skipped, self._row = [0] * len(self.names), [0] * len(self.names)
        """Steps that each block was left out of, all and the last ones in a row."""
        for n, name in enumerate(self.names):
            scaled(model.get_submodule(name), self.values[n])

    def block(self, parameter: str) -> int | None:
        """The number of the one that a parameter is of; None: of none."""
        return self._places.get(".".join(parameter.split(".")[:4]))

    def beside(self, bad: Sequence[str], names: Sequence[str]) -> list[str]:
        """Of some parameters those of the blocks that the bad ones are of."""
        blocks = {self.block(name) for name in bad} - {None}
        return [name for name in names if self.block(name) in blocks]

    def is_low(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is float16."""
        return p.ndim >= 2 and self.block(name) is not None

    def factors(self, names: Sequence[str]) -> list[float]:
        """What gradients of some parameters have been multiplied by."""
        values = [*self.numbers, 1.0]
        blocks = [self.block(name) for name in names]
        return [values[-1 if block is None else block] for block in blocks]

    def update(self, finite: bool, bad: Sequence[str]) -> None:
        """After a step that was taken, but for the blocks of the parameters whose gradients were not finite, or that
        was not, for which blocks are not to blame."""
        if not finite:
            return
        fell = {self.block(name) for name in bad}
        values = self.numbers
        for n, value in enumerate(values):
            self._since[n] += 1
            self.skipped[n] += n in fell
            self._row[n] = self._row[n] + 1 if n in fell else 0
            if n not in fell:
                values[n] = value * self._growth
            elif self._since[n] >= self._window:
                values[n], self._since[n] = value / math.sqrt(2), 0
            values[n] = min(max(values[n], LEAST), MOST)
        self._set(torch.tensor(values))

    def stuck(self, steps: int) -> str:
        """In a sentence, which blocks were now left out so many times in a row; "" if none."""
        found = [name.split(".")[2:] for name, row in zip(self.names, self._row, strict=True) if row == steps]
        places = [f"{part} of layer {int(number) + 1}" for number, part in found]
        return f"the gradients of {', '.join(places)} were not finite for {steps} steps" if places else ""

    def _set(self, values: Tensor) -> None:
        """values: float32 [2 L], of the CPU."""
        self.numbers = values.tolist()
        self.values.copy_(values)

    def said(self, name: str) -> str:
        """Of the scale of a parameter's block, behind a step in which its gradient was not finite."""
        block = self.block(name)
        return "" if block is None else f"; its block's scale is {self.numbers[block]:g} from now on"

    def logged(self) -> dict[str, float]:
        scales = {"least": min(self.numbers), "largest": max(self.numbers), "skipped": sum(self.skipped)}
        return {f"gradient_scale/{name}": value for name, value in scales.items()}

    def tensor(self) -> Tensor:
        """float32 [3, 2 L], for a checkpoint."""
        return torch.tensor([self.numbers, self._since, self.skipped])

    def load(self, saved: Tensor) -> None:
        self._set(saved[0])
        self._since, self.skipped = ([int(n) for n in row] for row in saved[1:])
