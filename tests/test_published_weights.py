"""`cogview import-weights` and `export-weights`: the released computation, the way back, what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import released
import torch
from common import assert_as_good_as
from test_train_command import header, tokens, train

from cogview import cli
from cogview.models import load_model
from cogview.published import families
from cogview.published.convert import _released_image
from cogview.recipes.cogview import CogView
from cogview.system import System
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

CAPTIONS = ["a fox above a tree", "a red car"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Released tokenizers, and a model in one part and in two."""
    folder = tmp_path_factory.mktemp("released")
    TextTokenizer.train([*CAPTIONS, "two birds on a blue house"], 300).save(folder / "cog-pretrain.model")
    torch.save(released.image_tokenizer(), folder / "vqvae.pt")
    for parts in (1, 2):
        released.write_model(folder / f"cogview-{parts}", weights(folder, parts), parts=parts)
    return folder


def weights(files: Path, parts: int = 1) -> released.Module:
    return released.module(released.vocab_size(text_size(files), parts))


def text_size(files: Path) -> int:
    return TextTokenizer.load(files / "cog-pretrain.model").vocab_size


def take(files: Path, run: Path, source: str | Path = "cogview-1", *more: object) -> None:
    tokenizers = ["--vqvae", files / "vqvae.pt", "--text", files / "cog-pretrain.model"]
    given = [] if "bare" in more else tokenizers
    rest = [part for part in more if part != "bare"]
    cli.main(list(map(str, ["import-weights", files / source, "--run", run, *given, *rest])))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> Path:
    """The model in one part, imported."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    take(files, folder)
    return folder


def sequences(files: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[ROI1] text [BASE] [BOI1] image [EOI1] [PAD]… of two captions, but for the last token; and captions and codes."""
    text = TextTokenizer.load(files / "cog-pretrain.model")
    ids = [text.encode(caption)[:6] for caption in ("a fox above", "a red")]
    codes = torch.randint(released.CODES, (2, released.GRID**2), generator=torch.Generator().manual_seed(1))
    pad = released.CODES + text.vocab_size
    rows = []
    for some, image in zip(ids, codes.tolist(), strict=True):
        row = [pad + 7, *(released.CODES + i for i in some), pad + 16, pad + 1, *image, pad + 4]
        rows.append((row + released.POSITIONS * [pad])[: released.POSITIONS - 1])
    padded = torch.tensor([some + [-1] * (6 - len(some)) for some in ids])
    return torch.tensor(rows), padded, codes


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_logits_are_those_of_the_released_computation(files, run, tmp_path, parts, dtype):
    """As near the formulas in float64 as they themselves are in the same dtype, at most twice as far."""
    folder = run
    if parts == 2:
        folder = tmp_path / "run"
        take(files, folder, "cogview-2")
    recipe, model = load_model(checkpoint.latest(folder / "gpt"), dtype=dtype)
    inputs, text, codes = sequences(files)
    batch = recipe.batch(text, codes)
    assert torch.equal(batch.inputs, inputs)
    module = weights(files, parts)
    truth, plain = (released.logits(module, inputs, d)[..., : recipe.vocab.size] for d in (torch.float64, dtype))
    assert_as_good_as(model(batch.inputs, batch.context), truth, plain.float())


def test_the_epsilon_tells(files, run):
    """Whether norms divide by the largest of the tensor or of the row is nothing that rounding hides."""
    _, model = load_model(checkpoint.latest(run / "gpt"))
    recipe = System.load(run).recipe
    inputs, text, codes = sequences(files)
    batch = recipe.batch(text, codes)
    truth = released.logits(weights(files), inputs, torch.float64)
    model.stack.relax = "row"
    for layer in model.stack.layers:
        layer.relax = "row"
    assert (model(batch.inputs, batch.context) - truth).abs().max() > 0.05


