"""Where the sequences of a batch lie, from what transformers tells a mask function.

The mask that comes of it is one of

- None: every row is one sequence;
- int32 `[B, 1, 1, 2]`, 0 and the end of what is in the cache, or `[B, 1, 1, 3]`, with the begin of the sequence between
  them: what lies before it is padding. That on the right is left at the end of its sequence, where a causal pattern
  hides it;
- int8 `[B, 1, 1, S]`, 1 where one of several packed sequences begins;
- float: something else, which attention refuses if a layer comes with it. (Models ask for masks that none of their
  layers uses.)

Nothing has the size of the scores, and no shape depends on what is padding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import causal_mask_function


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> Tensor | None:
    """For `transformers.AttentionMaskInterface`."""
    something_else = torch.zeros(1, 1, 1, 1, device=device)
    if local_size is not None or use_vmap or kv_offset != 0:
        return something_else
    if mask_function is not causal_mask_function and q_length > 1:
        row, i = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length - 1, device=device) + q_offset
        ahead = mask_function(row, 0, i, i + 1).any()
        if torch.compiler.is_compiling():
            torch._assert_async(
                ~ahead, "attention_mask: expected a causal mask, got one with tokens that see the next one"
            )
        elif ahead:
            return something_else
        if attention_mask is None and q_length == kv_length:  # transformers packs only then
            together = mask_function(row, 0, i + 1, i).expand(batch_size, -1)
            return pad(~together, (1, 0), value=True)[:, None, None].to(torch.int8)
    slots = [torch.zeros(batch_size, dtype=torch.int64, device=device)]
    if attention_mask is not None:
        tokens, columns = q_offset + q_length, attention_mask.shape[1]
        if isinstance(tokens, int) and columns < tokens:
            raise ValueError(
                f"attention_mask: expected {tokens} columns, for the tokens in the cache too, got {columns}"
            )
        begin = _begin(attention_mask)
        if torch.compiler.is_compiling() or begin.any():
            slots.append(begin)
    if len(slots) == 1 and q_length == kv_length and isinstance(q_offset, int):
        return None
    slots.append(slots[0] + q_offset + q_length)
    return torch.stack(slots, -1)[:, None, None].int()


def _begin(attention_mask: Tensor) -> Tensor:
    """The first token of each row that is no padding."""
    length = attention_mask.shape[1]
    at = torch.arange(length, device=attention_mask.device)
    begin, last = at.where(attention_mask, length).amin(-1), at.where(attention_mask, -1).amax(-1)
    empty = last < 0
    whole = (empty | (last - begin + 1 == attention_mask.sum(-1))).all()
    message = "attention_mask: expected padding on the left or right of each row, got a row with zeros between ones"
    if torch.compiler.is_compiling():
        torch._assert_async(whole, message)
    elif not whole:
        raise ValueError(message)
    return begin.where(~empty, 0)


def of_padding(slots: Tensor, length: int, position_ids: Tensor | None = None) -> Tensor | None:
    """cu_seqlens `[2 * B + 1]` of such a mask, for B rows of that length, or None where there is no padding; longer
    where positions behind the padding begin anew."""
    if slots.shape[-1] == 2:
        return None
    begins = slots[:, 0, 0, :2] + length * torch.arange(len(slots), device=slots.device)[:, None]
    cu_seqlens = pad(begins.flatten(), (0, 1), value=length * len(slots)).int()
    if position_ids is None or torch.compiler.is_compiling():  # where their number is not known
        return cu_seqlens
    behind = torch.arange(length, device=slots.device) > slots[:, 0, 0, 1:2]
    anew = (_anew(position_ids) & behind).flatten().nonzero()[:, 0]
    return torch.cat([cu_seqlens, anew.int()]).sort().values if len(anew) else cu_seqlens


def of_begins(begins: Tensor, length: int) -> Tensor | None:
    """cu_seqlens of sequences that begin at the ones of `[B, 1, 1, S]`, or None where that is at the begin of rows."""
    rows = len(begins)
    if torch.compiler.is_compiling():  # where their number is not known
        message = "position_ids: expected one sequence a row, or cu_seq_lens_q and cu_seq_lens_k as well, in a graph"
        torch._assert_async(begins.sum() == rows, message)
        return None
    at = begins.flatten().nonzero()[:, 0]
    return None if len(at) == rows else pad(at, (0, 1), value=rows * length).int()


def of_positions(position_ids: Tensor, batch: int) -> Tensor | None:
    """cu_seqlens of sequences whose positions, `[B, S]` or `[1, S]`, begin anew."""
    begins = _anew(position_ids)
    return of_begins(begins.expand(batch, -1), begins.shape[1])


def _anew(position_ids: Tensor) -> Tensor:
    return pad(position_ids.diff() != 1, (1, 0), value=True)
