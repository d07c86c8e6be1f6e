"""CogView: a GPT over text and image tokens whose every norm and sparse attention is a cogview_ops operator.

CogView paper (arXiv 2105.13290) section 2.3 and 2.4: Sandwich-LN, PB-relax, embedding-gradient shrink.
Parameters have the names and shapes of the published checkpoints. Shapes: B batch, S tokens, H heads,
D head size, L layers, P pivots, C hidden size.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.attention import Attention, LayerCache
from cogview.config import GPTConfig
from cogview.sequence import Vocabulary
from cogview_ops import layer_norm, sample_pivots, sandwich_layer_norm


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


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    """h += LN3(Attention(LN1 h)); h += LN4(MLP(LN2 h)). Takes and returns (h, x): x is h normalised for the
    next sub-layer, because each branch's post-norm is fused with the pre-norm that follows it. `seeds` say what
    dropout drops of either branch; None: nothing."""

    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.relax, self.dropout = config.relax, config.dropout
        # nn.LayerNorm only holds weight and bias here: the operators apply them.
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, index)
        self.third_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.fourth_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, h, x, next_norm: nn.LayerNorm, seeds, pivots, text_mask, cache, weights) -> tuple[Tensor, Tensor]:
        branch = self.attention(x, pivots, text_mask, cache, weights)
        h, x = self._join(branch, h, self.third_layernorm, self.post_attention_layernorm, seeds[0])
        return self._join(self.mlp(x), h, self.fourth_layernorm, next_norm, seeds[1])

    def _join(self, branch: Tensor, h: Tensor, post: nn.LayerNorm, pre: nn.LayerNorm, seed: int | None):
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


class Transformer(nn.Module):
    """The layers under the names of the published checkpoints; GPT runs them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size)


def _to_slots(h: Tensor, slots: Tensor, count: int) -> Tensor:
    """States [B, S, C] at their slots of [B, count, C], zeros elsewhere; what is beyond is dropped."""
    index = slots.clamp_max(count)[..., None].expand_as(h)
    return h.new_zeros(len(h), count + 1, h.shape[2]).scatter(1, index, h)[:, :count]


