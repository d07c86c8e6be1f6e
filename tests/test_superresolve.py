"""CogView2's super-resolution: what its models begin with, what sees what, and what its rounds draw."""

import dataclasses
from typing import Any

import pytest
import torch
from test_coglm import SIZES as BASE
from torch._dynamo.utils import counters

from cogview import lopar
from cogview.parts.transformer import Transformer
from cogview.recipes import RECIPES
from cogview.recipes.coglm import CogLM
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.recipes.direct import Direct, DirectConfig
from cogview.recipes.fine import Fine
from cogview.recipes.iterative import Iterative
from cogview.sampling import Sampling
from cogview.sequence import pad_text
from cogview.superresolve import fine_batches, refine

SIZES = BASE | {"image_grid": 4, "max_positions": 12 + 1 + 16, "patch_side": 2}
CAPTIONS = [[5, 6, 13], [7], [4, 5, 6, 7, 8, 9]]


def base(**change: Any) -> tuple[CogLM, Transformer]:
    torch.manual_seed(1)
    recipe = CogLM(CogLMConfig(**SIZES | change))
    model = recipe.model().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return recipe, model


def make(name: str, **change: Any) -> tuple[Any, Transformer]:
    kind: Any = RECIPES[name]
    before, source = base(**change)
    recipe = kind(kind.begun(before.config))
    model = recipe.model().eval()
    model.load_state_dict(recipe.inherited(dict(source.state_dict()), before, model.state_dict()))
    return recipe, model


def codes(recipe: Fine, rows: int = 3) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(5)
    return [torch.randint(40, (rows, grid**2), generator=stream) for grid in recipe.grids]


def test_sizes():
    recipe, _ = make("direct")
    assert recipe.grids == (4, 12)
    assert recipe.length == 9 + 16 + 144
    assert make("iterative")[0].length == 16 + 144
    direct = Direct.presets["coglm-6b"][0]
    assert (direct.fine_grid, direct.base_positions, direct.max_positions) == (60, 1024, 4624)
    assert Iterative(Iterative.presets["coglm-6b"][0]).length == 3616


@pytest.mark.parametrize("name", ["direct", "iterative"])
def test_they_begin_with_the_base(name):
    """Its tensors, its rows of cells as tiles of the fine grid, and of direct its projections once more."""
    recipe, model = make(name)
    before, source = base()
    old, new = source.state_dict(), model.state_dict()
    table = "embedding.positions.weight"
    for key, value in old.items():
        assert torch.equal(new[key][: len(value)] if key == table else new[key], value)
    cells, fine = old[table][13:29].view(4, 4, -1), new[table][29:].view(12, 12, -1)
    for y, x in ((0, 0), (3, 5), (7, 11), (11, 4)):
        assert torch.equal(fine[y, x], cells[y % 4, x % 4])
    own = [key for key in new if "fine_" in key]
    assert len(own) == (8 if name == "direct" else 0)
    for key in own:
        assert torch.equal(new[key], old[key.replace("fine_", "")])
    fresh = recipe.model().state_dict()
    again = recipe.inherited(dict(new), recipe, fresh)
    assert all(torch.equal(again[key], value) for key, value in new.items())
    assert before.length < recipe.length


def influence(recipe: Fine, model: Transformer, change: Any) -> torch.Tensor:
    """bool [fine cells]: whose logits change where `change` has changed text and codes."""
    found = []
    for changed in (False, True):
        text, own = pad_text(CAPTIONS[:1]), [c[:1].clone() for c in codes(recipe)]
        if changed:
            change(text, *own)
        if isinstance(recipe, Iterative):
            inputs, _ = recipe.hidden(text, own[1], torch.zeros(144, dtype=torch.bool))
        else:
            inputs, _ = recipe.layout(text, torch.cat(own, dim=1))
        with torch.no_grad():
            found.append(model(inputs, recipe.context(inputs))[0, recipe.before :])
    return (found[0] != found[1]).any(dim=1)


def test_direct_sees_the_coarse_window_and_not_the_text():
    recipe, model = make("direct", num_layers=1)

    def coarse(text, small, large):
        small[0, 4 * 3 + 3] += 1  # the last: the window of 5 x 5 around coarse cells from (1, 1) on has it

    seen = influence(recipe, model, coarse).view(12, 12)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:, 3:] = True
    assert torch.equal(seen, expected)
    assert not influence(recipe, model, lambda text, small, large: text.fill_(3)).any()
    two = make("direct")  # through the coarse cells
    assert influence(*two, lambda text, small, large: text[:, :1].add_(1)).all()


