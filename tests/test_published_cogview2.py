"""CogView2's released weights as runs and back: layout, stages, what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released
import test_icetk
import torch
from test_published_weights import same

from cogview import cli, lopar
from cogview.bilingual import BilingualVocabulary
from cogview.models import load_model
from cogview.parts.transformer import Transformer
from cogview.published import families
from cogview.recipes import preset
from cogview.system import System
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

CAPTIONS = ["a fox above a tree", "a red car", "两只鸟", "蓝色的房子", "一只红色的狐狸"]
COARSE, FINE, CELLS = 4, 12, 6  # of a side; the last of coglm alone
ROWS = 512  # positions before [SOI]'s
GRIDS = {"coglm": CELLS, "direct": COARSE, "iterative": COARSE}
FOLDERS = {"coglm": "coglm", "direct": "cogview2-dsr", "iterative": "cogview2-itersr"}
STAGES = pytest.mark.parametrize("recipe", GRIDS)


@pytest.fixture(scope="module", name="files")  # named, so that other modules can import and use them
def released_files(tmp_path_factory) -> Path:
    """Released tokenizers, and a model of each stage."""
    folder = tmp_path_factory.mktemp("released")
    TextTokenizer.train([*CAPTIONS, "two birds on a house"], 380, bilingual=True).save(folder / "ice_text.model")
    torch.save(released.image_tokenizer(), folder / "vqvae.pt")
    for recipe, name in FOLDERS.items():
        released.write_sat(folder / name, weights(folder, recipe))
    return folder


def vocabulary(files: Path) -> BilingualVocabulary:
    text = TextTokenizer.load(files / "ice_text.model")
    assert text.chinese_from is not None
    return BilingualVocabulary(released.CODES, text.vocab_size, text.chinese_from)


def weights(files: Path, recipe: str, rows: int | None = None) -> released.Module:
    rows = vocabulary(files).size if rows is None else rows
    fine = 0 if recipe == "coglm" else FINE**2
    return released.sat_module(rows, fine=fine, projections=recipe == "direct")


def take(files: Path, run: Path, recipe: str, *more: object, source: Path | None = None) -> None:
    given = ["--vqvae", files / "vqvae.pt", "--text", files / "ice_text.model", "--image-grid", GRIDS[recipe]]
    source = files / FOLDERS[recipe] if source is None else source
    cli.main(list(map(str, ["import-weights", source, "--run", run, *given, *more])))


@pytest.fixture(scope="module", name="run")
def imported_run(files, tmp_path_factory) -> Path:
    """Models of all stages in one run, what each is found by its folder's name."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    for recipe in GRIDS:
        take(files, folder, recipe)
    return folder


def imported(run: Path, recipe: str) -> tuple[Any, Transformer]:
    return load_model(checkpoint.latest(run / recipe))


@STAGES
def test_a_run_as_any_other(files, run, recipe):
    made, model = imported(run, recipe)
    c = made.config
    assert made.name == recipe
    assert (c.num_layers, c.hidden_size, c.num_heads, c.image_grid, c.text_rows) == (2, 128, 2, GRIDS[recipe], ROWS)
    assert (c.relax, c.chinese_from) == (None, vocabulary(files).chinese_from)
    header = checkpoint.read_header(checkpoint.latest(run / recipe))
    assert header["published"] == {"folder": str((files / FOLDERS[recipe]).resolve()), "iteration": 300}
    assert header["preset"] == "coglm-6b"
    module, found = weights(files, recipe), model.state_dict()
    table = [module["transformer.position_embeddings.weight"]]
    if recipe == "coglm":
        assert not c.stop
    else:
        table.append(module[released.EXTRA])
        assert (c.fine_grid, c.base_positions, c.kernel_size) == (FINE, 1024, (9, 5))
    assert getattr(c, "coarse_kernel_size", (5, 5)) == (5, 5)
    assert getattr(c, "text_slots", 16) == 16
    assert torch.equal(found["embedding.positions.weight"], torch.cat(table).float())
    assert torch.equal(found["embedding.words.weight"], module["transformer.word_embeddings.weight"].float())
    for i in range(2):
        at, theirs = f"stack.layers.{i}.", f"transformer.layers.{i}."
        norms = {"post_norm": "third_layernorm", "mlp_norm": "post_attention_layernorm"}
        norms |= {"mlp_post_norm": "fourth_layernorm"}
        for ours, name in norms.items():
            assert torch.equal(found[f"{at}{ours}.bias"], module[f"{theirs}{name}.bias"].float())
        if recipe == "direct":
            dense = module[f"mixins.attention_plus.dense.{i}.weight"]
            assert torch.equal(found[f"{at}attention.fine_dense.weight"], dense.float())
            three = module[f"mixins.attention_plus.query_key_value.{i}.weight"].view(3, 2, 64, 128)
            ours = found[f"{at}attention.fine_query_key_value.weight"].view(2, 3, 64, 128)
            assert torch.equal(ours, three.transpose(0, 1).float())
    tensors, _ = checkpoint.read(checkpoint.latest(run / recipe))
    assert {value.dtype for value in tensors.values()} == {torch.float16}