def _from_slots(x: Tensor, slots: Tensor) -> Tensor:
    """The inverse; zeros for what was dropped."""
    index = slots.clamp_max(x.shape[1])[..., None].expand(*slots.shape, x.shape[2])
    return F.pad(x, (0, 0, 0, 1)).gather(1, index)


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
        seeds: list[list[int | None]] | None = None,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Final hidden states [B, S, C] of int64 tokens [B, S].

        With a cache the tokens continue its rows, which grow by S. `weights`, a list, receives each
        layer's attention weights [B, H, S, keys] (dense_pb_relax only). `seeds` of dropout are drawn here if not given,
        which a compiled graph has to be interrupted for: see `draw_seeds`. With dalle attention text comes before the
        image, a cache takes it at once, and what follows the image is not computed: its states are 0.
        """
        c, S = self.config, tokens.shape[1]
        self._check(tokens, pivots, cache, weights, seeds)
        if cache is None:
            positions = torch.arange(S, device=tokens.device)
        else:
            positions = cache.seqlens[:, None] + torch.arange(S, device=tokens.device)
        rows, slots, text_mask = positions, None, None
        if c.image_positions == "fixed" or c.attention == "dalle":
            moved, shift = self._position_rows(tokens, positions, cache)
            rows = moved if c.image_positions == "fixed" else positions
        if c.attention == "dalle":
            slots, text_mask = moved, self._text_mask(shift)
        h = self.word_embeddings(tokens) + self.transformer.position_embeddings(rows)
        h = torch.lerp(h.detach(), h, c.embedding_grad_scale)  # value h, gradient times the scale
        h = F.dropout(h, c.dropout, self.training)
        # DALL-E's patterns need every image at the same place: all but image tokens for a cache move to their slots.
        prompt = c.attention == "dalle" and (cache is None or not bool(self.vocab.is_image(tokens).all()))
        if slots is not None and prompt:
            image_rows = min(c.image_grid, max(1, -(-(S - 3) // c.image_grid)))  # [ROI1], [BASE], [BOI1] are text
            h = _to_slots(h, slots, c.text_slots + image_rows * c.image_grid)
            positions = torch.arange(h.shape[1], device=tokens.device).expand(h.shape[:2])
        elif slots is not None:
            positions = slots

        seeds = self.draw_seeds() if seeds is None or not self.training else seeds
        layers = cast("list[Layer]", list(self.transformer.layers))
        norms = [layer.input_layernorm for layer in layers] + [self.transformer.final_layernorm]
        x = layer_norm(h, norms[0].weight, norms[0].bias, eps=norms[0].eps, relax=c.relax)
        for i, layer in enumerate(layers):
            layer_pivots = None if pivots is None else pivots[i]
            layer_cache = None if cache is None else LayerCache(cache.keys[i], cache.values[i], positions, prompt)
            args = (h, x, norms[i + 1], seeds[i], layer_pivots, text_mask, layer_cache, weights)
            h, x = checkpoint(layer, *args, use_reentrant=False) if checkpoint_activations else layer(*args)
        if cache is not None:
            cache.seqlens = cache.seqlens + S
        return x if slots is None or not prompt else _from_slots(x, slots)

    def draw_seeds(self) -> list[list[int | None]]:
        """What dropout of both branches of every layer takes; None outside training. Drawn before the layers run, so
        that recomputed activations drop the same, and from torch's CPU generator, for which no device has to wait."""
        c = self.config
        if not self.training or c.dropout == 0:
            return [[None, None]] * c.num_layers
        return torch.randint(2**63 - 1, (c.num_layers, 2), device="cpu").tolist()

    def _position_rows(self, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Rows of the position table, [B, S]: from [BOI1] on those behind the longest possible text; and by how much
        that moves, [B]."""
        c = self.config
        positions = positions.expand(tokens.shape)
        begins = (tokens == self.vocab["BOI1"]) & (positions >= 2)  # where the image comes first it stays there
        shift = torch.where(begins, c.max_text + 2 - positions, 0).sum(dim=1)
        begun = begins.cumsum(dim=1) > 0
        if cache is not None:
            begun |= (cache.image_shift >= 0)[:, None]
            shift = torch.where(begins.any(dim=1), shift, cache.image_shift)
            cache.image_shift = shift.where(begun[:, -1], -1)
        if c.attention == "dalle":
            self._check_text_first(tokens, begun, cache)
        return (positions + shift[:, None] * begun).clamp_max(c.max_positions - 1), shift

    def _check_text_first(self, tokens: Tensor, begun: Tensor, cache: KVCache | None) -> None:
        if torch.compiler.is_compiling():
            return
        image = self.vocab.is_image(tokens)
        if bool((image & ~begun).any()):
            raise ValueError("attention dalle needs the text before the image, got image tokens before [BOI1]")
        if cache is not None and not bool(image.all()) and bool(cache.seqlens.any()):
            raise ValueError("attention dalle needs all text in a cache at once, got text tokens for a cache in use")

    def _text_mask(self, shift: Tensor) -> Tensor:
        """bool [B, text_slots]: those with a token; [BOI1] has the last, and `shift` before it have none."""
        slot = torch.arange(self.config.text_slots, device=shift.device)
        return (slot < slot[-1] - shift[:, None]) | (slot == slot[-1])

    def forward(self, tokens: Tensor, **how) -> Tensor:
        """float32 logits [B, S, vocab.size] of tokens [B, S]; keywords as `hidden`."""
        return F.linear(self.hidden(tokens, **how), self.word_embeddings.weight).float()

    def _check(self, tokens, pivots, cache, weights, seeds) -> None:
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
        if seeds is not None and [len(pair) for pair in seeds] != [2] * c.num_layers:
            raise ValueError(f"seeds must be {c.num_layers} pairs, see draw_seeds, got {seeds}")
        if weights is not None and c.attention != "dense_pb_relax":
            raise ValueError(f"weights need attention dense_pb_relax, got {c.attention}")
        if cache is not None and cache.keys.shape[1] != len(tokens):
            raise ValueError(f"cache must hold {len(tokens)} rows, got {cache.keys.shape[1]}")
