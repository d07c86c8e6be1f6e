"""fuse_norms on models of transformers: the same numbers, how much is fused, and that nothing else is disturbed."""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from norm_models import (  # noqa: E402
    ASKED_FOR,
    FAMILIES,
    TEXT,
    TOKENS,
    VOCABULARY,
    AllInDouble,
    classes,
    counts,
    inputs_of,
    model_of,
    results,
)

from cogview_ops.integrations.transformers.norms import fuse_norms, unfuse_norms  # noqa: E402


def squared_errors(of: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor that is more than almost nothing (biases of keys, on which no attention depends)."""
    most = max(float(x.square().mean()) for x in truth.values())
    kept = {name: x for name, x in truth.items() if x.square().mean() > 1e-15 * most}
    return {name: float((of[name].double() - x).square().sum() / x.square().sum()) for name, x in kept.items()}


def assert_as_exact(own: list[dict[str, float]], fused: list[dict[str, float]], most: float) -> None:
    """Of the last hidden states and each gradient: the root of the mean squared error, over models with other weights,
    is at most twice the model's own; for tensors of a few numbers, whose error is chance, twice the median of all."""
    by_name = [{key: statistics.mean(x[key] for x in each) ** 0.5 for key in each[0]} for each in (own, fused)]
    usual = statistics.median(by_name[0].values())
    assert len(by_name[0]) > 20
    assert 0 < usual < most
    assert {key: error for key, error in by_name[1].items() if error > 2 * max(by_name[0][key], usual)} == {}
    assert by_name[1]["last_hidden_state"] <= 2 * by_name[0]["last_hidden_state"]
    assert statistics.median(by_name[1][key] / error for key, error in by_name[0].items() if error) < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ASKED_FOR)
def test_as_exact_as_the_model(name: str, dtype: torch.dtype) -> None:
    own, fused = [], []
    for seed in range(3):
        model = model_of(FAMILIES[name], seed).to(dtype)
        with AllInDouble():
            truth = results(copy.deepcopy(model).double())
        own.append(squared_errors(results(model), truth))
        fuse_norms(model)
        fused.append(squared_errors(results(model), truth))
    assert_as_exact(own, fused, 1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["Gemma 3", "Llama", "GPT-2", "OLMo 2", "Swin v2"])
def test_autocast(name: str) -> None:
    own, fused = [], []
    for seed in range(3):
        model = model_of(FAMILIES[name], seed)
        truth = results(model)
        with torch.autocast("cpu", torch.bfloat16):
            before = results(model)
            fuse_norms(model)
            after = results(model)
        assert [x.dtype for x in before.values()] == [x.dtype for x in after.values()]
        own.append(squared_errors(before, truth))
        fused.append(squared_errors(after, truth))
    assert_as_exact(own, fused, 0.03)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_fused_and_undone(name: str) -> None:
    family = FAMILIES[name]
    model = model_of(family)
    kinds, before, state = classes(model), results(model), model.state_dict()
    report = fuse_norms(model)
    assert counts(report) == family[1:5]
    assert {step.layer for step in report.steps} <= dict(model.named_modules()).keys()
    after = results(model)
    assert after.keys() == before.keys()
    for key, x in before.items():
        assert (after[key] - x).norm() <= 3e-5 * x.norm() + 1e-5 * x.numel() ** 0.5, key
    fused = model.state_dict()
    assert list(fused) == list(state)
    assert all(fused[key].data_ptr() == x.data_ptr() for key, x in state.items())
    report.undo()
    assert classes(model) == kinds
    assert not any("forward" in vars(module) for module in model.modules())
    again = results(model)
    assert all(torch.equal(again[key], x) for key, x in before.items())


