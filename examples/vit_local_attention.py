"""A vision transformer whose patches see the patches around them, at 14 x 14 to 56 x 56 tokens.

    python examples/vit_local_attention.py --sizes 14 28 56

Needs transformers. One line, `use_local_attention(model, 7)`, replaces the attention of a ViT; printed is the time of a
step, forward and backward, before and after: of the operators alone, SDPA of all keys and `local_attention_2d` of the
patches; of an attention layer, which has its projections and the class token too; and of the whole model.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTModel

from cogview_ops import local_attention_2d
from cogview_ops.integrations.vision import use_local_attention


def seconds(steps: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Medians of steps that take turns, so that a busy moment of the machine hits all."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for taken, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]  # the first warms up


def step(model: Any, *inputs: torch.Tensor, **options: Any) -> Callable[[], None]:
    """Forward and backward, nothing else: no loss, no sums into .grad."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    wanted = [x for x in (*inputs, *parameters) if x.requires_grad]

    def run() -> None:
        out = model(*inputs, **options)
        out = out if isinstance(out, torch.Tensor) else out[0]
        torch.autograd.grad(out, wanted, out.detach(), allow_unused=True)  # the pooler is not used

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[14, 28], help="tokens of a side")
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    print(f"DeiT-tiny's layers, {options.layers} of them, {torch.get_num_threads()} threads; ms: all keys, window")
    print(f"{'tokens':<10}{'operator':<28}{'attention layer':<28}model")
    for side in options.sizes:
        torch.manual_seed(0)
        size = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        config = ViTConfig(**size, num_hidden_layers=options.layers, image_size=16 * side)
        whole, window = ViTModel(config), ViTModel(config)
        window.load_state_dict(whole.state_dict())
        replaced = use_local_attention(window, options.kernel_size)
        pictures = torch.randn(options.batch, 3, 16 * side, 16 * side)
        tokens = torch.randn(options.batch, side * side + 1, 192, requires_grad=True)
        all_of_it = [torch.randn(options.batch, 3, side * side + 1, 64, requires_grad=True) for _ in range(3)]
        patches = [torch.randn(options.batch, 3, side * side, 64, requires_grad=True) for _ in range(3)]
        kernel_size = (min(options.kernel_size, 2 * side - 1),) * 2
        steps = [
            step(F.scaled_dot_product_attention, *all_of_it),
            step(local_attention_2d, *patches, grid=(side, side), kernel_size=kernel_size),
            step(whole.layers[0].attention, tokens),
            step(window.layers[0].attention, tokens, patch_grid=(side, side)),
            step(whole, pictures),
            step(window, pictures),
        ]
        times = [1e3 * x for x in seconds(steps, options.repeats)]
        pairs = [f"{a:.1f}, {b:.1f}: {a / b:.1f} x" for a, b in zip(times[::2], times[1::2], strict=True)]
        print(f"{f'{side} x {side}':<10}{pairs[0]:<28}{pairs[1]:<28}{pairs[2]}")

    replaced.remove()
    use_local_attention(window, 2 * max(options.sizes))  # a window of everything: the model as it was
    with torch.no_grad():
        difference = (window(pictures).last_hidden_state - whole(pictures).last_hidden_state).abs().max()
    print(f"with a window of the whole picture the outputs differ by {difference:.0e}")


if __name__ == "__main__":
    main()
