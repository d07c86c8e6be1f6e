"""Generation with a cache equals the full forward; seeds and batches."""

import dataclasses

import numpy as np
import pytest
import torch
from test_transformer import ATTENTIONS, make
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview.generate import emphasised, fill, generate, generate_batches
from cogview.sampling import Sampling, sample_token
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
        drawn = sample_token(logits, allowed, uniform, Sampling(temperature, top_k))
        kept = torch.tensor([1.0, 3.0, 2.0, 0.0])
        kept[torch.tensor([1.0, 3.0, 2.0, 0.0]).argsort(descending=True)[top_k:]] = -torch.inf
        frequency = torch.bincount(drawn, minlength=5) / 20000
        assert frequency[4] == 0
        torch.testing.assert_close(frequency[:4], (kept / temperature).softmax(0), rtol=0, atol=0.01)


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-300, 1e-320, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    """Exactly what top_k=1 gives, also where two logits are the largest, and whatever their size."""
    torch.manual_seed(0)
    allowed = torch.arange(300) < 200
    for scale in (1.0, 1e30):
        logits = scale * torch.randn(50, 300)
        if temperature < 1e-30:
            logits[:, 7] = logits[:, 9] = logits.amax(1)
        uniform = torch.rand(50)
        greedy = sample_token(logits, allowed, uniform, Sampling(1.0, 1))
        assert torch.equal(sample_token(logits, allowed, uniform, Sampling(temperature, 200)), greedy)


@pytest.mark.parametrize("temperature", [1e20, 1e38, 1e308])
def test_a_huge_temperature_is_uniform(temperature):
    logits, allowed = torch.tensor([[3.0, -2.0, 0.0, 9.0, 1.0]]).expand(4, 5), torch.tensor([1, 1, 0, 1, 1]).bool()
    drawn = sample_token(logits, allowed, torch.tensor([0.1, 0.3, 0.6, 0.9]), Sampling(temperature, 9))
    assert drawn.tolist() == [3, 0, 4, 1]  # from the largest logit on


def test_sampling_at_the_ends_stays_inside():
    logits, allowed = torch.randn(2, 300) * 5, torch.arange(300) < 200
    for u in (0.0, 1 - 2**-24):
        drawn = sample_token(logits, allowed, torch.full((2,), u), Sampling(1.0, 1000))
        assert (drawn < 200).all()


def test_sampling_waits_for_no_device():
    """Nothing in it asks for a tensor's value: tensors without any are enough."""
    with FakeTensorMode():
        logits, allowed, uniform = torch.zeros(2, 300), torch.ones(300, dtype=torch.bool), torch.zeros(2)
        drawn = sample_token(logits, allowed, uniform, Sampling(1.0, 20))
    assert drawn.shape == (2,)


def test_bad_requests():
    both = make()
    with pytest.raises(ValueError, match=r"text: expected at most 9 tokens beside .* got 10 in caption 1"):
        generate(*both, [[1], [2] * 10])
    with pytest.raises(ValueError, match=r"seeds: expected as many as captions \(1\), got 2"):
        generate(*both, [[1]], seeds=[1, 2])
    for text in ("a fox", ["a fox"], [[1], "a fox"]):
        with pytest.raises(
            ValueError, match="captions: expected lists of token ids, got text, which the methods of Sys"
        ):
            generate(*both, text)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), -float("inf"), "warm", None])
def test_bad_temperatures(value):
    with pytest.raises(ValueError, match="temperature: expected a positive and finite number, got"):
        generate(*make(), [[1]], temperature=value)


@pytest.mark.parametrize("name", ["top_k", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_bad_counts(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a whole number, at least 1, got {value}"):
        generate(*make(), [[1]], **{name: value})


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.5, "1", None])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"seeds: expected whole numbers from 0 to 2\^63 - 1, got"):
        generate(*make(), [[1], [2]], seeds=[0, seed])


def test_good_requests():
    both = make()
    drawn = generate(*both, [[1]], seeds=[2**63 - 1], top_k=10**6, batch_size=10**6, temperature=np.float32(1))
    assert torch.equal(drawn, generate(*both, [[1]], seeds=np.array([2**63 - 1]), top_k=20))


def test_what_is_wrong_is_said_before_anything_is_drawn():
    """The caption that does not fit is of the second batch."""
    asked = []
    with pytest.raises(ValueError, match="got 10 in caption 2"):
        generate_batches(*make(), [[1], [2], [3] * 10], Sampling(batch_size=1), update=asked.append)
    assert not asked


