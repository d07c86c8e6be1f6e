"""Generation with a cache equals the full forward; seeds, batches and CapLoss."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_transformer import ATTENTIONS, make
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview.generate import generate, sample_token
from cogview.recipes.caption import caploss, caption_batch
from cogview.sequence import pad_text

CAPTIONS = [[1, 2, 3, 4, 5], [], [6], [7, 8, 9, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("image_positions", ["following", "fixed"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cached_decoding_equals_the_full_forward(attention, image_positions):
    recipe, model = make(attention, image_positions=image_positions)
    model.eval()
    batch = recipe.batch(pad_text(CAPTIONS), torch.randint(20, (4, 16)))
    full, positions = model(batch.inputs, batch.context), batch.context.positions.expand(batch.inputs.shape)
    starts = recipe.prompt(pad_text(CAPTIONS)).starts
    cache, longest = model.make_cache(4, 28), int(starts.max())

    def context(places, **change):
        return dataclasses.replace(batch.context, positions=positions.gather(1, places), **change)

    before = torch.arange(longest).expand(4, -1)
    prompt = model(batch.inputs[:, :longest], context(before, prompt=True), cache=cache)
    for b, n in enumerate(starts):
        there = batch.inputs[b, :n] != recipe.vocab["PAD"]
        torch.testing.assert_close(prompt[b, :n][there], full[b, :n][there], rtol=1e-4, atol=1e-4)
    for layer in cache:
        layer.lengths.copy_(starts)
    rows, step = torch.arange(4)[:, None], 0
    for size in (1, 1, 3, 1, 2, 1, 1, 4, 1):  # one token at a time, and several
        places = starts[:, None] + step + torch.arange(size)
        logits = model(batch.inputs.gather(1, places), context(places), cache=cache)
        torch.testing.assert_close(logits, full[rows, places], rtol=1e-4, atol=1e-4)
        step += size
    assert cache[0].lengths.tolist() == (starts + step).tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_codes_are_the_argmax_of_the_full_forward(attention):
    recipe, model = make(attention)
    codes = generate(recipe, model, CAPTIONS, seeds=[3, 4, 5, 6], top_k=1)
    assert codes.shape == (4, 4, 4)
    assert model.training
    model.eval()
    streams = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]
    for g in streams:
        torch.rand(16, generator=g)
    batch = recipe.batch(pad_text(CAPTIONS), codes.flatten(1), draws=streams)
    logits, starts = model(batch.inputs, batch.context), recipe.prompt(pad_text(CAPTIONS)).starts
    for b, start in enumerate(starts):
        image = logits[b, start - 1 : start + 15, :20]
        assert torch.equal(image.argmax(-1), codes[b].flatten())


def test_a_picture_depends_on_its_seed_alone():
    both = make("three_region")
    whole = generate(*both, CAPTIONS, seeds=[0, 1, 2, 3])
    assert torch.equal(whole, generate(*both, CAPTIONS))
    assert torch.equal(whole, generate(*both, CAPTIONS, batch_size=3))
    assert torch.equal(whole[2:3], generate(*both, CAPTIONS[2:3], seeds=[2]))
    assert not torch.equal(whole, generate(*both, CAPTIONS, seeds=[4, 5, 6, 7]))
    assert generate(*both, []).shape == (0, 4, 4)


def test_sampling_follows_the_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, 9.0]]).expand(20000, 5)
    allowed = torch.tensor([True, True, True, True, False])
    uniform = torch.rand(20000)
    for temperature, top_k in ((1.0, 5), (0.5, 5), (1.0, 2)):
        drawn = sample_token(logits, allowed, uniform, temperature=temperature, top_k=top_k)
        kept = torch.tensor([1.0, 3.0, 2.0, 0.0])
        kept[torch.tensor([1.0, 3.0, 2.0, 0.0]).argsort(descending=True)[top_k:]] = -torch.inf
        frequency = torch.bincount(drawn, minlength=5) / 20000
        assert frequency[4] == 0
        torch.testing.assert_close(frequency[:4], (kept / temperature).softmax(0), rtol=0, atol=0.01)


def test_sampling_at_the_ends_stays_inside():
    logits, allowed = torch.randn(2, 300) * 5, torch.arange(300) < 200
    for u in (0.0, 1 - 2**-24):
        drawn = sample_token(logits, allowed, torch.full((2,), u), temperature=1.0, top_k=1000)
        assert (drawn < 200).all()


def test_sampling_waits_for_no_device():
    """Nothing in it asks for a tensor's value: tensors without any are enough."""
    with FakeTensorMode():
        logits, allowed, uniform = torch.zeros(2, 300), torch.ones(300, dtype=torch.bool), torch.zeros(2)
        drawn = sample_token(logits, allowed, uniform, temperature=1.0, top_k=20)
    assert drawn.shape == (2,)


def test_bad_requests():
    both = make()
    with pytest.raises(ValueError, match=r"text: expected at most 9 tokens beside .* got 10 in caption 1"):
        generate(*both, [[1], [2] * 10])
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        generate(*both, [[1]], temperature=0)
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        generate(*both, [[1]], top_k=0)
    with pytest.raises(ValueError, match=r"seeds: expected as many as captions \(1\), got 2"):
        generate(*both, [[1]], seeds=[1, 2])


def test_caploss_is_the_mean_over_the_text():
    recipe, model = make("dense")
    model.eval()
    codes = torch.randint(20, (2, 4, 4))
    scores = caploss(recipe.config, model, codes, [[1, 2, 3], [4]])
    batch = caption_batch(recipe.config, torch.tensor([[1, 2, 3], [4, -1, -1]]), codes.flatten(1))
    p = F.log_softmax(model(batch.inputs, batch.context), -1)
    expected = [-(p[0, 19, 21] + p[0, 20, 22] + p[0, 21, 23]) / 3, -p[1, 19, 24]]
    torch.testing.assert_close(scores, torch.stack(expected))


def test_caploss_does_not_depend_on_the_batch():
    recipe, model = make("three_region")
    codes = torch.randint(20, (3, 4, 4))
    together = caploss(recipe.config, model, codes, [[1, 2, 3], [4], [5, 6]])
    torch.testing.assert_close(together[1:2], caploss(recipe.config, model, codes[1:2], [[4]]))
    with pytest.raises(ValueError, match="captions: expected none that is empty"):
        caploss(recipe.config, model, codes, [[1], [], [2]])
    with pytest.raises(ValueError, match=r"codes: expected \[2, 4, 4\], one image a caption, got \[3, 4, 4\]"):
        caploss(recipe.config, model, codes, [[1], [2]])
