"""CogView: a GPT over text and image tokens whose every norm and sparse attention is a cogview_ops operator.

CogView paper (arXiv 2105.13290) section 2.3 and 2.4: Sandwich-LN, PB-relax, embedding-gradient shrink.
Parameters have the names and shapes of the published checkpoints. Shapes: B batch, S tokens, H heads,
D head size, L layers, P pivots, C hidden size.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.config import GPTConfig
from cogview.sequence import Vocabulary
from cogview_ops import (
    layer_norm,
    pb_relax_softmax,
    sample_pivots,
    sandwich_layer_norm,
    three_region_attention,
    three_region_attention_decode,
)

_PB_RELAX_ALPHA = 32.0


class KVCache:
    """Keys and values of every layer, [L, B, H, Smax, D], and how many tokens of each row are in (`seqlens`).

    Rows are contiguous from 0 and may differ in length. Prompts are fed padded to the longest; setting
    `seqlens` to their true lengths afterwards forgets the padding, which later tokens overwrite.
    """

    def __init__(self, config: GPTConfig, batch: int, *, device=None, dtype=torch.float32):
        c = config
        shape = (c.num_layers, batch, c.num_heads, c.max_positions, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.seqlens = torch.zeros(batch, device=device, dtype=torch.int32)
        self.image_shift = torch.full((batch,), -1, device=device)  # of fixed image positions; -1 before [BOI1]


class LayerCache(NamedTuple):
    """One layer's part of a KVCache and where its new tokens stand."""

    keys: Tensor  # [B, H, Smax, D]
    values: Tensor
    positions: Tensor  # int64 [B, Sq]

    def append(self, k: Tensor, v: Tensor) -> None:
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[rows, :, self.positions] = k.transpose(1, 2)
        self.values[rows, :, self.positions] = v.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, pivots: Tensor | None, cache: LayerCache | None, weights: list | None) -> Tensor:
        c, (B, S, C) = self.config, x.shape
        q, k, v = self.query_key_value(x).view(B, S, 3, c.num_heads, c.head_dim).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.append(k, v)
        if c.attention == "three_region":
            out = self._three_region(q, k, v, pivots, cache)
        elif c.attention == "dense_pb_relax":
            out = self._pb_relax(q, k, v, cache, weights)
        else:
            out = self._dense(q, k, v, cache)
        return self.dense(out.transpose(1, 2).reshape(B, S, C))

    def _three_region(self, q, k, v, pivots, cache):
        c = self.config
        pattern: dict[str, Any] = {
            "block_size": c.block_size,
            "window_blocks": c.window_blocks,
            "pivot_bias": c.pivot_bias,
        }
        if cache is None:
            return three_region_attention(q, k, v, pivots, **pattern)
        seqlens = (cache.positions[:, -1] + 1).int()
        return three_region_attention_decode(q, cache.keys, cache.values, pivots, seqlens, **pattern)

    def _dense(self, q, k, v, cache):
        if cache is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=_seen(cache))

    def _pb_relax(self, q, k, v, cache, weights):
        if cache is not None:
            k, v = cache.keys, cache.values
        # Divided by alpha before the product, so that it cannot overflow (paper, eq. 4).
        scores = (q / (_PB_RELAX_ALPHA * math.sqrt(self.config.head_dim))) @ k.transpose(-1, -2)
        if cache is None:
            p = pb_relax_softmax(scores, alpha=_PB_RELAX_ALPHA, causal=True)
        else:
            p = pb_relax_softmax(scores, alpha=_PB_RELAX_ALPHA, mask=_seen(cache))
        if weights is not None:
            weights.append(p)
        return p @ v


def _seen(cache: LayerCache) -> Tensor:
    """bool [B, 1, Sq, Smax]: cached tokens at or before each query."""
    keys = torch.arange(cache.keys.shape[2], device=cache.keys.device)
    return (keys <= cache.positions[..., None])[:, None]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    """h += LN3(Attention(LN1 h)); h += LN4(MLP(LN2 h)). Takes and returns (h, x): x is h normalised for the
    next sub-layer, because each branch's post-norm is fused with the pre-norm that follows it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.relax, self.dropout = config.relax, config.dropout
        # nn.LayerNorm only holds weight and bias here: the operators apply them.
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.third_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.fourth_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, h, x, next_norm: nn.LayerNorm, pivots, cache, weights) -> tuple[Tensor, Tensor]:
        branch = self.attention(x, pivots, cache, weights)
        h, x = self._join(branch, h, self.third_layernorm, self.post_attention_layernorm)
        return self._join(self.mlp(x), h, self.fourth_layernorm, next_norm)

    def _join(self, branch: Tensor, h: Tensor, post: nn.LayerNorm, pre: nn.LayerNorm):
        branch = F.dropout(branch, self.dropout, self.training)
        return sandwich_layer_norm(
            branch, h, post.weight, post.bias, pre.weight, pre.bias, eps=pre.eps, relax=self.relax
        )


class Transformer(nn.Module):
    """The layers under the names of the published checkpoints; GPT runs them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size)


