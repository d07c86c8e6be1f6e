"""Textual attention of generation in every kind of attention of CogView: against scores with c added, by hand."""

import dataclasses

import pytest
import torch
from test_transformer import make

from cogview.generate import emphasised, fill, generate
from cogview.parts.attend import Attention
from cogview.sampling import Sampling
from cogview_ops import patterns

TEXT = torch.tensor([[3, 4, 5, 6], [7, 8, -1, -1], [9, -1, -1, -1]])


def by_hand(recipe, tokens, value, index):
    """Attention of a layer over whole sequences: rows of image codes have c on the columns of captions."""

    def attend(q, k, v, context):
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        i = torch.arange(q.shape[2])
        seen = (i <= i[:, None]).expand(len(q), -1, -1)
        if recipe.config.attention == "three_region":
            how = recipe.config.block_size, recipe.config.window_blocks
            masks = patterns.three_region_masks(i[None], q.shape[2], context.attention["pivots"], *how)
            scores = scores + recipe.attention(index).pattern["pivot_bias"] * masks[1][:, None]
            seen = masks[0] | masks[1]
        rows, columns = recipe.vocab.is_image(tokens), recipe.vocab.is_caption(tokens)
        scores = scores + value * (rows[:, :, None] & columns[:, None])[:, None]
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("attention", ["dense", "dense_pb_relax", "three_region"])
@pytest.mark.parametrize("value", [1.4, 3.0, 1000.0])  # of the last exp overflows
def test_against_the_formula(attention, value):
    recipe, model = make(attention)
    assert attention != "three_region" or recipe.attention(0).pattern["pivot_bias"] > 0.5
    model = model.eval()
    streams = [torch.Generator().manual_seed(n) for n in range(3)]
    how = Sampling(top_k=1, text_attention=value)
    prompt = emphasised(recipe, recipe.prompt(TEXT, streams), how)
    tokens = fill(model, prompt, torch.zeros(3, 16), how)
    context = dataclasses.replace(prompt.context, emphasis=None)
    plain = model(tokens, context)
    for index, layer in enumerate(model.stack.layers):
        layer.attention.attend = by_hand(recipe, tokens, value, index)
    logits = model(tokens, context)
    there = prompt.drawn[:, 1:]
    drawn = tokens[:, 1:][there]
    assert torch.equal(logits[:, :-1, :20].argmax(dim=-1)[there], drawn)
    assert not torch.equal(plain[:, :-1, :20].argmax(dim=-1)[there], drawn)


@pytest.mark.parametrize("attention", ["dense", "three_region"])
def test_rows_are_the_same_in_any_batch_and_with_guidance(attention):
    recipe, model = make(attention)
    captions = [[3, 4, 5, 6], [7, 8], []]
    how = {"seeds": [5, 6, 7], "text_attention": 2.0, "temperature": 2.0}
    whole = generate(recipe, model.eval(), captions, **how)
    assert torch.equal(generate(recipe, model, captions, **how, batch_size=2), whole)
    plain = generate(recipe, model, captions, seeds=[5, 6, 7], temperature=2.0)
    assert torch.equal(plain[2], whole[2])  # without text
    assert not torch.equal(plain[:2], whole[:2])
    assert torch.equal(generate(recipe, model, [[]], **{**how, "seeds": [7]})[0], plain[2])
    guided = generate(recipe, model, captions, **how, guidance=1.5)
    assert torch.equal(generate(recipe, model, captions, **how, guidance=1.5, batch_size=1), guided)
    assert not torch.equal(guided[:2], whole[:2])


def test_where_it_is_not_heeded():
    recipe, model = make("dalle")
    with pytest.raises(ValueError, match=r"text_attention: expected 0 with recipe dalle, got 1\.4"):
        generate(recipe, model.eval(), [[3]], text_attention=1.4)
    assert not Attention.emphasises
