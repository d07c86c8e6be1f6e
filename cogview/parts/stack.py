"""The layers of a transformer, with Sandwich-LN (CogView paper, arXiv 2105.13290, section 2.4) or pre-LN. They know no
tokens.

A stack carries (h, x): h the main branch, x what the next sub-layer reads, h normalised. Each branch's post-norm is
fused with the pre-norm that follows it, so a layer owns its two post-norms and the pre-norm behind each: that of its
MLP and that of the next layer, or of the head. The first pre-norm is the stack's.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.config import ModelConfig, Recompute
from cogview.parts.attend import Attention, chosen
from cogview.parts.linear import Linear
from cogview.sequence import Context
from cogview_ops import layer_norm, sandwich_layer_norm
from cogview_ops.checkpointing import selective_contexts
from cogview_ops.modules import KVCache

States = tuple[Tensor, Tensor]
Seeds = Sequence[Tensor | None]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    """h += post_norm(attention(x)); x = mlp_norm(h); h += mlp_post_norm(mlp(x)); x = next_norm(h). With norms "pre"
    there are no post_norm and mlp_post_norm.

    Either branch is a module and called as one: hooks on `attention` and `mlp`, set before they are compiled, stand
    around it in forward and backward, also where it is computed again. So a branch's gradients can have a scale of
    their own.
    """

    def __init__(self, config: ModelConfig, attention: Attention):
        super().__init__()
        self.relax, self.dropout = config.relax, config.dropout
        self.norms: Literal["both", "pre"] = "both" if config.norms == "sandwich" else "pre"
        self.attention = attention

        # nn.LayerNorm only holds weight and bias here: the operators apply them.
        def post_norm() -> nn.LayerNorm | None:
            return nn.LayerNorm(config.hidden_size) if config.norms == "sandwich" else None

        self.post_norm = post_norm()
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.mlp_post_norm = post_norm()
        self.next_norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        context: Context,
        seeds: Seeds,
        cache: KVCache | None = None,
        recompute: Recompute = "none",
    ) -> States:
        """context: this layer's own. seeds: int64 [B] for either branch, of what dropout drops; None: nothing.
        recompute: what the backward computes again. It is inside the layer, where FSDP has gathered its parameters."""
        if recompute == "none":
            return self.compute(h, x, context, seeds, cache)
        some: dict[str, Any] = {"context_fn": selective_contexts} if recompute == "selective" else {}
        return checkpoint(self.compute, h, x, context, seeds, use_reentrant=False, **some)

    def compute(self, h: Tensor, x: Tensor, context: Context, seeds: Seeds, cache: KVCache | None = None) -> States:
        branch = self.attention(x, context, cache)
        h, x = self.join(branch, chosen(h, context.only), self.post_norm, self.mlp_norm, seeds[0])
        return self.join(self.mlp(x), h, self.mlp_post_norm, self.next_norm, seeds[1])

    def join(
        self, branch: Tensor, h: Tensor, post: nn.LayerNorm | None, pre: nn.LayerNorm, seed: Tensor | None
    ) -> States:
        return sandwich_layer_norm(
            branch,
            h,
            None if post is None else post.weight,
            None if post is None else post.bias,
            pre.weight,
            pre.bias,
            norms=self.norms,
            eps=pre.eps,
            relax=self.relax,
            dropout_p=0.0 if seed is None else self.dropout,
            seed=seed,
        )


class Stack(nn.Module):
    """One layer for each attention."""

    def __init__(self, config: ModelConfig, attentions: Iterable[Attention]):
        super().__init__()
        self.relax, self.dropout = config.relax, config.dropout
        self.first_norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, attention) for attention in attentions)

    def forward(
        self,
        h: Tensor,
        context: Context,
        cache: Sequence[KVCache] | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """x [B, S, C] behind the last layer, normalised, of embeddings h [B, S, C]; of the context's `only` places, at
        which alone the last layer computes queries and what follows."""
        seeds = self._seeds(len(h), context)
        h, x = self._begin(h, seeds[0])
        layer: Any
        for i, layer in enumerate(self.layers):
            own = layer.attention.own(context)
            if context.only is not None and i + 1 < len(self.layers):
                own = dataclasses.replace(own, only=None)
            h, x = layer(h, x, own, seeds[2 * i + 1 : 2 * i + 3], None if cache is None else cache[i], recompute)
        return x

    def _begin(self, h: Tensor, seed: Tensor | None) -> States:
        """The embeddings with dropout, and normalised."""
        norm = self.first_norm
        if seed is None:
            return h, layer_norm(h, norm.weight, norm.bias, eps=norm.eps, relax=self.relax)
        nothing = h.new_zeros(h.shape[-1]).expand(h.shape)
        weights = None, None, norm.weight, norm.bias
        how: Any = {"eps": norm.eps, "relax": self.relax, "dropout_p": self.dropout, "seed": seed}
        return sandwich_layer_norm(h, nothing, *weights, norms="pre", **how)

    def _seeds(self, rows: int, context: Context) -> Seeds:
        """The context's, or drawn on its device; None outside training."""
        count = seeds_a_row(len(self.layers))
        if not self.training or self.dropout == 0:
            return [None] * count
        seeds = context.seeds
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (rows, count), device=context.positions.device)
        return seeds.t().contiguous().unbind()


def seeds_a_row(layers: int) -> int:
    """Numbers that dropout takes: of the embeddings, and of both branches of each layer."""
    return 2 * layers + 1
