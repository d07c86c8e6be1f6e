"""What is told of the inside of a training: the largest values of each layer, and where one was first not finite."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import needs_processes
from PIL import Image
from spread import CPU, in_processes, sharing
from spread import trainer as spread_trainer
from test_superresolve import SIZES as COGVIEW2
from test_train_command import tokens, train
from test_train_run import CONFIG, TRAIN, Pairs, trainer
from torch import Tensor

from cogview.config import ModelConfig
from cogview.parts.transformer import Transformer
from cogview.recipes import RECIPES
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.recipes.dalle import DalleConfig
from cogview.sequence import Batch
from cogview.train.feed import streams
from cogview.train.log import read_log
from cogview.train.loop import Trainer
from cogview.train.ranks import ALONE, joined
from cogview.train.token_task import TokenTask

SIZES: dict[str, Any] = {
    f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(ModelConfig) if f.name not in ("dropout", "norms")
}
CONFIGS: dict[str, tuple[str, Any]] = {
    "dense": ("cogview", dataclasses.replace(CONFIG, attention="dense", dropout=0.0)),
    "three_region": ("cogview", dataclasses.replace(CONFIG, dropout=0.0)),
    "dalle": ("dalle", DalleConfig(**SIZES, dropout=0.0)),
    "dalle, learned": ("dalle", DalleConfig(**SIZES, dropout=0.0, padding="learned", norms="pre")),
}
HALF = dataclasses.replace(TRAIN, dtype="float16", log_every=2)


def task_of(name: str) -> tuple[TokenTask, Batch]:
    recipe = RECIPES[CONFIGS[name][0]](CONFIGS[name][1])
    torch.manual_seed(0)
    config = dataclasses.replace(TRAIN, hide_context=0.5)
    task = TokenTask(recipe, recipe.model(), Pairs(7), config)
    for p in task.model.parameters():  # biases, too
        torch.nn.init.normal_(p, std=0.5)
    return task, task.batch(task.data, torch.arange(4).numpy(), streams(range(4), 0))


def largest(task: TokenTask, batch: Batch) -> dict[str, float]:
    """By plain formulas, layer by layer, pair by pair, in float64."""
    model, vocab = task.model.double(), task.recipe.vocab
    x, context = batch.inputs, batch.context
    kind = {"text": vocab.is_text(x) & (x != vocab["MASK"]), "image": vocab.is_image(x)}
    found: dict[str, float] = {}

    def note(layer: int, name: str, values: Tensor) -> None:
        for which, there in kind.items():
            found[f"watch/{layer:02}/{name}/{which}"] = float(values[there].abs().max())

    def norm(of: Any, x: Tensor) -> Tensor:
        return x if of is None else F.layer_norm(x, x.shape[-1:], of.weight, of.bias, of.eps)

    layers: Any = model.stack.layers
    h = model.embedding.words.weight[x] + model.embedding.positions.weight[context.positions]
    s = norm(model.stack.first_norm, h)
    for number, layer in enumerate(layers, 1):
        a, (B, S, C) = layer.attention, h.shape
        each = F.linear(s, a.query_key_value.weight, a.query_key_value.bias).view(B, S, 2, 3, C // 2)
        q, k, v = (each[:, :, :, n].transpose(1, 2) for n in range(3))
        scores = torch.zeros(B, S, dtype=torch.float64)
        for b in range(B):
            for i in range(S):
                seen = [j for j in range(i + 1) if x[b, j] != vocab["PAD"]]
                pairs = [float(q[b, n, i] @ k[b, n, j]) / math.sqrt(C // 2) for n in range(2) for j in seen]
                scores[b, i] = max(map(abs, pairs), default=0.0)
        note(number, "scores", scores)
        out = a.attend(q, k, v, a.own(context)).transpose(1, 2).flatten(2)
        branch = F.linear(out, a.dense.weight, a.dense.bias)
        note(number, "attention", branch)
        h = h + norm(layer.post_norm, branch)
        inner = F.linear(norm(layer.mlp_norm, h), layer.mlp.dense_h_to_4h.weight, layer.mlp.dense_h_to_4h.bias)
        branch = F.linear(
            F.gelu(inner, approximate="tanh"), layer.mlp.dense_4h_to_h.weight, layer.mlp.dense_4h_to_h.bias
        )
        note(number, "mlp", branch)
        h = h + norm(layer.mlp_post_norm, branch)
        note(number, "h", h)
        s = norm(layer.next_norm, h)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_largest_values_are_those_of_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of scores that are computed some queries at a time."""
    task, batch = task_of(name)
    assert (batch.inputs == task.recipe.vocab["MASK"]).any()
    found = task.inside.largest(batch)
    monkeypatch.setattr("cogview.train.watch._PAIRS", 4 * 2 * 24 * 5)
    assert task.inside.largest(batch) == pytest.approx(found, rel=1e-5)
    with torch.no_grad():
        expected = largest(task, batch)
    assert len(expected) == 2 * 4 * 2
    assert found == pytest.approx(expected, rel=1e-4)


