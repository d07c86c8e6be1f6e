"""Magnification against one window and one token at a time, each by a forward over everything."""

import pytest
import torch
from test_superresolution import recipe_of
from test_transformer import recipe_of as base_of

from cogview.magnify import levels, magnify_batches, windows
from cogview.sampling import Sampling
from cogview.sequence import pad_text

CAPTIONS = [[5, 6, 7], [], [1]]
# Corners and rows of 16 x 16 cells, in the published order, of a picture of 8 x 8.
PLAIN = [(0, 0, 6), (0, 4, 6), (0, 8, 6), (4, 4, 6), (4, 0, 6), (4, 8, 6), (8, 0, 8), (8, 4, 8), (8, 8, 8)]


def make(attention="dense", num_layers=2, **change):
    torch.manual_seed(0)
    recipe = recipe_of(attention, image_grid=8, max_positions=77, num_layers=num_layers, **change)
    model = recipe.model()
    for p in model.parameters():  # away from the symmetric start: every parameter matters
        torch.nn.init.normal_(p, std=0.7)
    words, last = model.embedding.words.weight, model.stack.layers[-1].next_norm
    words.data /= words.data.norm(dim=1, keepdim=True)  # so that all are drawn
    torch.nn.init.zeros_(last.bias)
    return recipe, model.eval()


def plain(recipe, model, captions, codes):
    """The likeliest code for each cell in turn."""
    text, large = pad_text(captions), torch.full((len(captions), 16, 16), -1)
    for top, left, rows in PLAIN:
        small = codes[:, top // 2 : top // 2 + 4, left // 2 : left // 2 + 4].flatten(1)
        for y in range(top, top + rows):
            for x in range(left, left + 8):
                if large[0, y, x] < 0:
                    window = large[:, top : top + 8, left : left + 8].clamp_min(0).flatten(1)
                    batch = recipe.batch(text, small, window)
                    places = (batch.inputs == recipe.vocab["BOI2"]).nonzero()[:, 1] + 8 * (y - top) + x - left
                    logits = model(batch.inputs, batch.context)[torch.arange(len(text)), places]
                    large[:, y, x] = logits[:, :20].argmax(1)
    return large


@pytest.mark.parametrize(
    ("attention", "images", "restart"), [("dense", "following", "on"), ("three_region", "fixed", "behind")]
)
@torch.no_grad()
def test_it_is_one_window_after_the_other(attention, images, restart):
    recipe, model = make(attention, image_positions=images, restart=restart, num_pivots=97)  # all that is seen
    codes = torch.randint(20, (3, 8, 8))
    told = []
    greedy = Sampling(top_k=1, batch_size=2)
    found = list(magnify_batches(recipe, model, CAPTIONS, codes, greedy, update=told.append))
    assert [len(part) for part in found] == [2, 1]
    assert torch.equal(torch.cat(found), plain(recipe, model, CAPTIONS, codes))
    assert len(found[0].unique()) > 5
    assert told == sorted(told)
    assert told[-1] == 3 * 256
    assert len(told) == 2 * (48 + 24 + 24 + 32 + 16 + 48 + 24 + 24)  # two windows of 16 go together


def test_the_published_order():
    """New in each window: 4,096 codes in 64 x 64, of 8,448 that are walked over."""
    there, new = torch.zeros(64, 64, dtype=torch.bool), []
    for top, left, rows in windows(16):
        part = there[top : top + rows, left : left + 32]
        new.append(int((~part).sum()))
        part[:] = True
    assert new == [576, 672, 480, 512, 448, 256, 576, 288, 288]
    assert there.all()
    assert sum(32 * rows for _, _, rows in windows(16)) == 8448
    assert [w.rows for w in windows(16)] == [18, 30, 30, 30, 30, 30, 32, 32, 32]
    assert [len(level) for level in levels(16)] == [1, 1, 1, 1, 2, 1, 1, 1]
    assert [tuple(w) for w in windows(4)] == PLAIN


@pytest.mark.parametrize("n", [2, 4, 16])
def test_windows_of_a_level_wait_for_none_of_it(n):
    """Each cell is drawn by the window that is the first to have it, and read by later levels alone."""
    flat = [window for level in levels(n) for window in level]
    assert sorted(flat) == sorted(windows(n))
    for level in levels(n):
        cover = torch.zeros(4 * n, 4 * n)
        for top, left, rows in level:
            cover[top : top + rows, left : left + 2 * n] += 1
        assert cover.max() == 1
    number = {window: k for k, level in enumerate(levels(n)) for window in level}
    order = windows(n)
    for k, window in enumerate(order):
        for before in order[:k]:
            cells = [
                {(y, x) for y in range(w.top, w.top + w.rows) for x in range(w.left, w.left + 2 * n)}
                for w in (before, window)
            ]
            if cells[0] & cells[1]:
                assert number[before] < number[window]


def test_a_picture_depends_on_its_seed_alone():
    recipe, model = make("three_region", num_layers=1, num_pivots=50)
    codes, how = torch.randint(20, (3, 8, 8)), {"temperature": 1.0, "top_k": 20}
    together = torch.cat(list(magnify_batches(recipe, model, CAPTIONS, codes, Sampling(**how), seeds=[3, 4, 5])))
    alone = next(magnify_batches(recipe, model, CAPTIONS[1:2], codes[1:2], Sampling(**how), seeds=[4]))
    assert torch.equal(together[1:2], alone)
    other = next(magnify_batches(recipe, model, CAPTIONS[1:2], codes[1:2], Sampling(**how), seeds=[5]))
    assert not torch.equal(other, alone)


def test_guidance_leads_away_from_no_caption():
    recipe, model = make(num_layers=1)
    codes = torch.randint(20, (1, 8, 8))
    with_text, none = ([[5, 6, 7]], [[]])
    how = {"temperature": 2.0}
    plainly, without = (
        next(magnify_batches(recipe, model, text, codes, Sampling(**how))) for text in (with_text, none)
    )
    at_zero = next(magnify_batches(recipe, model, with_text, codes, Sampling(**how, guidance=1e-9)))
    assert torch.equal(at_zero, without)
    assert not torch.equal(plainly, without)


def test_what_does_not_fit_is_refused():
    recipe, model = make()
    codes, how = torch.zeros(1, 8, 8, dtype=torch.int64), Sampling()
    with pytest.raises(ValueError, match=r"codes: expected \[1, 8, 8\], one picture a caption, got \[1, 4, 4\]"):
        magnify_batches(recipe, model, [[1]], codes[:, :4, :4], how)
    with pytest.raises(ValueError, match=r"codes: expected \[2, 8, 8\], one picture a caption, got \[1, 8, 8\]"):
        magnify_batches(recipe, model, [[1], [2]], codes, how)
    with pytest.raises(ValueError, match="codes: expected ids 0 to 19, got 20 to 20"):
        magnify_batches(recipe, model, [[1]], codes + 20, how)
    with pytest.raises(ValueError, match="text: expected at most 9 tokens"):
        magnify_batches(recipe, model, [[1] * 10], codes, how)
    with pytest.raises(ValueError, match=r"image_grid: expected a multiple of 4, .* got 6"):
        magnify_batches(recipe_of(image_grid=6, max_positions=49), model, [[1]], codes, how)
    with pytest.raises(ValueError, match="model: expected one of recipe superresolution, got cogview"):
        magnify_batches(base_of(), model, [[1]], codes, how)
