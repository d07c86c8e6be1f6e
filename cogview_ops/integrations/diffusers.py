"""2D local attention in diffusers: attention processors for UNets, and for transformers of the DiT, SD3 and Flux kinds.

`use_local_attention(pipe.unet, 9)` sets them; by hand: `attn.set_processor(LocalUNetAttnProcessor(9, grid=(64, 96)))`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, _get_qkv_projections
from torch import Tensor

from .. import _checks
from ._patches import Pair, Tensors, attend_patches, pair, window
from ._replaced import Replaced


class _Window:
    """Of all processors: each pixel or patch attends to those around it.

    Args:
        kernel_size: rows and columns, or one for both; where it is larger than the picture, all of the picture.
            None: the processor of diffusers that this one replaces.
        dilation, edge: as in `cogview_ops.local_attention_2d`.
        grid: rows and columns of what attends, where it is set without `use_local_attention`: of a transformer's
            patches, of a UNet's latents.
    """

    def __init__(
        self,
        kernel_size: int | Pair | None,
        *,
        dilation: int | Pair = 1,
        edge: str = "clip",
        grid: Pair | None = None,
    ) -> None:
        super().__init__()
        self.grid = None if grid is None else _checks.pair(grid, "grid")
        self.window = {} if kernel_size is None else window(kernel_size, dilation, edge)

    def _attend(self, qkv: Tensors, before: int, grid: Pair | None, mask: Any) -> Tensor:
        """`[B, N, heads * D]` of three `[B, N, heads, D]`; `before` tokens are no patches."""
        _checks.require(mask is None, "attention_mask", "None under local attention", "one")
        grid = self.grid or grid
        if grid is None:
            raise ValueError(f"grid: expected rows and columns of the latents in {type(self).__name__}, got None")
        query, key, value = (x.transpose(1, 2) for x in qkv)
        grid = self._level(grid, query.shape[2] - before)
        return attend_patches((query, key, value), before, grid, **self.window).flatten(2)

    def _level(self, grid: Pair, cells: int) -> Pair:
        return grid


class LocalAttnProcessor(_Window, AttnProcessor2_0):
    """In place of `AttnProcessor2_0`, of DiT and PixArt. Cross attention stays as it is."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        patch_grid: Pair | None = None,
    ) -> Tensor:
        if not self.window or encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if x.ndim == 4:
            patch_grid = x.shape[-2], x.shape[-1]
            x = x.flatten(2).mT
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        qkv = _heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k)
        out = self._attend(qkv, 0, patch_grid, attention_mask)
        out = attn.to_out[1](attn.to_out[0](out))
        if hidden_states.ndim == 4:
            out = out.mT.reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class LocalUNetAttnProcessor(LocalAttnProcessor):
    """`LocalAttnProcessor` of UNets, whose levels find their grids: half of the latents', a quarter, rounded up."""

    def _level(self, grid: Pair, cells: int) -> Pair:
        while grid[0] * grid[1] > cells:
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return grid