def cogview2(name: str) -> tuple[TokenTask, Batch]:
    kind: Any = RECIPES[name]
    base = CogLMConfig(**COGVIEW2)
    recipe = kind(base if name == "coglm" else kind.begun(base))
    torch.manual_seed(0)
    data = Pairs(9)
    data.text += 4 * (data.text >= 0)  # behind </s> and <pad>
    codes = [torch.randint(40, (9, grid**2)) for grid in recipe.grids]
    data.batch = lambda rows: (data.text[rows], *(c[rows] for c in codes))
    task = TokenTask(recipe, recipe.model(), data, dataclasses.replace(TRAIN, hide_context=0.5))
    for p in task.model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return task, task.batch(data, torch.arange(9).numpy(), streams(range(9), 0))


@pytest.mark.parametrize("name", ["coglm", "direct", "iterative"])
@torch.no_grad()
def test_largest_values_of_cogview2(name: str) -> None:
    """Of text and cells wherever they stand, and the scores of all keys that may be seen, before and behind."""
    task, batch = cogview2(name)
    x, vocab, sees = batch.inputs, task.recipe.vocab, batch.context.attention.get("sees")
    soi, keys = x == vocab["SOI"], (x != vocab["PAD"])[:, None, None]
    text, image = (x >= 40) & (x != vocab["PAD"]), x < 40
    if sees is None:  # a cell
        text, image = text & ~soi, image | soi
    else:  # the first one is a command, others hide cells
        text &= ~(soi & (soi.cumsum(dim=1) > 1))
        keys = keys & (torch.arange(x.shape[1]) < sees[:, None, :, None])
    rows = [soi.any(dim=1)] if sees is None else [soi.any(dim=1), ~soi.any(dim=1)]
    for some in rows:
        assert some.any()
        found = task.inside.largest(Batch(x[some], batch.targets[some], batch.weights[some], batch.context.rows(some)))
        seen: list[tuple[Tensor, Tensor]] = []
        hooked = [
            layer.attention.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append((inputs[0], out)))
            for layer in task.model.stack.layers
        ]
        task.model(x[some], batch.context.rows(some), targets=batch.targets[some])
        for hook in hooked:
            hook.remove()
        assert len(found) == 2 * 4 * 2
        assert all(0 < value < math.inf for value in found.values())
        layers: Any = task.model.stack.layers
        for number, (layer, (states, out)) in enumerate(zip(layers, seen, strict=True), 1):
            own = projected = layer.attention.query_key_value(states)
            if name == "direct":
                own = layer.attention.fine_query_key_value(states)
            before = getattr(task.recipe, "before", 0)
            q, k, _ = layer.attention.split(torch.cat([projected[:, :before], own[:, before:]], dim=1))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).abs().where(keys[some], 0).amax((1, 3))
            for kind, there in (("text", text[some]), ("image", image[some])):
                for place, values in (("scores", scores), ("attention", out)):
                    expected = float(values[there].abs().max())
                    assert found[f"watch/{number:02}/{place}/{kind}"] == pytest.approx(expected, rel=1e-4)


