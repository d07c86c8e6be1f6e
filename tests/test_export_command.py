"""`cogview export`: one file of what one or several processes trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_command import tokens, train

from cogview import cli
from cogview.models import load_model
from cogview.recipes import named
from cogview.train import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokens(folder)
    train(folder)
    return folder


def test_a_model_is_one_file_that_says_what_it_is(run, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    cli.main(["export", str(run), "--out", str(out), "--dtype", "bfloat16"])
    assert f"{out}: of {run}, gpt, step 3" in capsys.readouterr().out.replace("\n", "")
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["model"])
    recipe = named(about["recipe"])
    model = recipe(recipe.Config(**about["config"])).model().to(torch.bfloat16)
    model.load_state_dict(load_file(out))
    _, expected = load_model(checkpoint.latest(run / "gpt"), dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        assert torch.equal(value, expected.get_parameter(name))


def test_a_whole_checkpoint_goes_on(run, tmp_path, capsys):
    tokens(tmp_path)
    cli.main(["export", str(run), "--out", str(tmp_path / "gpt"), "--all"])
    train(tmp_path, steps=4)
    assert "going on at step 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="out: expected a folder without this checkpoint"):
        cli.main(["export", str(run), "--out", str(tmp_path / "gpt"), "--all"])
    with pytest.raises(SystemExit, match="dtype: expected float32 with --all, got 'float16'"):
        cli.main(["export", str(run), "--out", str(tmp_path), "--all", "--dtype", "float16"])


def test_damaged_ones_are_passed_over(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run" / "gpt")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="no checkpoint can be read"):
        cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model.safetensors")])
    assert "it is passed over" in capsys.readouterr().out
    assert not (tmp_path / "model.safetensors").exists()
