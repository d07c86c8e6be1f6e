"""CogView's and CogView2's released files at reduced width, written from their description, and the published formulas
in plain torch.

Nothing here is of cogview: names, shapes and order of computation are those of the released code.
"""

import json
import math
import random
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CODES, HIDDEN, HEADS, LAYERS, POSITIONS, GRID = 20, 128, 2, 2, 31, 4
LAYER = {
    **{f"{norm}_layernorm.weight": [HIDDEN] for norm in ("input", "post_attention", "third", "fourth")},
    **{f"{norm}_layernorm.bias": [HIDDEN] for norm in ("input", "post_attention", "third", "fourth")},
    "attention.query_key_value.weight": [3 * HIDDEN, HIDDEN],
    "attention.query_key_value.bias": [3 * HIDDEN],
    "attention.dense.weight": [HIDDEN, HIDDEN],
    "attention.dense.bias": [HIDDEN],
    "mlp.dense_h_to_4h.weight": [4 * HIDDEN, HIDDEN],
    "mlp.dense_h_to_4h.bias": [4 * HIDDEN],
    "mlp.dense_4h_to_h.weight": [HIDDEN, 4 * HIDDEN],
    "mlp.dense_4h_to_h.bias": [HIDDEN],
}
Module = dict[str, Tensor]


def vocab_size(text: int, parts: int = 1) -> int:
    """Codes, text and 27 commands, padded as the released code does."""
    unit = 128 * parts
    return math.ceil((CODES + text + 27) / unit) * unit


def module(rows: int, seed: int = 0) -> Module:
    """A model's weights in float16; one token is an outlier, so that the norms' epsilon tells."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "word_embeddings.weight": [rows, HIDDEN],
        "transformer.position_embeddings.weight": [POSITIONS, HIDDEN],
        **{f"transformer.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()},
        "transformer.final_layernorm.weight": [HIDDEN],
        "transformer.final_layernorm.bias": [HIDDEN],
    }
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=g) * (0.3 if "layernorm" in name or "embeddings" in name else 0.08)
        made[name] = (value + ("layernorm.weight" in name)).half()
    made["word_embeddings.weight"][3] *= 300
    return made


def logits(m: Module, tokens: Tensor, dtype: torch.dtype, positions: Tensor | None = None) -> Tensor:
    """[B, S, V] of tokens [B, S], all computed in dtype. positions: of them, default 0 to S - 1."""
    w = {name: value.to(dtype) for name, value in m.items()}
    B, S = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        x = x / (x.abs().max() / 8)
        return F.layer_norm(x, (HIDDEN,), w[f"transformer.{name}.weight"], w[f"transformer.{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"transformer.{name}.weight"], w[f"transformer.{name}.bias"])

    def heads(x: Tensor) -> Tensor:
        return x.view(B, S, HEADS, HIDDEN // HEADS).permute(0, 2, 1, 3)

    mask = torch.ones(S, S, dtype=dtype).tril()
    places = torch.arange(S) if positions is None else positions
    h = w["word_embeddings.weight"][tokens] + w["transformer.position_embeddings.weight"][places]
    for i in range(LAYERS):
        at = f"layers.{i}"
        q, k, v = map(heads, linear(norm(h, f"{at}.input_layernorm"), f"{at}.attention.query_key_value").chunk(3, -1))
        scores = (q / math.sqrt(HIDDEN // HEADS)) @ k.transpose(-1, -2)
        weights = torch.softmax(scores * mask - 10000 * (1 - mask), dim=-1)
        attended = (weights @ v).permute(0, 2, 1, 3).reshape(B, S, HIDDEN)
        h = h + norm(linear(attended, f"{at}.attention.dense"), f"{at}.third_layernorm")
        x = linear(norm(h, f"{at}.post_attention_layernorm"), f"{at}.mlp.dense_h_to_4h")
        x = 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))
        h = h + norm(linear(x, f"{at}.mlp.dense_4h_to_h"), f"{at}.fourth_layernorm")
    return norm(h, "final_layernorm") @ w["word_embeddings.weight"].t()


def part(m: Module, rank: int, parts: int) -> Module:
    """What a rank of tensor parallelism has."""
    per_head = HIDDEN // HEADS
    mine = range(rank * HEADS // parts, (rank + 1) * HEADS // parts)
    q_rows = [head * per_head + i for head in mine for i in range(per_head)]
    made = {}
    for name, value in m.items():
        size = len(value) // parts
        if "query_key_value" in name:
            made[name] = value[[third * HIDDEN + row for third in range(3) for row in q_rows]]
        elif "word_embeddings" in name or "dense_h_to_4h" in name:
            made[name] = value[rank * size : (rank + 1) * size].clone()
        elif re.search(r"(attention(_plus)?\.dense(\.\d+)?|dense_4h_to_h)\.weight$", name):
            size = value.shape[1] // parts
            made[name] = value[:, rank * size : (rank + 1) * size].clone()
        else:
            made[name] = value.clone()
    return made


def trainer_state() -> dict:
    """What checkpoints have beside the weights, some of it of classes that are nowhere."""
    nowhere = types.ModuleType("cogview_trainer_that_is_nowhere")
    for name in ("Namespace", "LossScaler", "AnnealingLR"):
        setattr(nowhere, name, type(name, (), {"__module__": nowhere.__name__}))
    sys.modules[nowhere.__name__] = nowhere
    made = {name: getattr(nowhere, name)() for name in ("Namespace", "LossScaler", "AnnealingLR")}
    made["Namespace"].__dict__ = {"lr": 3e-4, "load": None, "betas": (0.9, 0.95), "scheduler": made["AnnealingLR"]}
    return {
        "iteration": 20,
        "args": made["Namespace"],
        "optimizer": {"loss_scaler": made["LossScaler"], "fp32_groups_flat": [torch.randn(7)], "overflow": False},
        "client_lr_scheduler": {
            "start_lr": 3e-4,
            "num_iters": 20.0,
            "decay_style": "cosine",
            "owner": made["AnnealingLR"],
        },
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        "csr_tensor_module_names": set(),
        "global_steps": np.int64(20),
    }


def write_model(folder: Path, m: Module, *, parts: int = 1, iteration: int = 20, zipped: bool = True) -> Path:
    """A released model's folder; the classes that its trainer had are gone afterwards."""
    (folder / str(iteration)).mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    state = trainer_state()
    for rank in range(parts):
        content = {"module": part(m, rank, parts), "mp_world_size": parts, **state}
        path = folder / str(iteration) / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    del sys.modules["cogview_trainer_that_is_nowhere"]
    return folder


