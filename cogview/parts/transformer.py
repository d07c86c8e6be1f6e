"""The transformer: tokens and their context to logits or losses. What its attention sees is the recipe's."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogview.config import ModelConfig, Recompute, require
from cogview.parts.attend import Attention
from cogview.parts.embed import Embedding
from cogview.parts.stack import Stack, seeds_a_row
from cogview.sequence import Context
from cogview_ops.modules import KVCache


class Transformer(nn.Module):
    """`model(inputs, context)` are logits, `model(inputs, context, targets=targets)` losses; a recipe's batch has all
    three. Every parameter is read inside this one forward, the layers' own inside theirs: each can be sharded."""

    records_steps = False
    """Whether steps are recorded as CUDA graphs, see `compile_step`."""

    def __init__(self, config: ModelConfig, vocab_size: int, attentions: Iterable[Attention], longest: int):
        """longest: tokens of a sequence, more than there are positions where these begin anew."""
        super().__init__()
        self.config, self.longest = config, longest
        self.embedding = Embedding(config, vocab_size)
        self.stack = Stack(config, attentions)
        attends = [module for module in self.modules() if isinstance(module, Attention)]
        self.takes = frozenset(name for module in attends for name in module.takes)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.dense.weight", "fine_dense.weight", "dense_4h_to_h.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.num_layers))
            elif name.startswith("embedding."):
                nn.init.normal_(parameter, std=config.embedding_std)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)
            elif name.endswith("post_norm.weight"):
                nn.init.constant_(parameter, config.branch_gain)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        inputs: Tensor,
        context: Context,
        *,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        at: Tensor | None = None,
        among: slice = slice(None),
        cache: Sequence[KVCache] | None = None,
        recompute: Recompute = "none",
    ) -> Any:
        """Of inputs int64 [B, S]: float32 logits [B, S, V]; with targets int64 [B, S] their negative log-likelihoods
        [B, S]; with weights [B, S] as well the pair of their weighted sum, which alone has gradients, and these; with
        `at` int64 [B] the logits [B, V] of one place of each row alone; of the ids `among` alone. With a cache, see
        `make_cache`, the tokens continue its rows. recompute: what a backward computes again."""
        x = self.states(inputs, context, cache, recompute)
        if targets is not None:
            return (
                self.embedding.nll(x, targets) if weights is None else self.embedding.weighted_nll(x, targets, weights)
            )
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at]
        return self.embedding.logits(x, among)

    def states(
        self,
        inputs: Tensor,
        context: Context,
        cache: Sequence[KVCache] | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """What the head reads, [B, S, C], or of the context's `only` places, [B, n, C]."""
        self._check(inputs, context, cache)
        return self.stack(self.embedding(inputs, context.positions), context, cache, recompute)

    def step(self, inputs: Tensor, context: Context, *, cache: Sequence[KVCache], among: slice = slice(None)) -> Tensor:
        """float32 logits [B, V] behind one more token of every row, inputs int64 [B, 1]."""
        return self(inputs, context, cache=cache, among=among)[:, 0]

    def compile_step(self) -> None:
        """Compiles `step`, anew for every size of batch and cache, half a minute each; on CUDA it is also recorded."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        cpu = self.device.type == "cpu"
        # less Python, whose code is not in the processor's caches any more once weights have gone through them
        how: dict[str, Any] = {"options": {"cpp_wrapper": True}} if cpu else {}
        compiled = torch.compile(self.step, fullgraph=True, dynamic=False, **how)
        # in other modes each of our operators calls Python, to see whether it is to be differentiated
        self.step = torch.inference_mode()(compiled)  # type: ignore[method-assign]
        self.records_steps = not cpu

    def make_cache(self, batch_size: int, tokens: int) -> list[KVCache]:
        """An empty cache for each layer, with room for `tokens` of every row."""
        c, like = self.config, self.embedding.words.weight
        sizes = (batch_size, c.num_heads, tokens, c.head_dim)
        return [KVCache(*sizes, device=like.device, dtype=like.dtype) for _ in self.stack.layers]

    @property
    def device(self) -> torch.device:
        return self.embedding.words.weight.device

    def _check(self, inputs: Tensor, context: Context, cache: Sequence[KVCache] | None) -> None:
        c = self.config
        if inputs.ndim != 2:
            raise ValueError(f"inputs: expected [B, S], got {list(inputs.shape)}")
        if inputs.shape[1] > self.longest:
            raise ValueError(f"inputs: expected at most {self.longest} tokens, got {inputs.shape[1]}")
        if context.positions.shape[-1] != inputs.shape[1]:
            raise ValueError(f"positions: expected {inputs.shape[1]}, got {list(context.positions.shape)}")
        if context.attention.keys() != self.takes:
            wanted, got = (", ".join(sorted(names)) or "nothing" for names in (self.takes, context.attention))
            raise ValueError(f"context: expected {wanted} for this attention, got {got}")
        for name, values in context.attention.items():
            if len(values) != len(inputs):
                raise ValueError(f"{name}: expected {len(inputs)} rows, got {list(values.shape)}")
        if context.seeds is not None:
            shape = [len(inputs), seeds_a_row(c.num_layers)]
            fits = list(context.seeds.shape) == shape and context.seeds.dtype == torch.int64
            require(fits, "seeds", f"int64 {shape}", context.seeds)
        if cache is not None and len(cache[0].keys) != len(inputs):
            raise ValueError(f"cache: expected {len(inputs)} rows, got {len(cache[0].keys)}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
