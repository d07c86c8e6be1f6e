"""The transformer against an independent formula, and who may influence whom."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from cogview.config import GPTConfig
from cogview.loss import sequence_nll, token_nll, weighted_mean
from cogview.model import GPT, KVCache

ATTENTIONS = ["dense", "dense_pb_relax", "three_region", "dalle"]


def make(attention: str = "dense", **change) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        image_grid=4,
        max_positions=29,
        image_vocab=20,
        text_vocab=10,
        attention=attention,
        block_size=4,
        window_blocks=2,
        num_pivots=14,
        dropout=0.0,
    )
    model = GPT(dataclasses.replace(config, **change))
    for p in model.parameters():  # away from the symmetric start: every parameter matters
        torch.nn.init.normal_(p, std=0.3)
    return model


def sample(model: GPT, batch: int = 3) -> torch.Tensor:
    text = torch.full((batch, 9), -1)
    for b in range(batch):
        text[b, : 9 - 3 * b] = torch.randint(10, (9 - 3 * b,))
    return model.vocab.text2image(text, torch.randint(20, (batch, 16)), 29)[:, :-1]


def layer_norm(x, m, relax):
    if relax == "row":
        x = x / x.abs().amax(-1, keepdim=True)
    elif relax == "tensor":
        x = x / (x.abs().max() / 8)
    return F.layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-5)


def dalle_mask(model: GPT, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """bool [B, S, S]: of the image an image token sees the last five tokens (row) or its column, of text all."""
    seen = torch.ones(len(tokens), tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    for b, row in enumerate(model.vocab.is_image(tokens)):
        start = int(row.int().argmax())
        for i in range(start, tokens.shape[1]):
            for j in range(start, i + 1):
                seen[b, i, j] = i - j <= 4 if kind == "row" else (i - j) % 4 == 0
    return seen


def formula(model: GPT, tokens: torch.Tensor, pivots) -> torch.Tensor:
    """CogView as in the paper: x += LN3(Attn(LN1 x)); x += LN4(MLP(LN2 x)), with an explicit mask."""
    c, S = model.config, tokens.shape[1]
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    x = model.word_embeddings.weight[tokens] + model.transformer.position_embeddings.weight[:S]
    for n, layer in enumerate(model.transformer.layers):
        y = layer_norm(x, layer.input_layernorm, c.relax)
        qkv = layer.attention.query_key_value(y).view(len(x), S, 3, c.num_heads, c.head_dim)
        q, k, v = (qkv[:, :, part].transpose(1, 2) for part in range(3))
        scores = q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)
        mask = (j <= i).expand(len(x), S, S)
        if c.attention == "dalle":
            mask = mask & dalle_mask(model, tokens, ("row", "column", "row", "row")[n % 4])
            mask = mask if n + 1 < c.num_layers else j <= i  # squares of 11 are all of an image of 4
        if c.attention == "three_region":
            near = j // c.block_size > i // c.block_size - c.window_blocks
            chosen = (pivots[n][:, None] == torch.arange(S)[:, None]).any(-1)[:, None]
            mask = mask & (near | chosen)
            scores = scores + math.log(28 // 14) * ~near
        p = scores.masked_fill(~mask.expand(len(x), S, S)[:, None], -math.inf).softmax(-1)
        a = layer.attention.dense((p @ v).transpose(1, 2).flatten(2))
        x = x + layer_norm(a, layer.third_layernorm, c.relax)
        y = layer_norm(x, layer.post_attention_layernorm, c.relax)
        m = layer.mlp.dense_4h_to_h(F.gelu(layer.mlp.dense_h_to_4h(y), approximate="tanh"))
        x = x + layer_norm(m, layer.fourth_layernorm, c.relax)
    return layer_norm(x, model.transformer.final_layernorm, c.relax) @ model.word_embeddings.weight.T


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("relax", ["row", "tensor", None])
def test_equals_the_formula(attention, relax):
    dalle = attention == "dalle"
    if dalle and relax == "tensor":
        pytest.skip("refused, see test_bad_shapes")
    model = make(attention, relax=relax, num_layers=6 if dalle else 2).double()
    tokens = sample(model)
    pivots = model.draw_pivots(tokens)
    logits = model(tokens, pivots=pivots)
    assert logits.dtype == torch.float32
    expected = formula(model, tokens, pivots).float()
    if dalle:  # what follows the image is not computed
        after = model.vocab.is_image(tokens).cumsum(1).roll(1, 1) == 16
        after[:, 0] = False
        assert after.sum() == 0 + 3 + 6
        assert not logits[after].any()
        expected[after] = 0
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_causality(attention):
    model = make(attention, relax="row")
    tokens = sample(model, 1)
    pivots = model.draw_pivots(tokens)
    before = model(tokens, pivots=pivots)[0]
    for j in range(tokens.shape[1]):
        changed = tokens.clone()
        if attention == "dalle" and tokens[0, j] == model.vocab["BOI1"]:
            continue  # it says where the image is
        image = changed[0, j] < 20  # and stays one, or dalle refuses it
        changed[0, j] = (changed[0, j] + 1) % 20 if image or attention != "dalle" else changed[0, j] ^ 1
        after = model(changed, pivots=pivots)[0]
        assert torch.equal(after[:j], before[:j])
        assert not torch.equal(after[j], before[j])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attention", ["three_region", "dalle"])
def test_gradients_with_activation_checkpointing(attention, dropout, dtype):
    model = make(attention, dropout=dropout).to(dtype)
    tokens = sample(model)
    pivots = model.draw_pivots(tokens)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model.hidden(tokens, pivots=pivots, checkpoint_activations=checkpointed).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_embedding_gradient_is_shrunk():
    full, shrunk = make(embedding_grad_scale=1.0), make(embedding_grad_scale=0.1)
    tokens = sample(full)
    for model in (full, shrunk):
        model.hidden(tokens)[..., 0].sum().backward()
    torch.testing.assert_close(shrunk.hidden(tokens), full.hidden(tokens), rtol=0, atol=0)
    torch.testing.assert_close(shrunk.word_embeddings.weight.grad, 0.1 * full.word_embeddings.weight.grad)
    inner = shrunk.transformer.layers[0].mlp.dense_h_to_4h, full.transformer.layers[0].mlp.dense_h_to_4h
    torch.testing.assert_close(inner[0].weight.grad, inner[1].weight.grad)


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(make().config, hidden_size=256, num_layers=8))
    layer = model.transformer.layers[3]
    for linear, std in (
        (layer.attention.query_key_value, 0.02),
        (layer.mlp.dense_h_to_4h, 0.02),
        (layer.attention.dense, 0.005),
        (layer.mlp.dense_4h_to_h, 0.005),
    ):
        assert abs(float(linear.weight.detach().std()) / std - 1) < 0.03
        assert not linear.bias.any()
    assert torch.equal(layer.third_layernorm.weight, torch.ones(256))
    assert not layer.third_layernorm.bias.any()


def test_pivots_are_drawn_per_layer_and_hold_all_text():
    model = make("three_region")
    tokens = sample(model)
    pivots = model.draw_pivots(tokens, torch.Generator().manual_seed(1))
    assert pivots.shape == (2, 3, 14)
    assert not torch.equal(pivots[0], pivots[1])
    for layer in pivots:
        for row, ids in zip(layer, tokens, strict=True):
            assert set(model.vocab.is_text(ids).nonzero().flatten().tolist()) <= set(row.tolist())
    again = model.draw_pivots(tokens, torch.Generator().manual_seed(1))
    assert torch.equal(pivots, again)


def test_attention_weights_on_request():
    model, weights = make("dense_pb_relax"), []
    tokens = sample(model)
    model(tokens, weights=weights)
    assert [list(w.shape) for w in weights] == [[3, 2, 28, 28]] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 2, 28))
    assert not weights[0].triu(1).any()


def test_dropout_is_for_training_only():
    model = make(dropout=0.5)
    tokens = sample(model)
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(1)
    first = model(tokens)
    torch.manual_seed(1)
    assert torch.equal(model(tokens), first)
    seeds = model.draw_seeds()
    model.eval()
    assert torch.equal(model(tokens), model(tokens, seeds=seeds))
    assert torch.equal(model(tokens), make()(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_takes_its_share_of_every_branch_by_itself(dtype):
    """Dropped elements of a branch are those whose gradient is zero."""
    model, dropped = make(dropout=0.3).to(dtype), []
    for layer in model.transformer.layers:
        for branch in (layer.attention, layer.mlp):
            branch.register_full_backward_hook(lambda module, into, grads: dropped.append(grads[0].flatten() == 0))
    tokens = sample(model)
    for training, share in ((True, 0.3), (False, 0.0)):
        dropped.clear()
        hidden = model.train(training).hidden(tokens)
        hidden.backward(torch.randn_like(hidden))
        found = torch.stack(dropped).float()
        both = found @ found.mT / found.shape[1]
        expected = torch.full((4, 4), share**2).fill_diagonal_(share)
        torch.testing.assert_close(both, expected, rtol=0, atol=0.03)


def test_training_with_dropout_compiles_as_one_graph():
    """With seeds from outside: new ones compile it once more, as numbers that may change."""
    model = make(dropout=0.3)
    tokens = sample(model)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.hidden, backend=graphs, fullgraph=True)
    for _ in range(4):
        pivots, seeds, grads = model.draw_pivots(tokens), model.draw_seeds(), []
        for hidden in (compiled, model.hidden):
            torch.manual_seed(1)  # dropout of the embeddings
            model.zero_grad()
            hidden(tokens, pivots=pivots, seeds=seeds).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 2


def test_calls_that_make_no_sense():
    dense, sparse = make("dense"), make("three_region")
    tokens = sample(dense)
    with pytest.raises(ValueError, match="attention three_region needs pivots"):
        sparse(tokens)
    with pytest.raises(ValueError, match=r"pivots must be \[2, 3, P\], got \[1, 3, 14\]"):
        sparse(tokens, pivots=sparse.draw_pivots(tokens)[:1])
    with pytest.raises(ValueError, match="attention dense takes no pivots"):
        dense(tokens, pivots=sparse.draw_pivots(tokens))
    with pytest.raises(ValueError, match="tokens must be at most 29 long, got 56"):
        dense(tokens.repeat(1, 2))
    with pytest.raises(ValueError, match="weights need attention dense_pb_relax"):
        dense(tokens, weights=[])
    with pytest.raises(ValueError, match="seeds must be 2 pairs, see draw_seeds"):
        dense(tokens, seeds=[[1, 2]])
    dalle = make("dalle")
    caption = dalle.vocab.caption(torch.randint(10, (1, 5)), torch.randint(20, (1, 16)), 29)
    with pytest.raises(ValueError, match=r"dalle needs the text before the image, got image tokens before \[BOI1\]"):
        dalle(caption)
    cache = KVCache(dalle.config, 3)
    dalle(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="dalle needs all text in a cache at once"):
        dalle(tokens[:, 5:6], cache=cache)


def test_loss_in_chunks(monkeypatch):
    model = make()
    tokens = model.vocab.text2image(torch.randint(10, (3, 9)), torch.randint(20, (3, 16)), 29)
    results = []
    for chunk in (2**26, 5 * model.vocab.size):
        monkeypatch.setattr("cogview.loss._CHUNK_LOGITS", chunk)
        model.zero_grad()
        nll = sequence_nll(model, tokens)
        nll.mean().backward()
        results.append((nll, model.word_embeddings.weight.grad.clone()))
    expected = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(results[0][0], expected)
    torch.testing.assert_close(results[0], results[1])
    assert token_nll(torch.zeros(1, 1, 4), torch.zeros(8, 4), torch.zeros(1, 1).long()).item() == pytest.approx(
        math.log(8)
    )


def test_weighted_mean():
    nll = torch.tensor([1.0, 2.0, 3.0])
    assert weighted_mean(nll, torch.tensor([1.0, 0.0, 3.0])).item() == 2.5
    assert weighted_mean(nll, torch.zeros(3)).item() == 0.0


def test_fixed_image_positions_do_not_depend_on_the_text():
    model = make("dense", image_positions="fixed")
    c, codes = model.config, torch.randint(20, (2, 16))
    text = torch.tensor([[1, 2, 3, 4, 5], [6, -1, -1, -1, -1]])
    tokens = model.vocab.text2image(text, codes, c.max_positions)[:, :-1]
    rows = model._position_rows(tokens, torch.arange(tokens.shape[1]), None)[0]
    image = rows[model.vocab.is_image(tokens)].view(2, 16)
    assert torch.equal(image[0], image[1])
    assert image[0].tolist() == list(range(c.max_text + 3, c.max_text + 19))
    assert rows[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, c.max_text + 2]  # text first, then [BOI1]
    caption = model.vocab.caption(text, codes, c.max_positions)[:, :-1]  # an image in front stays there
    plain = torch.arange(caption.shape[1]).expand(caption.shape)
    assert torch.equal(model._position_rows(caption, plain[0], None)[0], plain)


def test_initial_scales():
    scales = {"init_std": 0.05, "embedding_std": 0.3, "branch_gain": 0.25}
    model = GPT(dataclasses.replace(make("dense").config, hidden_size=128, **scales))
    layer = model.transformer.layers[0]
    assert layer.mlp.dense_h_to_4h.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert layer.attention.dense.weight.std().item() == pytest.approx(0.05 / 2, rel=0.05)  # 1 / sqrt(2 * 2 layers)
    assert model.word_embeddings.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert (layer.fourth_layernorm.weight == 0.25).all()
    assert (layer.input_layernorm.weight == 1).all()


def test_layers_of_dalle():
    kinds = [layer.attention.dalle_kind for layer in make("dalle", num_layers=8).transformer.layers]
    assert kinds == ["row", "column", "row", "row", "row", "column", "row", "convolutional"]


def test_dalle_learns_a_batch_by_heart():
    model = GPT(dataclasses.replace(make("dalle").config, num_layers=3))
    tokens = sample(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    image, losses = model.vocab.is_image(tokens)[:, 1:], []
    for _ in range(60):
        loss = sequence_nll(model, tokens)[image].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
