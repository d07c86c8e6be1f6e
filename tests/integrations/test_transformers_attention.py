"""cogview_three_region in transformers' models: the pattern, whole models, generation, packing, graphs."""

import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from small_models import additive, assert_close, seen, small, tokens  # noqa: E402

from cogview_ops.integrations.transformers import block_pivots, register  # noqa: E402

NAME = "cogview_three_region"
PATTERN = {"block_size": 4, "window_blocks": 2}
LENGTH = 37


@pytest.fixture(autouse=True)
def registered() -> None:
    register(**PATTERN)


def pivots(length: int) -> Tensor:
    """Of the registered pattern."""
    return block_pivots(length, block_size=4, pivots_per_block=1)


def dense(length: int) -> Tensor:
    return seen(length, pivots(length), **PATTERN)


def of_eager(model: Any, ids: Tensor, **more: Any) -> Any:
    """What eager attention makes of one sequence under the same mask."""
    model.set_attn_implementation("eager")
    length = ids.shape[1]
    mask = additive(dense(length))
    given = {"full_attention": mask, "sliding_attention": mask} if model.config.model_type == "gemma3_text" else mask
    out = model(ids, attention_mask=given, position_ids=torch.arange(length)[None], use_cache=False, **more)
    model.set_attn_implementation(NAME)
    return out


