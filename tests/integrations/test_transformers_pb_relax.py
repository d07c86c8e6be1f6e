"""cogview_pb_relax in transformers' models: eager attention, whatever the mask, also where float16 overflows."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from small_models import additive, assert_close, small, tokens  # noqa: E402

from cogview_ops.integrations.transformers import register  # noqa: E402

NAME = "cogview_pb_relax"
LENGTH = 21


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def padded(*lengths: int) -> dict[str, Tensor]:
    real = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]
    return {"input_ids": torch.cat(tokens(*[LENGTH] * len(lengths))) * real, "attention_mask": real.long()}


def mask_of_ones_own() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return additive((torch.rand(LENGTH, LENGTH, generator=generator) > 0.5) | torch.eye(LENGTH).bool())


ALONE = {"input_ids": tokens(LENGTH)[0]}
PACKED = torch.cat([torch.arange(8), torch.arange(13)])[None]
PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grouped queries": ("Llama", {}, ALONE),
    "left padding": ("Llama", {}, padded(21, 8)),
    "packed": ("Llama", {}, {**ALONE, "position_ids": PACKED, "use_cache": False}),
    "4D float mask": ("Llama", {}, {**ALONE, "attention_mask": mask_of_ones_own()}),
    "2D mask": ("GPT2", {}, padded(21, 8)),
    "sliding windows": ("Gemma3", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}, ALONE),
    "both directions": ("Bert", {}, {**ALONE, "attention_mask": (torch.arange(LENGTH) < 17)[None].long()}),
    "position bias": ("T5", {}, padded(21, 8)),
    "values narrower than keys": ("DeepseekV3", {}, padded(21, 8)),
    "pictures": ("ViT", {}, PICTURES),
}
# A bias of keys adds the same to all scores of a query, which softmax does not see: its gradient is 0 and what is
# found is rounding, of the size of the queries' bias's.
QUERY_OF_KEY = {"k_proj.bias": "q_proj.bias", "key.bias": "query.bias"}


@pytest.mark.parametrize("case", CASES)
def test_is_eager_attention(case: str) -> None:
    """What comes out, with weights and gradients; padding aside, whose queries see nothing."""
    kind, config, given = CASES[case]
    results = []
    for name in (NAME, "eager"):
        model = small(kind, **config)
        model.set_attn_implementation(name)
        out = model(**given, output_attentions=True, output_hidden_states=True)
        weights, hidden, real = out.attentions, out.hidden_states[-1], given.get("attention_mask")
        if real is not None and real.ndim == 2:
            hidden = hidden[real.bool()]
            weights = [w.transpose(1, 2)[real.bool()] for w in weights]
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(hidden.sin().sum(), parameters, allow_unused=True)
        grads = {n: g for n, g in zip(names, found, strict=True) if g is not None}
        for key, query in QUERY_OF_KEY.items():
            for n in [n for n in grads if n.endswith(key)]:
                assert grads.pop(n).abs().max() < 2e-6 * grads[n.replace(key, query)].abs().max()
        results.append([hidden, *weights, *grads.values()])
    assert len(results[0]) == len(results[1]) > 10
    assert_close(*results)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_is_eager_attention(cache: str | None) -> None:
    out = []
    for name in (NAME, "eager"):
        model = small("Llama")
        model.set_attn_implementation(name)
        how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
        out += [torch.cat([model.generate(**padded(21, 8), **how).flatten(), model.generate(**ALONE, **how)[0]])]
    assert torch.equal(*out)


def test_float16_does_not_overflow() -> None:
    """Scores beyond 65504, of which eager attention makes NaN."""
    model = small("GPT2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 300
    model.set_attn_implementation("eager")
    truth = model(**ALONE).logits
    model.half()
    assert model(**ALONE).logits.isnan().any()
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(**ALONE).logits.float(), truth, atol=0.05, rtol=0.05)


def test_compiles_as_one_graph() -> None:
    kind, _, given = CASES["left padding"]
    model = small(kind, num_hidden_layers=1)
    model.set_attn_implementation(NAME)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(**given).logits, model(**given).logits)


def test_masks_of_keys() -> None:
    """2D masks that come to attention itself, as FlashAttention's do."""
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    real = torch.arange(6) < torch.tensor([6, 4])[:, None]
    attention = transformers.AttentionInterface()[NAME]
    out, weights = attention(torch.nn.Module(), q, k, v, real.long())
    assert (weights[1, :, :, 4:] == 0).all()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2))


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dropout": (
        *("Llama", {"attention_dropout": 0.1}, {}),
        f"{NAME}: expected no dropout of attention weights, got 0.1; set it to 0 in the config",
    ),
    "soft capping": (
        *("Gemma2", {}, {}),
        rf"{NAME}: expected no softcap \(soft capping of scores\), got 50.0; set config.attn_logit_softcapping=None",
    ),
    "packed by its ends alone": (
        *("Llama", {}, {"cu_seq_lens_q": torch.tensor([0, 8, 21])}),
        f"{NAME}: expected packed sequences as position_ids that begin anew, without cache, got cu_seq_lens_q alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    kind, config, given, message = REFUSED[case]
    model = small(kind, **config, attn_implementation=NAME).train()
    with pytest.raises(ValueError, match=f"^{message}"):
        model(**ALONE, **given)
