"""A Llama with three-region attention on long packed text: training, and a step's time and memory beside SDPA's.

    python examples/llama_three_region.py --length 16384 --steps 50

Needs transformers. After `register()` the attention is one of those that a model can be set to: each token sees the 6
blocks of 128 up to its own, the first block, and a 16th of what lies between, instead of everything before it. Texts
are packed into one row, told apart by positions that begin anew: the articles of Python's reference, byte by byte.
"""

import argparse
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cogview_ops.integrations.transformers import register

NAMES = {"sdpa": "SDPA", "cogview_three_region": "three-region attention"}


def packed(length: int) -> Iterator[dict[str, Any]]:
    """Rows of that many bytes: texts one after the other, the last one cut off."""
    texts = [torch.tensor(list(text.encode())) for _, text in sorted(topics.items()) if len(text) > 1000]
    while True:
        row: list[torch.Tensor] = []
        while sum(map(len, row)) < length:
            row.append(texts[int(torch.randint(len(texts), ()))])
        ids = torch.cat(row)[:length]
        positions = torch.cat([torch.arange(len(text)) for text in row])[:length]
        labels = torch.where(positions > 0, ids, -100)  # no text says how the next one begins
        yield {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


def peak(step: Callable[[], Any]) -> float:
    """MB that a call takes at its peak, beyond what was there before it (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have left
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 2**10


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="bytes of a row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2, help="of 64 dimensions each, two on one key head")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each attention that are timed")
    options = parser.parse_args()

    torch.manual_seed(0)
    register()
    width = 64 * options.heads
    sizes = {"vocab_size": 256, "hidden_size": width, "intermediate_size": 3 * width, "use_cache": False}
    heads = {"num_attention_heads": options.heads, "num_key_value_heads": max(options.heads // 2, 1)}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=options.layers, max_position_embeddings=options.length)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("cogview_three_region")
    optimizer, batches = torch.optim.AdamW(model.parameters(), 3e-3), packed(options.length)

    def step(batch: dict[str, Any]) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() / math.log(2)

    for number in range(options.steps):
        print(f"step {number:4d}  {step(next(batches)):.2f} bits a byte")

    batch = next(batches)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    memory: dict[str, float] = {}
    for _ in range(options.repeats + 1):
        for name in NAMES:  # they take turns, so that a busy moment of the machine hits both
            model.set_attn_implementation(name)
            start = time.perf_counter()
            memory[name] = peak(lambda: step(batch))
            times[name].append(time.perf_counter() - start)
    print(f"a row of {options.length} bytes, {int((batch['position_ids'] == 0).sum())} texts")
    for name, called in NAMES.items():  # the first step of each warms up
        print(f"{called}: {statistics.median(times[name][1:]):.2f} s a step, {memory[name]:.0f} MB")


if __name__ == "__main__":
    main()
