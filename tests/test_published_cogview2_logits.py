"""The released computations of CogView2's stages in plain torch, and ours of the imported weights: equal logits."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import released
import torch
from common import assert_as_good_as
from test_published_cogview2 import (  # noqa: F401
    CELLS,
    COARSE,
    FINE,
    ROWS,
    imported,
    imported_run,
    released_files,
    vocabulary,
    weights,
)
from torch import Tensor

from cogview.bilingual import BilingualVocabulary
from cogview.recipes.coglm import of_rows
from cogview.recipes.direct import Direct
from cogview.recipes.iterative import Iterative
from cogview.sequence import pad_text
from cogview.tokenizers.text import TextTokenizer


class Sample(NamedTuple):
    """As pretrain_coglm.py gives it to the model: in the original order, of one picture."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    """[S, S], 1 where a row sees a column."""
    learned: Tensor
    """bool [S]"""


TEXT = 112  # places before an image's cells, one of them [SOI]'s or the first language's start
LENGTH = TEXT + CELLS**2


def stored(ids: BilingualVocabulary, texts: list[list[int]], codes: Tensor) -> list[int]:
    """A sample on the disk: texts with <pad> between and behind them, up to the picture."""
    row: list[int] = []
    for text in texts:
        row += [ids.image_size + i for i in text] + [ids["PAD"]]
    return [*row, *[ids["PAD"]] * (TEXT - len(row)), *codes.tolist()]


def spans_of(texts: list[list[int]]) -> list[tuple[int, int]]:
    """Where each text stands."""
    first = [sum(len(other) + 1 for other in texts[:n]) for n in range(len(texts))]
    return [(begin, begin + len(text)) for begin, text in zip(first, texts, strict=True)]


def text_to_image(ids: BilingualVocabulary, texts: list[list[int]], codes: Tensor, chosen: int) -> Sample:
    """One language is seen by all; the picture, [SOI] first, is causal."""
    row = stored(ids, texts, codes)
    begin, end = spans_of(texts)[chosen]
    image = range(TEXT - 1, LENGTH)
    positions, mask, learned = torch.zeros(LENGTH).long(), torch.zeros(LENGTH, LENGTH), torch.zeros(LENGTH).bool()
    labels = torch.tensor([*row[1:], row[-1]])
    row[TEXT - 1] = ids["SOI"]
    for n, place in enumerate(range(begin, end)):
        positions[place] = n
    mask[:, begin:end] = 1
    for n, place in enumerate(image):
        positions[place] = ROWS + n
        mask[place, image[0] : place + 1] = 1
        learned[place] = place < image[-1]
    return Sample(torch.tensor(row), positions, labels, mask, learned)


def image_to_text(ids: BilingualVocabulary, texts: list[list[int]], codes: Tensor, corners: list[int]) -> Sample:
    """Texts move one place on, so that the start of its language stands before each; they see the picture and
    themselves. Cells outside of patches see each other, those inside these and what is before them."""
    row = stored(ids, texts, codes)
    row = [row[0], *row[: TEXT - 1], *row[TEXT:]]
    positions, mask, learned = torch.zeros(LENGTH).long(), torch.zeros(LENGTH, LENGTH), torch.zeros(LENGTH).bool()
    for (begin, end), text in zip(spans_of(texts), texts, strict=True):
        row[begin] = ids["SOE" if max(text) < ids.chinese_from else "SOC"]
        for n, place in enumerate(range(begin, end + 1)):
            positions[place] = n
            mask[place, begin : place + 1] = 1
            mask[place, TEXT:] = 1
            learned[place] = place < end
    inside = torch.zeros(CELLS, CELLS).bool()
    for corner in corners:
        y, x = divmod(corner, CELLS - 4)
        inside[y : y + 4, x : x + 4] = True
        learned[TEXT:].view(CELLS, CELLS)[y : y + 4, x : x + 3] = True
    outside = [TEXT + j for j in range(CELLS**2) if not inside.flatten()[j]]
    for j in range(CELLS**2):
        positions[TEXT + j] = ROWS + 1 + j
        mask[TEXT + j, outside] = 1
        if inside.flatten()[j]:
            mask[TEXT + j, TEXT : TEXT + j + 1] = 1
    tokens = torch.tensor(row)
    return Sample(tokens, positions, torch.cat([tokens[1:], tokens[-1:]]), mask, learned)


def text_alone(ids: BilingualVocabulary, text: list[int], spans: list[tuple[int, int]]) -> Sample:
    """spans: the piece before each, which belongs to it, and how many are predicted. What is before a span and in none
    is seen by all; what is behind the last is causal, and seen by nothing that is predicted."""
    tokens, count = ids.image_size + torch.tensor(text), len(text)
    mask, learned = torch.ones(count, count).tril(), torch.zeros(count).bool()
    behind = 0
    for first, length in spans:
        mask[behind:first] = 0
        learned[first : first + length] = True
        behind = first + length + 1
    behind = 0
    for first, length in spans:
        mask[:, behind:first] = 1
        behind = first + length + 1
    return Sample(tokens, torch.arange(count), torch.cat([tokens[1:], tokens[-1:]]), mask, learned)


def learned_logits(files: Path, sample: Sample, dtype: torch.dtype) -> dict[int, Tensor]:
    """Of each position whose label is learned, which stands for its place."""
    model = released.Sat(weights(files, "coglm"), dtype)
    logits = model.coglm(sample.tokens[None], sample.positions, sample.mask)[0]
    places = sample.learned.nonzero()[:, 0].tolist()
    return {int(sample.positions[place]): logits[place] for place in places}


def assert_learned_alike(files: Path, run: Path, sample: Sample, rows: Any, places: Any = None) -> None:
    """Our logits of all positions that have a target are those of the sample, and so are the targets. places: of the
    sample's, since a row of ours has one text; None: all."""
    recipe, model = imported(run, "coglm")
    batch = recipe.weighed(*of_rows(rows))
    ours = model(batch.inputs, batch.context)[0]
    every = range(len(sample.learned))
    learned = torch.tensor([places is None or place in places for place in every]) & sample.learned
    sample = sample._replace(learned=learned)
    truth, plain = (learned_logits(files, sample, dtype) for dtype in (torch.float64, torch.float32))
    there = (batch.targets[0] != recipe.vocab["PAD"]).nonzero()[:, 0]
    at = rows.positions[0, there].tolist()
    assert sorted(at) == sorted(truth)
    targets = dict(zip(sample.positions[learned].tolist(), sample.labels[learned].tolist(), strict=True))
    assert dict(zip(at, batch.targets[0, there].tolist(), strict=True)) == targets
    assert_as_good_as(ours[there], *(torch.stack([some[p] for p in at]) for some in (truth, plain)))


