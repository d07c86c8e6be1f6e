"""What heads and offsets are called, and which of them are the strongest."""

from torch import Tensor

from cogview.attention.measure import Figures


def called(layer: int, head: int) -> str:
    """Of numbers from 0."""
    return f"layer {layer + 1} head {head + 1}"


def strongest(values: Tensor, count: int = 3) -> list[tuple[int, int, float]]:
    """Layer and head, from 0, and value of the largest of [L, H]."""
    best = values.flatten().topk(min(count, values.numel()))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(*divmod(n, values.shape[1]), value) for value, n in pairs]


def offset_of(figures: Figures, layer: int, head: int) -> tuple[int, int, float]:
    """dy, dx of the offset that gets the most of all that the image queries give, and what those that see it give."""
    shares = figures.offsets[layer, head]
    last = len(shares) - 1
    dy, dx = divmod(int(shares.argmax()), shares.shape[1])
    return dy - last, dx - last, float(figures.relative[layer, head, dy, dx])


def offset_name(dy: int, dx: int) -> str:
    """As in "the token above"."""
    names = {(0, 0): "the token itself", (0, -1): "its left neighbour", (-1, 0): "the token above"}
    names |= {(-1, 1): "the token above what is drawn"}
    if dx in (0, 1) and dy < -1:
        return f"the token {-dy} rows above{' what is drawn' if dx else ''}"
    return names.get((dy, dx), f"the token at ({dy}, {dx})")


def times(figures: Figures, region: str) -> Tensor:
    """[L, H]: how many times as much a region gets as if all that is seen got the same; 0 where there is no such place,
    in pictures of a few."""
    return (figures.regions[region] / figures.uniform[region]).nan_to_num(0.0)
