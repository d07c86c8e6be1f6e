"""CogLM's three objectives and its completion: who sees whom, what is predicted, and that drawing sees the same."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogview.bilingual import BilingualVocabulary, Rows, sampled_patches, sampled_spans
from cogview.config import TrainConfig
from cogview.generate import describe, fill, generate
from cogview.parts import emphasis
from cogview.parts.transformer import Transformer
from cogview.recipes import preset
from cogview.recipes.caption import caploss
from cogview.recipes.coglm import CogLM
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.sampling import Sampling
from cogview.sequence import Context, pad_text
from cogview.tokenizers.text import TextTokenizer
from cogview.train.token_task import TokenTask
from cogview_ops.modules import KVCache

CELLS, ROWS, IMAGE, TEXT = 6, 12, 40, 20
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "image_grid": CELLS,
    "max_positions": ROWS + 1 + CELLS**2,
    "max_caption": 9,
    "text_rows": ROWS,
    "image_vocab": IMAGE,
    "text_vocab": TEXT,
    "chinese_from": 12,
    "dropout": 0.0,
}
SOI, SOE, SOC, EOS, PAD = 60, 61, 62, IMAGE + 2, IMAGE + 3
CODES = torch.arange(CELLS**2)[None]
Seen = dict[int, set[int]]
"""Positions of the tokens that the one at each position sees."""


def make(**change) -> tuple[CogLM, Transformer]:
    torch.manual_seed(0)
    recipe = CogLM(CogLMConfig(**SIZES | change))
    model = recipe.model().eval()
    for p in model.parameters():  # away from the symmetric start: every parameter matters
        torch.nn.init.normal_(p, std=0.3)
    return recipe, model


def cell(j: int) -> int:
    return ROWS + 1 + j


def seen(rows: Rows, row: int = 0) -> Seen:
    there = rows.inputs[row] != PAD
    at = rows.positions[row].tolist()
    return {
        at[q]: {at[k] for k in range(len(at)) if k < int(rows.sees[row, q])} for q in range(len(at)) if bool(there[q])
    }


def predicted(rows: Rows, row: int = 0) -> dict[int, int]:
    pairs = zip(rows.positions[row].tolist(), rows.targets[row].tolist(), strict=True)
    return {position: target for position, target in pairs if target != PAD}


def text_of(*ids: int) -> torch.Tensor:
    return torch.tensor([[*ids] + [-1] * (9 - len(ids))])


def test_text_to_image():
    recipe, _ = make()
    rows, drawn = recipe.sequences.picture(text_of(5, 6, 13), CODES)
    assert rows.inputs[0, :8].tolist() == [IMAGE + 5, IMAGE + 6, IMAGE + 13, SOI, 0, 1, 2, 3]
    text = {0, 1, 2}
    expected: Seen = dict.fromkeys(text, text) | {ROWS: text | {ROWS}}
    for j in range(36):
        expected[cell(j)] = text | {ROWS} | {cell(i) for i in range(j + 1)}
    assert seen(rows) == expected
    assert predicted(rows) == {ROWS + j: j for j in range(36)}
    assert drawn[0].nonzero()[:, 0].tolist() == list(range(4, 40))
    assert recipe.length == rows.inputs.shape[1] == 46


@pytest.mark.parametrize("stop", [True, False])
def test_image_to_text_and_masked_patches(stop):
    """pretrain_coglm.py, make_image_text_understanding: masks by its rules, cell by cell."""
    recipe, _ = make()
    corners = [(0, 1), (1, 0)]  # which overlap
    inside = {(y + i, x + k) for y, x in corners for i in range(4) for k in range(4)}
    lead = {(y + i, x + k) for y, x in corners for i in range(4) for k in range(3)}
    masks = torch.zeros(2, 1, CELLS, CELLS, dtype=torch.bool)
    for y, x in inside:
        masks[0, 0, y, x] = True
    for y, x in lead:
        masks[1, 0, y, x] = True
    rows = recipe.sequences.caption(text_of(5, 6), CODES, *masks.flatten(2), stop=stop)
    patch = {y * CELLS + x for y, x in inside}
    context = {cell(j) for j in range(36) if j not in patch}
    expected: Seen = dict.fromkeys(context, context)
    for j in patch:
        expected[cell(j)] = context | {cell(i) for i in patch if i <= j}
    for k in range(3 + stop):  # the start of a language, two pieces, their end
        expected[k] = {cell(j) for j in range(36)} | set(range(k + 1))
    assert seen(rows) == expected
    learned = {cell(y * CELLS + x): y * CELLS + x + 1 for y, x in lead} | {0: IMAGE + 5, 1: IMAGE + 6}
    assert predicted(rows) == learned | ({2: EOS} if stop else {})


def test_the_start_of_a_language_is_that_of_its_pieces():
    recipe, _ = make()
    nothing = torch.zeros(3, 36, dtype=torch.bool)
    text = torch.cat([text_of(5, 11), text_of(5, 12), text_of(19)])
    rows = recipe.sequences.caption(text, CODES.expand(3, -1), nothing, nothing, stop=True)
    assert rows.inputs[:, 36].tolist() == [SOE, SOC, SOC]


def test_han_characters_may_be_spelled_in_bytes():
    """By a small vocabulary of one's own; the released one has English words where that has bytes."""
    text = TextTokenizer.train(["a red fox", "蓝色的房子"] * 3, 310, bilingual=True)
    assert text.chinese_from is not None
    expected = {"我爱你": SOC, "a fox 我": SOC, "蓝色": SOC, "a fox": SOE, "œuvre — 🦊": SOE, "ё": SOE, "": SOE}
    ids = [text.encode(one) for one in expected]
    assert max(ids[0]) < text.chinese_from
    vocab = BilingualVocabulary(IMAGE, text.vocab_size, text.chinese_from)
    tags = [SOE + int(tag) - vocab["SOE"] for tag in vocab.tags(pad_text(ids))]
    assert dict(zip(expected, tags, strict=True)) == expected
    assert [int(vocab.tags(pad_text([some]))) - vocab["SOE"] for some in ids[:1] + ids[-1:]] == [1, 0]
    released = preset("coglm-6b", "coglm")[0]
    vocab = CogLM(released).vocab
    assert int(vocab.tags(pad_text(ids[:1]))) == vocab["SOE"]


