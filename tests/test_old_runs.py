"""What version 0.1 left on disk: its checkpoints load, and its runs go on as they would have there.

old_runs/0.1 was written by it: five steps of small GPTs on the pairs of test_train_run, and the losses of the next
five; seven steps of an image tokenizer.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_tokenizer_image import scenes
from test_tokenizer_image import training as image_training
from test_train_run import Pairs

from cogview.config import TrainConfig
from cogview.models import load_model
from cogview.parts.published import THREE, by_heads, published_names
from cogview.recipes import RECIPES
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.train_image import train_vqvae, trained_steps
from cogview.train import checkpoint
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask

OLD = Path(__file__).parent / "old_runs" / "0.1"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.mark.parametrize(("attention", "recipe"), [("three_region", "cogview"), ("dalle", "dalle")])
def test_a_model_is_what_it_was(attention, recipe):
    path = checkpoint.latest(OLD / attention)
    loaded, model = load_model(path)
    assert type(loaded) is RECIPES[recipe]
    assert loaded.config.hidden_size == 8
    raw, names = load_file(path), published_names(loaded.config.num_layers)
    for name, value in model.named_parameters():
        theirs = raw[f"model.{names[name]}"]
        theirs = by_heads(theirs, loaded.config.num_heads) if name.endswith(THREE) else theirs
        assert torch.equal(value, theirs)
    assert len(names) == sum(name.startswith("model.") for name in raw)


def _resumed(attention: str, recipe: str, folder: Path, **change) -> Trainer:
    shutil.copytree(OLD / attention, folder, dirs_exist_ok=True)
    dtype = {"three_region": "float32", "dalle": "float16"}[attention]
    config = dataclasses.replace(TrainConfig(steps=10, batch_size=4, dtype=dtype, hide_context=0.5), **change)
    _, header = checkpoint.read(checkpoint.latest(folder))
    chosen = RECIPES[recipe](RECIPES[recipe].Config(**header["config"]))
    trainer = Trainer(TokenTask(chosen, chosen.model(), Pairs(7), config), config, folder)
    assert trainer.resume()
    return trainer


def test_a_training_goes_on(tmp_path):
    """About as it would have: what is hidden of its context is drawn in another way now."""
    trainer = _resumed("three_region", "cogview", tmp_path)
    assert dataclasses.astuple(trainer.state)[:3] == (5, 2, 6)
    for expected in EXPECTED["three_region"]:
        found = trainer.step()
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert found["learning_rate"] == expected["learning_rate"]
    trainer.save()
    assert _resumed("three_region", "cogview", tmp_path).state.step == 10


def test_a_training_with_attention_dalle_goes_on(tmp_path):
    """Its tokens had other places in a batch, so that dropout and hidden context are others: about as well."""
    trainer = _resumed("dalle", "dalle", tmp_path)
    assert trainer.optimizer.loss_scale == 2.0**12
    for expected in EXPECTED["dalle"]:
        found = trainer.step()
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert found["learning_rate"] == expected["learning_rate"]


def test_a_training_of_an_image_tokenizer_goes_on(tmp_path):
    shutil.copytree(OLD / "vq", tmp_path, dirs_exist_ok=True)
    before = load_file(tmp_path / "vqvae.safetensors")
    assert trained_steps(tmp_path) == 7
    raw, model = load_file(tmp_path / "vqvae.training.safetensors"), VQVAE.load(tmp_path / "vqvae.safetensors")
    tensors, _ = checkpoint.read(tmp_path / "vqvae.training.safetensors")
    for number, (name, _) in enumerate(model.named_parameters()):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(tensors[f"optimizer.{key}.{name}"], raw[f"adam.{number}.{key}"])
    config = VQVAE.load(tmp_path / "vqvae.safetensors").config
    finished = train_vqvae(scenes(10), config, image_training(7), tmp_path)
    assert (finished.steps, finished.finished) == (7, True)
    again = load_file(tmp_path / "vqvae.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert train_vqvae(scenes(10), config, image_training(9), tmp_path).steps == 9
    assert trained_steps(tmp_path) == 9
