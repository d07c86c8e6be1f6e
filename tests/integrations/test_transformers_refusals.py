"""What cogview_three_region refuses of transformers' models, and register of its arguments."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from small_models import additive, small, tokens  # noqa: E402
from test_transformers_attention import FULL, NAME, dense, mask, registered, sees  # noqa: E402, F401

from cogview_ops.integrations.transformers import block_pivots, register  # noqa: E402

MASK = r"expected a causal mask without a pattern of its own, got one of torch.float32 and shape \(1, 1, "
INTEGERS = MASK.replace("float32", "int32")
EAGER = "use attn_implementation='eager'"
TWO = torch.tensor([0, 4, 9])
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dropout": (
        *("Llama", {"attention_dropout": 0.1}, {}),
        f"{NAME}: expected no dropout of attention weights, got 0.1; set it to 0 in the config",
    ),
    "soft capping": (
        *("Gemma2", FULL, {}),
        rf"{NAME}: expected no softcap \(soft capping of scores\), got 50.0; set config.attn_logit_softcapping=None",
    ),
    "sliding layers": (
        *("Gemma3", {"sliding_window": 8}, {}),
        rf"{NAME}: expected no sliding_window \(a sliding window of the model's own\), got 8; set config",
    ),
    "a sliding window": (
        *("Mistral", {"sliding_window": 8}, {}),
        rf"{NAME}: expected no sliding_window \(a sliding window of the model's own\), got 8; set config",
    ),
    "sinks": (
        *("GptOss", FULL, {}),
        rf"{NAME}: expected no s_aux \(attention sinks\), got a tensor of shape \(4,\); {EAGER}",
    ),
    "weights": (
        *("Llama", {}, {"output_attentions": True}),
        rf"{NAME}: expected no output_attentions \(attention weights as output\), got True; "
        "use attn_implementation='cogview_pb_relax'",
    ),
    "a bias": (
        *("T5", {}, {}),
        rf"{NAME}: expected no position_bias \(a bias of scores\), got a tensor of shape \(1, 4, 9, 9\); "
        "use attn_implementation='cogview_pb_relax'",
    ),
    "both directions": (
        *("Bert", {}, {}),
        f"{NAME}: expected causal self-attention, got BertSelfAttention with is_causal=False; of a model in several "
        "parts name the causal one: attn_implementation={'text_config': 'cogview_three_region'",
    ),
    "chunks": (
        *("Llama4", {"attention_chunk_size": 4, "layer_types": ["chunked_attention"] * 2}, {}),
        rf"{NAME}: {MASK}1, 1\); sliding windows, chunks, blocks that see ahead and 4D masks",
    ),
    "a 4D mask": ("Llama", {}, {"attention_mask": additive(torch.ones(9, 9) > 0)}, f"{NAME}: {MASK}9, 9"),
    "a 4D mask of integers": ("Llama", {}, {"attention_mask": torch.ones(1, 1, 9, 9).int()}, f"{NAME}: {INTEGERS}9, 9"),
    "a short mask": (
        *("Llama", {}, {"attention_mask": torch.ones(1, 8)}),
        "attention_mask: expected 9 columns, for the tokens in the cache too, got 8",
    ),
    "holes": (
        *("Llama", {}, {"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]])}),
        "attention_mask: expected padding on the left or right of each row, got a row with zeros between ones",
    ),
    "padding beside packing": (
        *("Llama", {}, {"attention_mask": torch.arange(9)[None] > 2, "cu_seq_lens_q": TWO, "cu_seq_lens_k": TWO}),
        f"{NAME}: expected cu_seq_lens_q and the same cu_seq_lens_k, without attention_mask and cache",
    ),
    "other keys": (
        *("Llama", {}, {"cu_seq_lens_q": TWO, "cu_seq_lens_k": torch.tensor([0, 5, 9])}),
        f"{NAME}: expected cu_seq_lens_q and the same cu_seq_lens_k, without attention_mask and cache",
    ),
    "another attention": (
        *("Bloom", {}, {}),
        "attn_implementation: expected a model that takes its attention from transformers' AttentionInterface, got one "
        f"of BloomConfig; {EAGER}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    kind, config, given, message = REFUSED[case]
    model = small(kind, **config, attn_implementation=NAME).train()
    with pytest.raises(ValueError, match=f"^{message}"):
        model(tokens(9)[0], **given)


def test_refuses_blocks_that_see_ahead() -> None:
    """As of images in multimodal models; a mask whose blocks are of one token is causal."""
    overlay = transformers.masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, -1]]))
    together = transformers.masking_utils.or_masks(transformers.masking_utils.causal_mask_function, overlay)
    with pytest.raises(ValueError, match=f"^{NAME}: {MASK}1, 1"):
        sees(1, 6, attention_mask=mask(1, 6, mask_function=together))
    nothing = transformers.masking_utils.blockwise_overlay(torch.full((1, 6), -1))
    causal = transformers.masking_utils.or_masks(transformers.masking_utils.causal_mask_function, nothing)
    assert torch.equal(sees(1, 6, attention_mask=mask(1, 6, mask_function=causal))[0], dense(6))


def test_refuses_keys_that_it_knows_nothing_of() -> None:
    for given in ({"keys": 12}, {"keys": 5}):
        with pytest.raises(
            ValueError, match=f"^{NAME}: expected as many keys as queries or a cache, got .* keys and 9 q"
        ):
            sees(1, 9, attention_mask=None, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"pivots_per_block": 0}, "pivots_per_block: expected at least 1, got 0"),
        ({"block_size": 4, "pivots_per_block": 5}, "pivots_per_block: expected at most block_size 4, got 5"),
        ({"block_size": 0, "pivots": block_pivots}, "block_size: expected at least 1, got 0"),
        ({"window_blocks": 0}, "window_blocks: expected at least 1, got 0"),
        ({"pivot_bias": float("inf")}, "pivot_bias: expected a finite number, got inf"),
        ({"alpha": 0}, "alpha: expected a number above 0, got 0"),
        ({"impl": "fast"}, "impl: expected 'auto' or 'reference' or 'cpp' or 'cuda' or 'triton', got 'fast'"),
        ({"edge": "wrap"}, "edge: expected 'clip' or 'shift', got 'wrap'"),
        ({"kernel_size": (3, 0)}, "kernel_size: expected at least 1, got 0"),
        ({"dilation": 0}, "dilation: expected at least 1, got 0"),
        ({"grid": (4, 0)}, "grid: expected at least 1, got 0"),
        (
            {"grid": (4, 4), "kernel_size": (9, 9)},
            r"kernel_size: expected at most \(7, 7\) \(2 \* ceil\(grid / dilation\) - 1\), got \(9, 9\)",
        ),
        ({"pivots": block_pivots, "pivots_per_block": 5}, "pivots_per_block: expected None beside pivots, got 5"),
        ({"pivots": 3}, "pivots: expected a function of a length and a device, got 3"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),  # addresses of functions differ between processes
)
def test_register_checks(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        register(**given)


def test_register_checks_types() -> None:
    with pytest.raises(TypeError, match=r"^kernel_size: expected a pair of ints \(rows, columns\), got 3$"):
        register(kernel_size=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^window_blocks: expected an int, got float$"):
        register(window_blocks=2.0)  # type: ignore[arg-type]