@torch.no_grad()
def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """Token by token, without cache, by eager attention."""
    for _ in range(new):
        ids = torch.cat([ids, of_eager(model, ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def ours(kind: str = "Llama", **more: Any) -> Any:
    model = small(kind, **more)
    model.set_attn_implementation(NAME)
    return model


def left_padded(*rows: Tensor) -> dict[str, Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


FULL = {"layer_types": ["full_attention"] * 2}
MODELS: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen3": {}, "GPT2": {}, "Gemma3": FULL, "DeepseekV3": {}}
each_model = pytest.mark.parametrize("kind", MODELS)


# the pattern


def hashed(x: int) -> int:
    """Wellons' hash-prospector, in Python's integers."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 15)


def test_default_pivots() -> None:
    """The first block, then exactly k of each block, at most one in each k-th part, ascending."""
    at = block_pivots(1024, block_size=128, pivots_per_block=8)
    assert at.tolist()[:128] == list(range(128))
    assert len(at) == 128 + 7 * 8
    parts = at[128:] // 16
    assert parts.tolist() == list(range(8, 64))
    assert (at[128:] % 16).tolist() == [hashed(part) % 16 for part in range(8, 64)]
    assert len({int(p) % 16 for p in at[128:]}) == 16  # everywhere in a part


def test_default_pivots_of_odd_blocks() -> None:
    at = block_pivots(70, block_size=7, pivots_per_block=3)
    offsets = (at[7:] % 7).view(-1, 3)
    assert [set(column.tolist()) for column in offsets.T] == [{0, 1}, {2, 3}, {4, 5, 6}]


def test_default_pivots_do_not_depend_on_the_length() -> None:
    everything = block_pivots(104, block_size=8, pivots_per_block=2)
    for length in range(1, 100):
        part = block_pivots(length, block_size=8, pivots_per_block=2)
        assert part[part >= 0].tolist() == [i for i in everything.tolist() if i < length]
        assert (part[part >= 0].numel() == part.numel()) or (part < 0).nonzero()[0] == (part >= 0).sum()


def sees(batch: int, length: int, keys: int | None = None, **given: Any) -> Tensor:
    """Bool `[B, length, keys]`: whose value reaches whom, by the attention function itself."""
    keys = length if keys is None else keys
    attention = transformers.AttentionInterface()[NAME]
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query, key = torch.zeros(batch, 2, length, keys), torch.zeros(batch, 1, keys, keys)
    out, weights = attention(module, query, key, torch.eye(keys).expand(batch, 1, -1, -1), **given)
    assert weights is None
    assert out.shape == (batch, length, 2, keys)
    count = (out > 0).sum(-1, keepdim=True)
    torch.testing.assert_close(out * count, (out > 0).float())  # a mean over what is seen
    assert torch.equal(out[:, :, 0], out[:, :, 1])
    return out[:, :, 0] > 0


def mask(batch: int, length: int, **described: Any) -> Tensor | None:
    given = {"batch_size": batch, "q_length": length, "kv_length": length, **described}
    return transformers.AttentionMaskInterface()[NAME](**given)


def test_pattern_of_rows() -> None:
    assert mask(2, LENGTH) is None
    assert torch.equal(sees(2, LENGTH, attention_mask=None), dense(LENGTH).expand(2, -1, -1))


@pytest.mark.parametrize("side", ["left", "right", "both", "none", "all"])
def test_pattern_of_padding(side: str) -> None:
    """Entry by entry: tokens of the sequence see no padding, and each other as without."""
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, : 9 if side in ("left", "both") else LENGTH if side == "all" else 0] = False
    real[1, LENGTH - (7 if side in ("right", "both") else 0) :] = False
    at = sees(2, LENGTH, attention_mask=mask(2, LENGTH, attention_mask=real))
    for row, where in zip(at, real, strict=True):
        if where.any():
            assert torch.equal(row[where][:, where], dense(int(where.sum())))
        assert not row[where][:, ~where].any()


@pytest.mark.parametrize("said", ["position_ids", "cu_seq_lens", "both", "beside a cache"])
def test_pattern_of_packed_sequences(said: str) -> None:
    lengths = [13, 1, 23]
    expected = torch.block_diag(*(dense(n).float() for n in lengths)) > 0
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    given: dict[str, Any] = {"attention_mask": None}
    if said in ("position_ids", "both"):
        packed = transformers.masking_utils.find_packed_sequence_indices(positions)
        same = transformers.masking_utils.packed_sequence_mask_function(packed)
        causal = transformers.masking_utils.causal_mask_function
        remapped = transformers.masking_utils.remap_positions_for_packed_sequence(causal, positions)
        both = transformers.masking_utils.and_masks(remapped, same)
        given["attention_mask"] = mask(1, LENGTH, mask_function=both, allow_is_causal_skip=False)
    if said in ("cu_seq_lens", "both"):
        cu_seqlens = torch.tensor([0, 13, 14, 37], dtype=torch.int32)
        given |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 23, "max_length_k": 23}
    if said == "beside a cache":
        given["position_ids"] = positions
    assert torch.equal(sees(1, LENGTH, **given)[0], expected)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("new", [1, 5])
def test_pattern_of_decoding(new: int, padding: int) -> None:
    """The last tokens of a cache that has room for more."""
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, :padding] = False
    of = {"kv_length": 50, "q_offset": torch.tensor(LENGTH - new), "attention_mask": real}
    at = sees(2, new, 50, attention_mask=mask(2, new, **of))
    for row, where in zip(at, real, strict=True):
        assert torch.equal(row[:, :LENGTH][:, where], dense(int(where.sum()))[-new:])
        assert not row[:, LENGTH:].any()
        assert not row[:, :LENGTH][:, ~where].any()


# whole models


@each_model
def test_logits_and_gradients_are_those_of_eager_attention(kind: str) -> None:
    model, ids = ours(kind, **MODELS[kind]), tokens(LENGTH)[0]
    results = []
    for run in (model, functools.partial(of_eager, model)):
        out = run(ids, labels=ids)
        results.append([out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))])
    assert_close(*results)


@each_model
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_is_greedy_eager_attention(kind: str, cache: str | None) -> None:
    model, ids = ours(kind, **MODELS[kind]), tokens(21)[0]
    out = model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation=cache)
    assert torch.equal(out, greedy(model, ids, 20))
    model.set_attn_implementation("sdpa")
    assert not torch.equal(out, model.generate(ids, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_generate_of_a_left_padded_batch_is_that_of_each_row(kind: str, cache: str | None) -> None:
    model, rows = ours(kind), tokens(30, 4, 17)
    given = left_padded(*rows)
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    out = model.generate(**given, cache_implementation=cache, **how)
    for whole, row in zip(out, rows, strict=True):
        assert torch.equal(whole[30 - row.shape[1] :], model.generate(row, **how)[0])


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_ways_to_generate(how: dict[str, Any]) -> None:
    """Reordered caches, several new tokens against a cache, caches that lose tokens: as without a cache."""
    model, ids = ours(), tokens(26)[0]
    how = {**how, "max_new_tokens": 12, "do_sample": False}
    uncached = {k: v for k, v in how.items() if k == "num_beams" or k.startswith(("max", "do"))}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **uncached))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_conversation_goes_on_in_its_cache(static: bool) -> None:
    model, ids = ours(), torch.cat(tokens(LENGTH, LENGTH))
    cache = transformers.StaticCache(model.config, max_cache_len=50) if static else transformers.DynamicCache()
    parts = [model(part, cache=cache, use_cache=True).logits for part in ids.split([12, 1, 16, 8], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_right_padding_changes_nothing() -> None:
    model, (long, short) = ours(), tokens(30, 11)
    ids = torch.cat([long, torch.nn.functional.pad(short, (0, 19))])
    logits = model(ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(logits[:1], model(long).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:, :11], model(short).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "left-padded"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_training_step_of_several_sequences_is_that_of_each(padded: bool, use_cache: bool) -> None:
    model, rows = ours().train(), tokens(19, 1, 34, 8)
    parameters = list(model.parameters())
    total = sum(row.shape[1] - 1 for row in rows)

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") / total

    expected = torch.autograd.grad(sum(loss(model(row).logits, row) for row in rows), parameters)
    if padded:
        logits = model(**left_padded(*rows), use_cache=use_cache).logits
        parts = [part[None, -row.shape[1] :] for part, row in zip(logits, rows, strict=True)]
    else:
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        logits = model(torch.cat(rows, 1), position_ids=positions, use_cache=use_cache).logits
        parts = list(logits.split([row.shape[1] for row in rows], 1))
    grads = torch.autograd.grad(sum(map(loss, parts, rows)), parameters)
    assert_close(grads, expected)


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.parametrize("right", [0, 3])
def test_packed_rows_may_be_padded(left: int, right: int) -> None:
    model, rows = ours(), tokens(19, 8)
    ids = torch.nn.functional.pad(torch.cat(rows, 1), (left, right))
    positions = torch.cat([torch.arange(n) for n in (left, 19, 8, right)])[None]
    whole = torch.nn.functional.pad(tokens(27 + left)[0], (0, right))  # beside it a row of one sequence
    given = {"attention_mask": torch.cat([ids, whole]) > 0}
    given["position_ids"] = torch.cat([positions, torch.arange(ids.shape[1])[None]])
    logits = model(torch.cat([ids, whole]), **given).logits
    expected = [*(model(row).logits[0] for row in rows), model(whole[:, : 27 + left]).logits[0]]
    parts = logits[0, left : left + 19], logits[0, left + 19 : left + 27], logits[1, : 27 + left]
    torch.testing.assert_close(list(parts), expected, atol=1e-5, rtol=1e-5)


def test_packs_stand_in_no_cache() -> None:
    model, ids, ends = ours(), tokens(9)[0], torch.tensor([0, 2, 4])
    cache = transformers.DynamicCache()
    model(ids, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=f"^{NAME}: expected cu_seq_lens_q and the same .* and cache$"):
        model(ids[:, :4], cache=cache, cu_seq_lens_q=ends, cu_seq_lens_k=torch.tensor([0, 9, 13]))


def test_flash_attentions_arguments_pack() -> None:
    """As DataCollatorWithFlattening gives them."""
    model, rows = ours(), [row[0].tolist() for row in tokens(19, 34, 8)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": row} for row in rows])
    logits = model(**batch).logits
    for part, row in zip(logits.split([19, 34, 8], 1), rows, strict=True):
        torch.testing.assert_close(part, model(torch.tensor([row])).logits, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, given = ours().train(), left_padded(*tokens(25, 12))
    grads = []
    for _ in range(2):
        out = model(**given, labels=given["input_ids"], use_cache=False)
        grads.append(torch.autograd.grad(out.loss, list(model.parameters())))
        model.activation_checkpointing_enable()
    for mine, expected in zip(*grads, strict=True):
        assert torch.equal(mine, expected)


def test_a_model_made_with_it(tmp_path: Any) -> None:
    model, ids = ours(), tokens(LENGTH)[0]
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config._attn_implementation == NAME
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_pivots_of_ones_own() -> None:
    """A function of the length; asked again for longer sequences only, and then it must not have changed its mind."""
    asked = []

    def every_fifth(length: int, device: torch.device) -> Tensor:
        asked.append(length)
        return torch.arange(0, length, 5, device=device)

    register(**PATTERN, pivots=every_fifth)
    for length in (37, 20, 64):
        expected = seen(length, torch.arange(0, length, 5), **PATTERN)
        assert torch.equal(sees(1, length, attention_mask=None)[0], expected)
    assert asked == [64]
    register(**PATTERN, pivots=lambda length, device: torch.arange(length - 3, length))
    sees(1, 5, attention_mask=None)
    message = (
        r"pivots: expected ascending positions below length, of which those of a shorter length are the first, got"
    )
    with pytest.raises(ValueError, match=message):
        sees(1, 9, attention_mask=None)


def test_training_after_inference_mode() -> None:
    """The pivots that are remembered are no tensors of inference mode."""
    model, (ids,) = ours(), tokens(LENGTH)
    with torch.inference_mode():
        before = model(ids, position_ids=torch.arange(LENGTH)[None]).logits
    out = model(ids, labels=ids)
    out.loss.backward()
    assert torch.equal(out.logits, before)


def test_layers_share_what_is_made_of_a_mask() -> None:
    """Once for all layers of a forward, then forgotten."""
    attention = transformers.AttentionInterface()[NAME]
    model, given = ours(), left_padded(*tokens(25, 12))
    made = []
    of_each = attention._of_each
    attention._of_each = lambda *more: made.append(1) or of_each(*more)
    for _ in range(2):
        model(**given).logits.sum().backward()
    assert len(made) == 2
    gc.collect()
    assert not attention._known


def test_positions_may_change_in_place() -> None:
    positions = torch.arange(9)[None]
    assert torch.equal(sees(1, 9, attention_mask=None, position_ids=positions)[0], dense(9))
    positions[:, 4:] -= 4
    expected = torch.block_diag(dense(4).float(), dense(5).float()) > 0
    assert torch.equal(sees(1, 9, attention_mask=None, position_ids=positions)[0], expected)


def test_the_first_tokens_of_a_static_cache_have_gradients() -> None:
    """Which decoding has not."""
    model, given = ours(), left_padded(*tokens(25, 12))
    grads = []
    for cache in (None, transformers.StaticCache(model.config, max_cache_len=40)):
        out = model(**given, labels=given["input_ids"], cache=cache, use_cache=False)
        grads.append(torch.autograd.grad(out.loss, model.model.layers[-1].self_attn.q_proj.weight))
    assert_close(*grads)


def test_registering_again_changes_models() -> None:
    model, ids = ours(), tokens(LENGTH)[0]
    before = model(ids).logits
    register(block_size=64)
    model.set_attn_implementation("sdpa")
    causal = model(ids).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(ids).logits, causal, atol=1e-5, rtol=1e-5)
    assert (before - causal).abs().max() > 1e-2


# graphs


ROWS = torch.cat(tokens(20, 20))
PADDED = torch.arange(20) >= torch.tensor([[0], [11]])
POSITIONS = torch.arange(20).expand(2, -1)
ENDS = torch.tensor([0, 7, 20, 40], dtype=torch.int32)
ANEW = torch.cat([torch.arange(7), torch.arange(13)])
# what a graph is given, and what it must not be given then
GRAPHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no cache": ({"position_ids": POSITIONS, "use_cache": False}, {"position_ids": ANEW.expand(2, -1)}),
    "a cache": ({"position_ids": POSITIONS, "use_cache": True}, {"position_ids": ANEW.expand(2, -1)}),
    "padding": ({"attention_mask": PADDED}, {"attention_mask": PADDED ^ (torch.arange(20) == 15)}),
    "packed": ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "position_ids": torch.stack([ANEW, POSITIONS[0]])}, {}),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_training_compiles_as_one_graph(case: str) -> None:
    """Which says, when it runs, what it could not see when it was made."""
    given, wrong = GRAPHS[case]
    model = ours(num_hidden_layers=1).train()
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="eager")
    grads = [torch.autograd.grad(m(ROWS, labels=ROWS, **given).loss, list(model.parameters())) for m in (run, model)]
    assert_close(*grads)
    if wrong:
        message = {
            "position_ids": "position_ids: expected one sequence a row, or cu_seq_lens_q and cu_seq_lens_k as well, in",
            "attention_mask": "attention_mask: expected padding on the left or right of each row, got a row with zeros",
        }[next(iter(wrong))]
        with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match=message):
            run(ROWS, labels=ROWS, **{**given, **wrong})


@torch.no_grad()
def test_decoding_compiles_as_one_graph() -> None:
    """One for all tokens, as with SDPA, of a mask that generate has made beforehand."""
    model = ours(num_hidden_layers=1)
    given = {"attention_mask": PADDED.long(), "position_ids": (PADDED.cumsum(1) - 1).clamp(min=0)}
    expected = model(ROWS, **given).logits
    cache = transformers.StaticCache(model.config, max_cache_len=32)
    model(ROWS[:, :16], **{name: x[:, :16] for name, x in given.items()}, cache=cache)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run = torch.compile(model, fullgraph=True, backend=counter)
    for end in range(17, 21):
        so_far = {name: x[:, :end] for name, x in given.items()}
        inputs = model.prepare_inputs_for_generation(ROWS[:, :end], next_sequence_length=1, cache=cache, **so_far)
        assert inputs["attention_mask"].tolist() == [[[[0, 0, end]]], [[[0, 11, end]]]]
        torch.testing.assert_close(run(**inputs).logits[:, 0], expected[:, end - 1], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
