"""A vision transformer whose patches see the patches around them, at 14 x 14 to 56 x 56 tokens.

    python examples/vit_local_attention.py --sizes 14 28 56

Needs transformers. One line, `use_local_attention(model, 7)`, replaces the attention of a ViT; printed is the time of a
step, forward and backward, of its attention layers alone and of the whole model, before and after.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

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
    def run() -> None:
        out = model(*inputs, **options)
        out = out[0] if isinstance(out, tuple) else out.last_hidden_state
        out.square().mean().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[14, 28], help="tokens of a side")
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    print(f"DeiT-tiny's layers, {options.layers} of them, {torch.get_num_threads()} threads; ms of a step")
    print("tokens    all keys: attention, model    window: attention, model    ratio: attention, model")
    for side in options.sizes:
        torch.manual_seed(0)
        size = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        config = ViTConfig(**size, num_hidden_layers=options.layers, image_size=16 * side)
        whole, window = ViTModel(config), ViTModel(config)
        window.load_state_dict(whole.state_dict())
        replaced = use_local_attention(window, options.kernel_size)
        pictures = torch.randn(options.batch, 3, 16 * side, 16 * side)
        tokens = torch.randn(options.batch, side * side + 1, 192, requires_grad=True)
        steps = [
            step(whole.layers[0].attention, tokens),
            step(window.layers[0].attention, tokens, patch_grid=(side, side)),
            step(whole, pictures),
            step(window, pictures),
        ]
        all_keys, some_keys, model_before, model_after = seconds(steps, options.repeats)
        before, after = (
            f"{all_keys * 1e3:.1f}, {model_before * 1e3:.1f}",
            f"{some_keys * 1e3:.1f}, {model_after * 1e3:.1f}",
        )
        ratios = f"{all_keys / some_keys:.1f}, {model_before / model_after:.1f}"
        print(f"{f'{side} x {side}':<10}{before:<30}{after:<28}{ratios}")

    replaced.remove()
    use_local_attention(window, 2 * max(options.sizes))  # a window of everything: the model as it was
    with torch.no_grad():
        difference = (window(pictures).last_hidden_state - whole(pictures).last_hidden_state).abs().max()
    print(f"with a window of the whole picture the outputs differ by {difference:.0e}")


if __name__ == "__main__":
    main()
