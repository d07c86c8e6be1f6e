"""The kernels on tiles with one thing broken each, and a test that each must fail.

All faults are in one library, where `cogview_broken` chooses one of them: an expression, between « and », gives way to
another one. As a program, preloaded with that library: which of its arguments' tests fail with which fault.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

LOCAL, THREE = "tests/operators/test_local_attention_2d.py", "tests/operators/test_three_region_attention.py"
VARLEN = "tests/operators/test_three_region_varlen.py"
TILES, PATCHES, GRAD_KEY = "local_tiles.cpp", "local_patches.h", "tile_grad_key.h"
THREE_TILES, LINEAR_TILES = "three_region_attention.cpp", "linear_decode.cpp"
# tests that must fail
SETS = f"{LOCAL}::test_every_instruction_set -k bfloat16"
MASK = f"{LOCAL}::test_mask_across_tiles -k cpp-torch.bfloat16"
PREFIX = f"{LOCAL}::test_coarse_and_prefix_masks_exhaustively -k cpp-torch.bfloat16"
REGIONS = f"{THREE}::test_every_instruction_set -k bfloat16"
REGION_MASK = f"{THREE}::test_mask_across_tiles -k cpp-torch.bfloat16"
LOCAL_RACE = f"{LOCAL}::test_phases_that_skip_coarse_keys_share_no_query -k bfloat16"
THREE_RACE = f"{THREE}::test_groups_of_keys_share_no_query -k bfloat16"
LOCAL_HEADS = f"{LOCAL}::test_many_heads_share_packed_tiles -k bfloat16"  # on poisoned memory
PACKED = f"{VARLEN}::test_mask_across_tiles -k cpp-torch.bfloat16"
LEFTPAD = "tests/operators/test_three_region_leftpad.py::test_decode_of_left_padded_caches_equals_varlen -k bfloat16"
LINEAR = "tests/operators/test_linear_decode.py::test_truth -k bfloat16"
THREE_HEADS = f"{THREE}::test_many_heads_share_packed_tiles -k bfloat16"


class Fault(NamedTuple):
    what: str
    file: str  # of csrc/cpu
    text: str  # what is there once, with « and » around an expression
    instead: str  # of that expression
    test: str  # must fail


FAULTS = [
    Fault("linear: the first rows again", LINEAR_TILES, "tile_products(a, «row / kRows», n)", "0", LINEAR),
    Fault("linear: no bias", LINEAR_TILES, "sums[r] + «bias», count", "Vec<float>{}", LINEAR),
    # local attention, phase by phase
    Fault("forward: every prefix key", TILES, "mask[r] = «valid»;", "~uint64_t(0)", PREFIX),
    Fault("forward: the next query's window", TILES, "«phase.y.window(y)»", "phase.y.window(y + 1)", MASK),
    Fault("forward: no tile beyond the queries", TILES, "«phase.y.windows(rows.y)»", "rows.y", MASK),
    Fault("forward: no order", TILES, "«a.window.raster_causal ? Order::columns_before : Order::none»", "Order::none",
          MASK),
    Fault("forward: no bias of the prefix", TILES, "step(mask, «a.prefix.bias»)", "0.0", PREFIX),
    Fault("prepare: no delta", TILES,
          "«set_delta<T>(a, plan.delta, b, h, index, it.patch.count())»", "void()", MASK),
    Fault("prepare: sums of dq as they were", TILES,
          "sizeof(Acc<T>) * «dq_tile_size(a)»", "0", LOCAL_HEADS),
    Fault("meet_queries: one head of a group", TILES, "; h < «(kv + 1) * heads»; ++h) {", "kv * heads + 1", SETS),
    Fault("meet_queries: another patch's dq", TILES, "dq_patch<T>(plan, b, h, «number_of(i)»)", "0", MASK),
    Fault("grad_prefix: every key", TILES, "«valid >> r & 1» ? queries.there", "true", PREFIX),
    Fault("grad_prefix: queries of earlier chunks too", TILES,
          "from = «chunk * plan.query_patches() / plan.prefix_chunks»", "0", SETS),
    Fault("grad_prefix: dv for dk", TILES, "«group.owners[o].dk(r)», d", "group.owners[o].dv(r)", SETS),
    Fault("finish_prefix: the first chunk", TILES, "chunk < «plan.prefix_chunks»;", "1", SETS),
    Fault("finish_prefix: no scale", TILES, "write_row(dk, «Acc<T>(a.scale)»", "Acc<T>(1)", SETS),
    Fault("grad_coarse: the first phase", TILES, "0, «phases(a.window)»", "1", SETS),
    Fault("grad_coarse: no bias", TILES, "seen, «keys.bias»", "0.0", SETS),
    Fault("grad_patches: seen by the next key's queries", TILES, "«axes.y.seen(y)»", "axes.y.seen(y + 1)", MASK),
    Fault("grad_patches: of a group, what sees the first patch", TILES, "all = «seen_by(bounds(own))»", "by[0]",
          LOCAL_HEADS),
    Fault("grad_key: no order", TILES, "«a.window.raster_causal ? Order::columns_after : Order::none»", "Order::none",
          MASK),
    Fault("grad_key: rows of dk on each other", TILES, "index[r] * «keys.dk.stride[2]»", "0", MASK),
    Fault("finish: no scale", TILES, "(dq, «Acc<T>(a.scale)»", "Acc<T>(1)", SETS),
    Fault("finish: rows on each other", TILES, "«a.dq.stride[2]»", "0", MASK),
    Fault("colors: all groups at once", "local_attention_2d_plan.cpp", "return «most»;", "Grid{1, 1}", LOCAL_RACE),
    # its masks
    Fault("masks: every line", PATCHES, "Order::none ? «down & across[i]»", "across[i]", MASK),
    Fault("masks, columns_before: what comes in the line", PATCHES, "«x + 1 < seen.hi ? x + 1 : seen.hi»", "seen.hi",
          MASK),
    Fault("masks, columns_after: what was in the line", PATCHES, "«x > seen.lo ? x : seen.lo»", "seen.lo", MASK),
    Fault("masks, columns_before: lines below", PATCHES, "lines({seen.lo, «y < seen.hi ? y : seen.hi»})", "seen.hi",
          MASK),
    Fault("masks, columns_after: lines above", PATCHES, "lines({«y + 1 > seen.lo ? y + 1 : seen.lo», seen.hi})",
          "seen.lo", MASK),
    Fault("masks: none where some row sees all", PATCHES, "«all == ~uint64_t(0)» ? nullptr", "all != 0", MASK),
    Fault("prefix_bits: the first sample's", PATCHES, "«b * prefix.len» + first", "0", PREFIX),
    Fault("prefix_bits: beyond the prefix", PATCHES, "return range_bits(0, «n»)", "64", SETS),
    # three-region attention, phase by phase
    Fault("prepare: no delta", THREE_TILES,
          "«set_delta<T>(a, plan.delta, it.s.b, it.h, index, it.rows(o, index))»", "void()", REGION_MASK),
    Fault("prepare: sums of dq as they were", THREE_TILES, "sizeof(Acc<T>) * «dq_tile_size(a)»", "0", THREE_HEADS),
    Fault("grad_pivot: in the window too", THREE_TILES,
          "seen[o].lo[r] = «geometry.window_end(index[r] - s.first_key)»", "index[r] - s.first_key", REGION_MASK),
    Fault("grad_pivot: from the begin of all", THREE_TILES, "window_end(index[r] - «s.first_key»)", "0", PACKED),
    Fault("grad_pivot: queries of earlier chunks too", THREE_TILES, "if («from < chunk.begin») from", "false", REGIONS),
    Fault("grad_pivot: no bias", THREE_TILES, "from, chunk.end, «a.pivot_bias»", "0.0", REGION_MASK),
    Fault("grad_key: beyond the window", THREE_TILES, "«geometry.window_end(seen[o].lo[r])»", "s.queries",
          REGION_MASK),
    Fault("grad_key: in another sequence", THREE_TILES, "seen[o].lo[r] = index[r] - «s.first_key»", "0", PACKED),
    Fault("grad_key: queries before the key", THREE_TILES, "range_bits(«x.lo[r] - i»", "0", REGION_MASK),
    Fault("grad_key: the first chunk of pivots' dk", THREE_TILES,
          "owner.dk(r)[c] += «pivot_part<T>(plan.pivot_dk, plan, s, kv, chunk, p)[c]»",
          "(chunk ? 0 : pivot_part<T>(plan.pivot_dk, plan, s, kv, chunk, p)[c])", REGIONS),
    Fault("grad_key: no pivots' dv", THREE_TILES,
          "«pivot_part<T>(plan.pivot_dv, plan, s, kv, chunk, p)[c]»", "0", REGION_MASK),
    Fault("dq: of the sequence before", THREE_TILES, "(«s.tiles_before» * a.heads", "0", PACKED),
    Fault("dk of pivots: of the sequence before", THREE_TILES, "(«s.sums_before» + (kv", "0", PACKED),
    Fault("finish: no scale", THREE_TILES, "«Acc<T>(a.scale)», index, rows", "Acc<T>(1)", REGIONS),
    Fault("decode: from the begin of the cache", "three_region_attention_plan.cpp",
          "- a.seqlen_q - «s.first_key»", "0", LEFTPAD),
    Fault("decode: one row's mask", THREE_TILES, "masks[r] = «mask[r % n]»", "mask[0]",
          f"{THREE}::test_decode_equals_forward -k bfloat16"),
    Fault("colors: all groups at once", "three_region_attention_plan.cpp",
          "«1 + ceil_div(window, plan.key_group * kTile)»", "1", THREE_RACE),
    Fault("decode: the first row's query", "narrow.h", "load_pairs(q_ + «r» * ld_ + j), k)", "0",
          f"{THREE}::test_decode_equals_forward -k bfloat16"),
    # the engine of both
    Fault("step: a masked key's gradient", GRAD_KEY, "ds[i] = select_bits<A>(«mask[r] >> (c + i * l)»", "~uint64_t(0)",
          MASK),
    Fault("step: score gradients of the tile before", GRAD_KEY, "if («x.lo > lo») clear", "false", THREE_HEADS),
    Fault("dq: half of the keys", GRAD_KEY, "row < «kTile»; row", "32", MASK),
    Fault("float16: one part of B", "tile_gemm.h", "ib < «parts - i»", "1",
          f"{THREE}::test_every_instruction_set -k float16"),
    Fault("float16: one part of A", "operands.h", "out + i * plane + j, «part[i]»", "part[0]",
          f"{THREE}::test_every_instruction_set -k float16"),
    Fault("forward: rows that saw nothing yet", "tile_forward.h", "«hsum(total_[r]) == 0»", "false",
          f"{THREE}::test_scores_that_grow_on_the_way -k bfloat16"),
]  # fmt: skip


def copy(csrc: Path, to: Path) -> None:
    """What of csrc has a fault or includes one, with all of them."""
    plans = ("linear_decode_plan.cpp", "local_attention_2d_plan.cpp", "three_region_attention_plan.cpp")
    for path in [
        *csrc.glob("*.h"),
        *(csrc / "cpu").glob("*.h"),
        *(csrc / "cpu" / x for x in (TILES, THREE_TILES, LINEAR_TILES, *plans)),
    ]:
        text = path.read_text()
        for number, fault in enumerate(FAULTS, 1):
            if fault.file == path.name:
                text = broken(text, fault, number)
        if text != path.read_text():
            text = 'extern "C" int cogview_broken;\n' + text
        if path.name == TILES:
            text += "int cogview_broken = 0;\n"
        target = to / path.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def broken(text: str, fault: Fault, number: int) -> str:
    before, old, after = fault.text.replace("»", "«").split("«")
    assert text.count(before + old + after) == 1, f"{fault.file}: {text.count(before + old + after)} times {fault.text}"
    new = f"(cogview_broken == {number} ? ({fault.instead}) : ({old}))"
    return text.replace(before + old + after, before + new + after)


def fails(test: str) -> bool:
    code = pytest.main(["-x", "--tb=line", "-qq", *test.split()])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), f"{test}: {code}"
    return code == pytest.ExitCode.TESTS_FAILED


if __name__ == "__main__":
    number = ctypes.c_int.in_dll(ctypes.CDLL(None), "cogview_broken")
    chosen = [int(x) for x in sys.argv[2:]] or range(1, len(FAULTS) + 1)
    unfounded = [test for test in dict.fromkeys(FAULTS[k - 1].test for k in chosen) if fails(test)]
    missed = []
    for k in chosen:
        number.value = k
        if not fails(FAULTS[k - 1].test):
            missed.append(k)
    Path(sys.argv[1]).write_text(json.dumps({"unfounded": unfounded, "missed": missed}))
