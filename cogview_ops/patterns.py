"""Who may attend to whom: the one definition of every attention pattern.

Each pattern is a predicate on broadcastable integer tensors of positions; True means "attends". The
reference, the tests and the documentation use these; kernels are probed against them entry by entry.
"""

import torch
from torch import Tensor


def three_region_window(query: Tensor, key: Tensor, block_size: int, window_blocks: int) -> Tensor:
    """Causal, and in the query's own block or one of the `window_blocks - 1` blocks before it."""
    return (key <= query) & (key // block_size > query // block_size - window_blocks)


def three_region_pivot(query: Tensor, pivot: Tensor, block_size: int, window_blocks: int) -> Tensor:
    """A pivot token in a block before the query's window; -1 pads. Disjoint from the window."""
    return (pivot >= 0) & (pivot // block_size <= query // block_size - window_blocks)


def three_region_masks(
    query_pos: Tensor, num_keys: int, pivots: Tensor, block_size: int, window_blocks: int
) -> tuple[Tensor, Tensor]:
    """Window and pivot masks, bool `[B, Sq, num_keys]`, of queries at positions `[B, Sq]` (or `[1, Sq]`)."""
    i = query_pos[:, :, None]
    j = torch.arange(num_keys, device=pivots.device)
    window = three_region_window(i, j, block_size, window_blocks)
    seen = three_region_pivot(i, pivots[:, None, :], block_size, window_blocks)
    # one spare column swallows the padding
    pivot = torch.zeros(*seen.shape[:2], num_keys + 1, dtype=torch.bool, device=pivots.device)
    index = torch.where(pivots >= 0, pivots, num_keys).long()[:, None, :].expand_as(seen)
    pivot.scatter_(2, index, seen)
    return window.expand(seen.shape[0], -1, -1), pivot[..., :num_keys]


def packed(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each of `total` tokens the sequence, and the position in it: sequences lie one after the other, the n-th from
    cu_seqlens[n] to cu_seqlens[n + 1]."""
    token = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), token, right=True)
    return sequence, token - cu_seqlens[sequence]


def three_region_packed_masks(
    pivots: Tensor, cu_seqlens: Tensor, total: int, block_size: int, window_blocks: int
) -> tuple[Tensor, Tensor]:
    """Window and pivot masks, bool `[total, total]`, of packed sequences: none sees another."""
    sequence, position = packed(cu_seqlens, total)
    i, j = position[:, None], position
    same = sequence[:, None] == sequence
    window = same & three_region_window(i, j, block_size, window_blocks)
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    index = torch.where((pivots >= 0) & (begin + pivots < end), begin + pivots, total).clamp(0, total)
    is_pivot = torch.zeros(total + 1, dtype=torch.bool, device=pivots.device).index_fill(0, index.flatten(), True)
    pivot = same & is_pivot[:total] & three_region_pivot(i, j, block_size, window_blocks)
    return window, pivot


def local_2d(
    query: Tensor,
    key: Tensor,
    *,
    grid: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    edge: str = "clip",
    raster_causal: bool,
) -> Tensor:
    """Keys within the window around the query: of each axis the window `local_1d`.

    `query` and `key` are raster indices of one grid. `raster_causal` keeps keys at or before the query in
    raster order, so keys to the right in rows above remain.
    """
    rows = local_1d(query // grid[1], key // grid[1], grid[0], kernel_size[0], dilation[0], edge)
    columns = local_1d(query % grid[1], key % grid[1], grid[1], kernel_size[1], dilation[1], edge)
    near = rows & columns  # not in place: FlexAttention's rule
    return near & (key <= query) if raster_causal else near


def local_1d(query: Tensor, key: Tensor, length: int, kernel_size: int, dilation: int, edge: str) -> Tensor:
    """Every `dilation`-th position around the query, `kernel_size` of them.

    At an edge, "clip": positions outside do not exist; "shift": the window moves inward, so that it stays full (NATTEN,
    arXiv 2204.07143 and 2209.15001).
    """
    same = (key - query) % dilation == 0
    before, behind = kernel_size // 2, (kernel_size - 1) // 2  # of an even window, as NATTEN has them
    if edge == "clip":
        return same & (query - key <= before * dilation) & (key - query <= behind * dilation)
    # in the group of positions that are dilation apart
    members = (length - 1 - query % dilation) // dilation + 1
    start = torch.minimum((query // dilation - before).clamp(min=0), members - kernel_size)
    return same & (key // dilation >= start) & (key // dilation < start + kernel_size)


def coarse_2d(
    query: Tensor,
    key: Tensor,
    *,
    grid: tuple[int, int],
    coarse_grid: tuple[int, int],
    kernel_size: tuple[int, int],
) -> Tensor:
    """Keys of a lower-resolution grid, in the window around the cell that the query lies in."""
    y = query // grid[1] // (grid[0] // coarse_grid[0])
    x = query % grid[1] // (grid[1] // coarse_grid[1])
    rows = local_1d(y, key // coarse_grid[1], coarse_grid[0], kernel_size[0], 1, "clip")
    return rows & local_1d(x, key % coarse_grid[1], coarse_grid[1], kernel_size[1], 1, "clip")


def relative_2d(
    query: Tensor, key: Tensor, *, grid: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Row and column, in a table of `2 * kernel_size - 1`, of what is added to the score of a pair of a window."""
    pairs = (query // grid[1], key // grid[1]), (query % grid[1], key % grid[1])
    y, x = (
        ((key - query) // step + k - 1).clamp(0, 2 * k - 2)  # beyond the window it does not matter
        for (query, key), k, step in zip(pairs, kernel_size, dilation, strict=True)
    )
    return y, x


def dalle(
    query: Tensor,
    key: Tensor,
    *,
    kind: str,
    text_len: int,
    grid: tuple[int, int],
    kernel_size: int,
    wrap: bool,
) -> Tensor:
    """Positions of one sequence, text and then image: causal; of the image, image tokens see `kind`'s part only.

    `wrap`, of rows: the last W + 1 tokens in raster order, up to the one right above, wherever the row starts.
    """
    i, j = query - text_len, key - text_len
    if wrap:
        near = i - j <= grid[1]
    else:
        kernel = dalle_kernel(kind, grid, kernel_size)
        near = local_2d(i, j, grid=grid, kernel_size=kernel, raster_causal=True)
    return (key <= query) & ((key < text_len) | near)


def dalle_kernel(kind: str, grid: tuple[int, int], kernel_size: int) -> tuple[int, int]:
    """Of `local_2d`, no larger than the image can use."""
    whole = 2 * grid[0] - 1, 2 * grid[1] - 1
    if kind == "row":
        return 1, whole[1]
    if kind == "column":
        return whole[0], 1
    return min(kernel_size, whole[0]), min(kernel_size, whole[1])


def dalle_window(
    kind: str, grid: tuple[int, int], kernel_size: int, wrap: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and kernel of the image's `local_2d`; rows that wrap are those of an image of one long row."""
    if wrap:
        tokens = grid[0] * grid[1]
        return (1, tokens), (1, min(2 * grid[1] + 1, 2 * tokens - 1))
    return grid, dalle_kernel(kind, grid, kernel_size)


def cogview2(
    query: Tensor,
    key: Tensor,
    *,
    text_len: int,
    grid: tuple[int, int],
    kernel_size: tuple[int, int],
    raster_causal: bool,
    coarse_grid: tuple[int, int] | None,
    coarse_kernel_size: tuple[int, int],
) -> Tensor:
    """Positions of one sequence: text, the coarse image if there is one, the image.

    Text sees text. With a coarse image, that one sees text and itself, and the image its own window and the coarse
    one; without, the image sees text and its own window.
    """
    cells = 0 if coarse_grid is None else coarse_grid[0] * coarse_grid[1]
    start = text_len + cells
    i, j = query - start, key - start
    near = local_2d(i, j, grid=grid, kernel_size=kernel_size, raster_causal=raster_causal) & (j >= 0)
    if coarse_grid is None:
        return (key < text_len) | (near & (i >= 0))
    home = coarse_2d(i, key - text_len, grid=grid, coarse_grid=coarse_grid, kernel_size=coarse_kernel_size)
    fine = near | (home & (key >= text_len) & (key < start))
    return torch.where(i >= 0, fine, key < torch.where(query < text_len, text_len, start))


def cogview2_level(position: Tensor, text_len: int, coarse_grid: tuple[int, int] | None) -> Tensor:
    """Of positions of that sequence: 0 text, 1 the coarse image, 2 the image."""
    cells = 0 if coarse_grid is None else coarse_grid[0] * coarse_grid[1]
    return (position >= text_len).int() + (position >= text_len + cells)


def leading(key: Tensor, count: Tensor) -> Tensor:
    """The first `count` tokens of the sequence, a number for each query: all of GLM's masks, once what is context, and
    sees itself alone, stands before what is drawn, which sees that and what was drawn before it."""
    return key < count


def causal(query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Bottom-right aligned: row i of R sees columns j <= i + K - R."""
    return key <= query + num_keys - num_queries
