"""Published codecs where their packages are not installed."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from cogview.tokenizers import codec_folder
from cogview.tokenizers.load import load_image_tokenizer

CONFIG = {"kind": "VQModel", "codebook_size": 9, "downsample": 2, "mean": [0.5] * 3, "std": [0.5] * 3, "settings": {}}


@pytest.mark.parametrize(
    ("config", "package"),
    [
        ({"model_type": "janus_vqgan"}, "transformers"),
        ({"model_type": "emu3", "vq_config": {}}, "transformers"),
        ({"_class_name": "VQModel"}, "diffusers"),
    ],
)
def test_a_missing_package_is_named(config, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"needs the package {package}, .*: `pip install -U {package}`$"):
        codec_folder.read(tmp_path)


def test_a_run_names_it_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    path = tmp_path / "vqvae.safetensors"
    metadata = {"format": "cogview-codec-1", "config": json.dumps(CONFIG)}
    save_file({"model.quantize.embedding.weight": torch.zeros(9, 3)}, path, metadata)
    with pytest.raises(ValueError, match="codec: VQModel needs the package diffusers"):
        load_image_tokenizer(path)


def test_a_folder_of_another_model(tmp_path):
    for config, name in (
        ({"model_type": "bert"}, "'bert'"),
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL'"),
        ({}, "None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"codec: expected a folder of JanusVQVAE, .*, got one of {name}, "):
            codec_folder.read(tmp_path)