def language_model(kind: str, **options: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**TEXT, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["gemma3_text", "glm4", "olmo2"])
def test_generate(kind: str, cache: str) -> None:
    model = language_model(kind)
    prompt = torch.randint(1, VOCABULARY, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    expected = model.generate(prompt, **options)
    fuse_norms(model)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert expected.shape == (2, 11)


@pytest.mark.parametrize(("name", "reentrant"), [("T5Gemma", False), ("Gemma 2", True)])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = model_of(FAMILIES[name], **({"dropout_rate": 0.1} if name == "T5Gemma" else {})).train()
    fuse_norms(model)
    calls: list[int] = []
    getattr(model, "encoder", model).layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    outs = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        outs.append(results(model))
    assert len(calls) == 3
    assert all(torch.equal(outs[1][key], x) for key, x in outs[0].items())


def test_dropout_outside_of_steps_draws_as_before() -> None:
    model = model_of(FAMILIES["GPT-2"], resid_pdrop=0.2, embd_pdrop=0.1).train()
    outs = []
    for fuse in (False, True):
        if fuse:
            fuse_norms(model)
        torch.manual_seed(0)
        outs.append(results(model))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


def test_drop_path_draws_as_before() -> None:
    model = model_of(FAMILIES["Swin v2"], drop_path_rate=0.5).train()
    outs = []
    for fuse in (False, True):
        if fuse:
            assert counts(fuse_norms(model)) == FAMILIES["Swin v2"][1:5]
        torch.manual_seed(3)
        outs.append(results(model))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    torch.manual_seed(4)
    assert not torch.allclose(results(model)["last_hidden_state"], outs[0]["last_hidden_state"], atol=1e-2)


def test_hidden_states_are_recorded() -> None:
    model = model_of(FAMILIES["Gemma 3"])
    before = model(**inputs_of(model), output_hidden_states=True).hidden_states
    fuse_norms(model)
    after = model(**inputs_of(model), output_hidden_states=True).hidden_states
    assert len(before) == len(after) == 3
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_compiled() -> None:
    model = language_model("qwen3", num_hidden_layers=1)
    tokens = torch.randint(1, VOCABULARY, (2, TOKENS))
    expected = model(tokens, labels=tokens, use_cache=False)
    fuse_norms(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    got.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("first", ["fused", "sharded"])
def test_sharded_and_checkpointed(first: str) -> None:
    """FSDP2 gives layers another class too; whoever is first, both work, and layers are checkpointed."""
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = model_of(FAMILIES["Gemma 3"]).train()
        expected = results(model)
        if first == "fused":
            fuse_norms(model)
        for layer in [*model.layers, model]:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        if first == "sharded":
            assert counts(fuse_norms(model)) == FAMILIES["Gemma 3"][1:5]
        model.gradient_checkpointing_enable({"use_reentrant": False})
        calls: list[int] = []
        model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
        got = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in results(model).items()}
        assert len(calls) == 2
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = language_model("llama")
    tokens = torch.randint(1, VOCABULARY, (2, TOKENS))
    outs = []
    for order in ("own", "fused first", "fused last"):
        torch.manual_seed(0)
        tuned = copy.deepcopy(model)
        if order == "fused first":
            fuse_norms(tuned)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["post_attention_layernorm"])
        tuned = peft.get_peft_model(tuned, config)
        if order == "fused last":
            fuse_norms(tuned)
        tuned(tokens, labels=tokens).loss.backward()
        outs.append({name: p.grad for name, p in tuned.named_parameters() if p.grad is not None})
    for got in outs[1:]:
        torch.testing.assert_close(got, outs[0], rtol=1e-4, atol=1e-4)


def test_a_model_whose_norms_are_not_known() -> None:
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("nemotron", **TEXT))
    kinds = classes(model)
    report = fuse_norms(model)
    assert classes(model) == kinds
    assert not report.steps
    assert not report.norms
    assert set(report.left.values()) == {"it computes no formula that is known, in torch.bfloat16"}  # 1 + w in 16 bits
    unfuse_norms(model)


def test_a_part_of_a_model() -> None:
    model = model_of(FAMILIES["Llama"])
    fuse_norms(model.layers[1])
    assert len(model.layers) == 2
    assert type(model.layers[0]) is not type(model.layers[1])
    assert isinstance(model.layers[1], type(model.layers[0]))
    assert isinstance(model, nn.Module)