def test_iterative_sees_its_window_and_the_first_text():
    recipe, model = make("iterative", num_layers=1)

    def fine(text, small, large):
        large[0, 12 * 5 + 6] += 1

    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[1:10, 4:9] = True
    assert torch.equal(influence(recipe, model, fine).view(12, 12), expected)
    assert influence(recipe, model, lambda text, small, large: text[:, :1].add_(1)).all()
    short = Iterative(recipe.config.__class__(**vars(recipe.config) | {"text_slots": 2}))
    assert not influence(short, short.model().eval(), lambda text, small, large: text[:, 2:3].add_(1)).any()


@pytest.mark.parametrize("name", ["direct", "iterative"])
@pytest.mark.parametrize("value", [0.0, 1.4])
def test_some_places_alone(name, value):
    recipe, model = make(name)
    text = pad_text(CAPTIONS)
    inputs, _ = recipe.layout(text, torch.cat(codes(recipe), dim=1))
    context = recipe.context(inputs)
    if value:
        plain = model.states(inputs, context)
        context = dataclasses.replace(context, emphasis=recipe.emphasis(inputs, value))
        assert not torch.allclose(plain, model.states(inputs, context))
    places = recipe.before + torch.tensor([[5, 3, 143], [0, 1, 2], [70, 71, 69]])
    some = model.states(inputs, dataclasses.replace(context, only=places))
    whole = model.states(inputs, context).gather(1, places[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(some, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [4, 5])
def test_rounds_draw_the_likeliest_of_what_stands(grid):
    """Greedily, by hand: in round m all cells of m or later are hidden, and those of m drawn from whole logits."""
    recipe, model = make("iterative", image_grid=grid, max_positions=12 + 1 + grid**2)
    side = 3 * grid
    text, fine = pad_text(CAPTIONS), codes(recipe)[1].view(3, side, side)
    order = lopar.order(lopar.PUBLISHED if grid == 4 else lopar.diagonals(5, 5), side)
    known, chances = fine.clone(), torch.rand(3, side**2)
    last = int(order.max())
    for m in range(1, last + 1):
        inputs, _ = recipe.hidden(text, known.flatten(1), (order >= m).flatten())
        with torch.no_grad():
            likeliest = model(inputs, recipe.context(inputs))[:, recipe.before :, :40].argmax(dim=-1)
        known = torch.where(order == m, likeliest.view(3, side, side), known)
    rounds: list[int] = []
    found = refine(recipe, model, text, fine, Sampling(top_k=1), chances, update=rounds.append)
    assert torch.equal(found, known)
    assert rounds == list(range(1, {4: 6, 5: 7}[grid] + 1))
    assert torch.equal(found[:, order < 1], fine[:, order < 1])
    within = torch.zeros(3, side, side, dtype=torch.bool)
    within[0, :5], within[1, 3, 3] = True, True
    part = refine(recipe, model, text, fine, Sampling(top_k=1), chances, within=within)
    assert torch.equal(part[~within], fine[~within])
    assert torch.equal(part[2], fine[2])
    assert not torch.equal(part[0], fine[0])


def test_rounds_of_another_number_have_their_top_k():
    recipe, model = make("iterative", image_grid=5, max_positions=12 + 1 + 25)
    fine = codes(recipe)[1].view(3, 15, 15)
    how: dict[str, Any] = {"top_k": lopar.top_k(7)}
    found = torch.cat(list(fine_batches(recipe, model, CAPTIONS, fine, Sampling(), **how)))
    assert found.shape == fine.shape
    kept = recipe.order.view(15, 15) < 1
    assert torch.equal(found[:, kept], fine[:, kept])
    assert not torch.equal(found, fine)
    how = {"top_k": lopar.PUBLISHED_TOP_K}
    with pytest.raises(ValueError, match="top_k: expected one of each of 7 rounds"):
        list(fine_batches(recipe, model, CAPTIONS, fine, Sampling(), **how))


@pytest.mark.parametrize("name", ["direct", "iterative"])
def test_training_without_text(name):
    """In the rows that lose it."""
    recipe, _ = make(name)
    draws, dropped = [torch.Generator().manual_seed(n) for n in range(3)], torch.tensor([True, False, True])
    batch = recipe.training_batch(pad_text(CAPTIONS), *codes(recipe), draws=draws, dropped=dropped)
    assert recipe.vocab.is_caption(batch.inputs).sum(dim=1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["direct", "iterative"])
def test_a_picture_depends_on_its_seed_alone(name):
    recipe, model = make(name)
    side = recipe.grids[0] if name == "direct" else recipe.grids[1]
    given = codes(recipe)[0 if name == "direct" else 1].view(3, side, side)
    told: list[int] = []
    how: dict[str, Any] = {"seeds": [7, 8, 9]}
    whole = torch.cat(list(fine_batches(recipe, model, CAPTIONS, given, Sampling(), **how, update=told.append)))
    for size in (1, 2):
        parts = list(fine_batches(recipe, model, CAPTIONS, given, Sampling(batch_size=size), **how))
        assert [len(part) for part in parts] == ([1, 1, 1] if size == 1 else [2, 1])
        assert torch.equal(torch.cat(parts), whole)
    assert told == sorted(told)
    assert told[-1] == 3 * 144
    other = torch.cat(list(fine_batches(recipe, model, CAPTIONS, given, Sampling(), seeds=[7, 8, 10])))
    assert torch.equal(other[:2], whole[:2])
    assert not torch.equal(other[2], whole[2])


@pytest.mark.parametrize(
    ("grid", "hidden_of_a_tile", "tiles"), [(4, (2, 6, 10, 15, 19, 23), 4), (5, (2, 4, 6, 10, 12, 14, 16), 9)]
)
def test_training_hides_what_a_round_hides(grid, hidden_of_a_tile, tiles):
    recipe, _ = make("iterative", image_grid=grid, max_positions=12 + 1 + grid**2)
    small, large = codes(recipe, 60)
    text = pad_text([[4]] * 60)
    streams = [torch.Generator().manual_seed(n) for n in range(60)]
    batch = recipe.training_batch(text, small, large, draws=streams)
    hidden = batch.inputs[:, 16:] == recipe.vocab["SOI"]
    shares = sorted({int(n) for n in hidden.sum(dim=1)})
    assert shares == [tiles * n for n in hidden_of_a_tile]
    assert torch.equal(batch.targets[:, 16:][hidden], large[hidden])
    assert bool((batch.targets[:, 16:][~hidden] == recipe.vocab["PAD"]).all())
    assert torch.equal(batch.inputs[:, 16:][~hidden], large[~hidden])
    assert torch.equal(batch.weights.bool()[:, 16:], hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_grid": 10}, r"fine_grid: expected a multiple of image_grid \(4\), got 10"),
        ({"kernel_size": (8, 5)}, r"kernel_size: expected two odd numbers below 24, got \(8, 5\)"),
        ({"coarse_kernel_size": (5, 9)}, r"coarse_kernel_size: expected two odd numbers below 8, got \(5, 9\)"),
        ({"max_positions": 172}, "max_positions: expected at least 173, got 172"),
    ],
)
def test_bad_shapes(change, message):
    config = Direct.begun(base()[0].config)
    with pytest.raises(ValueError, match=message):
        DirectConfig(**vars(config) | change)


def test_bad_input():
    recipe, model = make("direct")
    other, source = base()
    small = torch.zeros(3, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="model: expected one of recipe direct or iterative, got coglm"):
        fine_batches(other, source, CAPTIONS, small, Sampling())
    with pytest.raises(ValueError, match=r"codes: expected \[3, 4, 4\], one picture a caption, got \[2, 4, 4\]"):
        fine_batches(recipe, model, CAPTIONS, small[:2], Sampling())
    with pytest.raises(ValueError, match="codes: expected ids 0 to 39, got 0 to 40"):
        fine_batches(recipe, model, CAPTIONS, small + 40 * (torch.arange(16).view(4, 4) == 3), Sampling())
    with pytest.raises(ValueError, match="text: expected at most 9 tokens"):
        fine_batches(recipe, model, [[4] * 10] * 3, small, Sampling())
    with pytest.raises(ValueError, match="tokens: expected pictures at two sizes"):
        Direct.fit(recipe.config, image_grid=12, max_text=9, image_vocab=40, text_vocab=20, chinese_from=12)
    with torch.no_grad():
        model.embedding.words.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        list(fine_batches(recipe, model, CAPTIONS, small, Sampling()))


@pytest.mark.parametrize("name", ["coglm", "direct", "iterative"])
def test_layers_compile(name):
    """As in training, without a break; other texts, masks and rounds compile nothing."""
    recipe, model = base() if name == "coglm" else make(name)
    grids = codes(recipe) if name != "coglm" else [torch.arange(48).view(3, 16) % 40]
    torch._dynamo.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        if compiled:
            for layer in model.stack.layers:
                layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
        for seed in (0, 3):
            streams = [torch.Generator().manual_seed(seed + n) for n in range(3)]
            batch = recipe.training_batch(pad_text(CAPTIONS), *grids, draws=streams)
            model.zero_grad()
            loss = (model(batch.inputs, batch.context, targets=batch.targets) * batch.weights).sum()
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, other in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