def image_tokenizer(hidden: int = 12, dim: int = 8, codes: int = CODES) -> Module:
    g = torch.Generator().manual_seed(5)
    shapes = {
        "enc_b.blocks.0": [hidden, 3, 4, 4],
        "enc_b.blocks.2": [hidden, hidden, 4, 4],
        "enc_b.blocks.4": [hidden, hidden, 4, 4],
        "enc_b.blocks.6": [dim, hidden, 1, 1],
        "dec.blocks.0": [dim, hidden, 4, 4],  # transposed: from, to
        "dec.blocks.2": [hidden, hidden, 4, 4],
        "dec.blocks.4": [hidden, hidden, 4, 4],
        "dec.blocks.6": [3, hidden, 1, 1],
    }
    made = {}
    for name, shape in shapes.items():
        made[f"{name}.weight"] = torch.randn(shape, generator=g) * 0.2
        out = shape[1] if name in ("dec.blocks.0", "dec.blocks.2", "dec.blocks.4") else shape[0]
        made[f"{name}.bias"] = torch.randn(out, generator=g) * 0.2
    made["quantize_t.embed"] = torch.randn(dim, codes, generator=g)
    made["quantize_t.cluster_size"] = torch.rand(codes, generator=g)
    made["quantize_t.embed_avg"] = torch.randn(dim, codes, generator=g)
    return made


MEAN, STD = (
    torch.tensor(x).view(1, 3, 1, 1).double() for x in ([0.79093, 0.76271, 0.75340], [0.30379, 0.32279, 0.32800])
)


def codes_of(m: Module, images: Tensor) -> Tensor:
    """[B, h, w] of pictures [B, 3, H, W] in [0, 1], in float64."""
    w = {name: value.double() for name, value in m.items()}
    x = (images.double() - MEAN) / STD
    for i in (0, 2, 4):
        x = F.relu(F.conv2d(x, w[f"enc_b.blocks.{i}.weight"], w[f"enc_b.blocks.{i}.bias"], stride=2, padding=1))
    x = F.conv2d(x, w["enc_b.blocks.6.weight"], w["enc_b.blocks.6.bias"]).permute(0, 2, 3, 1)
    distance = (x[..., None] - w["quantize_t.embed"]).square().sum(-2)
    return distance.argmin(-1)