def test_spans_of_text():
    recipe, _ = make()
    inside, lead = torch.zeros(2, 1, 9, dtype=torch.bool)
    inside[0, 2:5], lead[0, 2:4] = True, True  # a span of two pieces and the one before it
    rows = recipe.sequences.spans(text_of(4, 5, 6, 7, 8, 9), inside, lead)
    context = {0, 1, 5}
    expected: Seen = dict.fromkeys(context, context) | {k: context | set(range(2, k + 1)) for k in (2, 3, 4)}
    assert seen(rows) == expected
    assert predicted(rows) == {2: IMAGE + 7, 3: IMAGE + 8}
    assert rows.inputs[0, :7].tolist() == [IMAGE + i for i in (4, 5, 9, 6, 7, 8)] + [PAD]


def test_completion_as_published():
    """comp_pipeline/base_completion.py: context cells see text and each other; each run of masked cells follows its
    left neighbour, which is no context, but in column 0."""
    recipe, _ = make()
    masked = {0, 1, 9, 10, 17}  # two in column 0, two behind the 8th cell, one behind the 16th
    drawn = torch.zeros(1, 36, dtype=torch.bool)
    drawn[0, list(masked)] = True
    rows, places = recipe.sequences.picture(text_of(5, 6), CODES, drawn)
    last = masked | {8, 16}
    order = [j for j in range(36) if j not in last] + sorted(last)
    assert rows.inputs[0, :39].tolist() == [IMAGE + 5, IMAGE + 6, SOI, *order]
    context = {cell(j) for j in range(36) if j not in last}
    expected: Seen = {0: {0, 1}, 1: {0, 1}, ROWS: {0, 1, ROWS}} | {c: {0, 1, ROWS} | context for c in context}
    for j in sorted(last):
        expected[cell(j)] = {0, 1, ROWS} | context | {cell(i) for i in last if i <= j}
    assert seen(rows) == expected
    assert {order[k - 3] for k in places[0].nonzero()[:, 0].tolist()} == masked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_is_the_pattern(dtype):
    """Entry by entry: with equal scores the weights are the pattern over its row's sum, of whole sequences and of a
    prompt with a cache; a step sees all before it."""
    recipe, _ = make()
    inside, lead = (
        torch.stack(some) for some in zip(*(sampled_patches(CELLS, 4, 1, None) for _ in range(2)), strict=True)
    )
    text, codes = torch.cat([text_of(5, 6, 13), text_of(7)]), CODES.expand(2, -1)
    for rows in (
        recipe.sequences.picture(text, codes)[0],
        recipe.sequences.picture(text, codes, inside)[0],
        recipe.sequences.caption(text, codes, inside, lead, stop=True),
    ):
        tokens, attention = rows.inputs.shape[1], recipe.attention(0)
        nothing = torch.zeros(2, 1, tokens, tokens, dtype=dtype)
        values = torch.eye(tokens, dtype=dtype).expand(2, 1, -1, -1)
        pattern = (torch.arange(tokens) < rows.sees[..., None])[:, None].double()
        expected = pattern / pattern.sum(dim=-1, keepdim=True)
        context = Context(rows.positions, {"sees": rows.sees})
        cache = KVCache(2, 1, tokens + 1, tokens, dtype=dtype)
        ends = cache.append(nothing, values)
        prompt = dataclasses.replace(context, prompt=True)
        for found in (
            attention.attend(nothing, nothing, values, context),
            attention.decode(nothing, nothing, values, prompt, cache, ends),
        ):
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
            assert torch.equal(found != 0, pattern.bool())
        cache.lengths -= 1  # the last token once more, as a step
        last = [x[:, :, -1:] for x in (nothing, nothing, values)]
        step = attention.decode(*last, context, cache, cache.append(*last[1:]))
        torch.testing.assert_close(step.double(), torch.full_like(step.double(), 1 / tokens), atol=1e-2, rtol=0)