def test_a_run_as_any_other(files, run, capsys):
    system = System.load(run)
    c = system.recipe.config
    assert (c.num_layers, c.hidden_size, c.num_heads, c.image_grid, c.max_positions) == (2, 128, 2, 4, 31)
    assert (c.relax, c.attention, c.image_positions, c.dropout) == ("tensor", "dense", "following", 0.1)
    assert system.source.step == 20
    assert system.draw(CAPTIONS, seeds=[0, 1]).shape == (2, 3, 32, 32)
    assert header(run)["tokenizers"] == [system.text.sha256, system.image.sha256]
    assert json.loads((run / "gpt" / "config.json").read_text())["published"]["iteration"] == 20
    stored, _ = checkpoint.read(checkpoint.latest(run / "gpt"))
    assert {value.dtype for value in stored.values()} == {torch.float16}
    cli.main(["compare", str(run), "--out", str(run.parent / "compare.png")])
    cli.main(
        ["generate", "--run", str(run), "--captions", CAPTIONS[0], "--count", "1", "--out", str(run.parent / "a.png")]
    )
    assert (run.parent / "a.png").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_there_and_back(files, tmp_path, capsys, parts):
    take(files, tmp_path / "run", f"cogview-{parts}")
    said = capsys.readouterr().out
    assert "not read: mp_world_size, iteration, args, optimizer, client_lr_scheduler, random_rng_state" in said
    out = tmp_path / "out"
    cli.main(["export-weights", str(tmp_path / "run"), "--out", str(out), "--parts", str(parts)])
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "20"
    assert (out / "cog-pretrain.model").read_bytes() == (files / "cog-pretrain.model").read_bytes()
    same(torch.load(out / "vqvae_hard_biggerset_011.pt"), released.image_tokenizer())
    module = weights(files, parts)
    used = released.vocab_size(text_size(files))
    assert ("left out: 128 rows that pad the token table" in said) == (parts == 2)
    module["word_embeddings.weight"][used:] = 0  # rows of the padding for two parts
    for rank in range(parts):
        path = out / "20" / f"mp_rank_{rank:02d}_model_states.pt"
        same(torch.load(path)["module"], released.part(module, rank, parts))
        assert path.stat().st_size < 1.2 * (files / f"cogview-{parts}" / "20" / path.name).stat().st_size
    again, tokenizers = tmp_path / "again", (out / "vqvae_hard_biggerset_011.pt", out / "cog-pretrain.model")
    take(out, again, out, "--vqvae", tokenizers[0], "--text", tokenizers[1])
    one, other = (System.load(folder) for folder in (tmp_path / "run", again))
    assert (one.text.sha256, one.image.sha256) == (other.text.sha256, other.image.sha256)
    assert one.recipe.config == other.recipe.config
    first, second = (
        checkpoint.read(checkpoint.latest(folder / "gpt"), prefix="model.")[0] for folder in (tmp_path / "run", again)
    )
    same(first, second)


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (type(found[name]), found[name].dtype) == (torch.Tensor, value.dtype), name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_image_tokenizer(files, run, tmp_path, prefix):
    module = released.image_tokenizer()
    torch.save({prefix + name: value for name, value in module.items()}, tmp_path / "vqvae.pt")
    take(files, tmp_path / "run", "cogview-1", "--vqvae", tmp_path / "vqvae.pt")
    ours = VQVAE.load(tmp_path / "run" / "vqvae.safetensors")
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(2))
    codes = released.codes_of(module, images)
    assert len(codes.unique()) > 3
    assert torch.equal(ours.encode(images), codes)
    torch.testing.assert_close(
        ours.decode(codes).double(), released.pictures_of(module, codes).clamp(0, 1), atol=1e-5, rtol=0
    )