def codes(cells: int, seed: int = 1) -> Tensor:
    return torch.randint(released.CODES, (cells,), generator=torch.Generator().manual_seed(seed))


def texts(files: Path) -> list[list[int]]:
    """English and Chinese of one picture."""
    text, ids = TextTokenizer.load(files / "ice_text.model"), vocabulary(files)
    both = [text.encode(caption) for caption in ("a fox above a tree", "蓝色的房子")]
    assert max(both[0]) < ids.chinese_from <= max(both[1])
    return both


@pytest.mark.parametrize("chosen", [0, 1])
def test_text_to_image(files, run, chosen):
    both, image = texts(files), codes(CELLS**2)
    recipe, _ = imported(run, "coglm")
    for given, which in ((both, chosen), (both[chosen:][:1], 0)):
        rows, _ = recipe.sequences.picture(pad_text([both[chosen]]), image[None])
        assert_learned_alike(files, run, text_to_image(recipe.vocab, given, image, which), rows)


@pytest.mark.parametrize("corners", [[], [2], [0, 3], [1, 2]])
def test_image_to_text(files, run, corners):
    both, image = texts(files), codes(CELLS**2)
    recipe, _ = imported(run, "coglm")
    sample = image_to_text(recipe.vocab, both, image, corners)
    inside, predicted = torch.zeros(2, CELLS, CELLS).bool()
    for y, x in (divmod(corner, CELLS - 4) for corner in corners):
        inside[y : y + 4, x : x + 4] = True
        predicted[y : y + 4, x : x + 3] = True
    for text, (begin, end) in zip(both, spans_of(both), strict=True):
        rows = recipe.sequences.caption(
            pad_text([text]), image[None], inside.view(1, -1), predicted.view(1, -1), stop=False
        )
        assert_learned_alike(files, run, sample, rows, {*range(begin, end + 1), *range(TEXT, LENGTH)})