@STAGES
@pytest.mark.parametrize("parts", [1, 2])
def test_there_and_back(files, tmp_path, capsys, recipe, parts):
    text, rows = vocabulary(files), -(-vocabulary(files).size // (128 * parts)) * 128 * parts
    module = weights(files, recipe, rows)
    module["transformer.word_embeddings.weight"][text.size :] = 0
    source = released.write_sat(tmp_path / FOLDERS[recipe], module, parts=parts)
    take(files, tmp_path / "run", recipe, source=source)
    out = tmp_path / "out"
    cli.main(["export-weights", str(tmp_path / "run"), "--name", recipe, "--out", str(out), "--parts", str(parts)])
    told = capsys.readouterr().out.replace("\n", " ")
    assert "not written: the image tokenizer" in told
    assert f"image codes 20,000 (here 20), image grid 20 x 20 (here {GRIDS[recipe]} x {GRIDS[recipe]})" in told
    assert sorted(p.name for p in out.iterdir()) == ["300", "ice_text.model", "latest", "model_config.json"]
    assert (out / "latest").read_text() == "300"
    for rank in range(parts):
        path = Path("300", f"mp_rank_{rank:02d}_model_states.pt")
        same(torch.load(out / path)["module"], torch.load(source / path, weights_only=False)["module"])
    said = json.loads((out / "model_config.json").read_text())
    assert (said["vocab_size"], said["num_attention_heads"], said["model_parallel_size"]) == (rows, 2, parts)
    assert (said["max_sequence_length"], said["layernorm_order"]) == (1024, "sandwich")
    take(files, tmp_path / "again", recipe, "--recipe", recipe, "--name", recipe, source=out)
    one, other = (checkpoint.read(checkpoint.latest(tmp_path / folder / recipe)) for folder in ("run", "again"))
    assert one[1]["config"] == other[1]["config"]
    same(one[0], other[0])


@pytest.mark.parametrize("rows", [403, 406, 512, 700])
def test_a_table_of_any_padding(files, tmp_path, capsys, rows):
    """Of ids' rows all are there, of others those that there are."""
    assert vocabulary(files)["SOC"] == 402
    module = weights(files, "coglm", rows)
    source = released.write_sat(tmp_path / "coglm", module)
    take(files, tmp_path / "run", "coglm", source=source)
    said = capsys.readouterr().out.replace("\n", " ")
    assert ("left out: 188 rows that pad the token table" in said) == (rows == 700)
    assert (f"added: {512 - rows} rows of zeros that pad the token table" in said) == (rows < 512)
    found = imported(tmp_path / "run", "coglm")[1].embedding.words.weight
    table = module["transformer.word_embeddings.weight"].float()
    assert torch.equal(found[:rows], table[:512])
    assert not found[rows:].any()


# what is found, and refused


def refused(files: Path, run: Path, said: str, recipe: str, *more: object, source: Path | None = None) -> None:
    with pytest.raises(SystemExit, match=said):
        take(files, run, recipe, *more, source=source)
    assert not run.exists()


@pytest.mark.parametrize("given", GRIDS)
@pytest.mark.parametrize("asked", GRIDS)
def test_weights_of_another_stage(files, tmp_path, asked, given):
    if asked != given:
        said = f"recipe: expected {given}, since .*300 has tensors as {FOLDERS[given]} does, got '{asked}', "
        said += f"whose are those of {FOLDERS[asked]}$"
        refused(files, tmp_path / "run", said, asked, "--recipe", asked, source=files / FOLDERS[given])


def test_weights_of_cogview_and_of_cogview2(files, tmp_path):
    sizes = files / "ice_text.model", vocabulary(files)
    source = released.write_model(tmp_path / "model", released.module(released.vocab_size(sizes[1].text_size)))
    said = "recipe: expected cogview, caption or superresolution, since .* has tensors as cogview-base, cogview-caption"
    refused(files, tmp_path / "run", said, "coglm", "--recipe", "coglm", source=source)
    said = "recipe: expected coglm, since .* has tensors as coglm does, got 'cogview', whose are those of cogview-base"
    refused(files, tmp_path / "run", said, "coglm", "--recipe", "cogview")


def test_what_does_not_fit(files, tmp_path):
    run = tmp_path / "run"
    TextTokenizer.train(CAPTIONS, 380).save(tmp_path / "plain.model")
    plain = "one in the order of CogView2's vocabulary, icetk's ice_text.model, got 'another of"
    refused(files, run, f"text: expected {plain}", "coglm", "--text", tmp_path / "plain.model")
    said = "heads: expected a divisor of the width 128 and a multiple of 1 parts, got 3"
    refused(files, run, said, "direct", "--heads", 3)
    refused(files, run, "fine_grid: expected a multiple of image_grid", "direct", "--image-grid", 5)
    torch.save(released.image_tokenizer(codes=300), tmp_path / "many.pt")
    said = "word_embeddings.weight: expected at least 683 rows for 300 image codes, 380 text pieces and 3 commands"
    refused(files, run, said, "iterative", "--vqvae", tmp_path / "many.pt")


def without(name: str) -> Callable[[released.Module], object]:
    return lambda m: m.pop(name)


@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("direct", without(released.EXTRA), "extra_position_embedding.position_embeddings.weight is missing"),
        ("direct", without("mixins.attention_plus.dense.1.bias"), r"dense\.1\.bias: expected \[128\], got absent"),
        ("iterative", lambda m: m.update({released.EXTRA: torch.ones(143, 128)}), "the cells of a square, got 143"),
        ("coglm", without("transformer.position_embeddings.weight"), "position_embeddings.weight is missing"),
        ("coglm", without("transformer.layers.0.third_layernorm.bias"), "third_layernorm.bias: expected"),
        ("coglm", lambda m: m.update({"mixins.other.weight": torch.ones(1)}), "other.weight: expected absent"),
    ],
)
def test_models_that_are_not_whole(files, tmp_path, recipe, change, said):
    module = weights(files, recipe)
    change(module)
    source = released.write_sat(tmp_path / FOLDERS[recipe], module)
    refused(files, tmp_path / "run", said, recipe, source=source)


