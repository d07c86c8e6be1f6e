"""The steps of both kinds of norm with everything they can do: truth over pairs of options, formulas of torch's own,
what is left out of the backward, arguments."""

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    Case,
    assert_bitwise,
    assert_true,
    device_of,
    each_impl,
    every_isa,
    refused,
    results,
    run,
    skip_uncomputable,
    spread_out,
)
from torch import Tensor

from cogview_ops import layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm

WIDTHS = (1, 3, 37, 2304, 2560, 4096, 5376)
KINDS = {"layer_norm": (layer_norm, sandwich_layer_norm), "rms_norm": (rms_norm, sandwich_rms_norm)}
AXES: dict[str, tuple[Any, ...]] = {
    "norms": ("both", "pre", "post"),
    "weight_offset": (0.0, 1.0, 0.3),
    "scale": (0.5, 1.0, (2, 1, 1), (1, 3, 1), (2, 3, 1)),
    "dropout": ("none", "before", "after", "samples"),
    "missing": ("none", "weights", "biases"),
    "wide": ((), ("residual",), ("residual", "weights"), ("weights",)),
    "round_before_weight": (False, True),  # of RMSNorm
    "relax": (None, "row", "tensor"),  # of LayerNorm
}


def pairwise(axes: dict[str, tuple[Any, ...]]) -> Iterable[dict[str, Any]]:
    """Choices in which any two values of two axes come together: each begins with a pair that is missing, and takes
    what makes most others."""
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b]}

    def new(chosen: dict[str, Any], axis: str, x: Any) -> int:
        return sum(((a, y), (axis, x)) in missing or ((axis, x), (a, y)) in missing for a, y in chosen.items())

    while missing:
        chosen = dict(min(missing, key=repr))
        for axis in [axis for axis in axes if axis not in chosen]:
            chosen[axis] = max(axes[axis], key=partial(new, chosen, axis))
        missing -= set(itertools.permutations(chosen.items(), 2))
        yield chosen


def step(kind: str, width: int, norms: str, *, scale: Any = 1.0, dropout: str = "none", missing: str = "none",
         wide: tuple[str, ...] = (), **options: Any) -> Case:  # fmt: skip
    parts = ("post", "pre") if norms == "both" else (norms,)
    weights = [f"{part}_weight" for part in parts[: len(parts) - (missing == "weights")]]
    if kind == "layer_norm":
        weights += [f"{part}_bias" for part in parts if missing != "biases"]
        options.pop("round_before_weight", None)
    else:
        options.pop("relax", None)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("branch", "residual"), (2, 3, width))
    shapes |= dict.fromkeys(weights, (width,))
    if isinstance(scale, tuple):
        shapes["branch_scale"] = scale
    else:
        options["branch_scale"] = scale
    if dropout != "none":
        seed = torch.tensor([2**40 + width, 7]) if dropout == "samples" else 2**40 + width
        options |= {"dropout_p": 0.3, "dropout_after_norm": dropout == "after", "seed": seed}
    if width == 1:
        options["eps"] = 1e-2  # for the formula in float16
    label = f"{kind}-{width}-{norms}-{scale}-{dropout}-{missing}-{wide}-{options}"
    names = [name for x in wide for name in (weights if x == "weights" else [x])]
    return Case(f"sandwich_{kind}", label, shapes, {"norms": norms, **options}, tuple(names))


STEPS = {
    kind: [step(kind, width, **chosen) for width, chosen in zip(itertools.cycle(WIDTHS), pairwise(AXES))]
    for kind in KINDS
}


def test_pairs_are_there() -> None:
    chosen = list(pairwise(AXES))
    assert len(chosen) < 30
    for a, b in itertools.combinations(AXES, 2):
        assert {(x[a], x[b]) for x in chosen} == set(itertools.product(AXES[a], AXES[b]))