def test_batches_come_as_they_are_drawn_and_tokens_are_counted():
    both, told = make(), []
    batches = generate_batches(*both, CAPTIONS, Sampling(batch_size=3), update=told.append)
    assert not told
    first = next(batches)
    assert (first.shape, told) == ((3, 4, 4), list(range(3, 49, 3)))
    second = next(batches)
    assert told[16:] == list(range(49, 65))
    assert torch.equal(torch.cat([first, second]), generate(*both, CAPTIONS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value):
    """At the first step, if all are so; or later, where a token that was drawn makes them so."""
    recipe, model = make()
    words = model.embedding.words.weight
    start = generate(recipe, model, [[1]], top_k=1)[0, 0, 0]
    with torch.no_grad():
        model.embedding.positions.weight[7] = value  # of the fourth token behind one of text; the fifth comes from it
        with pytest.raises(ValueError, match="the model's logits are not finite, at token 5 of 16 drawn"):
            generate(recipe, model, [[1]], top_k=1)
        words[start] = value
        with pytest.raises(ValueError, match="the model's logits are not finite, at token 1 of 16 drawn"):
            generate(recipe, model, [[1]], top_k=1)


def by_full_forwards(recipe, model, prompt, guidance=1.0, against=None):
    """The likeliest tokens, one at a time, by a forward over everything for each."""
    prompts, found = [prompt] if against is None else [prompt, against], []
    model.eval()
    for row in range(len(prompt.inputs)):
        tokens = [p.inputs[row].clone() for p in prompts]
        for places in zip(*(p.drawn[row].nonzero().flatten().tolist() for p in prompts), strict=True):
            logits = [
                model(t[None], p.context.rows(slice(row, row + 1)))[0, place - 1]
                for t, p, place in zip(tokens, prompts, places, strict=True)
            ]
            best = logits[0] if against is None else logits[1] + guidance * (logits[0] - logits[1])
            drawn = int(best.masked_fill(~prompt.allowed, -torch.inf).argmax())
            for t, place in zip(tokens, places, strict=True):
                t[place] = drawn
            if drawn == prompt.stop:
                tokens[0][prompt.drawn[row] & (torch.arange(len(tokens[0])) > places[0])] = drawn
                break
        found.append(tokens[0])
    return torch.stack(found)


def some_given(recipe, share=0.5):
    """A prompt of which some image tokens are given, others in each row, and rows have different numbers of them."""
    streams = [torch.Generator().manual_seed(seed) for seed in range(len(CAPTIONS))]
    prompt = recipe.prompt(pad_text(CAPTIONS), streams)
    kept = torch.rand(prompt.drawn.shape, generator=torch.Generator().manual_seed(7)) < share
    inputs = torch.where(prompt.drawn & kept, torch.randint(20, prompt.inputs.shape), prompt.inputs)
    prompt = dataclasses.replace(prompt, inputs=inputs, drawn=prompt.drawn & ~kept, same=None)
    assert len(prompt.drawn.sum(1).unique()) > 2
    return prompt


@pytest.mark.parametrize("attention", [kind for kind in ATTENTIONS if kind != "dalle"])
def test_given_tokens_between_drawn_ones(attention):
    """Whatever is given where, what is drawn is what full forwards give; and there are as many of them as places."""
    recipe, model = make(attention)
    for share in (0.5, 0.9):
        prompt, forwards = some_given(recipe, share), []
        most = int(prompt.drawn.sum(1).max())
        hook = model.stack.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        tokens = fill(model, prompt, torch.rand(4, most), Sampling(top_k=1))
        hook.remove()
        assert len(forwards) == most
        last = prompt.drawn.int().cumsum(1) == prompt.drawn.sum(1, keepdim=True)
        before = last.int().cumsum(1) <= 1  # what stands behind the last one drawn does not matter
        assert torch.equal(tokens * before, by_full_forwards(recipe, model, prompt) * before)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_guidance_leads_away_from_no_caption(attention):
    recipe, model = make(attention)
    text = pad_text(CAPTIONS)
    streams = [torch.Generator().manual_seed(seed) for seed in range(4)]
    prompt, against = recipe.prompt(text, streams), recipe.prompt(text[:, :0], streams)
    tokens = fill(model, prompt, torch.rand(4, 16), Sampling(top_k=1, guidance=3.0), against=against)
    wanted = by_full_forwards(recipe, model, prompt, 3.0, against)
    assert torch.equal(tokens[prompt.drawn], wanted[prompt.drawn])
    assert not torch.equal(tokens, fill(model, prompt, torch.rand(4, 16), Sampling(top_k=1)))
    seeds = {"seeds": [0, 1, 2, 3], "top_k": 1}
    guided = generate(recipe, model, CAPTIONS, guidance=3.0, **seeds)
    assert torch.equal(guided, generate(recipe, model, CAPTIONS, guidance=3.0, batch_size=3, **seeds))


def test_a_row_stops_at_the_stop_token():
    recipe, model = make()
    prompt = recipe.prompt(pad_text(CAPTIONS))
    free = fill(model, prompt, torch.rand(4, 16), Sampling(top_k=1))[prompt.drawn].view(4, 16)
    stop = int(free[0, 5])
    prompt = dataclasses.replace(prompt, stop=stop)
    drawn = fill(model, prompt, torch.rand(4, 16), Sampling(top_k=1))[prompt.drawn].view(4, 16)
    for got, all_of_it in zip(drawn, free, strict=True):
        end = (all_of_it == stop).nonzero().flatten().tolist()[:1] or [15]
        assert torch.equal(got[: end[0] + 1], all_of_it[: end[0] + 1])
        assert (got[end[0] + 1 :] == stop).all()
    assert (drawn[0, 5:] == stop).all()
    alone = dataclasses.replace(prompt, allowed=torch.arange(recipe.vocab.size) == stop)
    told = []
    fill(model, alone, torch.rand(4, 16), Sampling(), told.append)
    assert len(told) == 8  # all have stopped, which is asked for every eight steps


def test_equal_prompts_are_computed_once():
    both, seen = make("three_region"), []
    hook = both[1].stack.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    repeated = [CAPTIONS[0]] * 3 + [CAPTIONS[2]] + [CAPTIONS[0]]
    together = generate(*both, repeated)
    hook.remove()
    assert seen[:2] == [2, 5]
    alone = [generate(*both, [caption], seeds=[n]) for n, caption in enumerate(repeated)]
    assert torch.equal(together, torch.cat(alone))


def test_top_p_keeps_the_likeliest():
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    logits, allowed, uniform = p.log().expand(20000, 5), torch.ones(5, dtype=torch.bool), torch.rand(20000)
    for top_p, top_k, kept in (
        (0.6, 5, [1, 3]),
        (0.66, 5, [1, 3, 4]),
        (0.6, 2, [1]),
        (1e-9, 5, [1]),
        (1.0, 5, range(5)),
    ):
        drawn = sample_token(logits, allowed, uniform, Sampling(1.0, top_k, top_p))
        wanted = torch.zeros(5)
        wanted[list(kept)] = p[list(kept)]
        torch.testing.assert_close(torch.bincount(drawn, minlength=5) / 20000, wanted / wanted.sum(), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["top_p", "guidance"])
def test_bad_shares(name):
    for value in (0, -1.0, float("nan"), True, "much"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive and finite number, got"):
            Sampling(**{name: value})
    with pytest.raises(ValueError, match=r"top_p: expected at most 1, got 1.5"):
        Sampling(top_p=1.5)


def test_a_compiled_step_draws_the_same():
    recipe, model = make("three_region", num_layers=1)
    model.requires_grad_(False)
    prompt = recipe.prompt(pad_text(CAPTIONS), [torch.Generator().manual_seed(seed) for seed in range(4)])
    plain = fill(model, prompt, torch.full((4, 16), 0.5), Sampling(top_k=1))
    assert not plain.is_inference()  # whoever trains on it could not
    how = Sampling(top_k=1, text_attention=2.0)
    stronger = emphasised(recipe, prompt, how)
    drawn = fill(model, stronger, torch.full((4, 16), 0.5), how)
    model.compile_step()
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        assert torch.equal(plain, fill(model, prompt, torch.full((4, 16), 0.5), Sampling(top_k=1)))
    assert counters["stats"]["unique_graphs"] == 1  # one of all steps of both
    assert torch.equal(drawn, fill(model, stronger, torch.full((4, 16), 0.5), how))
    assert not torch.equal(drawn, plain)
    _, other = make("three_region", num_layers=1)
    other.double().requires_grad_(False)
    wanted = fill(other, prompt, torch.full((4, 16), 0.5), Sampling(top_k=1))
    other.compile_step()  # by a graph of its own
    assert torch.equal(wanted, fill(other, prompt, torch.full((4, 16), 0.5), Sampling(top_k=1)))
