"""Small models of the families that have norm steps, what `fuse_norms` finds in them, and their truth in float64."""

from collections import Counter
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogview_ops.integrations.transformers.norms import FusedNorms

VOCABULARY, TOKENS = 97, 12
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
GLM_V = {**TEXT, "rope_parameters": SECTIONS}
EXPERTS = {**TEXT, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PICTURES = {"image_size": 16, "num_channels": 3, "embed_dim": 24, "depths": [2], "num_heads": [2]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT_OF_GPT2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 80}


class Family(NamedTuple):
    kind: str  # transformers' model_type
    both: int  # steps
    pre: int
    post: int
    norms: int  # in no step
    options: dict[str, Any] = TEXT


ASKED_FOR = {
    "Gemma 2": Family("gemma2", 2, 0, 2, 3),
    "Gemma 3": Family("gemma3_text", 2, 0, 2, 7),
    "GLM-4": Family("glm4", 2, 0, 2, 3),
    "GLM-Image": Family("glm_image_text", 2, 0, 2, 3, {**GLM_V, "vision_vocab_size": VOCABULARY}),
    "OLMo 2": Family("olmo2", 0, 0, 4, 5),
    "Llama": Family("llama", 0, 2, 0, 3),
    "Qwen 3": Family("qwen3", 0, 2, 0, 7),
    "GPT-2": Family(
        "gpt2", 0, 2, 0, 3, {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97} | NO_DROPOUT_OF_GPT2
    ),
    "Swin v2": Family("swinv2", 0, 0, 4, 2, {**PICTURES, "patch_size": 2, "window_size": 4, "drop_path_rate": 0.0}),
}
OTHERS = {
    "Gemma 4": Family(
        "gemma4_text", 2, 0, 4, 10, {**TEXT, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    ),
    "Gemma 4 unified": Family("gemma4_unified_text", 2, 0, 2, 9),
    "Gemma 3n": Family(
        "gemma3n_text",
        0,
        0,
        6,
        16,
        {
            **TEXT,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "laurel_rank": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "EmbeddingGemma 2": Family("embedding_gemma2_text", 2, 0, 4, 10),
    "T5Gemma": Family("t5gemma", 6, 0, 4, 6, {"encoder": TEXT, "decoder": TEXT, "dropout_rate": 0.0}),
    "GLM-4V": Family("glm4v_text", 2, 0, 2, 3, GLM_V),
    "GLM-OCR": Family("glm_ocr_text", 2, 0, 2, 3, GLM_V),
    "Kolibri 1": Family("kolibri1", 2, 0, 2, 7),
    "LFM 3": Family("lfm3", 2, 0, 2, 5, {**TEXT, "layer_types": ["conv", "full_attention"]}),
    "HyperCLOVA X": Family("hyperclovax", 2, 0, 2, 3, {**TEXT, "use_post_norm": True, "residual_multiplier": 0.5}),
    "HyperCLOVA X, no post-norm": Family("hyperclovax", 0, 2, 0, 3, {**TEXT, "use_post_norm": False}),
    "AFMoE": Family("afmoe", 2, 0, 2, 7, {**EXPERTS, "num_dense_layers": 1}),
    "Muse Glimmer": Family("muse_glimmer_text", 0, 0, 4, 8),  # its two norms have two eps
    "OLMo 3": Family("olmo3", 0, 0, 4, 5),
    "FlexOlmo": Family("flex_olmo", 0, 0, 4, 5, EXPERTS),
    "OLMo hybrid": Family("olmo_hybrid", 0, 1, 2, 4),
    "EXAONE 4": Family("exaone4", 0, 0, 4, 5),
    "Molmo 2": Family("molmo2_text", 0, 2, 0, 7),
    "Molmo 2, norms after": Family("molmo2_text", 0, 0, 4, 5, {**TEXT, "norm_after": True}),
    "Swin2SR": Family("swin2sr", 0, 0, 4, 2, {**PICTURES, "patch_size": 1, "window_size": 4, "drop_path_rate": 0.0}),
    "Mistral": Family("mistral", 0, 2, 0, 3),
    "Qwen 2": Family("qwen2", 0, 2, 0, 3),
    "Mixtral": Family("mixtral", 0, 2, 0, 3, EXPERTS),
    "Phi 3": Family("phi3", 0, 2, 0, 3),
    "Granite": Family("granite", 0, 2, 0, 3),
    "GPT-NeoX": Family("gpt_neox", 0, 2, 0, 3, {**TEXT, "use_parallel_residual": False}),
    "ModernBERT": Family("modernbert", 0, 2, 0, 3),
    "BERT": Family("bert", 0, 5, 0, 0, {**TEXT, **NO_DROPOUT}),
    "BART": Family(
        "bart", 0, 9, 0, 0, {**TEXT, **BART, "decoder_attention_heads": 4, "decoder_ffn_dim": 80, "dropout": 0.0}
    ),
    "ViT": Family("vit", 0, 2, 0, 3, {**TEXT, **NO_DROPOUT, "image_size": 16, "patch_size": 4}),
    "DINOv2": Family("dinov2", 0, 2, 0, 3, {**TEXT, "image_size": 16, "patch_size": 4, "mlp_ratio": 2}),
    "CLIP": Family("clip_vision_model", 0, 2, 0, 4, {**TEXT, "image_size": 16, "patch_size": 4}),
}
FAMILIES = {**ASKED_FOR, **OTHERS}


def model_of(family: Family, seed: int = 0, **options: Any) -> Any:
    """With random weights, norms' too, in evaluation; without a head but the last norm."""
    config = transformers.AutoConfig.for_model(family.kind, **{**family.options, **options})
    model = transformers.AutoModel.from_config(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model.eval()


def inputs_of(model: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw).to(model.dtype)}
    tokens = {"input_ids": torch.randint(1, VOCABULARY, (2, TOKENS), generator=draw)}
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = tokens["input_ids"].flip(1)
    return {**tokens, "use_cache": False}


def results(model: Any) -> dict[str, Tensor]:
    """The last hidden states, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**inputs_of(model)).last_hidden_state
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * toward.to(out.dtype)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"last_hidden_state": out.detach(), **grads}


class AllInDouble(TorchFunctionMode):
    """What a model does in float32 on purpose, in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def counts(report: FusedNorms) -> tuple[int, int, int, int]:
    kinds = Counter(step.norms for step in report.steps)
    return kinds["both"], kinds["pre"], kinds["post"], len(report.norms)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]
