"""`cogview train --from`: which model a training begins with, and that it begins with that."""

import json
import shutil

import pytest
import torch
from test_train_command import header, tokens, train

from cogview import runs
from cogview.models import load_model
from cogview.recipes import RECIPES, preset
from cogview.train import checkpoint
from cogview.train.finetune import start_from


def test_finetuning(tmp_path, capsys):
    """From a run's best weights, with longer captions, to a model of its own."""
    source, run = tmp_path / "source", tmp_path / "run"
    tokens(source)
    train(source, "--attention", "dense", "--dropout", "0", steps=6)
    best = checkpoint.best(source / "gpt")
    tokens(run, count=30, seed=5, length=20)
    more = ["--batch-size", "2", "--dtype", "float32"]
    train(run, "--from", str(source), small=more)
    said = capsys.readouterr().out
    assert f"beginning with the weights of {best}" in said
    begun = header(run)
    assert begun["from"] == {"folder": str(source / "gpt"), "step": checkpoint.step_of(best)}
    assert json.loads((run / "gpt" / "config.json").read_text())["from"] == begun["from"]
    assert begun["run"]["step"] == 3
    old, new = header(source)["config"], begun["config"]
    assert new["max_positions"] - 20 == 16 + 4 + 4  # text, image, commands, room
    assert new["num_pivots"] >= old["num_pivots"]
    assert new["dropout"] == 0.2  # of the data it is trained on
    assert {k: v for k, v in new.items() if k not in ("max_positions", "num_pivots", "dropout")} == {
        k: v for k, v in old.items() if k not in ("max_positions", "num_pivots", "dropout")
    }
    train(run, "--from", str(source), small=more, steps=4)  # the same command goes on
    assert "going on at step 3" in capsys.readouterr().out
    shutil.rmtree(source)
    train(run, "--from", str(source / "gpt"), small=more, steps=5)
    with pytest.raises(SystemExit, match=r"from: expected nothing, since .* holds a run that began with those of"):
        train(run, "--from", str(tmp_path / "other"), small=more, steps=6)
    train(run, "--from", str(run), "--name", "second", small=[*more, "--dropout", "0.3"])
    assert header(run, "second")["from"]["folder"] == str(run / "gpt")
    assert header(run, "second")["config"] == header(run)["config"] | {"dropout": 0.3}
    train(run, "--from", str(run / "second"), "--name", "third", small=more, steps=1)


def test_captioning_begins_with_a_model_that_draws(tmp_path, capsys):
    tokens(tmp_path)
    train(tmp_path, "--attention", "dense", steps=2)
    begin = ["--recipe", "caption", "--from", str(tmp_path), "--name", "caption"]
    small = ["--batch-size", "2", "--dtype", "float32"]
    train(tmp_path, *begin, small=small, steps=1)
    made, source = header(tmp_path, "caption"), header(tmp_path)
    assert (made["recipe"], made["from"]["folder"]) == ("caption", str(tmp_path / "gpt"))
    assert made["config"] == source["config"] | {"stop": True, "dropout": 0.2}
    settings = json.loads((tmp_path / "caption" / "config.json").read_text())["training"]
    assert (settings["text_weight"], settings["image_weight"]) == (1.0, 0.0)
    assert "held-out stop_loss" in capsys.readouterr().out
    train(tmp_path, *begin, small=small, steps=2)  # the same command goes on
    train(tmp_path, "--name", "caption", small=small, steps=3)
    assert header(tmp_path, "caption")["run"]["step"] == 3
    for more in (
        ["--from", str(tmp_path / "caption"), "--recipe", "cogview", "--name", "again"],
        ["--recipe", "cogview", "--name", "caption"],
    ):
        with pytest.raises(SystemExit, match=r"recipe: expected '(caption|cogview)'.*, got '(caption|cogview)'"):
            train(tmp_path, *more, small=[])
    train(tmp_path, "--recipe", "dalle", "--name", "dalle", "--bpe-dropout", "0", steps=1)
    with pytest.raises(SystemExit, match=r"recipe: expected 'dalle', as in .*, got 'caption'"):
        train(tmp_path, "--recipe", "caption", "--from", str(tmp_path / "dalle"), "--name", "other", small=[])