def test_trackers(files, tmp_path):
    module = weights(files, "coglm")
    older = released.write_sat(tmp_path / "coglm", module, tracker="latest_checkpointed_iteration.txt")
    take(files, tmp_path / "run", "coglm", source=older)
    alone = tmp_path / "model" / "coglm"
    shutil.copytree(older / "300", alone)
    take(files, tmp_path / "run", "coglm", "--name", "other", source=alone)
    one, other = (checkpoint.read(checkpoint.latest(tmp_path / "run" / name))[0] for name in ("coglm", "other"))
    same(one, other)
    (older / "300").rename(older / "release")
    (older / "latest_checkpointed_iteration.txt").write_text("release\n")
    take(files, tmp_path / "run", "coglm", "--name", "third", source=older)
    (older / "latest_checkpointed_iteration.txt").write_text("../300")
    refused(files, tmp_path / "none", r"expected the number of an iteration, got '\.\./300'", "coglm", source=older)
    (tmp_path / "coglm.zip").touch()
    refused(files, tmp_path / "none", r"unpack it first \(unzip\)", "coglm", source=tmp_path / "coglm.zip")


@pytest.mark.parametrize(
    ("said", "heads"),
    [(b'{"num_attention_heads": 4}', 4), (b"{}", 2), (b"[]", None), (b"{", None), (b"\xff", None)],
)
def test_sizes_that_are_said(files, tmp_path, said, heads):
    source = shutil.copytree(files / "coglm", tmp_path / "coglm")
    (source / "model_config.json").write_bytes(said)
    if heads is None:
        refused(files, tmp_path / "run", "model_config.json: expected sizes by name", "coglm", source=source)
    else:
        take(files, tmp_path / "run", "coglm", source=source)
        assert imported(tmp_path / "run", "coglm")[0].config.num_heads == heads
        (source / "model_config.json").write_text('{"num_attention_heads": "2"}')
        refused(
            files, tmp_path / "none", "num_attention_heads: expected a whole number, got '2'", "coglm", source=source
        )


