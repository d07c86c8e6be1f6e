"""Generation with a cache equals the full forward; seeds, batches and CapLoss."""

import pytest
import torch
import torch.nn.functional as F
from test_model_gpt import ATTENTIONS, make

from cogview.caploss import caploss
from cogview.generate import draw_pivots_per_row, generate, sample_token
from cogview.model import KVCache
from cogview.sequence import pad_text

CAPTIONS = [[1, 2, 3, 4, 5], [], [6], [7, 8, 9, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("image_positions", ["following", "fixed"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cached_decoding_equals_the_full_forward(attention, image_positions):
    model = make(attention, image_positions=image_positions).eval()
    c = model.config
    text = pad_text(CAPTIONS)
    tokens = model.vocab.text2image(text, torch.randint(20, (4, 16)), c.max_positions)
    pivots = model.draw_pivots(tokens[:, :-1])
    full = model(tokens[:, :-1], pivots=pivots)
    cache = KVCache(c, 4)
    lengths = torch.tensor([len(caption) + 3 for caption in CAPTIONS])
    prompt = model(tokens[:, : lengths.max()], pivots=pivots, cache=cache)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(prompt[b, :n], full[b, :n], rtol=1e-4, atol=1e-4)
    cache.seqlens = lengths.int()
    rows, step = torch.arange(4), 0
    for size in (1, 1, 3, 1, 2, 1, 1, 4, 1):  # one token at a time, and several
        places = lengths[:, None] + step + torch.arange(size)
        logits = model(tokens[rows[:, None], places], pivots=pivots, cache=cache)
        torch.testing.assert_close(logits, full[rows[:, None], places], rtol=1e-4, atol=1e-4)
        step += size
    assert cache.seqlens.tolist() == (lengths + step).tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_codes_are_the_argmax_of_the_full_forward(attention):
    model = make(attention)
    codes = generate(model, CAPTIONS, seeds=[3, 4, 5, 6], top_k=1)
    assert codes.shape == (4, 4, 4)
    assert model.training
    model.eval()
    tokens = model.vocab.text2image(pad_text(CAPTIONS), codes.flatten(1), model.config.max_positions)
    streams = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]
    for g in streams:
        torch.rand(16, generator=g)
    logits = model(tokens[:, :-1], pivots=draw_pivots_per_row(model, tokens[:, :-1], streams))
    for b, caption in enumerate(CAPTIONS):
        image = logits[b, len(caption) + 2 : len(caption) + 18, :20]
        assert torch.equal(image.argmax(-1), codes[b].flatten())


def test_a_picture_depends_on_its_seed_alone():
    model = make("three_region")
    whole = generate(model, CAPTIONS, seeds=[0, 1, 2, 3])
    assert torch.equal(whole, generate(model, CAPTIONS))
    assert torch.equal(whole, generate(model, CAPTIONS, batch_size=3))
    assert torch.equal(whole[2:3], generate(model, CAPTIONS[2:3], seeds=[2]))
    assert not torch.equal(whole, generate(model, CAPTIONS, seeds=[4, 5, 6, 7]))
    assert generate(model, []).shape == (0, 4, 4)


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


def test_bad_requests():
    model = make()
    with pytest.raises(ValueError, match="caption 1 is too long: 10 tokens, at most 9 fit"):
        generate(model, [[1], [2] * 10])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        generate(model, [[1]], temperature=0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        generate(model, [[1]], top_k=0)
    with pytest.raises(ValueError, match=r"seeds must be as many as captions \(1\), got 2"):
        generate(model, [[1]], seeds=[1, 2])


def test_caploss_is_the_mean_over_the_text():
    model = make("dense").eval()
    codes = torch.randint(20, (2, 4, 4))
    scores = caploss(model, codes, [[1, 2, 3], [4]])
    tokens = model.vocab.caption(torch.tensor([[1, 2, 3], [4, -1, -1]]), codes.flatten(1), 29)
    p = F.log_softmax(model(tokens[:, :-1]), -1)
    expected = [-(p[0, 19, 21] + p[0, 20, 22] + p[0, 21, 23]) / 3, -p[1, 19, 24]]
    torch.testing.assert_close(scores, torch.stack(expected))


def test_caploss_does_not_depend_on_the_batch():
    model = make("three_region")
    codes = torch.randint(20, (3, 4, 4))
    together = caploss(model, codes, [[1, 2, 3], [4], [5, 6]])
    torch.testing.assert_close(together[1:2], caploss(model, codes[1:2], [[4]]))
    with pytest.raises(ValueError, match="captions must not be empty"):
        caploss(model, codes, [[1], [], [2]])
    with pytest.raises(ValueError, match=r"codes must be \[2, 4, 4\], one image a caption, got \[3, 4, 4\]"):
        caploss(model, codes, [[1], [2]])
