"""The transformer against an independent formula, and who may influence whom."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from cogview.loss import token_nll, weighted_mean, weighted_nll
from cogview.parts import linear
from cogview.parts.attend import record_weights
from cogview.parts.published import published_names
from cogview.parts.transformer import Transformer
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.dalle import Dalle, DalleConfig
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch, Context
from cogview_ops import linear_decode

ATTENTIONS = ["dense", "dense_pb_relax", "three_region", "dalle"]
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "image_grid": 4,
    "max_positions": 29,
    "image_vocab": 20,
    "text_vocab": 10,
    "dropout": 0.0,
}


def recipe_of(attention: str = "dense", **change: Any) -> Recipe:
    if attention == "dalle":
        return Dalle(DalleConfig(**SIZES | change))
    three_region = {"block_size": 4, "window_blocks": 2, "num_pivots": 14}
    return CogView(CogViewConfig(**SIZES | three_region | {"attention": attention} | change))


def make(attention: str = "dense", **change: Any) -> tuple[Recipe, Transformer]:
    torch.manual_seed(0)
    recipe = recipe_of(attention, **change)
    model = recipe.model()
    for p in model.parameters():  # away from the symmetric start: every parameter matters
        torch.nn.init.normal_(p, std=0.3)
    return recipe, model


def sample(recipe: Recipe, batch: int = 3) -> Batch:
    text = torch.full((batch, 9), -1)
    for b in range(batch):
        text[b, : 9 - 3 * b] = torch.randint(10, (9 - 3 * b,))
    return recipe.batch(text, torch.randint(20, (batch, 16)))


def layer_norm(x, weight, bias, relax):
    if relax == "row":
        x = x / x.abs().amax(-1, keepdim=True)
    elif relax == "tensor":
        x = x / (x.abs().max() / 8)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def dalle_mask(recipe: Recipe, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """bool [B, S, S]: of the image an image token sees the last five tokens (row) or its column, and all text."""
    S = tokens.shape[1]
    seen = (tokens != recipe.vocab["PAD"])[:, None].repeat(1, S, 1)
    start = recipe.config.max_text + 3
    for i in range(start, S):
        for j in range(start, i + 1):
            seen[:, i, j] = i - j <= 4 if kind == "row" else (i - j) % 4 == 0
    return seen


def formula(recipe: Recipe, model: Transformer, batch: Batch) -> torch.Tensor:
    """CogView as in the paper: x += LN3(Attn(LN1 x)); x += LN4(MLP(LN2 x)), with an explicit mask."""
    c, tokens, names = recipe.config, batch.inputs, {t: o for o, t in published_names(len(model.stack.layers)).items()}
    S, dalle = tokens.shape[1], isinstance(recipe, Dalle)
    published = {theirs: model.get_parameter(ours) for theirs, ours in names.items()}

    def norm(x, name):
        return layer_norm(x, *(published[f"transformer.{name}.{kind}"] for kind in ("weight", "bias")), c.relax)

    def linear(x, name):
        return F.linear(x, *(published[f"transformer.{name}.{kind}"] for kind in ("weight", "bias")))

    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    x = published["word_embeddings.weight"][tokens]
    places = (tokens != recipe.vocab["PAD"]).cumsum(1) - 1 if dalle else torch.arange(S)  # all following
    x = x + published["transformer.position_embeddings.weight"][places]
    for n in range(c.num_layers):
        y = norm(x, f"layers.{n}.input_layernorm")
        qkv = linear(y, f"layers.{n}.attention.query_key_value").view(len(x), S, c.num_heads, 3, c.head_dim)
        q, k, v = (qkv[:, :, :, part].transpose(1, 2) for part in range(3))
        scores = q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)
        mask = (j <= i).expand(len(x), S, S)
        if dalle:  # squares of 11 are all of an image of 4
            kind = ("row", "column", "row", "row")[n % 4] if n + 1 < c.num_layers else "convolutional"
            there = (tokens != recipe.vocab["PAD"])[:, None]
            mask = mask & (there if kind == "convolutional" else dalle_mask(recipe, tokens, kind))
        elif c.attention == "three_region":
            near = j // c.block_size > i // c.block_size - c.window_blocks
            chosen = (batch.context.attention["pivots"][:, n, None] == torch.arange(S)[:, None]).any(-1)[:, None]
            mask = mask & (near | chosen)
            scores = scores + math.log(28 // 14) * ~near
        p = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
        a = linear((p @ v).transpose(1, 2).flatten(2), f"layers.{n}.attention.dense")
        x = x + norm(a, f"layers.{n}.third_layernorm")
        y = norm(x, f"layers.{n}.post_attention_layernorm")
        m = F.gelu(linear(y, f"layers.{n}.mlp.dense_h_to_4h"), approximate="tanh")
        x = x + norm(linear(m, f"layers.{n}.mlp.dense_4h_to_h"), f"layers.{n}.fourth_layernorm")
    return norm(x, "final_layernorm") @ published["word_embeddings.weight"].T


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("relax", ["row", "tensor", None])
def test_equals_the_formula(attention, relax):
    dalle = attention == "dalle"
    if dalle and relax == "tensor":
        pytest.skip("refused, see test_bad_shapes")
    recipe, model = make(attention, relax=relax, num_layers=6 if dalle else 2)
    model.double()
    batch = sample(recipe)
    logits = model(batch.inputs, batch.context)
    assert logits.dtype == torch.float32
    expected = formula(recipe, model, batch).float()
    there = batch.inputs != recipe.vocab["PAD"] if dalle else slice(None)  # holes say nothing
    torch.testing.assert_close(logits[there], expected[there], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_causality(attention):
    recipe, model = make(attention, relax="row")
    batch = sample(recipe, 1)
    before = model(batch.inputs, batch.context)[0]
    for j in range(batch.inputs.shape[1]):
        changed = batch.inputs.clone()
        changed[0, j] = (changed[0, j] + 1) % 20 if changed[0, j] < 20 or attention != "dalle" else changed[0, j] ^ 1
        after = model(changed, batch.context)[0]
        assert torch.equal(after[:j], before[:j])
        assert not torch.equal(after[j], before[j])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attention", ["three_region", "dalle"])
def test_gradients_with_activation_checkpointing(attention, dropout, dtype):
    recipe, model = make(attention, dropout=dropout)
    model.to(dtype)
    batch = sample(recipe)
    grads = []
    for recompute in ("none", "full", "selective"):
        torch.manual_seed(1)
        model.zero_grad()
        logits = model(batch.inputs, batch.context, recompute=recompute)
        (logits.square() * (batch.weights[..., None] > 0)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, again, selective in zip(*grads, strict=True):
        assert torch.equal(plain, again)
        assert torch.equal(plain, selective)


def test_holes_of_a_fixed_text_do_not_matter():
    """What stands in them, and that they are there: gradients, too."""
    recipe, model = make("dalle")
    batch = sample(recipe)
    grads = []
    for inputs in (batch.inputs, batch.inputs.where(batch.inputs != recipe.vocab["PAD"], 25)):
        model.zero_grad()
        nll = model(inputs, batch.context, targets=batch.targets) * batch.weights
        nll.sum().backward()
        grads.append([nll.detach(), *(p.grad.clone() for p in model.parameters())])
    assert (batch.inputs == recipe.vocab["PAD"]).any()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_embedding_gradient_is_shrunk():
    (recipe, full), (_, shrunk) = make(embedding_grad_scale=1.0), make(embedding_grad_scale=0.1)
    batch, hidden = sample(recipe), []
    for model in (full, shrunk):
        x = model.stack(model.embedding(batch.inputs, batch.context.positions), batch.context)
        hidden.append(x.detach())
        x[..., 0].sum().backward()
    torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=0)
    torch.testing.assert_close(shrunk.embedding.words.weight.grad, 0.1 * full.embedding.words.weight.grad)
    inner = shrunk.stack.layers[0].mlp.dense_h_to_4h, full.stack.layers[0].mlp.dense_h_to_4h
    torch.testing.assert_close(inner[0].weight.grad, inner[1].weight.grad)


def test_initialisation():
    torch.manual_seed(0)
    model = recipe_of(hidden_size=256, num_layers=8).model()
    layer = model.stack.layers[3]
    for projection, std in (
        (layer.attention.query_key_value, 0.02),
        (layer.mlp.dense_h_to_4h, 0.02),
        (layer.attention.dense, 0.005),
        (layer.mlp.dense_4h_to_h, 0.005),
    ):
        assert abs(float(projection.weight.detach().std()) / std - 1) < 0.03
        assert not projection.bias.any()
    assert torch.equal(layer.post_norm.weight, torch.ones(256))
    assert not layer.post_norm.bias.any()


def test_published_names_are_those_of_all_parameters():
    model = recipe_of().model()
    names = published_names(2)
    assert names.keys() == dict(model.named_parameters()).keys()
    assert len(set(names.values())) == len(names)
    assert names["stack.first_norm.weight"] == "transformer.layers.0.input_layernorm.weight"
    assert names["stack.layers.0.next_norm.bias"] == "transformer.layers.1.input_layernorm.bias"
    assert names["stack.layers.1.next_norm.bias"] == "transformer.final_layernorm.bias"


def test_pivots_are_drawn_per_layer_and_hold_all_text():
    recipe = recipe_of("three_region")
    inputs = sample(recipe).inputs
    pivots = recipe.draw_pivots(inputs, torch.Generator().manual_seed(1))
    assert pivots.shape == (3, 2, 14)
    assert not torch.equal(pivots[:, 0], pivots[:, 1])
    for row, ids in zip(pivots, inputs, strict=True):
        for layer in row:
            assert set(recipe.vocab.is_text(ids).nonzero().flatten().tolist()) <= set(layer.tolist())
    again = recipe.draw_pivots(inputs, torch.Generator().manual_seed(1))
    assert torch.equal(pivots, again)


def test_attention_weights_on_request():
    recipe, model = make("dense_pb_relax")
    batch = sample(recipe)
    with record_weights(model) as weights:
        model(batch.inputs, batch.context)
    model(batch.inputs, batch.context)
    assert [list(w.shape) for w in weights] == [[3, 2, 28, 28]] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 2, 28))
    assert not weights[0].triu(1).any()


def test_dropout_is_for_training_only():
    recipe, model = make(dropout=0.5)
    batch = sample(recipe)
    call = batch.inputs, batch.context
    assert not torch.equal(model(*call), model(*call))
    torch.manual_seed(1)
    first = model(*call)
    torch.manual_seed(1)
    assert torch.equal(model(*call), first)
    seeded = dataclasses.replace(batch.context, seeds=torch.arange(3 * 5).view(3, 5))
    some = dataclasses.replace(seeded.rows(slice(1, 3)))
    torch.testing.assert_close(model(batch.inputs, seeded)[1:], model(batch.inputs[1:], some))
    assert not torch.equal(model(batch.inputs, seeded), first)
    model.eval()
    assert torch.equal(model(*call), model(batch.inputs, seeded))
    assert torch.equal(model(*call), make()[1](*call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_takes_its_share_of_every_branch_by_itself(dtype):
    """Dropped elements of a branch are those whose gradient is zero."""
    recipe, model = make(dropout=0.3)
    model.to(dtype)
    dropped: list[torch.Tensor] = []
    for layer in model.stack.layers:
        for branch in (layer.attention, layer.mlp):
            branch.register_full_backward_hook(lambda module, into, grads: dropped.append(grads[0].flatten() == 0))
    batch = sample(recipe)
    for training, share in ((True, 0.3), (False, 0.0)):
        dropped.clear()
        logits = model.train(training)(batch.inputs, batch.context)
        logits.backward(torch.randn_like(logits))
        found = torch.stack(dropped).float()
        both = found @ found.mT / found.shape[1]
        expected = torch.full((4, 4), share**2).fill_diagonal_(share)
        torch.testing.assert_close(both, expected, rtol=0, atol=0.03)


def test_training_with_dropout_compiles_as_one_graph():
    """Seeds are tensors, so that new ones compile nothing."""
    recipe, model = make(dropout=0.3)
    batch = sample(recipe)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(4):
        context, grads = dataclasses.replace(batch.context, seeds=torch.randint(2**62, (3, 5))), []
        for call in (compiled, model):
            model.zero_grad()
            call(batch.inputs, context, targets=batch.targets).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 1


def test_calls_that_make_no_sense():
    (dense_recipe, dense), (sparse_recipe, sparse) = make("dense"), make("three_region")
    batch, pivots = sample(dense_recipe), sample(sparse_recipe).context
    with pytest.raises(ValueError, match="context: expected pivots for this attention, got nothing"):
        sparse(batch.inputs, batch.context)
    with pytest.raises(ValueError, match=r"pivots: expected 3 rows, got \[1, 2, 14\]"):
        sparse(batch.inputs, pivots.rows(slice(0, 1)))
    with pytest.raises(ValueError, match=r"pivots: expected \[B, 2, P\], got \[3, 1, 14\]"):
        sparse(batch.inputs, Context(pivots.positions, {"pivots": pivots.attention["pivots"][:, :1]}))
    dalle_recipe, dalle = make("dalle")
    whole = sample(dalle_recipe)
    with pytest.raises(ValueError, match="inputs: expected whole rows of 4 image tokens, got 14"):
        dalle(whole.inputs[:, :-2], Context(torch.arange(26), whole.context.attention))
    with pytest.raises(ValueError, match="context: expected nothing for this attention, got pivots"):
        dense(batch.inputs, pivots)
    with pytest.raises(ValueError, match="inputs: expected at most 29 tokens, got 56"):
        dense(batch.inputs.repeat(1, 2), batch.context)
    with pytest.raises(ValueError, match=r"positions: expected 27, got \[28\]"):
        dense(batch.inputs[:, 1:], batch.context)
    with pytest.raises(ValueError, match="layers of attention dense_pb_relax"), record_weights(dense):
        pass
    with pytest.raises(ValueError, match=r"seeds: expected int64 \[3, 5\], got Tensor torch.int64 \[2, 5\]"):
        dense(batch.inputs, dataclasses.replace(batch.context, seeds=torch.zeros(2, 5, dtype=torch.int64)))
    with pytest.raises(ValueError, match="cache: expected 3 rows, got 2"):
        dense(batch.inputs, batch.context, cache=dense.make_cache(2, 28))


def test_loss_in_chunks(monkeypatch):
    recipe, model = make()
    batch = recipe.batch(torch.randint(10, (3, 9)), torch.randint(20, (3, 16)))
    results = []
    for chunk in (2**26, 5 * recipe.vocab.size):
        monkeypatch.setattr("cogview.loss._CHUNK_LOGITS", chunk)
        model.zero_grad()
        nll = model(batch.inputs, batch.context, targets=batch.targets)
        nll.mean().backward()
        results.append((nll, model.embedding.words.weight.grad.clone()))
    logits = model(batch.inputs, batch.context)
    expected = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    torch.testing.assert_close(results[0][0], expected)
    torch.testing.assert_close(results[0], results[1])
    assert token_nll(torch.zeros(1, 1, 4), torch.zeros(8, 4), torch.zeros(1, 1).long()).item() == pytest.approx(
        math.log(8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [2**26, 50 * 11])
def test_weighted_loss_and_its_gradients_are_those_of_the_formula(monkeypatch, dtype, chunk):
    monkeypatch.setattr("cogview.loss._CHUNK_LOGITS", chunk)
    hidden, head = torch.randn(3, 9, 16).to(dtype), torch.randn(50, 16).to(dtype)
    labels, weights = torch.randint(50, (9, 3)).t(), torch.rand(3, 9).round(decimals=1)

    def found(compute, dtype):
        x, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, head))
        total, nll = compute(x, w, labels, weights.to(dtype if dtype == torch.float64 else torch.float32))
        (total * 7).backward()
        return [t.double() for t in (total.detach(), nll.detach(), x.grad, w.grad)]

    def formula(x, head, labels, weights):
        nll = F.cross_entropy((x @ head.t()).flatten(0, 1), labels.flatten(), reduction="none").view(3, 9)
        return (nll * weights).sum(), nll

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, exact in zip(found(weighted_nll, dtype), found(formula, torch.float64), strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()
    with torch.no_grad():
        assert not weighted_nll(hidden, head, labels, weights)[0].requires_grad


def test_a_million_equal_logits_are_not_too_many_for_float16():
    hidden, head = torch.zeros(1, 2, 1, dtype=torch.float16), torch.zeros(2**20, 1, dtype=torch.float16)
    total, _ = weighted_nll(hidden, head.requires_grad_(), torch.tensor([[0, 5]]), torch.ones(1, 2))
    total.backward()
    assert total.item() == pytest.approx(2 * 20 * math.log(2))
    assert bool(head.grad.isfinite().all())
    large = 40.0 * torch.randn(2**16, 4).half()  # nor their products with a head that begins so
    hidden = torch.zeros(1, 2, 4, dtype=torch.float16, requires_grad=True)
    weighted_nll(hidden, large, torch.tensor([[0, 5]]), torch.ones(1, 2))[0].backward()
    expected = large.float().mean(0) - large[[0, 5]].float()
    torch.testing.assert_close(hidden.grad[0].float(), expected, rtol=2e-3, atol=0.1)


def test_many_tokens_of_one_label_are_not_too_many_for_float16():
    """Their gradients of the head are added up, of all of a batch in float32."""
    count = 110_000
    hidden, labels = torch.ones(1, count, 4, dtype=torch.float16), torch.full((1, count), 7)
    head = torch.zeros(600, 4, dtype=torch.float16, requires_grad=True)
    weighted_nll(hidden, head, labels, torch.full((1, count), 1.0))[0].mul(1 / count).backward()
    expected = torch.full((600, 4), 1 / 600)
    expected[7] -= 1
    torch.testing.assert_close(head.grad.float(), expected, rtol=2e-3, atol=1e-5)


def test_logits_of_one_place_of_each_row():
    recipe, model = make()
    batch, at = sample(recipe), torch.tensor([3, 27, 0])
    whole = model(batch.inputs, batch.context)
    torch.testing.assert_close(model(batch.inputs, batch.context, at=at), whole[torch.arange(3), at])


def test_few_rows_without_gradients_go_to_the_operator_of_decoding(monkeypatch):
    layer, seen = linear.Linear(24, 10), []
    monkeypatch.setattr(linear, "linear_decode", lambda x, *rest: seen.append(len(x)) or linear_decode(x, *rest))
    for rows in (1, 16, 17):
        x = torch.randn(rows, 24, requires_grad=True)
        wanted = layer(x)
        assert torch.autograd.grad(wanted.sum(), x)[0].shape == x.shape
        with torch.no_grad():
            assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert seen == [1, 16]


def test_weighted_mean():
    nll = torch.tensor([1.0, 2.0, 3.0])
    assert weighted_mean(nll, torch.tensor([1.0, 0.0, 3.0])).item() == 2.5
    assert weighted_mean(nll, torch.zeros(3)).item() == 0.0


def test_fixed_image_positions_do_not_depend_on_the_text():
    recipe = recipe_of("dense", image_positions="fixed")
    c, codes = recipe.config, torch.randint(20, (2, 16))
    text = torch.tensor([[1, 2, 3, 4, 5], [6, -1, -1, -1, -1]])
    batch = recipe.batch(text, codes)
    tokens, rows = batch.inputs, batch.context.positions
    image = rows[recipe.vocab.is_image(tokens)].view(2, 16)
    assert torch.equal(image[0], image[1])
    assert image[0].tolist() == list(range(c.max_text + 3, c.max_text + 19))
    assert rows[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, c.max_text + 2]  # text first, then [BOI1]
    caption = recipe.vocab.caption(text, codes, c.max_positions + 1)[:, :-1]  # the same behind the image as before it
    turned = recipe.context(caption).positions
    assert torch.equal(turned[recipe.vocab.is_image(caption)].view(2, 16), image)
    assert turned[0, 17:26].tolist() == [c.max_positions - 2, c.max_positions - 1, 0, 1, 2, 3, 4, 5, 6]


def test_positions_of_dalle():
    """The place, or as many tokens as there were before, holes not counted."""
    text, codes = torch.tensor([[1, 2, 3, -1, -1]]), torch.randint(20, (1, 16))
    fixed, following = (recipe_of("dalle", image_positions=p).batch(text, codes) for p in ("fixed", "following"))
    assert torch.equal(fixed.inputs, following.inputs)
    assert fixed.context.positions.tolist() == list(range(28))
    assert following.context.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert following.context.positions[0, 11:].tolist() == list(range(5, 22))
    assert isinstance(fixed.context, Context)


def test_initial_scales():
    scales = {"init_std": 0.05, "embedding_std": 0.3, "branch_gain": 0.25}
    model = recipe_of("dense", hidden_size=128, **scales).model()
    layer = model.stack.layers[0]
    assert layer.mlp.dense_h_to_4h.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert layer.attention.dense.weight.std().item() == pytest.approx(0.05 / 2, rel=0.05)  # 1 / sqrt(2 * 2 layers)
    assert model.embedding.words.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert (layer.mlp_post_norm.weight == 0.25).all()
    assert (layer.next_norm.weight == 1).all()


def test_layers_of_dalle():
    kinds = [layer.attention.kind for layer in recipe_of("dalle", num_layers=8).model().stack.layers]
    assert kinds == ["row", "column", "row", "row", "row", "column", "row", "convolutional"]


def test_dalle_learns_a_batch_by_heart():
    torch.manual_seed(0)
    recipe = recipe_of("dalle", num_layers=3)
    model, batch = recipe.model(), sample(recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    image, losses = recipe.vocab.is_image(batch.targets), []
    for _ in range(60):
        loss = model(batch.inputs, batch.context, targets=batch.targets)[image].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
