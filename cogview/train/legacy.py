"""Checkpoints of versions before, read as today's."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogview.parts.published import THREE, by_heads, published_names

Tensors = dict[str, Tensor]
Header = dict[str, Any]


def _gpt(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, Header]:
    """A GPT's: parameters by their published names, DALL-E's attention a field of the config."""
    config, state = json.loads(metadata["config"]), json.loads(metadata["state"])
    recipe = "dalle" if config.get("attention") == "dalle" else "cogview"
    if recipe == "dalle":
        for name in ("attention", "block_size", "window_blocks", "num_pivots"):
            config.pop(name)
    layers = min(config.get("num_layers", 0), len(tensors))  # of a damaged config, maybe, which is found out later
    own = {theirs: ours for ours, theirs in published_names(layers).items()}
    run = dict(state["run"])
    header = state | {"recipe": recipe, "config": config, "counts": {"truncated": run.pop("truncated")}, "run": run}
    return _by_heads({_renamed(name, own): value for name, value in tensors.items()}, header), header


def _renamed(name: str, own: dict[str, str]) -> str:
    """model.<parameter> and optimizer.<key>.<parameter> are renamed, others are not parameters."""
    *prefix, parameter = name.split(".", 1 if name.startswith("model.") else 2)
    return ".".join([*prefix, own.get(parameter, parameter)])


def _vqvae(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, Header]:
    """An image tokenizer's: Adam's state by number; an epoch left out what did not fill a batch."""
    settings, position = json.loads(metadata["settings"]), json.loads(metadata["position"])
    parameters = sorted((n for n in tensors if n.startswith(("model.enc_b.", "model.dec."))), key=_convolution)
    renamed = {name: value for name, value in tensors.items() if name.startswith("model.")}
    for number, parameter in enumerate(parameters):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            renamed[f"optimizer.{key}.{parameter.removeprefix('model.')}"] = tensors[f"adam.{number}.{key}"]
    seed, samples = settings["seed"], settings["images"]
    random = torch.Generator().manual_seed(seed).get_state()
    renamed["random.cpu"] = random
    size = min(settings["batch_size"], samples)
    epoch, place = divmod(position["step"], samples // size)
    run = {"step": position["step"], "elapsed": position["seconds"], "epoch": epoch, "samples_seen": place * size}
    header = {"recipe": "vqvae", "config": settings["config"], "data": samples, "seed": seed, "run": run, "counts": {}}
    return renamed, header


def _convolution(name: str) -> tuple[bool, int, bool]:
    """Order of the parameters: encoder, decoder; by layer; weight, bias."""
    _, part, _, layer, kind = name.split(".")
    return part == "dec", int(layer), kind == "bias"


def _run(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, Header]:
    """Of any recipe, or of an image tokenizer."""
    header = dict(json.loads(metadata["header"]))
    return _by_heads(tensors, header), header


def _by_heads(tensors: Tensors, header: Header) -> Tensors:
    """Rows of all queries, then keys, then values were those of each head."""
    rows = {name: value for name, value in tensors.items() if name.endswith(THREE) and value.ndim}
    return tensors | {name: by_heads(value, header["config"]["num_heads"]) for name, value in rows.items()}


READERS: dict[tuple[str | None, str | None], Callable[[Tensors, dict[str, str]], tuple[Tensors, Header]]] = {
    ("cogview-gpt", "1"): _gpt,
    ("cogview-vqvae-training-1", None): _vqvae,
    ("cogview-run", "2"): _run,
    ("cogview-run", "3"): _run,
}
