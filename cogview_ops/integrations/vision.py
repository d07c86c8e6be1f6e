"""2D local attention in vision transformers of transformers: ViT, DINOv2 and Swin.

`use_local_attention(model, 9)` lets every patch see the patches around it, instead of all patches or those of its
window of Swin's; weights stay where they are, and `.remove()` puts the attention back.
"""

import copy
import inspect
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ._patches import attend_patches, local, pair, window
from ._replaced import Replaced

# tokens before the patches, of models whose attention goes through transformers' AttentionInterface
_BEFORE_PATCHES = {"vit": 1, "vit_msn": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1, "dinov3_vit": 1}
_NAME = "cogview_ops_patches"
_REFUSED = ("output_attentions", "head_mask", "position_bias", "softcap", "is_causal")


def use_local_attention(
    model: Any,
    kernel_size: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    edge: str = "clip",
    layers: Iterable[int] | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> Replaced:
    """Replace the attention among patches by `local_attention_2d`, until `.remove()`.

    ViT, DINOv2 (and others through transformers' AttentionInterface, with `prefix_tokens`): class and register tokens
    stay as they are, seen by all patches in the same softmax, and they see everything. A window that has all of the
    picture gives what the model gave.

    Swin: each patch has the window around it instead of its share of a partition, so nothing is shifted or padded, and
    the learned relative position bias is that of the model, which knows offsets below its window_size w. So kernel_size
    is at most 2 * w - 1, or w with edge="shift", which sees as many keys as before: use_local_attention(model, 7,
    edge="shift") makes it a neighborhood attention transformer. Pretrained weights want a finetuning.

    Works under autocast, gradient checkpointing and torch.compile. Masks, dropout of the probabilities,
    output_attentions and head masks raise.

    Args:
        model: a model of transformers, or one with a head around it.
        kernel_size: rows and columns, or one for both; where it is larger than the picture, all of the picture.
        dilation, edge: as in `cogview_ops.local_attention_2d`.
        layers: which, at least one, counted from 0 through the model; by default all.
        grid: rows and columns of patches; by default those of pixel_values at each call, whatever its shape.
        prefix_tokens: tokens before the patches; by default what is known of the model's type.
    """
    asked = window(kernel_size, dilation, edge)
    if grid is not None:
        grid = _checks.pair(grid, "grid")
    # DINOv3's base_model is its encoder
    seeing = [m for m in (model.base_model, model) if "pixel_values" in inspect.signature(m.forward).parameters]
    _checks.require(len(seeing) > 0, "model", "one whose forward takes pixel_values", type(model).__name__)
    base = seeing[0]
    if base.config.model_type == "swin":
        _checks.require(grid is None, "grid", "None: Swin's layers are told it", grid)
        return _in_swin(base, asked, layers)
    return _by_interface(base, asked, layers, grid, prefix_tokens)


def _by_interface(
    base: Any,
    asked: dict[str, Any],
    layers: Iterable[int] | None,
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
) -> Replaced:
    from transformers import AttentionInterface

    config = base.config
    if prefix_tokens is None:
        names = f"swin, {', '.join(_BEFORE_PATCHES)}, or another with prefix_tokens"
        _checks.require(config.model_type in _BEFORE_PATCHES, "model", names, config.model_type)
        prefix_tokens = _BEFORE_PATCHES[config.model_type] + getattr(config, "num_register_tokens", 0)
    prefix_tokens = _checks.integer(prefix_tokens, "prefix_tokens", 0)
    attention = {n: m for n, m in base.named_modules() if all(hasattr(m, f"{x}_proj") for x in "qkv")}
    chosen = _chosen(attention, layers)
    replaced = Replaced()
    AttentionInterface.register(_NAME, _attend)
    for name, module in chosen.items():
        own = module.config
        module.config = copy.copy(own)
        module.config._attn_implementation = _NAME
        module.local_attention = {"prefix_tokens": prefix_tokens, **asked}
        replaced.add(name, partial(setattr, module, "config", own), partial(delattr, module, "local_attention"))

    def tell_grid(module: Any, args: Any, kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        rows, columns = pair(config.patch_size, "patch_size")
        kwargs["patch_grid"] = grid or (pixels.shape[-2] // rows, pixels.shape[-1] // columns)
        return args, kwargs

    # as an argument it goes with the call through checkpoints: pictures of several shapes may be under way
    replaced.add(None, base.register_forward_pre_hook(tell_grid, with_kwargs=True).remove)
    return replaced


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    patch_grid: tuple[int, int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: `[B, N, heads, D]` of `[B, heads, N, D]`."""
    _checks.require(attention_mask is None, "attention_mask", "None under local attention", "one")
    _checks.require(dropout == 0, "attention_probs_dropout_prob", "0 under local attention", dropout)
    for name in _REFUSED:
        _checks.require(not others.get(name), name, "none under local attention", others.get(name))
    if patch_grid is None:
        raise ValueError("patch_grid: expected a call of the model with pixel_values, got one of its parts")
    options = dict(module.local_attention)
    before = options.pop("prefix_tokens")
    return attend_patches((query, key, value), before, patch_grid, **options, scale=scaling), None


def _in_swin(base: Any, asked: dict[str, Any], layers: Iterable[int] | None) -> Replaced:
    known = base.config.window_size
    most = known if asked["edge"] == "shift" else 2 * known - 1
    kernel = asked["kernel_size"]
    _checks.require(max(kernel) <= most, "kernel_size", f"at most {most}, what the position bias knows", kernel)
    blocks = {n: m for n, m in base.named_modules() if hasattr(m, "attention") and hasattr(m, "shift_size")}
    chosen = _chosen(blocks, layers)
    replaced = Replaced()
    for name, layer in chosen.items():
        layer.local_attention = asked
        layer.forward = MethodType(_swin_layer, layer)
        replaced.add(name, partial(delattr, layer, "forward"), partial(delattr, layer, "local_attention"))
    return replaced


def _swin_layer(
    self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **others: Any
) -> tuple[Tensor, None]:
    """SwinLayer.forward without its windows."""
    for name in _REFUSED:
        _checks.require(not others.get(name), name, "none under local attention", others.get(name))
    attention = self.attention
    dropout = attention.attention_dropout if self.training else 0
    _checks.require(dropout == 0, "attention_probs_dropout_prob", "0 under local attention", dropout)
    x = self.layernorm_before(hidden_states)
    heads = -1, attention.head_dim
    query = attention.q_proj(x).unflatten(-1, heads).transpose(1, 2)
    key = attention.k_proj(x).unflatten(-1, heads).transpose(1, 2)
    value = attention.v_proj(x).unflatten(-1, heads).transpose(1, 2)
    bias = _swin_bias(attention.relative_position_bias, self.local_attention["kernel_size"])
    out = local((query, key, value), input_dimensions, **self.local_attention, bias=bias, scale=attention.scaling)
    out = self.dropout(attention.o_proj(out.transpose(1, 2).flatten(2)))
    hidden_states = hidden_states + self.drop_path(out)
    return self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states, None


def _swin_bias(table: Any, kernel: tuple[int, int]) -> Tensor:
    """Swin's table, which is by query minus key, as one by key minus query for a window of another size."""
    sizes = [2 * w - 1 for w in table.window_size]
    bias = table.relative_position_bias_table.view(*sizes, -1).permute(2, 0, 1).flip(1, 2)
    # offsets that no window has are cut off, or zeros
    more = [(2 * k - 1 - n) // 2 for k, n in zip(kernel, sizes, strict=True)]
    return F.pad(bias, (more[1], more[1], more[0], more[0]))


def _chosen(modules: dict[str, Any], layers: Iterable[int] | None) -> dict[str, Any]:
    _checks.require(len(modules) > 0, "model", "attention layers", "none")
    numbers = list(range(len(modules)) if layers is None else layers)
    _checks.require(len(numbers) > 0, "layers", "at least one", "none")
    for layer in numbers:
        _checks.require(layer in range(len(modules)), "layers", f"numbers from 0 to {len(modules) - 1}", layer)
    chosen = {name: x for i, (name, x) in enumerate(modules.items()) if i in numbers}
    for name, module in chosen.items():
        _checks.require(not hasattr(module, "local_attention"), "layers", "layers with attention of their own", name)
    return chosen