def pictures_of(m: Module, codes: Tensor) -> Tensor:
    """[B, 3, H, W] of codes [B, h, w], in float64."""
    w = {name: value.double() for name, value in m.items()}
    x = w["quantize_t.embed"].t()[codes].permute(0, 3, 1, 2)
    for i in (0, 2, 4):
        weight, bias = w[f"dec.blocks.{i}.weight"], w[f"dec.blocks.{i}.bias"]
        x = F.relu(F.conv_transpose2d(x, weight, bias, stride=2, padding=1))
    return F.conv2d(x, w["dec.blocks.6.weight"], w["dec.blocks.6.bias"]) * STD + MEAN


# CogView2: SwissArmyTransformer 0.2 (training/model_io.py, model/transformer.py) and CogView2's own models

EXTRA = "mixins.extra_position_embedding.position_embeddings.weight"
SAT_POSITIONS = 1024
Attend = Callable[[int, Tensor], Tensor]
"""What attention of a layer makes of its normalised input [B, S, C]."""


def sat_module(rows: int, *, fine: int = 0, projections: bool = False, seed: int = 0) -> Module:
    """Weights of coglm; of a super-resolution with so many fine cells, direct's with projections of their own."""
    made = module(rows, seed)
    g = torch.Generator().manual_seed(seed + 1)
    words = made.pop("word_embeddings.weight")
    words[3] /= 300  # norms are plain here
    made["transformer.word_embeddings.weight"] = words
    made["transformer.position_embeddings.weight"] = (torch.randn(SAT_POSITIONS, HIDDEN, generator=g) * 0.3).half()
    if fine:
        made[EXTRA] = (torch.randn(fine, HIDDEN, generator=g) * 0.3).half()
    for part in ("query_key_value", "dense") if projections else ():
        for i in range(LAYERS):
            for kind in ("weight", "bias"):
                shape = LAYER[f"attention.{part}.{kind}"]
                made[f"mixins.attention_plus.{part}.{i}.{kind}"] = (torch.randn(shape, generator=g) * 0.08).half()
    return made