EMBEDDED = r"ahead of the layers, output of embedding: nan at 0 text, [1-9]\d*"
IN_COGVIEW2 = [
    ("coglm", "embedding.words.weight:3", EMBEDDED),
    ("direct", "stack.layers.0.attention.query_key_value.bias", r"in layer 1 .*\.query_key_value: nan at 35 text, 144"),
    ("direct", "stack.layers.1.attention.fine_dense.bias", "in layer 2 .* attention.dense: nan at 0 text, 1296"),
    ("iterative", "embedding.words.weight:60", EMBEDDED),
]


@pytest.mark.parametrize(("name", "where", "words"), IN_COGVIEW2, ids=[f"{n[0]}-{n[1]}" for n in IN_COGVIEW2])
def test_what_is_planted_in_cogview2_is_found(name: str, where: str, words: str) -> None:
    """Cells are called so, hidden ones of super-resolution, too."""
    task, batch = cogview2(name)
    plant(task.model, where, math.nan)
    said = task.inside.first_not_finite([batch])
    assert re.match(f"{words} image(, 46 other)? tokens", said), said


def hooks(model: Transformer) -> int:
    """And what stands in a layer's way."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("join" in vars(m)) + ("forward" in vars(m))
        for m in model.modules()
    )


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"checkpoint_activations": "full", "accumulate": 2}])
def test_a_watched_run_is_the_same(tmp_path: Path, changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; nothing is left behind, and what is compiled stays so."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    config = dataclasses.replace(HALF, **changes)
    plain, watched = (
        trainer(tmp_path / name, dataclasses.replace(config, watch=name == "watched")) for name in ("plain", "watched")
    )
    before = hooks(watched.task.model)
    losses = [str([t.step() for _ in range(5)]) for t in (plain, watched)]  # nan is nan
    assert losses[0] == losses[1]
    assert hooks(watched.task.model) == before == (2 if config.compile else 0)
    if config.compile:  # both trainers' layers: once each
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_the_log_has_watched_values_where_it_is_written(tmp_path: Path) -> None:
    t = trainer(tmp_path, dataclasses.replace(HALF, watch=True, steps=5))
    seen: list[int] = []
    look = t.task.inside.largest
    t.task.inside.largest = lambda part: seen.append(t.state.step + 1) or look(part)
    t.run()
    log = read_log(tmp_path)
    assert seen == [entry["step"] for entry in log] == [2, 4, 5]
    for entry in log:
        names = [name for name in entry if name.startswith("watch/")]
        assert names[:2] == ["watch/01/scores/text", "watch/01/scores/image"]
        assert len(names) == 16
        assert all(0 < entry[name] < 100 for name in names)
    assert log[-1]["loss_scale"] == t.optimizer.loss_scale


@torch.no_grad()
def plant(model: Transformer, where: str, value: Any) -> None:
    name, _, row = where.partition(":")
    parameter = model.get_parameter(name)
    parameter[int(row) if row else ...] = value


OVERFLOW = torch.tensor([6e4, -6e4]).repeat(16)  # finite itself; the sum of what is normalised is 0
AHEAD, LAYER = "ahead of the layers", "stack.layers"
PLANTED = [
    ("embedding.words.weight:3", math.nan, f"{AHEAD}, output of embedding: nan at 0 text, 2 image tokens"),
    ("embedding.positions.weight:0", math.inf, f"{AHEAD}, output of embedding: nan at 4 text, 0 image tokens"),
    ("stack.first_norm.bias", math.nan, f"{AHEAD}, output of first_norm: nan at"),
    (f"{LAYER}.0.attention.query_key_value.bias:0", math.inf, "in layer 1 of 2, output of attention.query_key_value"),
    (f"{LAYER}.1.attention.dense.weight", math.nan, "in layer 2 of 2, output of attention.dense: nan"),
    (f"{LAYER}.1.post_norm.weight", math.inf, "in layer 2 of 2, output of h + post_norm: inf"),
    (f"{LAYER}.0.mlp_norm.bias", math.nan, "in layer 1 of 2, output of mlp_norm: nan"),
    (f"{LAYER}.0.mlp.dense_h_to_4h.weight", OVERFLOW, "in layer 1 of 2, output of mlp.dense_h_to_4h: inf"),
    (f"{LAYER}.1.mlp.dense_4h_to_h.bias:0", math.inf, "in layer 2 of 2, output of mlp.dense_4h_to_h: inf"),
    (f"{LAYER}.0.mlp_post_norm.bias", math.inf, "in layer 1 of 2, output of h + mlp_post_norm: inf"),
    (f"{LAYER}.1.next_norm.weight", math.nan, "in layer 2 of 2, output of next_norm: nan"),
    ("embedding.words.weight:45", math.nan, "behind the layers, output of embedding.nll: nan at"),  # that nothing reads
]


@pytest.mark.parametrize(("where", "value", "words"), PLANTED, ids=[p[0] for p in PLANTED])
def test_what_is_planted_is_found(
    tmp_path: Path, where: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float16, in the first operation that reads it; once in a row of steps."""
    t = trainer(tmp_path, HALF)
    plant(t.task.model, where, value)
    assert not math.isfinite(t.step()["loss"])
    t.step()
    said = capsys.readouterr().out
    assert said.startswith(f"step 1: the loss is not finite; first {words}")
    assert re.search(r": (inf|nan|inf and nan) at \d+ text, \d+ image(, \d+ other)? tokens \(", said)
    assert said.endswith(f"dtype float{32 if 'nll' in said else 16}); the step is skipped\n")
    assert ("largest |value| before: " in said) == (" embedding:" not in said)
    assert said.count("\n") == 1