@each_impl("sandwich_layer_norm", STEPS["layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_steps(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)


@each_impl("sandwich_rms_norm", STEPS["rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_steps(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for case in (*STEPS["layer_norm"], *STEPS["rms_norm"]):
        assert_true(case, dtype, "cpp")


FORMULAS = {
    "layer_norm": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
    "rms_norm": lambda x, w, b, eps: F.rms_norm(x, x.shape[-1:], w, eps),
}


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", AXES["norms"])
def test_torch_formulas(kind: str, norms: str, impl: str) -> None:
    """h = residual + scale * N(branch), x = N(h) with torch's own norms, and all derivatives."""
    own = {"relax": None} if kind == "layer_norm" else {}
    case = step(kind, 20, norms, scale=(2, 1, 1), weight_offset=0.5, eps=0.1, **own)
    outputs, grads = run(case, case.inputs(torch.float64), impl)
    given = {name: x.requires_grad_() for name, x in case.inputs(torch.float64).items()}

    def norm(part: str, x: Tensor) -> Tensor:
        return FORMULAS[kind](x, given[f"{part}_weight"] + 0.5, given.get(f"{part}_bias"), 0.1)

    y = given["branch"] if norms == "pre" else norm("post", given["branch"])
    h = given["residual"] + given["branch_scale"] * y
    expected = (h,) if norms == "post" else (h, norm("pre", h))
    torch.testing.assert_close(outputs, expected)
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(x.shape, generator=generator).double() for x in expected]
    torch.testing.assert_close(list(grads.values()), list(torch.autograd.grad(expected, list(given.values()), seeds)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", AXES["norms"])
@pytest.mark.parametrize("dropout", AXES["dropout"])
def test_gradcheck(kind: str, norms: str, dropout: str) -> None:
    own = {"relax": None} if kind == "layer_norm" else {}
    case = step(kind, 5, norms, scale=(2, 3, 1), dropout=dropout, weight_offset=0.3, eps=0.1, **own)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64).values()]

    def call(*tensors: Tensor) -> Any:
        return case(dict(zip(case.shapes, tensors, strict=True)), "auto")

    assert torch.autograd.gradcheck(call, leaves)


def steps_of(norms: Iterable[str], **options: Any) -> list[Case]:
    return [step(kind, 37, which, **options) for kind in KINDS for which in norms]


@pytest.mark.parametrize("case", steps_of(("both", "pre", "post"), scale=(2, 3, 1)), ids=lambda case: case.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_of_zero(case: Case, dtype: torch.dtype) -> None:
    """A dropped path: h is the residual there, nothing comes back, and the scale has its gradient all the same."""
    inputs = case.inputs(dtype)
    inputs["branch_scale"][0, 1] = 0
    outputs, grads = run(case, inputs, "auto", rounding=dtype)
    _, truth = run(case, {name: x.double() for name, x in inputs.items()}, "reference", rounding=dtype)
    assert torch.equal(outputs[0][0, 1], inputs["residual"][0, 1])
    assert not grads["branch"][0, 1].any()
    expected = truth["branch_scale"][0, 1].to(dtype)
    assert expected.abs() > 0.1
    torch.testing.assert_close(grads["branch_scale"][0, 1], expected, rtol=2**-7, atol=1e-4)


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_rows_in_any_layout(impl: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch slices what it shards: the scale on the way in, it and the statistics on the way back."""
    case = step(kind, 20, "both", scale=(2, 3, 1))
    inputs = case.inputs(torch.float32, device_of(impl))
    expected = run(case, inputs, impl)
    spread = spread_out(monkeypatch, inputs["branch"].shape[:-1])
    _, grads = run(case, inputs, impl)
    with torch.no_grad():
        outputs = case(inputs, impl)
    assert len(spread) == (6 if kind == "layer_norm" else 4)
    assert_bitwise(list(outputs), list(expected[0]))
    assert_bitwise(list(grads.values()), list(expected[1].values()))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_alike(kind: str) -> None:
    """A number, one number for all rows, and what is not given; of any float dtype."""
    case = step(kind, 37, "both")
    inputs, op = case.inputs(torch.bfloat16), KINDS[kind][1]
    expected = op(**inputs, branch_scale=0.5)
    for scale in (torch.tensor(0.5), torch.full((1,), 0.5).double(), torch.full((2, 3, 1), 0.5).half()):
        assert_bitwise(list(op(**inputs, branch_scale=scale)), list(expected))
    assert_bitwise(list(op(**inputs, branch_scale=torch.ones(3, 1))), list(op(**inputs)))
    one_row = {name: x[0, 0] if x.dim() > 1 else x for name, x in inputs.items()}
    assert_bitwise(list(op(**one_row, branch_scale=torch.tensor(0.5))), [x[0, 0] for x in expected])


@pytest.mark.parametrize("case", steps_of(("both", "post")), ids=lambda case: case.label)
def test_dropout_after_the_norm(case: Case) -> None:
    """What is dropped of the norm's result is 0, the rest larger; without a post-norm both places are one."""
    inputs, op = case.inputs(torch.float64), KINDS[case.op.removeprefix("sandwich_")][1]
    inputs["residual"].zero_()
    dropped = {"dropout_p": 0.25, "seed": 3, "dropout_after_norm": True}
    (plain, *_), (h, *_) = case(inputs, "auto"), case._replace(options=case.options | dropped)(inputs, "auto")
    zero = h == 0
    assert 0.1 < zero.double().mean() < 0.4
    torch.testing.assert_close(h[~zero], plain[~zero] / 0.75)
    pre = {name: inputs[name] for name in ("branch", "residual")}
    before = op(**pre, norms="pre", dropout_p=0.25, seed=3)
    assert_bitwise(list(op(**pre, norms="pre", **dropped)), list(before))


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_offsets_do_not_matter(kind: str) -> None:
    norm, op = KINDS[kind]
    x = torch.randn(3, 20, dtype=torch.bfloat16)
    for offset in (1.0, 0.3, -7.0):
        assert torch.equal(norm(x, weight_offset=offset), norm(x))
        assert_bitwise(list(op(x, x, weight_offset=offset)), list(op(x, x)))
        # beside one that has it
        h, y = op(x, x, torch.full((20,), 1 - offset, dtype=torch.bfloat16), weight_offset=offset)
        expected = op(x, x, (torch.full((20,), 1 - offset).bfloat16().float() + offset))
        torch.testing.assert_close((h, y), expected, rtol=2**-7, atol=0.01)


# --- what is left out ------------------------------------------------------------------------------------------------


def saved(case: Case, inputs: dict[str, Tensor]) -> set[str]:
    """What is kept for the backward."""
    kept: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        kept.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = case(inputs, "auto")
    return {name for name, x in {**inputs, "h": outputs[0]}.items() if x.data_ptr() in kept}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed_is_kept(kind: str) -> None:
    def of(norms: str, wants: bool = True, **options: Any) -> set[str]:
        case = step(kind, 37, norms, **options)
        inputs = {
            name: x.requires_grad_(wants or "scale" not in name) for name, x in case.inputs(torch.float32).items()
        }
        return saved(case, inputs) & {"branch", "residual", "h"}

    assert of("both") == {"branch", "h"}
    assert of("post") == {"branch"}
    assert of("pre") == of("pre", dropout="before") == of("pre", wants=False, scale=(2, 1, 1)) == {"h"}
    assert of("pre", scale=(2, 1, 1)) == {"branch", "h"}


@pytest.mark.parametrize("kind", KINDS)
def test_one_gradient_is_not_written_twice(kind: str) -> None:
    """The branch's is the residual's where it is just added, and the residual's h's where there is no pre-norm."""

    def gradients(norms: str, which: list[int], **options: Any) -> tuple[Tensor, ...]:
        case = step(kind, 37, norms, **options)
        inputs = {name: x.requires_grad_() for name, x in case.inputs(torch.float32).items()}
        outputs = case(inputs, "auto")
        ones = [torch.ones_like(outputs[k]) for k in which]
        grads = torch.autograd.grad([outputs[k] for k in which], [inputs["branch"], inputs["residual"]], ones)
        return *grads, ones[0]

    for which in ([0, 1], [1], [0]):
        branch, residual, _ = gradients("pre", which)
        assert branch.data_ptr() == residual.data_ptr()
    for norms in ("both", "pre", "post"):
        _, residual, dh = gradients(norms, [0], scale=0.5)
        assert residual.data_ptr() == dh.data_ptr()
    branch, residual, _ = gradients("pre", [0, 1], scale=0.5)
    torch.testing.assert_close(branch, residual / 2)


@each_impl("sandwich_layer_norm", [*STEPS["layer_norm"][:7]])
def test_one_output_alone_layer_norm(impl: str, case: Case) -> None:
    for k in range(1 + (case.options["norms"] != "post")):
        assert_true(case, torch.float32, impl, [k])


@each_impl("sandwich_rms_norm", [*STEPS["rms_norm"][:7]])
def test_one_output_alone_rms_norm(impl: str, case: Case) -> None:
    for k in range(1 + (case.options["norms"] != "post")):
        assert_true(case, torch.float32, impl, [k])


# --- memory, threads -------------------------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_their_parts(isa: str, dtype: torch.dtype) -> None:
    """Results beyond the caches are written around them, in lines that rows of this width begin and end within."""
    width, rows, part = 1025, 4200, 1300
    for kind, norms in (("rms_norm", "both"), ("rms_norm", "pre"), ("layer_norm", "post")):
        case = step(kind, width, norms, scale=0.5)
        shapes = {k: (rows, width) if len(s) > 1 else s for k, s in case.shapes.items()}
        inputs = case._replace(shapes=shapes).inputs(dtype)

        def sliced(chosen: slice, case: Case = case, inputs: dict[str, Tensor] = inputs) -> list[Tensor]:
            given = {k: x[chosen].requires_grad_() if x.dim() > 1 else x for k, x in inputs.items()}
            outputs = case(given, "cpp")
            seeds = [inputs["residual"][chosen].detach()] * len(outputs)
            return [*outputs, *torch.autograd.grad(outputs, [given["branch"], given["residual"]], seeds)]

        whole = sliced(slice(None))
        assert whole[0].nbytes > 2**23
        for start in range(0, rows, part):
            chosen = slice(start, start + part)
            assert_bitwise([x[chosen] for x in whole], sliced(chosen))


@pytest.mark.parametrize("case", [STEPS[kind][k] for kind in KINDS for k in (1, 3)], ids=lambda case: case.label)
def test_repeats_with_any_number_of_threads(case: Case, threads: None) -> None:
    case = case._replace(shapes={k: (700, 37) if len(s) > 1 else (37,) for k, s in case.shapes.items()})
    case.shapes.pop("branch_scale", None)
    inputs, found = case.inputs(torch.float32), []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        found.append(results(case, inputs, "cpp"))
    for other in found[1:]:
        assert_bitwise(found[0], other)


# --- arguments -------------------------------------------------------------------------------------------------------

X = torch.ones(5, 20)
WRONG: list[tuple[str, Any, type[Exception]]] = [
    ("norms", "all", ValueError),
    ("norms", None, ValueError),
    ("norms", True, ValueError),
    ("weight_offset", float("nan"), ValueError),
    ("weight_offset", "1", TypeError),
    ("branch_scale", float("inf"), ValueError),
    ("branch_scale", None, TypeError),
    ("branch_scale", torch.ones(5), ValueError),
    ("branch_scale", torch.ones(20), ValueError),
    ("branch_scale", torch.ones(1, 5, 1), ValueError),
    ("branch_scale", torch.ones(5, 1, dtype=torch.int64), TypeError),
    ("branch_scale", torch.ones(5, 1, device="meta"), ValueError),
    ("dropout_after_norm", 1, TypeError),
    ("dropout_after_norm", None, TypeError),
    ("pre_weight", torch.ones(19), ValueError),
    ("impl", "fast", ValueError),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_wrong_arguments(kind: str, name: str, value: Any, error: type[Exception]) -> None:
    arguments = {"branch": X, "residual": X, "post_weight": X[0], "pre_weight": X[0]}
    refused(KINDS[kind][1], arguments, name, value, error)


@pytest.mark.parametrize("kind", KINDS)
def test_messages(kind: str) -> None:
    for call, message in (
        ({"norms": "pre", "post_weight": X[0]}, "post_weight: expected None with norms='pre', got one"),
        ({"norms": "post", "pre_weight": X[0]}, "pre_weight: expected None with norms='post', got one"),
        ({"norms": "all"}, "norms: expected 'both' or 'pre' or 'post', got 'all'"),
        (
            {"branch_scale": torch.ones(5)},
            "branch_scale: expected a number, or a tensor that broadcasts to (5, 1), got shape (5,)",
        ),
        ({"dropout_after_norm": 0}, "dropout_after_norm: expected True or False, got 0"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            KINDS[kind][1](X, X, **call)
        assert str(caught.value) == message
    if kind == "layer_norm":
        with pytest.raises(ValueError, match=r"^pre_bias: expected None with norms='post', got one$"):
            sandwich_layer_norm(X, X, pre_bias=X[0], norms="post")