@pytest.mark.parametrize("spans", [[(3, 2)], [(0, 1), (2, 3), (9, 1)]])
def test_text_alone(files, run, spans):
    """What stands behind the last span changes nothing of what is predicted there, and is left out of our row."""
    ids = vocabulary(files)
    text = torch.randint(4, ids.text_size, (17,), generator=torch.Generator().manual_seed(2)).tolist()
    recipe, _ = imported(run, "coglm")
    inside, predicted = torch.zeros(2, 1, sum(spans[-1]) + 1).bool()
    for first, count in spans:
        inside[0, first : first + count + 1] = True
        predicted[0, first : first + count] = True
    rows = recipe.sequences.spans(pad_text([text[: inside.shape[1]]]), inside, predicted)
    assert_learned_alike(files, run, text_alone(ids, text, spans), rows)


@pytest.mark.parametrize("value", [0.0, 1.4])
@pytest.mark.parametrize("masked", [range(CELLS**2), [0, 1, 9, 10, 17, 35]], ids=["all", "some"])
def test_drawing_and_textual_attention(files, run, value, masked):
    """cogview2_text2image.py, and base_completion.py of some cells: the constant is added to the scores of every row
    and the columns of text. Here the prompt has it, and what is drawn behind it, token by token."""
    recipe, model = imported(run, "coglm")
    text, image = texts(files)[0], codes(CELLS**2)
    last = {*masked, *(j - 1 for j in masked if j % CELLS)}  # and the left neighbours of masked cells
    order = [*(j for j in range(CELLS**2) if j not in last), *sorted(last)]
    count, begun = len(text), len(text) + 1 + CELLS**2 - len(last)  # of text, and before what is causal
    tokens = torch.tensor([[*(released.CODES + i for i in text), recipe.vocab["SOI"], *image[order].tolist()]])
    positions = torch.tensor([*range(count), ROWS, *(ROWS + 1 + j for j in order)])
    mask = torch.ones(tokens.shape[1], tokens.shape[1]).tril()
    mask[:count, :count] = 1
    mask[count + 1 :, count + 1 : begun] = 1
    log_weights = torch.zeros_like(mask)
    log_weights[:, :count] = value
    computed = [released.Sat(weights(files, "coglm"), dtype) for dtype in (torch.float64, torch.float32)]
    truth, plain = (each.coglm(tokens, positions, mask, log_weights) for each in computed)

    drawn = torch.zeros(1, CELLS**2).bool()
    drawn[0, list(masked)] = True
    prompt = recipe.completion(pad_text([text]), image[None], drawn)
    context = dataclasses.replace(prompt.context, emphasis=recipe.emphasis(prompt.inputs, value) if value else None)
    length = prompt.inputs.shape[1] - int((prompt.inputs == recipe.vocab["PAD"]).sum())
    assert torch.equal(prompt.inputs[:, :length], tokens[:, :length])
    assert length >= tokens.shape[1] - 1  # the last cell is drawn and not seen
    cache, found = model.make_cache(1, length), []
    for start, end in ((0, begun), *((place, place + 1) for place in range(begun, length))):
        own = dataclasses.replace(context, positions=context.positions[:, start:end], prompt=start == 0)
        found.append(model(tokens[:, start:end], own, cache=cache))
    assert_as_good_as(torch.cat(found, dim=1), truth[:, :length], plain[:, :length])
    if value:
        none = computed[0].coglm(tokens, positions, mask)
        assert (none - truth)[:, count:].abs().max() > 0.05