def write_sat(folder: Path, m: Module, *, parts: int = 1, iteration: int = 300, tracker: str = "latest") -> Path:
    (folder / str(iteration)).mkdir(parents=True)
    (folder / tracker).write_text(str(iteration))
    (folder / "model_config.json").write_text(json.dumps({"num_attention_heads": HEADS, "layernorm_order": "sandwich"}))
    for rank in range(parts):
        content = {"module": part(m, rank, parts), "iteration": iteration, "torch_rng_state": torch.get_rng_state()}
        torch.save(content, folder / str(iteration) / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


class Sat:
    """The computation of such weights, all in one dtype."""

    def __init__(self, m: Module, dtype: torch.dtype):
        self.w = {name: value.to(dtype) for name, value in m.items()}
        self.dtype = dtype

    def linear(self, x: Tensor, name: str, layer: str = "") -> Tensor:
        return F.linear(x, self.w[f"{name}{layer}.weight"], self.w[f"{name}{layer}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (HIDDEN,), self.w[f"transformer.{name}.weight"], self.w[f"transformer.{name}.bias"])

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Positions from 1024 on are those of fine cells."""
        table = torch.cat(
            [self.w["transformer.position_embeddings.weight"], *(self.w[n] for n in (EXTRA,) if n in self.w)]
        )
        return self.w["transformer.word_embeddings.weight"][tokens] + table[positions]

    def logits(self, h: Tensor, attend: Attend) -> Tensor:
        """[B, S, V] of embeddings [B, S, C]; order of norms: sandwich."""
        for i in range(LAYERS):
            at = f"layers.{i}"
            h = h + self.norm(attend(i, self.norm(h, f"{at}.input_layernorm")), f"{at}.third_layernorm")
            x = self.linear(self.norm(h, f"{at}.post_attention_layernorm"), f"transformer.{at}.mlp.dense_h_to_4h")
            x = 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))
            h = h + self.norm(self.linear(x, f"transformer.{at}.mlp.dense_4h_to_h"), f"{at}.fourth_layernorm")
        return self.norm(h, "final_layernorm") @ self.w["transformer.word_embeddings.weight"].t()

    def heads(self, x: Tensor, name: str, layer: str = "") -> list[Tensor]:
        """Queries, divided by sqrt(D), keys, values, [B, H, S, D]."""
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.linear(x, name, layer).chunk(3, dim=-1)
        )
        return [q / math.sqrt(HIDDEN // HEADS), k, v]

    def base(self, i: int, x: Tensor) -> list[Tensor]:
        return self.heads(x, f"transformer.layers.{i}.attention.query_key_value")

    def dense(self, i: int, out: Tensor) -> Tensor:
        return self.linear(joined(out), f"transformer.layers.{i}.attention.dense")

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(self.dtype)
        return scores * mask - 10000 * (1 - mask)

    def coglm(self, tokens: Tensor, positions: Tensor, mask: Tensor, log_weights: float | Tensor = 0.0) -> Tensor:
        """mask, 1 or 0, and what is added to scores: [S, S]."""

        def attend(i: int, x: Tensor) -> Tensor:
            q, k, v = self.base(i, x)
            weights = self.masked(q @ k.mT + log_weights, mask).softmax(-1)
            return self.dense(i, weights @ v)

        return self.logits(self.embed(tokens, positions), attend)

    def direct(self, tokens: Tensor, positions: Tensor, mask: Tensor, text: int, coarse: int, fine: int) -> Tensor:
        """dsr_model.py: of text padded to so many tokens on the left, coarse cells and fine ones, of so many a side;
        mask of the first two kinds."""
        before = text + coarse**2

        def attend(i: int, x: Tensor) -> Tensor:
            q0, k0, v0 = self.base(i, x[:, :before])
            q1, k1, v1 = self.heads(x[:, before:], "mixins.attention_plus.query_key_value", f".{i}")
            out0 = self.masked(q0 @ k0.mT, mask).softmax(-1) @ v0
            around = Windows(9, 5, fine, fine)
            below = Windows(5, 5, coarse, fine)
            k0, v0 = k0[:, :, text:], v0[:, :, text:]
            weights = torch.cat([below.scores(q1, k0), around.scores(q1, k1)], dim=-1).softmax(-1)
            out1 = around.weighted(weights[..., 25:], v1) + below.weighted(weights[..., :25], v0)
            plus = self.linear(joined(out1), "mixins.attention_plus.dense", f".{i}")
            return torch.cat([self.dense(i, out0), plus], dim=1)

        return self.logits(self.embed(tokens, positions), attend)

    def iterative(self, tokens: Tensor, positions: Tensor, mask: Tensor, text: int, fine: int) -> Tensor:
        """itersr_model.py: of text padded to so many tokens on the left, of which mask [text] tells, and fine cells."""

        def attend(i: int, x: Tensor) -> Tensor:
            (q0, q1), (k0, k1), (v0, v1) = (each.tensor_split([text], dim=2) for each in self.base(i, x))
            out0 = self.masked(q0 @ k0.mT, mask).softmax(-1) @ v0
            around = Windows(9, 5, fine, fine)
            weights = torch.cat([self.masked(q1 @ k0.mT, mask), around.scores(q1, k1)], dim=-1).softmax(-1)
            out1 = around.weighted(weights[..., text:], v1) + weights[..., :text] @ v0
            return self.dense(i, torch.cat([out0, out1], dim=2))

        return self.logits(self.embed(tokens, positions), attend)


def joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


class Windows:
    """Image-Local-Attention's f_similar and f_weighting, not causal: of queries in a grid of `fine` cells a side, keys
    of `side` cells in a window around the one that each is on; -10000 outside of the grid."""

    def __init__(self, rows: int, columns: int, side: int, fine: int):
        on = torch.arange(fine) // (fine // side)
        y = on[:, None, None, None] + torch.arange(rows)[:, None] - rows // 2
        x = on[:, None, None] + torch.arange(columns) - columns // 2
        inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
        self.inside = inside.reshape(fine**2, rows * columns)
        self.places = (y.clamp(0, side - 1) * side + x.clamp(0, side - 1)).reshape(self.inside.shape)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, queries, keys of a window]"""
        found = (q[..., None, :] * k[:, :, self.places]).sum(-1)
        return found.where(self.inside, -10000)

    def weighted(self, weights: Tensor, v: Tensor) -> Tensor:
        return (weights[..., None] * v[:, :, self.places] * self.inside[..., None]).sum(-2)