class LocalJointAttnProcessor(_Window, JointAttnProcessor2_0):
    """In place of `JointAttnProcessor2_0`, as SD3 has it: every patch sees all of the text too, in the same softmax,
    and the text sees everything."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patch_grid: Pair | None = None,
    ) -> Any:
        if not self.window:
            inherited: Any = super().__call__
            return inherited(attn, hidden_states, encoder_hidden_states, attention_mask)
        x, text = hidden_states, encoder_hidden_states
        qkv = _heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k)
        if text is None:
            out = self._attend(qkv, 0, patch_grid, attention_mask)
            return attn.to_out[1](attn.to_out[0](out))
        projected = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        of_text = _heads(attn, *projected, attn.norm_added_q, attn.norm_added_k)
        out = self._attend(_after(of_text, qkv), text.shape[1], patch_grid, attention_mask)
        text, out = out.split((text.shape[1], x.shape[1]), 1)
        return attn.to_out[1](attn.to_out[0](out)), text if attn.context_pre_only else attn.to_add_out(text)


class LocalFluxAttnProcessor(_Window, FluxAttnProcessor):
    """In place of `FluxAttnProcessor`, of both kinds of blocks: text as in `LocalJointAttnProcessor`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        patch_grid: Pair | None = None,
    ) -> Any:
        if not self.window:
            inherited: Any = super().__call__
            return inherited(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text = encoder_hidden_states
        query, key, value, text_q, text_k, text_v = _get_qkv_projections(attn, hidden_states, text)
        query, key, value = _heads(attn, query, key, value, attn.norm_q, attn.norm_k)
        if text is not None:
            text_qkv = _heads(attn, text_q, text_k, text_v, attn.norm_added_q, attn.norm_added_k)
            query, key, value = _after(text_qkv, (query, key, value))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        if text is None:  # before the picture, in the same tensor
            rows, columns = self.grid or patch_grid or (0, 0)
            before = query.shape[1] - rows * columns
        else:
            before = text.shape[1]
        out = self._attend((query, key, value), before, patch_grid, attention_mask)
        if text is None:
            return out
        text, out = out.split((before, out.shape[1] - before), 1)
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(text)


def _heads(attn: Any, query: Tensor, key: Tensor, value: Tensor, norm_q: Any, norm_k: Any) -> Tensors:
    """`[B, N, heads, D]`"""
    query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _after(text: Tensors, image: Tensors) -> Tensors:
    query, key, value = (torch.cat(both, 1) for both in zip(text, image, strict=True))
    return query, key, value


_LOCAL: dict[type, Any] = {
    AttnProcessor2_0: LocalAttnProcessor,
    JointAttnProcessor2_0: LocalJointAttnProcessor,
    FluxAttnProcessor: LocalFluxAttnProcessor,
}


def use_local_attention(
    model: Any,
    kernel_size: int | Pair,
    *,
    dilation: int | Pair = 1,
    edge: str = "clip",
    grid: Pair | None = None,
    where: Callable[[str], bool] = lambda name: True,
) -> Replaced:
    """Give the self-attention of a model of diffusers local processors, until `.remove()`.

    Args:
        model: UNet2DConditionModel, or a transformer with attention of the DiT, PixArt, SD3 or Flux kind.
        kernel_size, dilation, edge: as in the processors.
        grid: rows and columns of the latents (of a transformer: of its patches); by default those of each call's
            latents, also of ones that are not square. Flux, whose latents are rows of patches, must be told.
        where: of which attention layers, by their names: `lambda name: "down_blocks.0" in name`.
    """
    window(kernel_size, dilation, edge)  # before anything is replaced
    if grid is not None:
        grid = _checks.pair(grid, "grid")
    attention = {n: m for n, m in model.named_modules() if hasattr(m, "set_processor")}
    chosen = [n for n, m in attention.items() if where(n) and not getattr(m, "is_cross_attention", False)]
    _checks.require(len(chosen) > 0, "where", "one self-attention layer at least", "none")
    known = " or ".join(x.__name__ for x in _LOCAL)
    for name, module in attention.items():
        kind = type(module.processor)
        _checks.require(kind in _LOCAL, name, f"the processor {known}", kind.__name__)
    replaced = Replaced()
    kinds = _LOCAL | ({AttnProcessor2_0: LocalUNetAttnProcessor} if hasattr(model, "down_blocks") else {})
    for name, module in attention.items():  # those that are not chosen are told the grid too
        size = kernel_size if name in chosen else None
        replaced.add(name if name in chosen else None, partial(module.set_processor, module.processor))
        module.set_processor(kinds[type(module.processor)](size, dilation=dilation, edge=edge))
    parameters = list(inspect.signature(model.forward).parameters)
    more = next(name for name in parameters if name.endswith("attention_kwargs"))
    patch = pair(getattr(model.config, "patch_size", None) or 1, "patch_size")

    def tell_grid(module: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(parameters, args, strict=False)) | kwargs
        latents = given[parameters[0]]
        cells = grid
        if cells is None and latents.ndim == 4:
            cells = latents.shape[-2] // patch[0], latents.shape[-1] // patch[1]
        given[more] = {"patch_grid": cells} | (given.get(more) or {})
        return (), given

    replaced.add(None, model.register_forward_pre_hook(tell_grid, with_kwargs=True).remove)
    return replaced
