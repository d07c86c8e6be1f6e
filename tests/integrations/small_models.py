"""Models of transformers of two layers with random weights, and the masks that eager attention needs to be the same."""

from typing import Any

import torch
import transformers
from torch import Tensor

from cogview_ops import patterns

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # else a token is most likely followed by itself
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
NAMES_OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DENSE = {"first_k_dense_replace": 2, "num_key_value_heads": 4, "head_dim": 4}
OTHERWISE: dict[str, dict[str, Any]] = {
    "GPT2": {**NAMES_OF_GPT2, **NO_DROPOUT},
    "Bloom": NAMES_OF_GPT2,
    "DeepseekV3": {**LATENT, **DENSE},
    "Bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 4},
    "Bert": {"attention_probs_dropout_prob": 0.0},
    "ViT": {"image_size": 16, "patch_size": 4},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
}


def small(kind: str, **more: Any) -> Any:
    """The same weights every time."""
    config, model = {
        "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "GPT2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "Gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "Gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "DeepseekV3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
        "Llama4": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
        "GptOss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
        "Bloom": (transformers.BloomConfig, transformers.BloomForCausalLM),
        "Bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "Bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        "T5": (transformers.T5Config, transformers.T5EncoderModel),
        "ViT": (transformers.ViTConfig, transformers.ViTModel),
    }[kind]
    sizes = {**SIZES, **OTHERWISE.get(kind, {})}
    torch.manual_seed(0)
    made = model(config(**{**sizes, **more})).eval()
    for p in made.parameters():  # so that tokens differ in what comes out
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    return made


def tokens(*lengths: int, seed: int = 1) -> list[Tensor]:
    """Sequences `[1, length]` without padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (1, n), generator=generator) for n in lengths]


def seen(length: int, pivots: Tensor, block_size: int, window_blocks: int) -> Tensor:
    """Of one sequence, bool `[length, length]`."""
    window, pivot = patterns.three_region_masks(
        torch.arange(length)[None], length, pivots[None], block_size, window_blocks
    )
    return (window | pivot)[0]


def additive(mask: Tensor) -> Tensor:
    """As eager attention takes it: `[1, 1, S, S]`."""
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """To float32's rounding of the largest entry of each."""
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5 * max(float(right.detach().abs().max()), 0.1), rtol=0)
