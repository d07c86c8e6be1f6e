"""Captions that are drawn: the cache, the stop token, seeds; reranking; what is wrong with some pictures."""

import dataclasses

import pytest
import torch
from test_caption import KINDS, SEP, TEXT, make
from test_system import small_image, small_text

from cogview.generate import describe
from cogview.sampling import Sampling
from cogview.system import System

GREEDY = Sampling(top_k=1)
CODES = torch.randint(20, (4, 4, 4), generator=torch.Generator().manual_seed(1))
SIZES = {"text_vocab": 300, "max_positions": 40, "num_pivots": 30}


def system_of(attention="dense", **change) -> System:
    return System(small_text(), small_image(), *make(attention, **SIZES | change))


def test_the_language_is_the_models_own_choice():
    message = "language: expected none with recipe caption, whose models choose it, got 'zh'"
    with pytest.raises(ValueError, match=message):
        system_of().caption(CODES, language="zh")


@pytest.mark.parametrize("image_positions", ["fixed", "following"])
@pytest.mark.parametrize("attention", KINDS)
def test_a_drawn_caption_is_the_likeliest_of_full_forwards(attention, image_positions):
    """Token by token, by the layout and the pivots of training; [SEP] ends it."""
    recipe, model = make(attention, image_positions=image_positions, text_vocab=10)
    texts = describe(recipe, model, CODES, GREEDY, seeds=[3, 4, 5, 6])
    for text, seed, codes in zip(texts, (3, 4, 5, 6), CODES.flatten(1), strict=True):
        stream = torch.Generator().manual_seed(seed)
        torch.rand(9, generator=stream)  # what the tokens take
        batch = recipe.batch(torch.tensor([[*text, *[-1] * (9 - len(text))]]), codes[None], draws=[stream])
        logits = model(batch.inputs, batch.context)[0, 19:].detach()
        expected = []
        for row in logits[:9]:
            best = max([*range(TEXT, TEXT + 10), SEP], key=lambda token, row=row: float(row[token]))
            if best == SEP:
                break
            expected.append(best - TEXT)
        assert text == expected


@pytest.mark.parametrize("place", [0, 3, 8])
def test_the_stop_token_ends_a_caption(place):
    """Whose head is made to like it in one state, before the token of one place."""
    endless, model = make(stop=False)
    whole = describe(endless, model, CODES[:1], GREEDY)[0]
    assert len(whole) == 9  # the most there is room for
    forwards = []
    hook = model.stack.register_forward_hook(lambda *_: forwards.append(1))
    assert describe(endless, model, CODES[:1], GREEDY, longest=4)[0] == whole[:4]
    hook.remove()
    assert len(forwards) == 4  # what would be cut is not drawn
    roomy, large = make(stop=False, max_positions=60)
    assert len(describe(roomy, large, CODES[:1], GREEDY)[0]) == 20  # as many as the original draws
    assert len(describe(roomy, large, CODES[:1], GREEDY, longest=30)[0]) == 30
    tokens = endless.vocab.caption(torch.tensor([whole]), CODES[:1].flatten(1), 29, stop=False)
    states: list[torch.Tensor] = []
    hook = model.stack.register_forward_hook(lambda module, given, x: states.append(x))
    model(tokens, endless.context(tokens))
    hook.remove()
    with torch.no_grad():
        model.embedding.words.weight[SEP] = 1e3 * states[0][0, 19 + place]
    likes = (states[0][0, 19:28] @ model.embedding.words.weight[SEP] > 1e3).tolist()
    text = describe(make()[0], model, CODES[:1], GREEDY)[0]
    assert text == whole[: likes.index(True)]
    assert len(text) <= place


def test_a_caption_depends_on_its_seed_alone():
    for attention in KINDS:
        both, how = make(attention), Sampling(temperature=2.0)
        whole = describe(*both, CODES, how)
        assert whole == describe(*both, CODES, dataclasses.replace(how, batch_size=3), seeds=range(4))
        assert whole[2:3] == describe(*both, CODES[2:3], how, seeds=[2])
        assert whole != describe(*both, CODES, how, seeds=[4, 5, 6, 7])
        same = CODES[:1].expand(4, -1, -1)  # the picture is computed once
        assert describe(*both, same, how)[0] == whole[0]
        assert len({tuple(text) for text in describe(*both, same, how)}) > 1
    assert describe(*both, CODES[:0], how) == []
