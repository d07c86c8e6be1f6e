"""cogview_local_2d in transformers' models, against SDPA under the mask of the same pattern."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from small_models import assert_close, small, tokens  # noqa: E402

from cogview_ops import patterns  # noqa: E402
from cogview_ops.integrations.transformers import register  # noqa: E402

NAME = "cogview_local_2d"
WINDOWS: list[dict[str, Any]] = [{"kernel_size": (3, 3), "dilation": (1, 2)}, {"kernel_size": (3, 3), "edge": "shift"}]


def seen(grid: tuple[int, int], prefix: int, causal: bool, **window: Any) -> Tensor:
    """Bool `[S, S]`: all see the prefix, and the prefix all, or what is before it."""
    window = {"dilation": (1, 1), "edge": "clip", **window}
    i = torch.arange(prefix + grid[0] * grid[1]) - prefix
    row, column = i[:, None], i
    near = patterns.local_2d(row, column, grid=grid, raster_causal=causal, **window) & (column >= 0)
    near = torch.where(row < 0, not causal, near) | (column < 0)
    return near & (column <= row) if causal else near


def by_mask(mask: Tensor) -> str:
    """An attn_implementation."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **more: Any) -> Any:
        given = {"attn_mask": mask[: query.shape[2], : key.shape[2]], "scale": scaling, "enable_gqa": True}
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **given)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("by_mask", attend)
    return "by_mask"


def assert_same(model: Any, mask: Tensor, **given: Any) -> None:
    """What comes out, and all gradients."""
    found = []
    for name in (NAME, by_mask(mask)):
        model.set_attn_implementation(name)
        out = model(**given)[0]
        grads = torch.autograd.grad(out.sin().sum(), list(model.parameters()), allow_unused=True)
        found.append([out, *(g for g in grads if g is not None)])
    assert len(found[0]) > 20
    assert_close(*found)


@pytest.mark.parametrize("window", WINDOWS, ids=["clip", "shift"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 6)], ids=["square", "wide"])
def test_pictures(grid: tuple[int, int], window: dict[str, Any]) -> None:
    """A ViT with its class token."""
    register(grid=None if grid == (4, 4) else grid, prefix=1, **window)
    pictures = torch.randn(2, 3, 4 * grid[0], 4 * grid[1], generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pictures, "interpolate_pos_encoding": True}
    assert_same(small("ViT"), seen(grid, 1, False, **window), **given)


@pytest.mark.parametrize(("kind", "prefix"), [("Llama", 3), ("GPT2", 0)])
def test_pictures_token_by_token(kind: str, prefix: int) -> None:
    """In raster order behind a text; also the first tokens of a picture, the last of which nobody has drawn yet."""
    register(grid=(4, 6), kernel_size=(3, 5), prefix=prefix)
    mask, (ids,) = seen((4, 6), prefix, True, kernel_size=(3, 5)), tokens(prefix + 24)
    model = small(kind)
    for length in (prefix + 24, prefix + 23, prefix + 8, max(prefix, 1)):
        assert_same(model, mask, input_ids=ids[:, :length], use_cache=False)
    drawn = []
    for name in (NAME, by_mask(mask)):
        model.set_attn_implementation(name)
        drawn += [model.generate(ids[:, : max(prefix, 1)], max_length=prefix + 24, do_sample=False, use_cache=False)]
    assert torch.equal(*drawn)


def test_compiles_as_one_graph() -> None:
    register(kernel_size=(3, 3), prefix=1)
    torch._dynamo.reset()
    model, pictures = small("ViT", attn_implementation=NAME), torch.randn(2, 3, 16, 16)
    run = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(pictures)[0], model(pictures)[0])


PICTURE = {"pixel_values": torch.zeros(1, 3, 16, 16)}
WIDE = {"pixel_values": torch.zeros(1, 3, 12, 24), "interpolate_pos_encoding": True}
TEXT = {"input_ids": tokens(16)[0]}
UNPADDED = "expected one whole image a row, got an attention_mask or packed sequences"
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "dropout": (
        *("ViT", {"attention_probs_dropout_prob": 0.1}, {"kernel_size": (3, 3), "prefix": 1}, PICTURE),
        "expected no dropout of attention weights, got 0.1; set it to 0 in the config",
    ),
    "no window": (*("ViT", {}, {"prefix": 1}, PICTURE), r"expected register\(kernel_size=\(kh, kw\)\), got none"),
    "no square": (
        *("ViT", {}, {"kernel_size": (3, 3), "prefix": 1}, WIDE),
        r"expected register\(grid=\(H, W\)\) for an image of 18 tokens, which is no square",
    ),
    "another grid": (
        *("ViT", {}, {"kernel_size": (3, 3), "prefix": 1, "grid": (4, 5)}, PICTURE),
        r"expected 1 prefix tokens and a grid \(4, 5\), got 17 tokens",
    ),
    "too many tokens": (
        *("Llama", {}, {"kernel_size": (3, 3), "grid": (3, 5)}, {**TEXT, "use_cache": False}),
        r"expected 0 prefix tokens and a grid \(3, 5\), got 16 tokens",
    ),
    "padding": (
        *("Llama", {}, {"kernel_size": (3, 3)}, {**TEXT, "attention_mask": torch.arange(16)[None] > 2}),
        UNPADDED,
    ),
    "padded pictures": (
        "Bert",
        {},
        {"kernel_size": (3, 3)},
        {**TEXT, "attention_mask": torch.arange(16)[None] < 9},
        UNPADDED,
    ),
    "packing": (
        *("Llama", {}, {"kernel_size": (3, 3)}),
        *({**TEXT, "position_ids": torch.arange(8).repeat(1, 2), "use_cache": False}, UNPADDED),
    ),
    "ends": ("Llama", {}, {"kernel_size": (3, 3)}, {**TEXT, "cu_seq_lens_q": torch.tensor([0, 4, 16])}, UNPADDED),
    "a sliding window": (
        *("Mistral", {"sliding_window": 8}, {"kernel_size": (3, 3)}, TEXT),
        r"expected no sliding_window \(a sliding window of the model's own\), got 8; set config",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    kind, config, options, given, message = REFUSED[case]
    register(**options)
    model = small(kind, **config, attn_implementation=NAME).train()
    with pytest.raises(ValueError, match=f"^{NAME}: {message}"):
        model(**given)


def test_refuses_a_negative_prefix() -> None:
    with pytest.raises(ValueError, match=r"^prefix: expected at least 0, got -1$"):
        register(kernel_size=(3, 3), prefix=-1)


@pytest.mark.parametrize("kind", ["GPT2", "Bart"])
def test_refuses_cross_attention(kind: str) -> None:
    """Also where an encoder gives as many tokens as there are queries."""
    register(kernel_size=(3, 3))
    more = {"add_cross_attention": True} if kind == "GPT2" else {}
    model = small(kind, **more, attn_implementation=NAME)
    seen: Any = (
        {"encoder_hidden_states": torch.zeros(1, 16, 32)}
        if kind == "GPT2"
        else {"decoder_input_ids": TEXT["input_ids"]}
    )
    with pytest.raises(
        ValueError, match=f"^{NAME}: expected self-attention, got the cross-attention of {kind}Attention$"
    ):
        model(**TEXT, **seen, use_cache=False)


def test_refuses_caches() -> None:
    register(kernel_size=(3, 3), grid=(4, 4))
    model = small("Llama", attn_implementation=NAME)
    message = f"^{NAME}: expected self-attention without cache \\(use_cache=False\\), got 1 queries and 2 keys$"
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(1)[0], max_new_tokens=4)
