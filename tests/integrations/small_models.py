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
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **SIZES}
DROPOUTS = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FULL = {"layer_types": ["full_attention"] * 2}


def small(kind: str, **more: Any) -> Any:
    """A causal language model, the same one every time; "Llama", "Qwen3", "GPT2", "Gemma2", "Gemma3"."""
    config, model = {
        "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "GPT2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "Gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "Gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[kind]
    sizes = {**GPT2, **DROPOUTS} if kind == "GPT2" else SIZES
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