def test_an_attention_that_overflows_is_found_in_the_part_where_it_is_first(tmp_path: Path) -> None:
    """The second part's is in an earlier layer. It is no parameter's fault, and the run goes on without it."""
    t = trainer(tmp_path, dataclasses.replace(TRAIN, accumulate=2))
    first, second = t.feed.next(dataclasses.replace(t.state)).chunk(2)
    layers = t.task.model.stack.layers
    for layer, part in ((layers[0], second), (layers[1], first)):
        pivots, attend = part.context.attention["pivots"][:, layer.attention.index], layer.attention.attend

        def broken(q: Tensor, k: Tensor, v: Tensor, context: Any, pivots: Any = pivots, attend: Any = attend) -> Tensor:
            out = attend(q, k, v, context)
            hit = torch.equal(context.attention["pivots"], pivots)
            return out.index_fill(2, torch.tensor([3, 20]), torch.inf) if hit else out

        layer.attention.attend = broken
    t.step()
    assert "in layer 1 of 2, output of attention.attend: inf at " in t.skips.words
    assert "dtype float32" in t.skips.words
    for layer in layers:
        del layer.attention.attend
    t.step()
    assert (t.skips.count, t.state.skipped) == (0, 1)


@pytest.mark.parametrize("config", [TRAIN, HALF, dataclasses.replace(HALF, watch=True)], ids=["32", "16", "watched"])
def test_a_gradient_that_is_not_finite_is_named(
    tmp_path: Path, config: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it begins in the backward. In float16 that is no news."""
    monkeypatch.setattr("cogview.train.loss_scale.FIRST", 2.0**8)
    t = trainer(tmp_path, config)
    dense = t.task.model.stack.layers[0].attention.dense
    hook = dense.register_full_backward_pre_hook(lambda _, gradients: (gradients[0] * torch.inf,))
    for _ in range(2):
        assert math.isfinite(t.step()["loss"])
    words = (
        "step 1: the loss is finite, not so its gradients, in the backward first that of layer 1, attention.dense.bias"
    )
    scale = "; the loss scale is 128 from now on" if config.dtype == "float16" else ""
    assert t.skips.words == words + scale
    said = "" if config is HALF else f"{words}{scale}; the step is skipped\n"
    assert capsys.readouterr().out == said
    dense.bias.data.fill_(torch.nan)  # now the loss, too
    t.step()
    assert "step 3: the loss is not finite; first in layer 1 of 2, output of attention.dense" in capsys.readouterr().out
    hook.remove()


def test_a_hopeless_run_says_where_it_broke(tmp_path: Path) -> None:
    t = trainer(tmp_path, dataclasses.replace(TRAIN, steps=100))
    t.task.model.stack.layers[1].mlp.dense_4h_to_h.weight.data.fill_(torch.nan)
    with pytest.raises(
        RuntimeError, match=r"up to step 20: .* \(step 1: .* first in layer 2 of 2, output of mlp.dense_4h"
    ):
        t.run()


SPREAD = dataclasses.replace(TRAIN, batch_size=8, watch=True)


def spread(folder: Path) -> list[tuple[dict[str, float], str]]:
    """Of two processes that share a batch, and of two that share the heads: watched values, and the words of a step in
    which the second one breaks in a layer, and both in a later one."""
    found = []
    with joined(CPU) as ranks:
        for tensor in (1, 2):
            t = spread_trainer(sharing(ranks, tensor), folder / str(tensor), SPREAD)
            t.step()
            watched = t._watched
            layer: Any = t.task.model.stack.layers[0 if ranks.rank == 1 else 1]
            attend = layer.attention.attend
            layer.attention.attend = lambda *args, attend=attend: attend(*args) * torch.nan
            t.step()
            found.append((watched, t.skips.words))
    return found


@needs_processes
def test_several_processes_tell_the_same(tmp_path: Path) -> None:
    alone = spread_trainer(ALONE, tmp_path / "alone", SPREAD)
    alone.step()
    first, second = in_processes(2, spread, tmp_path / "spread")
    assert first == second
    for watched, words in first:
        assert watched == pytest.approx(alone._watched, rel=1e-5)
        where = "first in layer 1 of 2, output of attention.attend: nan at "
        assert words.startswith(f"step 2: the loss is not finite; {where}")
        assert words.endswith("dtype float32) on rank 1")


class Scaled(torch.autograd.Function):
    """Of a value, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


@pytest.mark.parametrize("changes", [{}, {"checkpoint_activations": "full"}, {"compile": True}])
def test_a_branch_can_have_gradients_of_its_own_scale(
    tmp_path: Path, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks on its module scale them on entering its backward, and back on leaving: those of the main branch are left
    alone. 8 is exact."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))

    def gradients(scaled: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()  # it takes a module for the same whatever its hooks
        torch.manual_seed(0)
        recipe = RECIPES["cogview"](CONFIG)
        task = TokenTask(recipe, recipe.model(), Pairs(7), dataclasses.replace(TRAIN, **changes))
        for layer in task.model.stack.layers if scaled else []:
            for branch in (layer.attention, layer.mlp):
                branch.register_forward_pre_hook(lambda _, args: (Scaled.apply(args[0], 1 / 8), *args[1:]))
                branch.register_forward_hook(lambda _, args, out: Scaled.apply(out, 8.0))
        t = Trainer(task, task.config, tmp_path)
        part = t.feed.next(t.state)
        task.loss(part, part)[0].backward()
        return {name: p.grad for name, p in task.model.named_parameters()}

    plain, scaled = gradients(False), gradients(True)
    assert sum("attention." in name or "mlp." in name for name in plain) == 2 * 2 * 4
    for name, gradient in plain.items():
        times = 8 if "attention." in name or "mlp." in name else 1
        assert torch.equal(scaled[name], times * gradient), name


def test_train_watch_leaves_a_picture(tmp_path: Path) -> None:
    tokens(tmp_path)
    train(tmp_path, "--watch", "--log-every", "2")
    with Image.open(tmp_path / "gpt" / "watch.png") as picture:
        assert picture.width > 1000
    assert "watch/01/scores/image" in read_log(tmp_path / "gpt")[0]
    train(tmp_path, "--name", "other")
    assert not (tmp_path / "other" / "watch.png").exists()