def test_patches_and_spans_are_drawn_as_defined():
    stream = torch.Generator().manual_seed(1)
    rows = [sampled_patches(20, 4, 20, stream) for _ in range(40)]
    inside, lead = (torch.stack(some).view(-1, 20, 20) for some in zip(*rows, strict=True))
    assert not inside[:, 19].any()
    assert not inside[:, :, 19].any()  # corners are 0 to 15
    over = torch.tensor([[min(4, y + 1, 19 - y) * min(4, x + 1, 19 - x) for x in range(19)] for y in range(19)])
    free = sum(math.comb(256 - n, 20) / math.comb(256, 20) for n in over.flatten().tolist())  # corners that cover none
    assert inside.float().mean() == pytest.approx((361 - free) / 400, abs=0.02)
    assert bool((inside | ~lead).all())
    assert lead.sum() < inside.sum()
    shares = []
    for length in (2, 3, 12, 400):
        for _ in range(50):
            inside, lead = sampled_spans(length, stream)
            count = int(lead.sum())
            assert 1 <= count <= max(1, 0.15 * length)
            assert bool(inside[lead].all())
            assert not lead[-1]
            shares += [count / length] if length == 400 else []
    assert sum(shares) / len(shares) == pytest.approx(0.15, abs=0.01)
    assert not sampled_spans(1, stream)[0].any()


def test_training_mixes_by_each_rows_own_stream():
    recipe, _ = make(spans_share=0.2)
    text, codes = torch.randint(4, TEXT, (400, 9)), torch.randint(IMAGE, (400, 36))

    def batch(rows: slice) -> Any:
        streams = [torch.Generator().manual_seed(n) for n in range(400)[rows]]
        return recipe.training_batch(text[rows], codes[rows], draws=streams)

    whole, part = batch(slice(None)), batch(slice(100, 200))
    for name in ("inputs", "targets", "weights"):
        assert torch.equal(getattr(whole, name)[100:200], getattr(part, name))
    assert torch.equal(whole.context.attention["sees"][100:200], part.context.attention["sees"])
    kinds = {name: kind.any(dim=1).float().mean().item() for name, kind in recipe.kinds(whole.targets).items()}
    assert kinds["image"] == pytest.approx(0.5, abs=0.08)
    assert kinds["patches"] == pytest.approx(0.3, abs=0.08)
    assert kinds["text"] == pytest.approx(0.5, abs=0.08)
    assert bool((whole.weights.bool() == (whole.targets != PAD)).all())
    hidden = recipe.hideable(whole.inputs)
    drawn = recipe.kinds(whole.targets)["image"].any(dim=1)
    assert bool((hidden.any(dim=1) == drawn).all())