def sequences(files: Path, slots: int) -> list[tuple[list[int], list[int]]]:
    """Texts, of which one is longer than 16, and their ids padded on the left."""
    both = texts(files)
    ids = vocabulary(files)
    long = torch.randint(4, ids.text_size, (23,), generator=torch.Generator().manual_seed(2)).tolist()
    given = [*both, long, both[0][:1]]
    # what is padded with is 0, an image's code
    return [(text, [0] * max(0, slots - len(text)) + [ids.image_size + i for i in text[:slots]]) for text in given]


def left(slots: int, text: list[int]) -> tuple[int, list[int]]:
    """Padding, and positions of padding and text."""
    there = min(slots, len(text))
    return slots - there, [*[0] * (slots - there), *range(there)]


def test_direct(files, run):
    """Text padded on the left to 96, [SOI] where fine cells are; what padding comes to is nobody's."""
    recipe, model = imported(run, "direct")
    assert isinstance(recipe, Direct)
    coarse, ids, slots, before = codes(COARSE**2), recipe.vocab, 96, 96 + COARSE**2
    for text, padded in sequences(files, slots):
        none, at = left(slots, text)
        mask = torch.ones(before, before)
        mask[:slots, slots:] = 0
        mask[none:, :none] = 0
        tokens = torch.tensor([[*padded, *coarse.tolist(), *[ids["SOI"]] * FINE**2]])
        positions = torch.tensor([*at, *range(513, 513 + COARSE**2), *range(1024, 1024 + FINE**2)])
        sizes = slots, COARSE, FINE
        truth, plain = (
            released.Sat(weights(files, "direct"), d).direct(tokens, positions, mask, *sizes)
            for d in (torch.float64, torch.float32)
        )
        inputs, targets = recipe.layout(pad_text([text]), torch.cat([coarse, codes(FINE**2, 3)])[None])
        ours, there = model(inputs, recipe.context(inputs)), inputs[0] != ids["PAD"]
        assert_as_good_as(ours[:, there], truth[:, none:], plain[:, none:])
        assert torch.equal(targets[:, recipe.before :], codes(FINE**2, 3)[None])


def test_iterative(files, run):
    """The first 16 of text, padded on the left; cells that are drawn are [SOI], in their places."""
    recipe, model = imported(run, "iterative")
    assert isinstance(recipe, Iterative)
    fine, ids, slots = codes(FINE**2), recipe.vocab, 16
    hidden = recipe.order.view(-1) >= 2
    assert 0 < int(hidden.sum()) < FINE**2
    for text, padded in sequences(files, slots):
        none, at = left(slots, text)
        mask = torch.ones(slots)
        mask[:none] = 0
        tokens = torch.tensor([[*padded, *fine.masked_fill(hidden, ids["SOI"]).tolist()]])
        positions = torch.tensor([*at, *range(1024, 1024 + FINE**2)])
        truth, plain = (
            released.Sat(weights(files, "iterative"), d).iterative(tokens, positions, mask, slots, FINE)
            for d in (torch.float64, torch.float32)
        )
        inputs, _ = recipe.hidden(pad_text([text]), fine[None], hidden[None])
        ours, there = model(inputs, recipe.context(inputs)), inputs[0] != ids["PAD"]
        assert_as_good_as(ours[:, there], truth[:, none:], plain[:, none:])
