"""NATTEN's functions against its definition, written down here once more, and against NATTEN where it is installed."""

import importlib.util
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogview_ops.integrations.natten import functional, fuse, na1d, na2d

Sizes = tuple[int, ...]


def neighbors(length: int, kernel: int, dilation: int, causal: bool = False) -> list[list[int]]:
    """The keys of each position along one axis (NATTEN's docs/operations.md; arXiv 2209.15001 for the dilation)."""
    windows = []
    for i in range(length):
        group = range(i % dilation, length, dilation)
        at = group.index(i)
        start = max(at - kernel + 1, 0) if causal else min(max(at - kernel // 2, 0), len(group) - kernel)
        windows.append(list(group[start : at + 1 if causal else start + kernel]))
    return windows


def cells(grid: Sizes, kernel: Sizes, dilation: Sizes, causal: bool = False) -> list[list[int]]:
    """Raster indices of the keys of each query, the rows of its window one after the other."""
    (height, width), (kh, kw), (dh, dw) = ((1, *x)[-2:] for x in (grid, kernel, dilation))
    rows, columns = neighbors(height, kh, dh, causal), neighbors(width, kw, dw, causal)
    return [[y * width + x for y in above for x in beside] for above in rows for beside in columns]


def expected(
    qkv: list[Tensor],
    kernel: Sizes,
    dilation: Sizes,
    causal: bool = False,
    scale: float | None = None,
    more: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Heads last; out and lse from all scores and a mask."""
    grid = qkv[0].shape[1:-2]
    query, key, value = (x.flatten(1, len(grid)).transpose(1, 2) for x in qkv)
    group = query.shape[1] // key.shape[1]
    seen = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool)
    for i, keys in enumerate(cells(grid, kernel, dilation, causal)):
        seen[i, keys] = True
    if more:
        key, value = (torch.cat((x, y.transpose(1, 2)), 2) for x, y in zip((key, value), more, strict=True))
        seen = torch.cat((seen, torch.ones(len(seen), more[0].shape[1], dtype=torch.bool)), 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.mT * (scale or query.shape[-1] ** -0.5)).masked_fill(~seen, -math.inf)
    out, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


def draw(*shapes: Sizes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


CASES = {
    "1d": ((11,), (5,), (1,), False),
    "1d dilated": ((17,), (3,), (4,), False),
    "1d even": ((9,), (4,), (2,), False),
    "1d causal": ((12,), (4,), (2,), True),
    "2d": ((7, 9), (3, 5), (1, 1), False),
    "2d dilated": ((11, 8), (3, 3), (3, 2), False),
    "2d even": ((6, 9), (2, 4), (2, 1), False),
    "2d whole": ((5, 6), (5, 6), (1, 1), False),
    "2d causal": ((7, 8), (3, 2), (2, 1), True),
}


@pytest.mark.parametrize("more", [False, True], ids=["alone", "additional"])
@pytest.mark.parametrize("case", CASES)
def test_definition(case: str, more: bool) -> None:
    grid, kernel, dilation, causal = CASES[case]
    function = [na1d, na2d][len(grid) - 1]
    query, key, value = draw((2, *grid, 4, 8), (2, *grid, 2, 8), (2, *grid, 2, 8))
    additional = draw((2, 3, 2, 8), (2, 3, 2, 8)) if more else [None, None]
    options: dict[str, Any] = {"is_causal": causal, "scale": 0.3, "return_lse": True}
    options |= dict(zip(("additional_keys", "additional_values"), additional, strict=True))
    got = function(query, key, value, kernel, dilation=dilation, **options)
    want = expected([query, key, value], kernel, dilation, causal, 0.3, tuple(x for x in additional if x is not None))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    inputs = [x for x in (query, key, value, *additional) if x is not None]
    pull = [torch.randn_like(x) for x in got]
    grads = [torch.autograd.grad(both, inputs, pull) for both in (got, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_one_number_for_all_axes_and_out_alone() -> None:
    qkv = draw((1, 6, 7, 2, 4), (1, 6, 7, 2, 4), (1, 6, 7, 2, 4))
    one = na2d(*qkv, 3, dilation=2, q_tile_shape=(8, 8), backend="cutlass-fna")
    assert torch.equal(one, na2d(*qkv, (3, 3), (1, 1), [2, 2], (False, False), return_lse=True)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 2}, "stride: expected 1, other strides are NATTEN's alone, got 2"),
        (
            {"is_causal": (True, False)},
            "is_causal: expected all axes or none: a causal window beside one that moves at ",
        ),
        ({"kernel_size": 1}, "kernel_size: expected at least 2, got 1"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size: expected an int or 2 of them, got (3, 3, 3)"),
        (
            {"dilation": 3},
            "kernel_size: expected kernel_size * dilation at most (6, 7), the lengths of the axes, got (3, 3) with "
            "dilation (3, 3)",
        ),
        ({"query": torch.zeros(1, 6, 2, 4)}, "query: expected [B, H, W, heads, D], got (1, 6, 2, 4)"),
        (
            {"key": torch.zeros(1, 7, 6, 2, 4), "value": torch.zeros(1, 7, 6, 2, 4)},
            "key: expected query's batch and axes, got (1, 7, 6, 2, 4)",
        ),
        ({"additional_keys": torch.zeros(1, 3, 2, 4)}, "additional_values: expected with additional_keys, got None"),
        (
            {"additional_keys": torch.zeros(1, 3, 1, 4), "additional_values": torch.zeros(1, 3, 1, 4)},
            "additional_keys: expected shape (1, 3, 2, 4), got (1, 3, 1, 4)",
        ),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    query, key, value = draw((1, 6, 7, 2, 4), (1, 6, 7, 2, 4), (1, 6, 7, 2, 4))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        na2d(**({"query": query, "key": key, "value": value, "kernel_size": 3} | change))
    with pytest.raises(TypeError, match=r"^na2d: got an unexpected argument 'rpb'$"):
        na2d(query, key, value, 3, rpb=None)


PAIRS = {
    "1d": ((9,), 3, 1),
    "1d dilated": ((14,), 5, 2),
    "2d": ((6, 5), 5, 1),
    "2d dilated": ((11, 7), 3, 2),
}


def pair(axes: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if axes == 1:
        return functional.natten1dqkrpb, functional.natten1dav
    return functional.natten2dqkrpb, functional.natten2dav


@pytest.mark.parametrize("case", PAIRS)
def test_pair(case: str) -> None:
    """Scores entry by entry, the index of rpb among them, and the product."""
    grid, kernel, dilation = PAIRS[case]
    axes = len(grid)
    scores, product = pair(axes)
    query, key, value, rpb = draw(*[(2, 3, *grid, 4)] * 3, (3, *[2 * kernel - 1] * axes))
    got = scores(query, key, rpb, kernel, dilation)
    keys = torch.tensor(cells(grid, (kernel,) * axes, (dilation,) * axes))
    assert got.shape == (2, 3, *grid, kernel**axes)
    width = grid[-1]
    own = torch.arange(len(keys))[:, None]
    offsets = keys // width - own // width, keys % width - own % width
    index = [x // dilation + kernel - 1 for x in offsets]
    flat = [x.flatten(2, -2) for x in (query, key, value)]
    want = (flat[0][..., None, :] * flat[1][:, :, keys]).sum(-1) + rpb[(slice(None), *index[2 - axes :])]
    torch.testing.assert_close(got.flatten(2, -2), want)
    out = product(got, value, kernel, dilation).flatten(2, -2)
    want_out = (want[..., None] * flat[2][:, :, keys]).sum(-2)
    torch.testing.assert_close(out, want_out)
    pull = torch.randn_like(out)
    grads = [torch.autograd.grad(x, (query, key, value, rpb), pull) for x in (out, want_out)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_pair_with_additional_keys() -> None:
    grid, kernel = (5, 6), (3, 5)
    query, key, value, more_k, more_v = draw(*[(2, 3, *grid, 4)] * 3, *[(2, 3, 7, 4)] * 2)
    weights = functional.na2d_qk(query, key, kernel, additional_keys=more_k).softmax(-1)
    out = functional.na2d_av(weights, value, kernel, additional_values=more_v)
    last = [x.movedim(1, -2) for x in (query, key, value)]
    want, _ = expected(last, kernel, (1, 1), False, 1.0, (more_k.transpose(1, 2), more_v.transpose(1, 2)))
    torch.testing.assert_close(out.movedim(1, -2), want)


@pytest.mark.usefixtures("threads")
def test_gradients_of_the_pair_repeat() -> None:
    query, key, rpb = draw(*[(2, 4, 21, 23, 16)] * 2, (4, 9, 9), dtype=torch.float32)

    def grads() -> tuple[Tensor, ...]:
        weights = functional.natten2dqkrpb(query, key, rpb, 5, 2)  # torch's softmax alone depends on the threads
        return torch.autograd.grad(functional.natten2dav(weights, key, 5, 2).square().sum(), (query, key, rpb))

    torch.set_num_threads(1)
    first = grads()
    torch.set_num_threads(2)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, grads(), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: functional.na2d_qk(q, q, 4), "kernel_size: expected odd, got 4"),
        (
            lambda q: functional.na2d_qk(q, q, 3, is_causal=True),
            "is_causal: expected False, scores of causal windows are not here: na1d or na2d, got True",
        ),
        (lambda q: functional.na1d_qk(q, q, 3), "query: expected [B, heads, N, D], got (1, 2, 6, 7, 4)"),
        (lambda q: functional.na2d_qk(q, q[:, :1], 3), "key: expected shape (1, 2, 6, 7, 4), got (1, 1, 6, 7, 4)"),
        (
            lambda q: functional.natten2dqkrpb(q, q, q.new_zeros(2, 3, 3), 3, 1),
            "rpb: expected shape (2, 5, 5), got (2, 3, 3)",
        ),
        (lambda q: functional.na2d_av(q, q, 3), "attn: expected shape (1, 2, 6, 7, 9), got (1, 2, 6, 7, 4)"),
        (
            lambda q: functional.na2d_qk(q, q, 3, additional_keys=q.new_zeros(1, 2, 5, 3)),
            "additional_keys: expected shape (1, 2, 5, 4), got (1, 2, 5, 3)",
        ),
    ],
)
def test_errors_of_the_pair(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(torch.zeros(1, 2, 6, 7, 4))


class Separate(nn.Module):
    """The attention of DiNAT in transformers before 5, and of what copied it, in one and two dimensions."""

    def __init__(self, axes: int, p: float) -> None:
        super().__init__()
        self.num_attention_heads, self.kernel_size, self.dilation = 2, 3, 2
        self.rpb = nn.Parameter(torch.randn(2, *[5] * axes))
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        scores, product = pair(x.dim() - 2)
        query, key, value = (
            layer(x).unflatten(-1, (2, 4)).movedim(-2, 1) for layer in (self.query, self.key, self.value)
        )
        weights = self.dropout(scores(query / 2, key, self.rpb, 3, 2).softmax(-1))
        out = product(weights, value, 3, 2).movedim(1, -2).flatten(-2)
        return (out, weights) if output_attentions else (out,)


class Together(nn.Module):
    """NeighborhoodAttention2D of NATTEN up to 0.17, and 1D."""

    def __init__(self, axes: int, p: float) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation, self.scale = 2, (3,) * axes, (2,) * axes, 0.7
        self.rpb = nn.Parameter(torch.randn(2, *[5] * axes))
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.attn_drop, self.proj_drop = nn.Dropout(p), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        scores, product = pair(x.dim() - 2)
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).movedim(-2, 2)
        weights = self.attn_drop(scores(query * self.scale, key, self.rpb, 3, 2).softmax(-1))
        return self.proj_drop(self.proj(product(weights, value, 3, 2).movedim(1, -2).flatten(-2)))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("kind", [Separate, Together])
def test_fuse(kind: Callable[[int, float], nn.Module], axes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": kind(axes, 0.0), "b": nn.Linear(8, 8)}).double()
    (x,) = draw((2, *[7, 9][:axes], 8))

    def run() -> list[Tensor]:
        out = model["a"](x)
        out = out if isinstance(out, Tensor) else out[0]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *model["a"].parameters()])]

    before = run()
    replaced = fuse(model)
    assert replaced.names == ["a"]
    with monkeypatch.context() as patch:
        patch.setattr(functional, "_scores", None)  # nothing calls the pair any more
        for got, want in zip(run(), before, strict=True):
            torch.testing.assert_close(got, want)
    replaced.remove()
    assert torch.equal(run()[0], before[0])
    model["a"].is_causal = (False,) * (axes - 1) + (True,)
    assert not fuse(model).names


@pytest.mark.parametrize("kind", [Separate, Together])
def test_fuse_with_dropout(kind: Callable[[int, float], nn.Module]) -> None:
    """Drops as before when training, not at all otherwise."""
    torch.manual_seed(0)
    model, (x,) = kind(2, 0.5).double(), draw((2, 7, 9, 8))
    before = []
    for training in (True, False):
        torch.manual_seed(1)
        before.append(model.train(training)(x))
    fuse(model)
    for training, want in zip((True, False), before, strict=True):
        torch.manual_seed(1)
        torch.testing.assert_close(model.train(training)(x), want)
    if kind is Separate:
        torch.testing.assert_close(model(x, output_attentions=True), type(model).forward(model, x, True))


def test_compile() -> None:
    qkv = draw((1, 6, 7, 2, 4), (1, 6, 7, 2, 4), (1, 6, 7, 2, 4), dtype=torch.float32)

    def out(*qkv: Tensor) -> Tensor:
        weights = functional.na2d_qk(*(x.movedim(-2, 1) for x in qkv[:2]), 3).softmax(-1)
        return na2d(*qkv, 3) + functional.na2d_av(weights, qkv[2].movedim(-2, 1), 3).movedim(1, -2)

    torch.testing.assert_close(torch.compile(out, fullgraph=True, backend="aot_eager")(*qkv), out(*qkv))


@pytest.mark.parametrize("case", CASES)
def test_equals_natten(case: str) -> None:
    natten = pytest.importorskip("natten", minversion="0.21")
    grid, kernel, dilation, causal = CASES[case]
    shapes = (2, *grid, 4, 16), *[(2, *grid, 2, 16)] * 2, *[(2, 3, 2, 16)] * 2
    *qkv, more_k, more_v = (x.detach() for x in draw(*shapes, dtype=torch.float32))
    more = {"additional_keys": more_k, "additional_values": more_v}
    options: dict[str, Any] = {"dilation": dilation, "is_causal": causal, "return_lse": True, "scale": 0.2}
    ours, theirs = ([na1d, na2d][len(grid) - 1], [natten.na1d, natten.na2d][len(grid) - 1])
    for added in ({}, more):
        got = ours(*qkv, kernel, **options, **added)
        want = theirs(*qkv, kernel, **options, **added)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


INSTALLED = """
    import sys
    import torch
    {before}
    import cogview_ops.integrations.natten.install
    {after}
    from transformers import DinatConfig, DinatForImageClassification
    from cogview_ops.integrations.natten import functional

    torch.manual_seed(0)
    config = DinatConfig(
        embed_dim=8, depths=[1, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1], [1, 2]], num_labels=2,
        drop_path_rate=0.0, layer_scale_init_value=1.0
    )
    model = DinatForImageClassification(config)
    for name, x in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(x)
    x, labels = torch.randn(4, 3, 32, 48), torch.tensor([0, 1, 1, 0])
    model.double().eval()
    fused, pair = model(x.double()), model(x.double(), output_attentions=True)
    assert pair.attentions[0].shape == (4, 2, 8, 12, 9), pair.attentions[0].shape
    torch.testing.assert_close(fused.logits, pair.logits)
    assert fused.logits.std() > 1e-3
    model.float().train()
    functional._scores = None  # it trains without the pair
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3, losses
    print("trained")
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("import transformers.models.dinat.modeling_dinat; transformers.utils.is_natten_available()", ""),
        ("import transformers", "import natten; natten.na2d, natten.functional.na2d"),
    ],
    ids=["first", "after the model's file", "after transformers"],
)
def test_dinat(before: str, after: str) -> None:
    pytest.importorskip("transformers")
    if "modeling_dinat" in before and importlib.util.find_spec("natten") is not None:
        pytest.skip("with today's NATTEN that file cannot be imported first")
    assert run(INSTALLED.format(before=before, after=after)).endswith("trained\n")


def test_install_beside_natten(tmp_path: Path) -> None:
    """What NATTEN has stays its own; what it has dropped is there again."""
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "functional.py").write_text("na2d = 'theirs'")
    code = """
        import cogview_ops.integrations.natten.install
        import natten.functional
        from cogview_ops.integrations.natten import functional
        assert natten.functional.na2d == "theirs"
        assert natten.functional.natten2dqkrpb is functional.natten2dqkrpb
        print("both")
    """
    assert run(code, tmp_path).endswith("both\n")


def test_install_without_natten() -> None:
    code = """
        import importlib.util, sys
        sys.modules["natten"] = None
        assert importlib.util.find_spec("natten") is None
        import cogview_ops.integrations.natten.install
        from natten import na1d, na2d
        from natten.functional import na2d_qk, natten1dav, natten2dav
        assert importlib.util.find_spec("natten").name == "natten"
        assert "transformers" not in sys.modules
        print("ours")
    """
    assert run(code).endswith("ours\n")


def run(code: str, *first: Path) -> str:
    """What it prints, in a process of its own: what it imports stays there."""
    path = os.pathsep.join([*map(str, first), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout
