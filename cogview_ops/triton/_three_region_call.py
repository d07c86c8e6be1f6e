"""What the kernels of one call of three-region attention share, of a batch or of packed sequences."""

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from ._three_region_pattern import gather_kernel, rank_kernel
from ._three_region_place import PIVOT_ROWS
from ._tiles import Keys, Shape, accumulator, block_d, check_interpreter, launch, logit, rows_of, section, wide

ROWS = PIVOT_ROWS.value
BATCH: dict[str, Any] = {"begins": None, "sequences": None, "tokens": None}


def samples(x: Tensor) -> Tensor:
    """Packed rows [total, H, D] as [1, H, total, D], of which sample number t begins at token t."""
    token, head, _ = x.stride()
    return x.as_strided((1, x.shape[1], x.shape[0], x.shape[2]), (token, head, token, 1))


class Call:
    """Clamped sizes, keys, the rank table, the pivots' copies."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pivots: Tensor,
        numbers: tuple[int, int, float, float],
        cu_seqlens: Tensor | None = None,
        longest: int = 0,
    ) -> None:
        check_interpreter(q)
        self.device, self.element_size = q.device, q.element_size()
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads, self.tokens = k.shape[1], k.shape[2]
        self.group, self.pairs = self.heads // self.kv_heads, self.batch * self.kv_heads
        self.keys = Keys(rows_of(k), rows_of(v))
        self.seqlen, self.sequences, self.packed = self.tokens, 0, BATCH
        if cu_seqlens is not None:  # whose contents are not trusted: they ascend now, and end where tokens do
            begins = cu_seqlens.clamp(0, self.tokens).cummax(0).values.to(torch.int32)
            self.seqlen, self.sequences = max(min(longest, self.tokens), 1), len(begins) - 1
            self.packed = {"begins": begins, "sequences": self.sequences, "tokens": self.tokens}
        block_size, window_blocks, pivot_bias, self.scale = numbers
        # larger ones mean the same, and products stay below 2**31; a pivot beyond the first S is no pivot
        block_size = min(block_size, self.seqlen)
        window_blocks = min(window_blocks, triton.cdiv(self.seqlen, block_size))
        self.window = block_size * window_blocks
        self.pivots = pivots[:, : self.seqlen].contiguous()
        self.num_pivots = self.pivots.shape[1]
        # with copies or without: of a sample, and of a head
        self.room = triton.cdiv(self.num_pivots, ROWS) * ROWS if self.window < self.seqlen else 0
        self.rows = min(self.token_tiles(ROWS) * ROWS, self.sequences * self.room) if self.sequences else self.room
        self.pattern = {"block_size": block_size, "window_blocks": window_blocks, "bias": logit(pivot_bias)}
        self.acc = accumulator(q.dtype)

    def config(self, kernel: str) -> configs.Config:
        return configs.lookup(kernel, configs.chip(self.device), self.element_size, block_d(self.dim))

    def shape(self, config: configs.Config, *tensors: Tensor) -> Shape:
        return Shape(self.dim, block_d(self.dim), config.m, config.n, wide(*tensors))

    def token_tiles(self, size: int) -> int:
        """Tiles of so many tokens, of a head: _three_region_place.py."""
        return self.tokens // size + self.sequences if self.sequences else triton.cdiv(self.tokens, size)

    def rank(self) -> Tensor:
        sizes = {"num_pivots": self.num_pivots, "seqlen": self.seqlen, "steps": self.num_pivots.bit_length()}
        programs, entries = triton.cdiv(self.tokens + 1, 256) * self.batch, self.batch * (self.tokens + 1)
        if self.sequences:
            programs, entries = self.token_tiles(256), self.tokens + self.sequences
        rank = torch.empty(entries, dtype=torch.int32, device=self.device)
        launch(rank_kernel, (programs,), configs.SMALL, pivots=self.pivots, rank=rank, **sizes, **self.packed, ROWS=256)
        return rank

    def copies(self) -> Keys:
        """Rows of keys and values at the pivots, contiguous.

        A copy moves 4 * P * D * size bytes per head, once; every query tile behind the window then reads runs of rows
        as it does in the window, not one row at an address that it must first load.
        """
        shape = (self.batch, self.kv_heads, self.rows, block_d(self.dim))
        copies = Keys(*(x.at.new_empty(shape) for x in self.keys))
        if self.room:
            launch(
                gather_kernel,
                (self.rows // 32 * self.pairs,),
                configs.SMALL,
                keys=self.keys,
                pivots=self.pivots,
                copies=copies,
                kv_heads=self.kv_heads,
                num_pivots=self.num_pivots,
                room=self.room,
                seqlen=self.seqlen,
                **self.packed,
                D=self.dim,
                BLOCK_D=block_d(self.dim),
                ROWS=32,
            )
        return copies

    def tiles(self, config: configs.Config) -> tuple[int, dict[str, Any]]:
        """Programs, and arguments, of the kernels that own a tile of queries each."""
        total = self.batch * self.heads
        launched = {"heads": self.heads, "group": self.group, "total_heads": total}
        launched |= {"section": section(total, self.group, self.keys.k.at), "seqlen": self.seqlen, "room": self.room}
        shared = {"keys": self.keys, "copies": self.copies(), "ACC": self.acc}
        shared |= {**launched, **self.packed, **self.pattern}
        return self.token_tiles(config.m) * total, shared

    def pivot_tiles(self, config: configs.Config) -> tuple[int, int]:
        """Programs that own a tile of pivots each, and into how many parts to split the queries of one."""
        if not self.sequences:
            programs = triton.cdiv(min(self.room, self.num_pivots), config.n) * self.pairs
        else:
            programs = self.rows // config.n * self.pairs
        tiles = triton.cdiv(self.tokens, config.m) * self.group
        return programs, configs.splits(programs, tiles, 8, self.device)