class GPT(nn.Module):
    """`GPT(config)(tokens) -> logits`. With three_region attention every call takes `pivots`, one draw per
    layer: see `draw_pivots`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.vocab = Vocabulary(config.image_vocab, config.text_vocab)
        self.word_embeddings = nn.Embedding(self.vocab.size, config.hidden_size)
        self.transformer = Transformer(config)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.num_layers))
            elif "embeddings" in name:
                nn.init.normal_(parameter, std=config.embedding_std)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)
            elif name.endswith(("third_layernorm.weight", "fourth_layernorm.weight")):
                nn.init.constant_(parameter, config.branch_gain)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def draw_pivots(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """int32 [L, B, P]: for every layer all text of tokens [B, S] and its own sample of image positions;
        None for dense attention."""
        c = self.config
        if c.attention != "three_region":
            return None
        text, image = self.vocab.is_text(tokens), self.vocab.is_image(tokens)
        repeated = sample_pivots(
            text.repeat(c.num_layers, 1), image.repeat(c.num_layers, 1), c.num_pivots, generator=generator
        )
        return repeated.view(c.num_layers, len(tokens), c.num_pivots)

    def hidden(
        self,
        tokens: Tensor,
        *,
        pivots: Tensor | None = None,
        cache: KVCache | None = None,
        weights: list[Tensor] | None = None,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Final hidden states [B, S, C] of int64 tokens [B, S].

        With a cache the tokens continue its rows, which grow by S. `weights`, a list, receives each
        layer's attention weights [B, H, S, keys] (dense_pb_relax only).
        """
        c, S = self.config, tokens.shape[1]
        self._check(tokens, pivots, cache, weights)
        if cache is None:
            positions = torch.arange(S, device=tokens.device)
        else:
            positions = cache.seqlens[:, None] + torch.arange(S, device=tokens.device)
        rows = self._position_rows(tokens, positions, cache) if c.image_positions == "fixed" else positions
        h = self.word_embeddings(tokens) + self.transformer.position_embeddings(rows)
        h = torch.lerp(h.detach(), h, c.embedding_grad_scale)  # value h, gradient times the scale
        h = F.dropout(h, c.dropout, self.training)

        layers = cast("list[Layer]", list(self.transformer.layers))
        norms = [layer.input_layernorm for layer in layers] + [self.transformer.final_layernorm]
        x = layer_norm(h, norms[0].weight, norms[0].bias, eps=norms[0].eps, relax=c.relax)
        for i, layer in enumerate(layers):
            layer_pivots = None if pivots is None else pivots[i]
            layer_cache = None if cache is None else LayerCache(cache.keys[i], cache.values[i], positions)
            args = (h, x, norms[i + 1], layer_pivots, layer_cache, weights)
            h, x = checkpoint(layer, *args, use_reentrant=False) if checkpoint_activations else layer(*args)
        if cache is not None:
            cache.seqlens = cache.seqlens + S
        return x

    def _position_rows(self, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        """Rows of the position table, [B, S]: from [BOI1] on those behind the longest possible text."""
        c = self.config
        positions = positions.expand(tokens.shape)
        begins = (tokens == self.vocab["BOI1"]) & (positions >= 2)  # where the image comes first it stays there
        shift = torch.where(begins, c.max_text + 2 - positions, 0).sum(dim=1)
        begun = begins.cumsum(dim=1) > 0
        if cache is not None:
            begun |= (cache.image_shift >= 0)[:, None]
            shift = torch.where(begins.any(dim=1), shift, cache.image_shift)
            cache.image_shift = shift.where(begun[:, -1], -1)
        return (positions + shift[:, None] * begun).clamp_max(c.max_positions - 1)

    def forward(self, tokens: Tensor, **how) -> Tensor:
        """float32 logits [B, S, vocab.size] of tokens [B, S]; keywords as `hidden`."""
        return F.linear(self.hidden(tokens, **how), self.word_embeddings.weight).float()

    def _check(self, tokens, pivots, cache, weights) -> None:
        c = self.config
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, S], got {list(tokens.shape)}")
        if tokens.shape[1] > c.max_positions:
            raise ValueError(f"tokens must be at most {c.max_positions} long, got {tokens.shape[1]}")
        if (c.attention == "three_region") != (pivots is not None):
            wanted = "needs pivots, see draw_pivots" if pivots is None else "takes no pivots"
            raise ValueError(f"attention {c.attention} {wanted}")
        if pivots is not None and pivots.shape[:2] != (c.num_layers, len(tokens)):
            raise ValueError(f"pivots must be [{c.num_layers}, {len(tokens)}, P], got {list(pivots.shape)}")
        if weights is not None and c.attention != "dense_pb_relax":
            raise ValueError(f"weights need attention dense_pb_relax, got {c.attention}")
        if cache is not None and cache.keys.shape[1] != len(tokens):
            raise ValueError(f"cache must hold {len(tokens)} rows, got {cache.keys.shape[1]}")