def test_what_cannot_be_finetuned(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    tokens(source)
    train(source, "--attention", "dense")
    tokens(run, seed=1)
    for more, said in (
        (["--layers", "2"], "layers: expected 1, as in .*, got 2"),
        (["--attention", "three_region"], "attention: expected 'dense', as in .*, got 'three_region'"),
        (["--recipe", "dalle"], "recipe: expected 'cogview', as in .*, got 'dalle'"),
        (["--preset", "cogview-large"], "layers: expected 1, as in .*, got 72"),
        (["--from", str(tmp_path)], "holds no model"),
        (["--from", str(tmp_path / "none")], "none is no folder"),
        (["--from", str(source / "tokens")], "holds no model"),
    ):
        with pytest.raises(SystemExit, match=said):
            train(run, "--from", str(source), *more, small=[])
    for other, said in (
        (
            {"image_sha256": "3" * 64},
            f"by another image tokenizer than those that .* tokenize with --from {source} first",
        ),
        ({"text_sha256": "3" * 64}, "by another text tokenizer than those that"),
        (
            {"grid": 3},
            "the pictures are 3 x 3 tokens, those that .* was trained on 4 x 4: tokenize with --image-size 32",
        ),
    ):
        tokens(run, **other)
        with pytest.raises(SystemExit, match=said):
            train(run, "--from", str(source), small=[])
    assert not (run / "gpt").exists()
    tokens(run)
    (run / "gpt").mkdir()
    (run / "gpt" / "log.jsonl").touch()  # begun, and nothing saved yet
    with pytest.raises(SystemExit, match="from: expected another model than"):
        train(run, "--from", str(run), small=[])


def test_a_source_is_a_run_or_one_of_its_models(tmp_path):
    tokens(tmp_path)
    for name in ("one", "two"):
        train(tmp_path, "--name", name, steps=1)
    with pytest.raises(ValueError, match=r"holds several models: name one of .*one, .*two"):
        runs.model_of(tmp_path)
    assert runs.model_of(tmp_path / "two") == tmp_path / "two"
    train(tmp_path, steps=1)
    assert runs.model_of(tmp_path) == tmp_path / "gpt"


@pytest.mark.parametrize("positions", ["fixed", "following"])
@pytest.mark.parametrize(("name", "attention"), [("cogview", "dense"), ("cogview", "dense_pb_relax"), ("dalle", None)])
@pytest.mark.parametrize("longer", [0, 6])
def test_finetuned_logits_are_the_sources_before_the_first_step(tmp_path, name, attention, positions, longer):
    """Also of a table that has grown, for captions that fit both."""
    recipe = RECIPES[name]
    shape = {"num_layers": 3, "hidden_size": 32, "num_heads": 2, "image_positions": positions, "dropout": 0.0}
    config = recipe.Config(
        **shape, **({"attention": attention} if attention else {}), image_grid=4, max_positions=25, image_vocab=20
    )
    torch.manual_seed(0)
    source, path = recipe(config).model(), checkpoint.path_of(tmp_path, 7)
    head = {"recipe": name, "config": {f: getattr(config, f) for f in config.__dataclass_fields__}}
    checkpoint.save(path, {f"model.{n}": p for n, p in source.state_dict().items()}, head)
    sizes = {"image_vocab": 20, "text_vocab": config.text_vocab, "image_grid": 4, "max_text": 5 + longer}
    grown = recipe(recipe.fit(config, **sizes))
    model = grown.model().eval()
    fresh = model.embedding.positions.weight.detach().clone()
    start_from(path, recipe(config), grown, model)
    text = torch.tensor([[3, 4, 5, 6, 7], [8, 9, -1, -1, -1]])
    codes = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    kept = {}
    for r, m in ((recipe(config), load_model(path)[1]), (grown, model)):
        batch = r.batch(text, codes)
        nll = m(batch.inputs, batch.context, targets=batch.targets)
        kept[r] = nll[batch.weights > 0]
        assert len(kept[r]) > 2 * 16
    torch.testing.assert_close(*kept.values(), atol=2e-5, rtol=2e-5)
    new = (model.embedding.positions.weight == fresh).all(dim=1).nonzero().flatten().tolist()
    first = config.max_text + 2 if positions == "fixed" else config.max_positions
    assert new == list(range(first, first + longer))


def test_a_checkpoint_that_is_no_model_is_no_beginning(tmp_path):
    recipe = RECIPES["cogview"](preset("tiny")[0])
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.save(path, {"model.a": torch.zeros(1)}, {"recipe": "cogview", "config": {}})
    with pytest.raises(ValueError, match=r"does not fit the model: model\.a: expected absent"):
        start_from(path, recipe, recipe, recipe.model())


def test_what_a_source_may_be(tmp_path, monkeypatch):
    """A path relative to any folder, also when the run goes on from another one; the best is damaged: the newest."""
    source, run = tmp_path / "source", tmp_path / "run"
    tokens(source)
    train(source, steps=2)
    tokens(run)
    monkeypatch.chdir(source / "gpt")
    train(run, "--from", ".", small=["--batch-size", "4", "--dtype", "float32"], steps=1)
    monkeypatch.chdir("/")
    train(run, "--from", str(source), small=["--batch-size", "4", "--dtype", "float32"], steps=2)
    assert header(run)["from"] == {"folder": str((source / "gpt").resolve()), "step": 2}
    (source / "vqvae").mkdir()
    (source / "vqvae" / "log.jsonl").touch()
    for wrong in (source / "vqvae", checkpoint.latest(source / "gpt"), tmp_path / "nothing"):
        with pytest.raises(SystemExit, match=r"holds no model|is no folder of a run or of a model"):
            train(run, "--from", str(wrong), "--name", "other")


def test_a_damaged_best_is_passed_over_by_a_finetuning(tmp_path, capsys):
    source, run = tmp_path / "source", tmp_path / "run"
    tokens(source)
    train(source, "--keep", "3", "--save-every", "1", "--validate-every", "1", "--learning-rate", "1e-9", steps=3)
    best = checkpoint.best(source / "gpt")
    best.write_bytes(best.read_bytes()[:-9])
    tokens(run)
    train(run, "--from", str(source), small=["--batch-size", "4", "--dtype", "float32"], steps=1)
    said = capsys.readouterr().out
    assert f"{best} is not a readable checkpoint" in said
    other = next(path for path in reversed(checkpoint.paths(source / "gpt")) if path != best)
    assert f"{other.name} is taken" in said
    assert header(run)["from"]["step"] == checkpoint.step_of(other)