def test_several_models_in_a_run(files, run, tmp_path, capsys):
    take(files, tmp_path / "run")
    source = released.write_model(tmp_path / "cogview-caption", weights(files), iteration=7)
    take(files, tmp_path / "run", source, "bare", "--name", "other", "--recipe", "cogview")
    assert System.load(tmp_path / "run", name="other").source.step == 7
    assert System.load(tmp_path / "run", name="gpt").source.step == 20
    with pytest.raises(SystemExit, match=r"name: expected a new one, got 'other, which has .*step-00000007"):
        take(files, tmp_path / "run", source, "bare", "--name", "other", "--recipe", "cogview")
    other = released.image_tokenizer()
    other["enc_b.blocks.0.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"vqvae: expected the same tokenizer as .*vqvae\.safetensors, got another"):
        take(files, tmp_path / "run", source, "bare", "--name", "third", "--vqvae", tmp_path / "other.pt")


def test_captioning(files, tmp_path):
    """CapLoss is that of the released computation; a caption has no end but the longest."""
    take(files, tmp_path / "run", released.write_model(tmp_path / "cogview-caption", weights(files)))
    system = System.load(tmp_path / "run", name="caption")
    _, _, codes = sequences(files)
    text = system.encode(CAPTIONS[0])[0]
    pad, words = released.CODES + text_size(files), [released.CODES + i for i in text]
    ids = [pad + 16, pad + 1, *codes[0].tolist(), pad + 4, pad + 7, *words]
    logits = released.logits(weights(files), torch.tensor([ids]), torch.float64)[0]
    nll = -logits.log_softmax(dim=-1)[torch.arange(len(ids) - len(words) - 1, len(ids) - 1), torch.tensor(words)]
    found = system.caploss(CAPTIONS[0], codes[:1].view(1, 4, 4))
    torch.testing.assert_close(found.double(), nll.mean()[None], atol=2e-3, rtol=1e-3)
    assert not system.recipe.config.stop
    assert len(system.caption(codes[:1].view(1, 4, 4), longest=3)) == 1


def test_super_resolution(files, tmp_path):
    """Positions begin anew on [ROI2], as these weights were trained; by the folder's name it is known what they are."""
    take(files, tmp_path / "run", released.write_model(tmp_path / "cogview-sr", weights(files)))
    system = System.load(tmp_path / "run", name="sr")
    _, text, large = sequences(files)
    small = large[:, :4]
    batch = system.recipe.batch(text, small, large)
    pad, rows = released.CODES + text_size(files), []
    for some, few, many in zip(text.tolist(), small.tolist(), large.tolist(), strict=True):
        first = [pad + 7, *(released.CODES + i for i in some if i >= 0), pad + 16, pad + 1, *few, pad + 4]
        rows.append(([*first, pad + 8, pad + 18, pad + 16, pad + 2, *many], len(first)))
    for row, (ids, begin) in enumerate(rows):
        assert batch.inputs[row, : len(ids)].tolist() == ids
        positions = torch.tensor([*range(begin), *range(len(ids) - begin)])
        truth = released.logits(weights(files), torch.tensor([ids]), torch.float64, positions)
        one = system.recipe.batch(text[row : row + 1], small[row : row + 1], large[row : row + 1])
        found = system.model(one.inputs[:, : len(ids)], dataclasses.replace(one.context, positions=positions))
        assert torch.equal(one.context.positions[0, : len(ids)], positions)
        torch.testing.assert_close(found.double(), truth[..., : system.recipe.vocab.size], atol=1e-3, rtol=1e-3)
    take(files, tmp_path / "run", tmp_path / "cogview-sr", "--name", "other", "--restart", "behind")
    assert System.load(tmp_path / "run", name="other").recipe.config.restart == "behind"
    with pytest.raises(SystemExit, match="restart: expected none but with recipe superresolution, got 'on'"):
        take(files, tmp_path / "run", "cogview-1", "--restart", "on")
    assert system.magnify(CAPTIONS[1], large[:1].view(1, 4, 4), top_k=1).shape == (1, 3, 64, 64)


def test_finetuning(files, run, tmp_path, capsys):
    system = System.load(run)
    made_by = {"text_sha256": system.text.sha256, "image_sha256": system.image.sha256}
    tokens(tmp_path / "mine", **made_by)
    how = ["--batch-size", "2", "--accumulate", "1", "--dtype", "float32", "--warmup", "0"]
    train(tmp_path / "mine", "--from", str(run), small=how, steps=1)
    assert header(tmp_path / "mine")["config"]["relax"] == "tensor"
    assert header(tmp_path / "mine")["from"] == {"folder": str((run / "gpt").resolve()), "step": 20}
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    tokens(copy, **made_by)
    with pytest.raises(SystemExit, match="has released weights, which stay as they are"):
        train(copy, small=how)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--heads", "3"], "heads: expected a divisor of the width 128 and a multiple of 1 parts, got 3"),
        (["--image-grid", "6"], "max_positions: expected at least 41 for 36 image tokens, got 31"),
        (["--name", "tokens"], "name: expected a plain name"),
        (["bare"], r"text: expected --text PATH, since there is no .*text\.model"),
        (
            ["--vqvae", "many.pt"],
            r"word_embeddings\.weight: expected \d+ rows for 300 image codes, \d+ text pieces and 27",
        ),
        (["--text", "vqvae.pt"], r"vqvae\.pt' is not a SentencePiece model"),
        (["--vqvae", "cog-pretrain.model"], r"cog-pretrain\.model is no whole file of torch\.save: "),
        (["--text", "nothing"], "no text tokenizer at"),
    ],
)
def test_what_does_not_fit(files, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(files)
    if not Path("many.pt").exists():
        torch.save(released.image_tokenizer(codes=300), "many.pt")
    with pytest.raises(SystemExit, match=said):
        take(files, tmp_path / "run", "cogview-1", *more)
    assert not (tmp_path / "run").exists()


def without(name):
    return lambda m: m.pop(name)


def replaced(name, value):
    return lambda m: m.update({name: value})


NORM = "transformer.layers.1.third_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(NORM), f"{NORM}: expected \\[128\\], got absent"),
        (without("word_embeddings.weight"), "word_embeddings.weight is missing"),
        (replaced(NORM, torch.ones(127).half()), f"{NORM}: expected \\[128\\], got \\[127\\]"),
        (replaced(NORM, torch.ones(128).half() / 0), f"{NORM}: expected finite floating-point values, got others"),
        (
            replaced(NORM, torch.ones(128, dtype=torch.int16)),
            f"{NORM}: expected finite floating-point values, got others",
        ),
        (replaced("extra.weight", torch.ones(1)), r"extra\.weight: expected absent, got \[1\]"),
        (replaced("extra", 3), "module: expected tensors by name, got 'extra'"),
        (replaced("\x1b[2J", torch.ones(1)), r"module: expected tensors by name, got '\\x1b\[2J'"),
        (lambda m: m.clear(), r"word_embeddings\.weight is missing"),
        (replaced("transformer.layers.2.mlp.dense_4h_to_h.bias", torch.ones(128)), r"layers\.2\..*: expected \["),
        (replaced(NORM, torch.ones(1).half().expand(128)), f"{NORM} is larger than what is stored of it"),
        (
            replaced("transformer.position_embeddings.weight", torch.ones(4, 128)),
            "rows for an image and its text, got 4",
        ),
    ],
)
def test_models_that_are_not_whole(files, tmp_path, change, said):
    module = weights(files)
    change(module)
    folder = tmp_path / "model" / "20"
    folder.mkdir(parents=True)
    torch.save({"module": module}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(SystemExit, match=said):
        take(files, tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()


def test_parts_that_are_missing_or_others(files, tmp_path):
    source = shutil.copytree(files / "cogview-2", tmp_path / "model")
    first, second = (source / "20" / f"mp_rank_{rank:02d}_model_states.pt" for rank in (0, 1))

    def refused(said: str) -> None:
        with pytest.raises(SystemExit, match=said):
            take(files, tmp_path / "run", source)

    content = {"module": released.part(weights(files, 2), 1, 2)}
    content["module"][NORM] = content["module"][NORM] + 1
    torch.save(content, second)
    refused(f"mp_rank_01.*: {NORM}: expected what mp_rank_00_model_states.pt has, got other values")
    content["module"]["word_embeddings.weight"] = content["module"]["word_embeddings.weight"][:-1].clone()
    torch.save(content, second)
    refused(r"mp_rank_01.*word_embeddings\.weight: expected \[256, 128\], got \[255, 128\]")
    del content["module"][NORM]
    torch.save(content, second)
    refused(f"mp_rank_01.*: {NORM} is in one of the parts and not in another")
    second.unlink()
    refused(r"expected 384 rows for 20 image codes, 300 text pieces and 27 commands, of 1 part together, got 256")
    first.rename(second)
    refused(r"mp_rank_00_model_states\.pt is missing beside mp_rank_01_model_states\.pt")
    second.unlink()
    refused(
        r"source: expected latest_checkpointed_iteration\.txt, latest or mp_rank_00_model_states\.pt in it, got .*20'"
    )
    (source / "latest_checkpointed_iteration.txt").write_text("../../etc")
    refused(r"expected the number of an iteration, got '\.\./\.\./etc'")
    (tmp_path / "cogview-base.tar").touch()
    source = tmp_path / "cogview-base.tar"
    refused(r"got the file .*: unpack it first \(tar xf\)")


def test_what_cannot_be_exported(files, run, tmp_path):
    def refused(said: str, *more: str, of: Path = run) -> None:
        with pytest.raises(SystemExit, match=said):
            cli.main(["export-weights", str(of), "--out", str(tmp_path / "out"), *more])
        assert not (tmp_path / "out").exists()

    refused("parts: expected a divisor of 2 heads, got 3", "--parts", "3")
    refused("name: expected a model of", "--name", "none")
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = checkpoint.latest(folder / "gpt")
    stored, head = checkpoint.read(path)
    for change, said in (
        ({"attention": "three_region", "num_pivots": 20}, "attention: expected dense, as CogView's code has it"),
        ({"image_positions": "fixed"}, "image_positions: expected following, as in CogView's code, got 'fixed'"),
    ):
        checkpoint.save(path, stored, head | {"config": head["config"] | change})
        refused(said, of=folder)
    alone = {
        name: value for name, value in stored.items() if ".post_norm." not in name and ".mlp_post_norm." not in name
    }
    checkpoint.save(path, alone, head | {"config": head["config"] | {"norms": "pre"}})
    refused("norms: expected sandwich, as in CogView's code, got 'pre'", of=folder)
    wide = {name: value.float() for name, value in stored.items()}
    wide["model.stack.first_norm.bias"][0] = 1e6
    checkpoint.save(path, wide, head)
    refused(r"stack\.first_norm\.bias: expected values that float16 has", of=folder)
    checkpoint.save(path, stored, head | {"tokenizers": ["1", "2"]})
    refused("the text and the image tokenizer were trained again", of=folder)
    for there in (Path("latest_checkpointed_iteration.txt"), Path("20", "mp_rank_01_model_states.pt")):
        (tmp_path / "some" / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "some" / there).touch()
        with pytest.raises(SystemExit, match="out: expected a folder without a released model"):
            cli.main(["export-weights", str(run), "--out", str(tmp_path / "some")])
        (tmp_path / "some" / there).unlink()


def test_trained_weights_are_rounded_and_it_is_said(files, run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = checkpoint.latest(folder / "gpt")
    stored, head = checkpoint.read(path)
    wide = {name: value.float() for name, value in stored.items()}
    wide["model.stack.first_norm.bias"][:5] += 1e-6
    checkpoint.save(path, wide, head | {"config": head["config"] | {"relax": "row"}})
    cli.main(["export-weights", str(folder), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert re.search(r"rounded to float16: 5 of [\d,]+ values", said)
    assert "its norms are those of relax row" in said
    differing = "image codes 8,192 (here 20), image grid 32 x 32 (here 4 x 4)"
    assert f"CogView's code has sizes written into it that are to be changed for this model: {differing}\n" in said
    module = torch.load(tmp_path / "out" / "20" / "mp_rank_00_model_states.pt")["module"]
    same(module, weights(files))


def test_nothing_is_said_of_the_released_sizes(run):
    recipe = System.load(run).recipe
    config = dataclasses.replace(recipe.config, image_vocab=8192, image_grid=32, max_positions=1089)
    assert families.of("cogview").differing(CogView(config)) is None


@pytest.mark.parametrize("codebook", ["fixed", "straight_through"])
def test_an_image_tokenizer_without_averages_is_exported_with_some(codebook):
    model = VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8, codebook=codebook))
    tensors = _released_image(model)
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        name: list(value.shape)
        for name, value in VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8)).state_dict().items()
    }
    moved = tensors["quantize_t.embed_avg"] / tensors["quantize_t.cluster_size"]
    assert torch.equal(moved, model.quantize_t.embed)
    with pytest.raises(ValueError, match="image tokenizer: expected a VQ-VAE, got 'Linear'"):
        _released_image(torch.nn.Linear(1, 1))


def test_names_are_all_of_a_models(files):
    recipe = CogView(CogView.presets["cogview-4b"][0])
    with torch.device("meta"):
        assert sum(p.numel() for p in recipe.model().parameters()) == 3_928_849_920
