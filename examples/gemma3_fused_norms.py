"""Gemma 3 with fused norms: a training step before and after, on this machine.

    python examples/gemma3_fused_norms.py --hidden 1152 --layers 4 --tokens 512 --dtype bfloat16

Needs transformers. One call replaces the norm steps of any model of its families (Gemma 2 to 4, GLM-4, GLM-Image,
OLMo, Llama, Qwen, GPT-2, ViT, Swin v2, ...): parameters, checkpoints and names stay what they are, and `undo()` gives
the model back. Weights are random here, so that nothing is downloaded; a pretrained model takes the same call.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from cogview_ops.integrations.transformers.norms import fuse_norms


def small_gemma3(hidden: int, layers: int) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 6 * hidden, "num_hidden_layers": layers, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": min(hidden // 4, 256)}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, sliding_window=512))


def step(model: Gemma3ForCausalLM, tokens: Tensor) -> Tensor:
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


@torch.no_grad()
def forward(model: Gemma3ForCausalLM, tokens: Tensor) -> None:
    model(input_ids=tokens, use_cache=False)


def kept_for_backward(model: Gemma3ForCausalLM, tokens: Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(input_ids=tokens, labels=tokens, use_cache=False)
    return sum(kept.values())


def interleaved(run: Callable[..., Any], models: dict[str, Any], tokens: Tensor, times: int) -> dict[str, float]:
    """Median seconds of `run` of each, in turns: what else the machine does is shared by both."""
    took: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(times + 1):
        for name, model in models.items():
            start = time.perf_counter()
            run(model, tokens)
            if turn:  # the first warms up
                took[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()

    dtype = getattr(torch, given.dtype)
    models = {name: small_gemma3(given.hidden, given.layers).to(dtype) for name in ("before", "after")}
    tokens = torch.randint(4096, (given.batch, given.tokens))
    report = fuse_norms(models["after"])
    print(report)

    losses = {name: float(step(model, tokens)) for name, model in models.items()}
    kept = {name: kept_for_backward(model, tokens) / 1e6 for name, model in models.items()}
    forwards, steps = (interleaved(run, models, tokens, given.times) for run in (forward, step))
    for name in models:
        times = f"{1e3 * forwards[name]:.1f} ms a forward, {1e3 * steps[name]:.1f} ms a step"
        print(f"{name}: loss {losses[name]:.4f}, {times}, {kept[name]:.1f} MB kept for backward")
    faster = [f"{seconds['before'] / seconds['after']:.2f}" for seconds in (forwards, steps)]
    less = 1 - kept["after"] / kept["before"]
    print(f"{faster[0]} times as fast forward, {faster[1]} times as fast a step, {less:.0%} less kept")


if __name__ == "__main__":
    main()