def test_text_is_dropped_where_it_is_context():
    """No caption that is learned is empty, nor are spans; of text to image no row has one."""
    recipe, model = make(spans_share=0.2)

    class Pairs:
        def batch(self, rows):
            return torch.arange(4, 12).expand(len(rows), -1), CODES.expand(len(rows), -1)

    task = TokenTask(recipe, model, Pairs(), TrainConfig(steps=1, drop_text=1.0))
    batch = task.batch(task.data, np.arange(60), [torch.Generator().manual_seed(n) for n in range(60)])
    vocab, inputs = recipe.vocab, batch.inputs
    drawn = (inputs == SOI).any(dim=1)
    counts = vocab.is_caption(inputs).sum(dim=1)
    assert 0 < int(drawn.sum()) < 60
    assert bool((counts[drawn] == 0).all())
    assert bool((counts[~drawn] == 8).all())
    assert bool(((batch.targets == EOS).sum(dim=1) == (inputs == SOE).sum(dim=1)).all())
    plain = recipe.kinds(batch.targets)
    assert bool((plain["text"].any(dim=1) == ~drawn).all())
    held_out = task.batch(task.data, np.arange(4), [torch.Generator().manual_seed(n) for n in range(4)], training=False)
    assert bool((vocab.is_caption(held_out.inputs).sum(dim=1) == 8).all())


def test_kinds_of_inputs():
    """A text before its picture is no target, and no reason to call the cells patches; hidden ones are neither."""
    recipe, _ = make()
    text, nothing = text_of(5, 6), torch.zeros(1, 36, dtype=torch.bool)
    inputs = recipe.sequences.picture(text, CODES)[0].inputs
    inputs[0, [6, 9]] = SOI
    kinds = recipe.input_kinds(inputs)
    assert kinds["text"][0].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert kinds["image"][0].nonzero()[:, 0].tolist() == [k for k in range(3, 39) if k not in (6, 9)]
    inputs = recipe.sequences.caption(text, CODES, nothing, nothing, stop=True).inputs
    kinds = recipe.input_kinds(inputs)
    assert kinds["image"][0].nonzero()[:, 0].tolist() == list(range(36))
    assert kinds["text"][0].nonzero()[:, 0].tolist() == [36, 37, 38, 39]


@pytest.mark.parametrize("given", [0, 1])
def test_drawing_sees_what_training_saw(given):
    """Greedily drawn codes are the likeliest behind the same ones, whole pictures and parts of them alike."""
    recipe, model = make()
    text = torch.cat([text_of(5, 6, 13), text_of(7)])
    codes = torch.randint(IMAGE, (2, 36), generator=torch.Generator().manual_seed(3))
    masks = torch.rand(2, 36, generator=torch.Generator().manual_seed(4)) < 0.4
    if not given:
        masks[:] = True
    prompt = recipe.completion(text, codes, masks)
    uniforms = torch.zeros(2, int(masks.sum(dim=1).max()))
    drawn = fill(model, prompt, uniforms, Sampling(top_k=1))
    assert torch.equal(drawn.where(~prompt.drawn, 0), prompt.inputs.where(~prompt.drawn, 0))
    logits = model(drawn, prompt.context)
    before = logits[:, :-1, :IMAGE].argmax(dim=-1)
    there = prompt.drawn[:, 1:]
    assert torch.equal(before[there], drawn[:, 1:][there])
    assert len(drawn[prompt.drawn].unique()) > 3
    if not given:
        ids = [[5, 6, 13], [7]]
        assert torch.equal(generate(recipe, model, ids, top_k=1).flatten(), drawn[prompt.drawn])