def test_what_cannot_be_exported(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name, change, said in (
        ("coglm", {"text_rows": 511}, "text_rows: expected 512, as in CogView2's code, got 511"),
        ("direct", {"coarse_kernel_size": [3, 3]}, r"coarse_kernel_size: expected \(5, 5\), as in CogView2's code"),
        ("iterative", {"kernel_size": [9, 9]}, r"kernel_size: expected \(9, 5\), as in CogView2's code, got \(9, 9\)"),
        ("iterative", {"text_slots": 15}, "text_slots: expected 16, as in CogView2's code, got 15"),
    ):
        path = checkpoint.latest(folder / name)
        stored, header = checkpoint.read(path)
        checkpoint.save(path, stored, header | {"config": header["config"] | change})
        with pytest.raises(SystemExit, match=said):
            cli.main(["export-weights", str(folder), "--name", name, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
        checkpoint.save(path, stored, header)


RELEASED_SIZES = {"image_vocab": 20_000, "image_grid": 20, "chinese_from": 63_823, "max_caption": 111}
FINE_SIZES = {"fine_grid": 60, "max_positions": 1024 + 3600}
OTHERS = {
    "coglm": "",
    "direct": ", fine grid 60 x 60 (here 12 x 12), layout [96, 496, 4096] (here [96, 112, 256])",
    "iterative": ", fine grid 60 x 60 (here 12 x 12), layout [16, 3616] (here [16, 160])",
}


def released_config(run: Path, recipe: str) -> Any:
    """A small model's with what the released scripts have as numbers."""
    config = imported(run, recipe)[0].config
    own = {"max_positions": 1024} if recipe == "coglm" else FINE_SIZES
    return dataclasses.replace(config, text_vocab=130_000, **RELEASED_SIZES, **own)


@STAGES
def test_sizes_that_the_released_scripts_have_as_numbers(files, run, recipe):
    """None is told of a model that has them, and of a small one what differs."""
    made, family = imported(run, recipe)[0], families.of(recipe)
    config, chinese = released_config(run, recipe), released.CODES + made.config.chinese_from
    assert family.differing(type(made)(config)) is None
    said, grid = family.differing(made), GRIDS[recipe]
    assert said is not None
    assert said.startswith("CogView2's code has sizes written into it")
    first = f"image codes 20,000 (here 20), image grid 20 x 20 (here {grid} x {grid})"
    assert said.endswith(f": {first}, first Chinese id 83,823 (here {chinese}){OTHERS[recipe]}")
    longer = type(made)(dataclasses.replace(config, max_caption=200))
    assert str(family.differing(longer)).endswith(": tokens of the longest caption 111 (here 200)")
    if recipe == "iterative":
        for tile, name in ((lopar.diagonals(5, 5), "another of 5 x 5"), (lopar.diagonals(6, 6), "another of 6 x 6")):
            other = type(made)(dataclasses.replace(config, tile=tile))
            assert str(family.differing(other)).endswith(f": tile order the published of 6 x 6 (here {name})")


def test_a_fine_grid_that_the_published_tile_does_not_divide(files, tmp_path):
    module = released.sat_module(vocabulary(files).size, fine=15**2)
    source = released.write_sat(tmp_path / "cogview2-itersr", module)
    take(files, tmp_path / "run", "iterative", "--image-grid", 5, source=source)
    config = imported(tmp_path / "run", "iterative")[0].config
    assert (config.fine_grid, config.tile) == (15, lopar.diagonals(5, 5))


def test_with_icetks_image_tokenizer(files, tmp_path):
    """All that CogView2 has, as it was released."""
    path = test_icetk.write(tmp_path / "ice_image.pt", test_icetk.module())
    text = vocabulary(files).text_size
    for recipe, name in FOLDERS.items():
        fine = 0 if recipe == "coglm" else FINE**2
        module = released.sat_module(test_icetk.CODES + text + 3, fine=fine, projections=recipe == "direct")
        source = released.write_sat(tmp_path / name, module)
        grid = 5 if recipe == "coglm" else COARSE
        take(files, tmp_path / "run", recipe, "--vqvae", path, "--image-grid", grid, source=source)
    system = System.load(tmp_path / "run", name="coglm")
    assert system.recipe.config.image_vocab == test_icetk.CODES
    assert system.draw([CAPTIONS[3]], seeds=[0]).shape == (1, 3, 40, 40)
    cli.main(["export-weights", str(tmp_path / "run"), "--name", "direct", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "latest").exists()


def test_names_are_all_of_a_models():
    """The published sizes: names and shapes of the three files."""
    from cogview.published.layout import Layout
    from cogview.recipes import named

    shapes = {name: Layout(named(name)(preset("coglm-6b", name)[0])).shapes() for name in GRIDS}
    base = shapes["coglm"]
    assert base["transformer.word_embeddings.weight"] == [150_016, 3072]
    assert base["transformer.position_embeddings.weight"] == [1024, 3072]
    assert len(base) == 48 * 16 + 4
    assert shapes["iterative"] == base | {released.EXTRA: [3600, 3072]}
    more = {name: shape for name, shape in shapes["direct"].items() if name not in shapes["iterative"]}
    assert len(more) == 48 * 4
    assert more["mixins.attention_plus.query_key_value.47.weight"] == [9216, 3072]
    assert more["mixins.attention_plus.dense.0.bias"] == [3072]
