"""Bytes by formula are those that autograd keeps, and those of a trainer's tensors."""

import itertools
from typing import Any

import pytest
import torch
from test_train_run import CONFIG, TRAIN, trainer

from cogview.memory import MODES, activations, logits, parameters
from cogview.parts import stack
from cogview.parts.transformer import Transformer
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.dalle import Dalle, DalleConfig
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch
from cogview.train.block_scales import BlockScales
from cogview_ops.checkpointing import selective_contexts

SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 128, "num_heads": 4, "image_grid": 8, "max_positions": 97}
SIZES |= {"image_vocab": 100, "text_vocab": 50, "dropout": 0.0}
PIVOTS: dict[str, Any] = {"block_size": 16, "window_blocks": 2, "num_pivots": 48}
KINDS, DTYPES, BATCH = ("three_region", "dense", "dense_pb_relax", "dalle"), (torch.float32, torch.bfloat16), 4


def recipe_of(kind: str) -> Recipe:
    return Dalle(DalleConfig(**SIZES)) if kind == "dalle" else CogView(CogViewConfig(**SIZES | PIVOTS, attention=kind))


def losses(model: Transformer, batch: Batch, mode: Any) -> torch.Tensor:
    return model(batch.inputs, batch.context, targets=batch.targets, weights=batch.weights, recompute=mode)[0]


def made(kind: str, dtype: torch.dtype) -> tuple[Recipe, Transformer, Batch]:
    recipe = recipe_of(kind)
    text = torch.randint(50, (BATCH, recipe.config.max_text))
    return recipe, recipe.model().to(dtype), recipe.batch(text, torch.randint(100, (BATCH, 64)))


def kept(monkeypatch: Any, model: Transformer, batch: Batch, mode: str) -> int:
    """Bytes of the storages that autograd and selective checkpointing keep of a forward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: dict[int, torch.Tensor] = {}  # by storage; kept, so that none is given to another
    caches = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            alive[x.untyped_storage().data_ptr()] = x
        return x

    def contexts() -> Any:
        forward, again = selective_contexts()
        caches.append(forward.storage)
        return forward, again

    monkeypatch.setattr(stack, "selective_contexts", contexts)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses(model, batch, mode)
    for value in torch.utils._pytree.tree_leaves([list(cache.values()) for cache in caches]):
        if isinstance(value := getattr(value, "val", value), torch.Tensor):
            pack(value)
    return sum(x.untyped_storage().nbytes() for x in alive.values())


@pytest.mark.parametrize(("kind", "dtype", "mode"), [*itertools.product(KINDS, DTYPES, MODES)])
def test_activations(monkeypatch, kind, dtype, mode):
    recipe, model, batch = made(kind, dtype)
    head = 4 * recipe.vocab.size * recipe.config.hidden_size  # its gradient
    formula = BATCH * activations(recipe, mode, dtype.itemsize).kept + head
    assert kept(monkeypatch, model, batch, mode) == pytest.approx(formula, rel=0.005)


@pytest.mark.parametrize(("norms", "mode"), [*itertools.product(("sandwich", "pre"), MODES)])
def test_activations_with_scales_of_blocks(monkeypatch, norms, mode):
    """In float16, with a main branch in float32; biases and norms are none of it."""
    recipe = CogView(CogViewConfig(**SIZES, attention="dense", norms=norms))
    model = recipe.model()
    scales = BlockScales(model, 1000)
    for name, p in model.named_parameters():
        p.data = p.data.half() if scales.is_low(name, p) else p.data
    text = torch.randint(50, (BATCH, recipe.config.max_text))
    batch = recipe.batch(text, torch.randint(100, (BATCH, 64)))
    head = 4 * recipe.vocab.size * recipe.config.hidden_size
    formula = BATCH * activations(recipe, mode, 2, main_size=4).kept + head
    assert kept(monkeypatch, model, batch, mode) == pytest.approx(formula, rel=0.005)


@pytest.mark.parametrize("mode", MODES)
def test_most_that_is_alive_at_once(mode):
    """By torch's profiler; at the end of the forward logits are there, in the backward the gradients of a layer. Not in
    bfloat16, of which CPUs' products take 0.7 MB for themselves."""
    recipe, model, batch = made("three_region", torch.float32)
    losses(model, batch, mode).backward()  # from here on there are gradients of parameters
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        losses(model, batch, mode).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    expected = activations(recipe, mode, 4)
    more = max(BATCH * expected.again, logits(recipe, BATCH, 4))
    assert max(itertools.accumulate(changes)) == pytest.approx(BATCH * expected.kept + more, rel=0.01)


def test_tensor_parallel_ranks_keep_less_of_what_is_split():
    recipe = recipe_of("dense")
    one, two, four = (activations(recipe, "none", 2, ranks).kept for ranks in (1, 2, 4))
    state = 2 * 128 * recipe.length
    assert one - two == 2 * (two - four) == 3 * (6 * state + 2 * 4 * recipe.length)  # 12 states and lse of each layer


def test_logits_are_of_a_chunk_at_most():
    recipe = CogView(CogView.presets["cogview-4b"][0])
    one, many = (2 * 2560 * (samples * recipe.length + rows) for samples, rows in ((1, recipe.length), (64, 1152)))
    head = (4 + 2) * recipe.vocab.size * 2560
    assert logits(recipe, 1, 2) == recipe.length * recipe.vocab.size * 6 + head + one
    assert 0.99 * 2**26 * 6 < logits(recipe, 64, 2) - head - many <= 2**26 * 6


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4 + 4 + 8), ("bfloat16", 2 + 4 + 4 + 8)])
def test_states_of_a_trainer(tmp_path, dtype, bytes_each):
    """Model, masters, gradients and AdamW's two averages, behind a backward and a step."""
    made = trainer(tmp_path, TRAIN.__class__(**vars(TRAIN) | {"dtype": dtype}))
    made.step()
    batch = made.feed.next(made.state)
    made.optimizer.backward(made.task.loss(batch, batch)[0])
    masters = made.optimizer.master.values()
    found = [*made.task.model.parameters(), *masters, *(p.grad for p in masters)]
    found += [x for name, x in made.optimizer.tensors().items() if ".exp_avg" in name]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    assert sum(storages.values()) == bytes_each * parameters(CogView(CONFIG)).total