def test_captions_see_what_training_saw():
    recipe, model = make()
    captions = recipe.drawing("captions")
    assert captions is not None
    with torch.no_grad():
        model.embedding.words.weight[EOS] *= 0.1  # these weights would end all at once
    codes = torch.randint(IMAGE, (8, 6, 6), generator=torch.Generator().manual_seed(3))
    found = describe(captions, model, codes, Sampling(top_k=1))
    for ids, picture in zip(found, codes.flatten(1), strict=True):
        batch = captions.batch(text_of(*ids), picture[None])
        likeliest = model(batch.inputs, batch.context)[0, 36:]
        likeliest = likeliest.masked_fill(~recipe.vocab.drawn_text(True), -torch.inf).argmax(dim=-1)
        assert likeliest[: len(ids)].tolist() == [IMAGE + i for i in ids]
    assert any(found)
    ids = [[5, 6, 13], [7]]
    losses = caploss(captions, model, codes[:2], ids)
    for loss, text, picture in zip(losses, ids, codes[:2].flatten(1), strict=True):
        batch = captions.batch(text_of(*text), picture[None])
        log_p = F.log_softmax(model(batch.inputs, batch.context)[0, 36:].detach(), dim=-1)
        assert float(loss) == pytest.approx(
            -sum(float(log_p[k, IMAGE + t]) for k, t in enumerate(text)) / len(text), rel=1e-4
        )


@pytest.mark.parametrize("value", [1.4, 3.0])
def test_textual_attention(value):
    """Against the formula: c on the scores of all rows and the columns of text."""
    recipe, model = make()
    text = torch.cat([text_of(5, 6, 13), text_of(7)])
    codes = torch.randint(IMAGE, (2, 36), generator=torch.Generator().manual_seed(3))
    masks = torch.rand(2, 36, generator=torch.Generator().manual_seed(4)) < 0.4
    prompt = recipe.completion(text, codes, masks)
    how = Sampling(top_k=1, text_attention=value)
    context = dataclasses.replace(prompt.context, emphasis=recipe.emphasis(prompt.inputs, value))
    drawn = fill(model, dataclasses.replace(prompt, context=context), torch.zeros(2, int(masks.sum(dim=1).max())), how)
    plain = fill(model, prompt, torch.zeros(2, int(masks.sum(dim=1).max())), Sampling(top_k=1))
    assert not torch.equal(drawn, plain)

    def by_hand(q, k, v, mask, context):
        bias = torch.where(mask, value * recipe.vocab.is_caption(drawn)[:, None, None], -torch.inf)
        return ((q @ k.mT) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emphasis, "masked", by_hand)
        logits = model(drawn, prompt.context)
    there = prompt.drawn[:, 1:]
    assert torch.equal(logits[:, :-1, :IMAGE].argmax(dim=-1)[there], drawn[:, 1:][there])


def test_published_sizes():
    config = preset("coglm-6b", "coglm")[0]
    recipe = CogLM(config)
    with torch.device("meta"):
        count = sum(p.numel() for p in recipe.model().parameters())
    assert round(count / 1e9, 1) == 5.9
    assert recipe.length == 512
    assert recipe.vocab["SOI"] == 150_000
    assert recipe.vocab["PAD"] == 20_003
    assert config.patches == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_rows": 9}, "text_rows: expected at least 10 for captions of 9, got 9"),
        ({"max_positions": 48}, "max_positions: expected at least 49, got 48"),
        ({"caption_share": 0.8, "spans_share": 0.3}, "caption_share, spans_share: expected shares that come to 1"),
        ({"patch_side": 6}, "patch_side: expected 1 to 5, got 6"),
        ({"chinese_from": 21}, "chinese_from: expected 1 to 20, got 21"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        CogLMConfig(**SIZES | change)


def test_bad_input():
    recipe, model = make()
    with pytest.raises(ValueError, match="tokens: expected those of a bilingual text tokenizer"):
        CogLM.fit(recipe.config, image_grid=6, max_text=9, image_vocab=40, text_vocab=20)
    with pytest.raises(ValueError, match="text: expected at most 9 tokens beside 36 image tokens in 45, got 10"):
        generate(recipe, model, [[5] * 10])
    with pytest.raises(ValueError, match="text_attention: expected a finite number that is not negative, got -1"):
        Sampling(text_attention=-1)
