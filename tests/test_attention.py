"""What is told of attention: its weights are the model's own, its figures are formulas, words and places are theirs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_coglm import make as coglm
from test_system import small_image, small_text, system_of
from test_transformer import recipe_of, sample
from torch import Tensor

from cogview.attention import look as looking
from cogview.attention import words
from cogview.attention.analysis import analyse
from cogview.attention.look import Places, Seen, check, look, places_of
from cogview.attention.measure import Figures, Tally, regions_of
from cogview.attention.names import offset_name, offset_of, strongest
from cogview.attention.observations import observations
from cogview.attention.plots import Panel, Row, marked, sheet
from cogview.recipes.superresolution import SuperResolution
from cogview.system import System
from cogview.tokenizers.text import TextTokenizer

KINDS = ["dense", "dense_pb_relax", "three_region", "dalle", "coglm"]
GRID = 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_to_scores_gives_the_attention_of_the_model(kind):
    """Softmax of the scores with it, times values, is what every layer computes: mask, pivots and biases."""
    torch.manual_seed(0)
    if kind == "coglm":
        recipe, _ = coglm()
        text, codes = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]]), torch.randint(20, (2, recipe.config.image_tokens))
        batch = recipe.batch(text, codes)
    else:
        recipe = recipe_of(kind, **({"num_pivots": 13} if kind == "three_region" else {}))  # each stands for two tokens
        batch = sample(recipe)
    rows, tokens = batch.inputs.shape
    biased = False
    for index in range(recipe.config.num_layers):
        attention = recipe.attention(index)
        q, k, v = torch.randn(3, rows, attention.num_heads, tokens, attention.head_dim)
        own = attention.own(batch.context)
        added = attention.added(own, tokens)
        weights = (q @ k.mT / math.sqrt(attention.head_dim) + added).softmax(-1)
        torch.testing.assert_close(weights @ v, attention.attend(q, k, v, own))
        biased |= bool((added.isfinite() & (added != 0)).any())
    assert biased == (kind == "three_region")


@pytest.fixture(scope="module")
def system() -> System:
    return system_of(small_text(), small_image())


def collected(system: System, codes: Tensor) -> tuple[list[Seen], Places]:
    ids, found = system.encode("a red car")[0], list[Seen]()
    look(system, ids, codes, found.append)
    return found, places_of(system, ids)


def test_weights_are_those_of_the_forward(system, monkeypatch):
    """Of each layer those by which its branch comes out, whatever the number of heads at a time."""
    codes = torch.randint(20, (GRID, GRID), generator=torch.Generator().manual_seed(1))
    outputs, layers = list[Tensor](), system.model.stack.layers
    hooks = [
        layer.attention.dense.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])) for layer in layers
    ]
    values = list[Tensor]()
    hooks += [
        layer.attention.query_key_value.register_forward_hook(
            lambda _, inputs, x, attention=layer.attention: values.append(attention.split(x)[2][0])
        )
        for layer in layers
    ]
    together, places = collected(system, codes)
    for hook in hooks:
        hook.remove()
    for seen, v, out in zip(together, values, outputs, strict=True):
        assert seen.weights.shape[0] == 2
        branch = (seen.weights @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(branch, out[0])
        assert torch.equal(seen.weights > 0, seen.visible.expand_as(seen.weights))
    monkeypatch.setattr(looking, "_PAIRS", 1)
    alone, _ = collected(system, codes)
    assert [(seen.layer, seen.heads.start) for seen in alone] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for seen in alone:
        torch.testing.assert_close(seen.weights, together[seen.layer].weights[seen.heads])
    vocab = system.recipe.vocab
    tokens = system.recipe.layout(torch.tensor([system.encode("a red car")[0]]), codes.flatten()[None])[0][0]
    assert tokens[places.image].tolist() == codes.flatten().tolist()
    assert (tokens[places.text] - 20).tolist() == system.encode("a red car")[0]
    assert [tokens[at].tolist() for at in places.separators.values()] == [[vocab[n]] for n in places.separators]


def handmade(weights: Tensor) -> tuple[Seen, Places]:
    """[ROI1] two words [BOI1] and 2 x 2 image tokens, of causal attention with these weights."""
    scores = torch.arange(64.0).view(1, 8, 8)
    places = Places(torch.arange(4, 8), torch.tensor([1, 2]), {"ROI1": torch.tensor([0]), "BOI1": torch.tensor([3])})
    return Seen(0, slice(0, 1), scores, weights[None], torch.ones(8, 8).tril().bool()), places


def test_figures_are_their_formulas():
    evenly = torch.ones(8, 8).tril()
    evenly = evenly / evenly.sum(1, keepdim=True)
    tally = Tally(1, 1, 2)
    tally(*handmade(evenly))
    even = tally.figures()
    assert float(even.entropy) == pytest.approx(1)
    torch.testing.assert_close(even.absolute[0, 0], torch.ones(2, 2, dtype=torch.float64))
    for name in even.regions:
        torch.testing.assert_close(even.regions[name], even.uniform[name], equal_nan=True)
    weights = evenly.clone()
    weights[4:] = 0
    weights[4, 3] = weights[5, 4] = 1.0  # [BOI1], and the left neighbour
    weights[6, [1, 4]] = 0.5  # a word, and the token above
    weights[7, [5, 7]] = 0.5  # the token above, and itself
    tally = Tally(1, 1, 2)
    tally(*handmade(weights))
    tally(*handmade(weights))
    found = tally.figures()
    assert {name: float(share) for name, share in found.targets.items()} == pytest.approx(
        {"itself": 0.5 / 4, "image": 2 / 4, "words": 0.5 / 4, "separators": 1 / 4}
    )
    assert {name: float(share) for name, share in found.separators.items()} == {"[ROI1]": 0, "[BOI1]": 0.25}
    assert found.relative[0, 0, 0].tolist() == [0, 0.5, 0]
    assert found.relative[0, 0, 1].tolist() == pytest.approx([0.5, 0.125, math.nan], nan_ok=True)
    assert found.offsets[0, 0].tolist() == [[0, 0.25, 0], [0.25, 0.125, 0]]
    assert offset_of(found, 0, 0) == (-1, 0, 0.5)
    assert float(found.regions["column above"]) == pytest.approx(1 / 2.5)
    log = torch.tensor([5.0, 6.0, 7.0, 8.0]).log()
    assert float(found.entropy) == pytest.approx(float((math.log(2) / log[2:]).sum() / 4))
    there = torch.tensor([[9, 17, 18]]).double()  # of words, not of commands
    assert found.scores["text to text"][0, 0].tolist() == pytest.approx(
        [9, float(there.mean()), 18, float(there.std(unbiased=False))]
    )
    others = torch.tensor(
        [[8 * i + j for i in range(8) for j in range(i + 1) if (i, j) not in ((1, 1), (2, 1), (2, 2))]]
    )
    assert found.scores["others"][0, 0].tolist() == pytest.approx(
        [0, float(others.double().mean()), 63, float(others.double().std(unbiased=False))]
    )
    assert [one.holds for one in observations(found)][2] == "no"  # checkers: nothing is inside of 2 x 2


def test_regions_and_names():
    regions = regions_of(8)
    queries, keys = regions["first rows"]
    assert (queries.sum(), keys.sum()) == (32, 16)
    assert (regions["column above"][1].sum(), regions["column above what is drawn"][1].sum()) == (8 * 28, 7 * 28)
    named = [offset_name(*offset) for offset in ((-1, 1), (0, -1), (-3, 0), (-2, 5))]
    assert named[:2] == ["the token above what is drawn", "its left neighbour"]
    assert named[2:] == ["the token 3 rows above", "the token at (-2, 5)"]
    assert strongest(torch.tensor([[0.0, 1.0], [3.0, 2.0]]), 3) == [(1, 0, 3.0), (1, 1, 2.0), (0, 1, 1.0)]


def test_observations_tell_what_is_there(system):
    """A head that sees its left neighbour alone attends to an offset, and one that sees [BOI1] to a separator."""
    _, places = collected(system, torch.zeros(GRID, GRID, dtype=torch.int64))
    tokens = system.recipe.length
    visible, weights = torch.ones(tokens, tokens).tril().bool(), torch.zeros(2, tokens, tokens)
    scores = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(0))
    weights[0].fill_diagonal_(1.0).copy_(weights[0].roll(-1, 1))
    weights[1, :, int(places.separators["BOI1"])] = 1.0
    tally = Tally(2, 2, GRID)
    for layer in range(2):
        tally(Seen(layer, slice(0, 2), scores, weights, visible), places)
    told = observations(tally.figures())
    assert (told[0].holds, told[5].holds) == ("yes", "no")  # not more at the end than before
    assert "2 of 4 heads give 25% or more to one offset" in told[0].here
    assert "to its left neighbour" in told[0].here
    assert "layer 1 head 2 100%, layer 2 head 2 100%" in told[5].here


def of_heads(grid: int = 8, layers: int = 4) -> Figures:
    """Of heads that give all keys that they see the same, and whose scores are all of one distribution."""
    words = 60  # so many pairs that their scores tell the distribution
    tally, tokens = Tally(layers, 2, grid), grid**2 + words + 2
    visible = torch.ones(tokens, tokens).tril()
    separators = {"ROI1": torch.tensor([0]), "BOI1": torch.tensor([words + 1])}
    places = Places(torch.arange(words + 2, tokens), torch.arange(1, words + 1), separators)
    weights = (visible / visible.sum(1, keepdim=True)).expand(2, -1, -1)
    for layer in range(layers):
        scores = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(layer))
        tally(Seen(layer, slice(0, 2), scores, weights, visible.bool()), places)
    return tally.figures()


def changed(figures: Figures, name: str) -> Figures:
    """What the observation of this number says yes to, and no other way to see it."""
    layers, heads, g = *figures.entropy.shape, figures.relative.shape[2]
    halves = torch.tensor([0.4, 0.4, 0.2, 0.2])[:, None].double().expand(layers, heads)
    regions, targets = dict(figures.regions), dict(figures.targets)
    offsets, scores = figures.offsets.clone(), {pairs: of.clone() for pairs, of in figures.scores.items()}
    entropy = figures.entropy
    if name == "offsets":
        offsets[0, 0, g - 2, g - 1] = 0.3
    if name == "first rows":
        regions["first rows"] = 2 * figures.uniform["first rows"]
    if name == "checkers":
        regions["edges, from edges"] = figures.regions["edges, from edges"] + 0.3
    if name == "broad":
        regions["upper half"] = figures.regions["upper half"] + torch.tensor([0.0, 0.0, 0.2, 0.2])[:, None]
    if name == "depth":
        offsets[..., g - 1, g - 2] = halves
        regions["column above"] = 5 * halves * figures.uniform["column above"]
        targets["words"] = 0.5 - halves
    if name == "separators":
        targets["separators"] = torch.tensor([0.1, 0.1, 0.1, 0.9])[:, None].double().expand(layers, heads)
    if name == "sparse":
        entropy = torch.tensor([1.0, 1.0, 1.0, 0.5])[:, None].double().expand(layers, heads)
    if name == "text":
        scores["text to text"][..., 1:] *= 0.5
    if name == "scales":
        scores["others"][..., 1] = torch.tensor([10.0, -40.0])
    return replace(figures, offsets=offsets, regions=regions, targets=targets, scores=scores, entropy=entropy)


OBSERVED = ("offsets", "first rows", "checkers", "broad", "depth", "separators", "sparse", "text", "scales")


@pytest.mark.parametrize("name", OBSERVED)
def test_each_observation_is_seen_where_it_is_and_not_elsewhere(name):
    even, number = of_heads(), OBSERVED.index(name)
    assert observations(even)[number].holds == "no"
    assert observations(changed(even, name))[number].holds == "yes"


@pytest.mark.parametrize(
    ("shares", "holds"),
    [
        ([0.9, 0.9, 0.9, 0.01], "no"),
        ([0.5, 0.5, 0.5, 0.5], "no"),
        ([0.25, 0.25, 0.25, 0.35], "partly"),
        ([0.2, 0.2, 0.2, 0.35], "partly"),
        ([0.2, 0.2, 0.2, 0.6], "yes"),
    ],
)
def test_separators_are_for_the_last_layers(shares, holds):
    even = of_heads()
    separators = torch.tensor(shares, dtype=torch.float64)[:, None].expand_as(even.entropy)
    told = observations(replace(even, targets=even.targets | {"separators": separators}))
    assert told[OBSERVED.index("separators")].holds == holds


def test_entropy_that_rises_or_stays_is_not_sparse():
    even = of_heads()
    for last in (1.0, 0.55, 0.5):
        entropy = torch.tensor([0.5, 0.5, 0.5, last], dtype=torch.float64)[:, None].expand_as(even.entropy)
        told = observations(replace(even, entropy=entropy))[OBSERVED.index("sparse")]
        assert (told.holds, "(by layer 0.50, 0.50, 0.50" in told.here) == ("no", True)


def test_a_broad_bias_is_beyond_offsets_and_of_deeper_layers():
    even, where = of_heads(), OBSERVED.index("broad")
    centre = even.regions["centre"].clone()
    centre[0, 1] += 0.2
    early = replace(even, regions=even.regions | {"centre": centre})
    told = observations(early)[where]
    assert (told.holds, "the centre 1, most layer 1 head 2" in told.here) == ("partly", True)
    explained = replace(early, by_offset=even.by_offset | {"centre": centre - 0.1})
    assert observations(explained)[where].holds == "no"


def test_what_goes_by_offset_alone_is_no_checkers():
    """A head that looks at its left neighbour gives edges what its offset tells; one whose edges look elsewhere not."""
    g = 8
    tokens, places = g**2, Places(torch.arange(g**2), torch.tensor([0]), {"ROI1": torch.tensor([0])})
    x, at, visible = torch.arange(g**2) % g, torch.arange(g**2), torch.ones(g**2, g**2).tril().bool()
    weights = torch.zeros(2, tokens, tokens)
    weights[:, at, (at - 1).clamp_min(0)] = 1.0
    edge = at[((x == 0) | (x == g - 1)) & (at >= 2 * g)]
    weights[1, edge] = 0.0
    weights[1, edge, edge - 2 * g] = 1.0  # stays at the edge
    inside = at[(x == 3) & (at >= 2 * g)]
    weights[1, inside] = 0.0
    weights[1, inside, inside - 3] = 1.0  # the edge, from inside
    tally = Tally(1, 2, g)
    tally(Seen(0, slice(0, 2), torch.randn(2, tokens, tokens), weights, visible), places)
    found = tally.figures()
    for name in ("edges, from edges", "edges, from inside"):
        told = float(found.by_offset[name][0, 0])  # but for the first token, which has no left neighbour
        assert told == pytest.approx(float(found.regions[name][0, 0]), abs=0.03)
    assert (observations(found)[2].holds, "in 1 of 2 heads" in observations(found)[2].here) == ("yes", True)


def test_words_and_their_tokens():
    text = TextTokenizer.train(["a small fox above a tree", "蓝色背景上有狐狸"] * 5, 330)
    for caption in ("a small fox above a tree", "an ox 蓝色 🦊 a"):
        ids = text.encode(caption)
        found = words.words_of(text, ids)
        if caption.isascii():
            assert [word.text for word in found] == caption.split()
        for word in found:
            assert word.text in text.decode([ids[n] for n in word.tokens])
        told = {n for word in found for n in word.tokens}
        assert all(not text.decode([ids[n]]).strip() for n in range(len(ids)) if n not in told)
    ids = text.encode("a small fox above a tree")
    both = words.find(text, ids, "fox  above")
    assert text.decode([ids[n] for n in both.tokens]).strip() == "fox above"
    assert words.find(text, ids, "car") is None
    assert words.find(text, ids, "ox") is None
    chinese = text.encode("蓝色背景上有狐狸")
    assert "狐" in text.decode([chinese[n] for n in words.find(text, chinese, "狐").tokens])


def test_maps_of_words_are_of_the_queries_that_draw(system):
    codes = torch.zeros(GRID, GRID, dtype=torch.int64)
    found, places = collected(system, codes)
    word = words.words_of(system.text, system.encode("a red car")[0])[1]
    assert word.text == "red"
    maps = words.maps(found[0], places, [word])
    first = found[0].weights[:, int(places.separators["BOI1"]), places.text[word.tokens]].sum(-1)
    torch.testing.assert_close(maps[:, 0, 0], first)
    behind = Places(torch.arange(4), torch.tensor([5, 6]), {})  # a picture before its text
    maps = words.maps(found[0], behind, [words.Word("x", [1])])
    torch.testing.assert_close(maps[:, 0], found[0].weights[:, 5, :4])
    assert words.contrast(torch.tensor([0.0, 0.0, 0.0, 4.0])) == pytest.approx(0.75)


def test_what_cannot_be_looked_at(system, tmp_path):
    codes = torch.zeros(1, GRID, GRID, dtype=torch.int64)
    for captions, wanted, message in (
        (["a fox"], ["car"], "words: expected what stands in one of the captions, got 'car'"),
        (["a fox"], [" "], "words: expected none that is blank, got ' '"),
        ([" "], [], "captions: expected one that is not blank, got nothing to draw in caption 1"),
    ):
        with pytest.raises(ValueError, match=message):
            analyse(system, captions, codes, tmp_path, wanted=wanted)
    with pytest.raises(ValueError, match="name: expected a model that draws pictures or captions, got 'one of recipe"):
        check(SuperResolution(SuperResolution.presets["tiny"][0]))
    assert not list(tmp_path.iterdir())


def test_pictures(tmp_path):
    """A map's values stand at their layer and head, marks on their places."""
    maps = torch.zeros(2, 3, 2, 2)
    maps[1, 2, 0, 1] = 1.0
    with Image.open(sheet(maps, tmp_path / "sheet.png", "title", "bar")) as image:
        pixels, (width, height) = torch.from_numpy(np.array(image.convert("RGB"))), image.size
    bright = (pixels.int() - torch.tensor([252, 253, 191])).abs().sum(-1) < 8  # of magma the largest
    y, x = bright[:, : int(width * 0.8)].nonzero().float().mean(0).tolist()
    assert (x > width * 0.55, y > height * 0.5) == (True, True)
    values = torch.zeros(GRID, GRID)
    values[0, 3] = values[0, 2] = 1.0
    grey = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    rows = [Row("dots", grey, [Panel("one", values, dots=True)]), Row("black", grey * 0, [Panel("two", values)])]
    path = marked(rows, tmp_path / "marked.png", "a $ 狐狸 $")
    with Image.open(path) as image:
        pixels, (width, height) = torch.from_numpy(np.array(image.convert("RGB"))), image.size
    red = (pixels == torch.tensor([255, 0, 0])).all(-1)
    assert red.any()
    assert red.nonzero()[:, 1].min() > width / 2
    assert red.nonzero()[:, 0].max() < height * 0.5
    for colour, where in ((128, 0.3), (127, 0.75)):  # each row is of its own picture; the lower in grey
        y = (pixels == colour).all(-1).nonzero()[:, 0].float().mean() / height
        assert float(y) == pytest.approx(where, abs=0.15)
