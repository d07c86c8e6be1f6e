"""Decoding of three-region attention in left-padded caches: equal to the packed form, arguments."""

import math
from typing import Any

import pytest
import torch
from cases import BY_LABEL, varlen
from common import DTYPES, assert_as_good_as, device_of, each_impl, every_isa, interpreted, skip_slow, skip_uncomputable
from test_three_region_varlen import GOOD, spans

from cogview_ops import three_region_attention_decode


@each_impl("three_region_attention_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 70])
def test_decode_of_left_padded_caches_equals_varlen(impl: str, dtype: torch.dtype, steps: int) -> None:
    """Token by token or several at once, of which some may stand in the padding and give 0 and -inf; what lies before
    the sequences and behind them is NaN."""
    skip_uncomputable(dtype, impl)
    skip_slow(impl, unless=(steps, dtype) == (3, torch.float16))
    lengths, capacity, device = (130, 41, 90), 150, device_of(impl)
    case = varlen("leftpad", lengths, 16, 16, 2, heads=4, kv_heads=2, pivot_bias=0.4)
    options = {k: case.options[k] for k in ("block_size", "window_blocks", "pivot_bias")}
    inputs = case.inputs(dtype, device)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")
    formula, pivots = case(inputs, "reference"), case.options["pivots"].to(device)
    for end in (steps, 100, 139) if not interpreted(impl) else (100,):  # the cache is filled up to here
        begins = [139 - length for length in lengths]
        caches = [x.new_full((3, 2, capacity, 16), math.nan) for x in (inputs["key"], inputs["value"])]
        query = torch.randn(3, 4, steps, 16, device=device).to(dtype)
        expected = [
            (out.new_zeros(3, 4, steps, 16), lse.new_full((3, 4, steps), -math.inf)) for out, lse in (truth, formula)
        ]
        for b, (begin, (first, _)) in enumerate(zip(begins, spans(case), strict=True)):
            there = max(0, end - begin)  # tokens of the sequence
            for cache, name in zip(caches, ("key", "value"), strict=True):
                cache[b, :, begin : begin + there] = inputs[name][first : first + there].transpose(0, 1)
            new = min(steps, there)
            last = slice(first + there - new, first + there)
            query[b, :, steps - new :] = inputs["query"][last].transpose(0, 1)
            for (out, lse), whole in zip(expected, (truth, formula), strict=True):
                out[b, :, steps - new :] = whole[0][last].transpose(0, 1)
                lse[b, :, steps - new :] = whole[1][:, last]
        ends, pads = torch.full((3,), end, device=device), torch.tensor(begins, device=device).clamp(max=end)
        for impls in (impl, "reference"):
            outputs = three_region_attention_decode(
                query, *caches, pivots, ends, cache_leftpad=pads, **options, return_lse=True, impl=impls
            )
            for k, results in enumerate(zip(outputs, *expected, strict=True)):
                assert_as_good_as(*results, f"output {k}, cache up to {end}, {impls}")


@each_impl("three_region_attention_decode")
def test_no_padding_is_as_none_given(impl: str) -> None:
    case = BY_LABEL["three_region_decode"]
    inputs = case.inputs(torch.float32, device_of(impl))
    padded = case._replace(options={**case.options, "cache_leftpad": torch.zeros(2, dtype=torch.int32)})
    assert all(map(torch.equal, case(inputs, impl), padded(inputs, impl)))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padded_decode_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    case = BY_LABEL["three_region_decode_leftpad"]
    inputs = case.inputs(dtype)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")
    for results in zip(case(inputs, "cpp"), truth, case(inputs, "reference"), strict=True):
        assert_as_good_as(*results)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_padding(impl: str) -> None:
    cache = torch.zeros(2, 2, 12, 8)
    arguments = {"query": torch.zeros(2, 4, 2, 8), "key_cache": cache, "value_cache": cache, "pivots": GOOD[:2]}
    arguments |= {"cache_seqlens": torch.tensor([12, 9]), "impl": impl}  # type: ignore[dict-item]
    table: list[tuple[Any, type[Exception], str]] = [
        (3, TypeError, "a tensor, got int"),
        (torch.zeros(2), TypeError, "dtype int32 or int64, got float32"),
        (torch.zeros(1, dtype=torch.int32), ValueError, r"shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 1, dtype=torch.int32), ValueError, "1 dimensions"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "query's device cpu, got meta"),
        (torch.tensor([0, -1]), ValueError, r"places from 0 to cache_seqlens \[12, 9\], got \[0, -1\]"),
        (torch.tensor([0, 10]), ValueError, r"places from 0 to cache_seqlens \[12, 9\], got \[0, 10\]"),
    ]
    for value, error, text in table:
        with pytest.raises(error, match=f"^cache_leftpad: expected .*{text}"):
            three_region_attention_decode(**arguments, cache_leftpad=value)  # type: ignore[arg-type]
