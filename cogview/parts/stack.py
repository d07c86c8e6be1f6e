"""The layers of a transformer with Sandwich-LN (CogView paper, arXiv 2105.13290, section 2.4). They know no tokens.

A stack carries (h, x): h the main branch, x what the next sub-layer reads, h normalised. Each branch's post-norm is
fused with the pre-norm that follows it, so a layer owns its two post-norms and the pre-norm behind each: that of its
MLP and that of the next layer, or of the head. The first pre-norm is the stack's.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.config import ModelConfig
from cogview.parts.attend import Attention
from cogview.parts.linear import Linear
from cogview.sequence import Context
from cogview_ops import layer_norm, sandwich_layer_norm
from cogview_ops.modules import KVCache


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    """h += post_norm(attention(x)); x = mlp_norm(h); h += mlp_post_norm(mlp(x)); x = next_norm(h)."""

    def __init__(self, config: ModelConfig, attention: Attention):
        super().__init__()
        self.relax, self.dropout = config.relax, config.dropout
        self.attention = attention
        # nn.LayerNorm only holds weight and bias here: the operators apply them.
        self.post_norm = nn.LayerNorm(config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.mlp_post_norm = nn.LayerNorm(config.hidden_size)
        self.next_norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, h: Tensor, x: Tensor, context: Context, seeds: Sequence[int | None], cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """`seeds` say what dropout drops of either branch; None: nothing."""
        h, x = self.join(self.attention(x, context, cache), h, self.post_norm, self.mlp_norm, seeds[0])
        return self.join(self.mlp(x), h, self.mlp_post_norm, self.next_norm, seeds[1])

    def join(self, branch: Tensor, h: Tensor, post: nn.LayerNorm, pre: nn.LayerNorm, seed: int | None):
        return sandwich_layer_norm(
            branch,
            h,
            post.weight,
            post.bias,
            pre.weight,
            pre.bias,
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
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """x [B, S, C] behind the last layer, normalised, of states h [B, S, C]."""
        seeds = context.seeds if self.training and context.seeds is not None else self.draw_seeds()
        norm = self.first_norm
        x = layer_norm(h, norm.weight, norm.bias, eps=norm.eps, relax=self.relax)
        for i, layer in enumerate(self.layers):
            args = (h, x, context, seeds[i], None if cache is None else cache[i])
            h, x = checkpoint(layer, *args, use_reentrant=False) if checkpoint_activations else layer(*args)
        return x

    def draw_seeds(self) -> list[list[int | None]]:
        """What dropout of both branches of every layer takes; None outside training. Drawn before the layers run, so
        that recomputed activations drop the same, and from torch's CPU generator, for which no device has to wait; a
        compiled graph is interrupted for it, unless its context brings them."""
        if not self.training or self.dropout == 0:
            return [[None, None]] * len(self.layers)
        return torch.randint(2**63 - 1, (len(self.layers), 2), device="cpu").tolist()
