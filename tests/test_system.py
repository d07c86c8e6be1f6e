"""A run in Python: which checkpoint it is, what goes in and out, and what the model finds likely."""

import dataclasses
import io
import os
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from test_transformer import recipe_of

from cogview.generate import generate
from cogview.recipes.coglm import CogLM
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.runs import last_run, models
from cogview.sequence import pad_text
from cogview.system import System
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

CAPTIONS = ["a fox", "a red car", "蓝色"]
SIZES = {"image_vocab": 20, "text_vocab": 300, "max_positions": 40, "num_pivots": 30}


def small_text() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS * 3, 300)


def small_image() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQConfig(codebook_size=20, dim=4, hidden=4)).eval()


@pytest.fixture(scope="module")
def text():
    return small_text()


@pytest.fixture(scope="module")
def image():
    return small_image()


def system_of(text, image, attention="three_region") -> System:
    torch.manual_seed(0)
    recipe = recipe_of(attention, **{n: v for n, v in SIZES.items() if attention != "dalle" or n != "num_pivots"})
    model = recipe.model()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return System(text, image, recipe, model)


@pytest.fixture
def system(text, image):
    return system_of(text, image)


@pytest.fixture
def run(tmp_path, system):
    """A folder with a model of three checkpoints, the second of which was the best held out."""
    folder = tmp_path / "runs" / "mine"
    (folder / "gpt").mkdir(parents=True)
    system.text.save(folder / "text.model")
    system.image.save(folder / "vqvae.safetensors")
    for step in (10, 20, 1300):
        write(folder / "gpt", step, system, best_step=20 if step > 10 else 10, best_loss=2.5)
    return folder


def saved_run(folder, **models):
    """Both tokenizers of the first system, and the models by name, a checkpoint each."""
    first = next(iter(models.values()))
    first.text.save(folder / "text.model")
    first.image.save(folder / "vqvae.safetensors")
    for name, system in models.items():
        write(folder / name, 1, system)


def write(folder, step, system, **run):
    header = {
        "recipe": system.recipe.name,
        "config": vars(system.recipe.config),
        "tokenizers": [system.text.sha256, system.image.sha256],
        "run": {"step": step} | run,
    }
    weights = {f"model.{name}": value + step for name, value in system.model.state_dict().items()}
    checkpoint.save(checkpoint.path_of(folder, step), weights, header)


def damage(path):
    contents = bytearray(path.read_bytes())
    contents[-100] ^= 1
    path.write_bytes(contents)


def test_the_best_is_taken_and_said(run, system):
    loaded = System.load(run)
    assert str(loaded.source) == f"{run}, gpt, step 20 (best held-out loss 2.500)"
    words = system.model.embedding.words.weight
    assert torch.equal(loaded.model.embedding.words.weight, words + 20)
    assert not loaded.model.training
    third = System.load(run, step=1300)
    assert str(third.source) == f"{run}, gpt, step 1,300 (as asked for)"
    assert torch.equal(third.model.embedding.words.weight, words + 1300)
    with pytest.raises(ValueError, match=r"step: expected one that .*gpt has a checkpoint of: 10, 20, 1,300, got 30"):
        System.load(run, step=30)


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(run):
    files = sorted(run.rglob("*"))
    damage(run / "gpt" / "step-00000020.safetensors")
    assert System.load(run).source.why == "newest; step 20 is damaged"
    damage(run / "gpt" / "step-00001300.safetensors")
    assert str(System.load(run).source).endswith(
        "gpt, step 10 (newest that is whole; step 20 is damaged; step 1,300 is damaged)"
    )
    for step in (20, 1300):
        with pytest.raises(checkpoint.Damaged, match="is damaged"):
            System.load(run, step=step)
    (run / "gpt" / "step-00000010.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.Damaged, match=r"step-00000020\.safetensors is damaged"):
        System.load(run)
    assert sorted(run.rglob("*")) == files


def test_without_held_out_data_it_is_the_newest(run, system):
    for path in (run / "gpt").iterdir():
        path.unlink()
    write(run / "gpt", 7, system)
    write(run / "gpt", 8, system)
    assert str(System.load(run).source) == f"{run}, gpt, step 8 (newest)"


def test_models_of_a_run_and_the_run_used_last(run, system, tmp_path):
    shutil.copytree(run / "gpt", run / "dense")
    shutil.copytree(run / "gpt", run / "vqvae")  # the image tokenizer's training is no model
    shutil.copytree(run, tmp_path / "runs" / "other")
    (tmp_path / "runs" / "empty" / "gpt").mkdir(parents=True)

    def use(folder, time):
        for path in folder.glob("step-*"):
            os.utime(path, (time, time))

    for folder, time in (
        ("mine/gpt", 50),
        ("mine/dense", 40),
        ("mine/vqvae", 90),
        ("other/gpt", 10),
        ("other/dense", 20),
    ):
        use(tmp_path / "runs" / folder, time)
    assert (models(run), last_run(tmp_path / "runs")) == (["gpt", "dense"], run)
    assert System.load(run).source.path.parent.name == "gpt"
    assert System.load(run, name="dense").source.path.parent.name == "dense"
    use(tmp_path / "runs" / "other" / "dense", 60)
    assert last_run(tmp_path / "runs") == tmp_path / "runs" / "other"
    assert System.load(tmp_path / "runs" / "other").source.path.parent.name == "dense"
    with pytest.raises(ValueError, match=r"name: expected a model of .*mine: gpt, dense, got 'vqvae'"):
        System.load(run, name="vqvae")
    with pytest.raises(ValueError, match=r"empty holds no trained model"):
        System.load(tmp_path / "runs" / "empty")
    with pytest.raises(ValueError, match=r"run: expected a folder with a trained model; .* has none either"):
        last_run(tmp_path / "runs" / "empty")


def test_a_tokenizer_trained_again_is_named(run, text, image, tmp_path):
    torch.manual_seed(1)
    VQVAE(image.config).save(run / "vqvae.safetensors")
    again = "trained again after the tokens of its model gpt: tokenize again and train a new model"
    with pytest.raises(ValueError, match=rf"mine: the image tokenizer was {again}"):
        System.load(run)
    TextTokenizer.train(["other words"], 300).save(run / "text.model")
    with pytest.raises(ValueError, match=rf"mine: the text and the image tokenizer were {again}"):
        System.load(run)
    image.save(run / "vqvae.safetensors")
    with pytest.raises(ValueError, match=rf"mine: the text tokenizer was {again}"):
        System.load(run)


def test_parts_that_do_not_fit(text, image):
    system = system_of(text, image)
    small = recipe_of(**SIZES | {"image_vocab": 19})
    with pytest.raises(ValueError, match="image tokenizer: expected 19 codes, as the model has, got 20"):
        System(text, image, small, small.model())
    few = VQVAE(dataclasses.replace(image.config, codebook_size=19))
    with pytest.raises(ValueError, match="image tokenizer: expected 20 codes, as the model has, got 19"):
        System(text, few, system.recipe, system.model)
    broken = VQVAE(image.config)
    with torch.no_grad():
        broken.dec.blocks[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"image tokenizer: expected finite weights, got others in dec\.blocks\.0\."):
        System(text, broken, system.recipe, system.model)


def test_characters_without_ids_are_refused(system):
    """Of a tokenizer without byte fallback, which would make one id of all of them."""
    model = io.BytesIO()
    how = {"model_type": "bpe", "vocab_size": 20, "hard_vocab_limit": False, "bos_id": -1, "eos_id": -1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a fox", "red"]), model_writer=model, **how)
    other = dataclasses.replace(system, text=TextTokenizer(model.getvalue()))
    assert other.encode("a red fox") == [other.text.encode("a red fox")]
    with pytest.raises(
        ValueError, match="captions: expected characters that the text tokenizer knows, got '狐狸' in c"
    ):
        other.encode(["a fox", "a 狐狸 fox"])
    assert system.encode("a 狐狸 fox") == [system.text.encode("a 狐狸 fox")]


def test_a_string_is_one_caption(system):
    assert system.encode("a fox") == [system.text.encode("a fox")] == system.encode(["a fox"])
    assert system.encode([]) == []
    one = system.draw("a fox")
    assert (one.shape, one.dtype) == ((1, 3, 32, 32), torch.uint8)
    assert torch.equal(one, system.draw(["a fox", "a red car"])[:1])
    assert system.draw([]).shape == (0, 3, 32, 32)
    ids = system.encode(CAPTIONS)
    codes = generate(system.recipe, system.model, ids, seeds=[5, 6, 7], temperature=0.5, top_k=9)
    drawn = system.draw(CAPTIONS, seeds=[5, 6, 7], temperature=0.5, top_k=9, batch_size=2)
    assert torch.equal(drawn, system.pictures(codes))
    assert torch.equal(system.draw(CAPTIONS[2], seeds=[7], temperature=0.5, top_k=9), drawn[2:])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([*CAPTIONS, " \n\t"], r"expected one that is not blank, got nothing to draw in caption 4: ' \\n\\t'"),
        ("", "expected one that is not blank, got nothing to draw in caption 1: ''"),
        (["\u200b\u202e"], "expected one that is not blank"),
        (["a", "half \ud83d"], r"expected valid Unicode, got half of a character in caption 2: 'half \\ud83d'"),
        (["a", "fox " * 200], r"expected at most 20 tokens, got \d+ in caption 2: 'fox fox .{60,80}…$"),
        (["a", [1, 2]], r"expected text, got list in caption 2: \[1, 2\]"),
        ([b"a"], "expected text, got bytes in caption 1"),
    ],
)
def test_bad_captions(system, captions, message):
    for call in (system.encode, system.draw, lambda c: system.likelihood(c, torch.zeros(1, 4, 4, dtype=torch.int64))):
        with pytest.raises(ValueError, match=f"captions: {message}"):
            call(captions)


def test_pictures_become_codes_and_pictures(system):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 32, 32), generator=g, dtype=torch.uint8)
    codes = system.tokenize(images)
    assert (codes.shape, codes.dtype) == ((3, 4, 4), torch.int64)
    assert torch.equal(codes, system.image.encode(images / 255))
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    assert torch.equal(system.tokenize(pil), codes)
    assert torch.equal(system.tokenize(pil[0]), codes[:1])
    assert torch.equal(system.tokenize(images[0]), codes[:1])
    large = pil[0].resize((64, 64), Image.Resampling.NEAREST)
    array = torch.from_numpy(np.array(large)).permute(2, 0, 1)
    assert torch.equal(system.tokenize(array), system.tokenize(large))
    wide = Image.new("RGB", (96, 32), "white")
    wide.paste(pil[0], (32, 0))
    assert torch.equal(system.tokenize(wide), codes[:1])  # the square in its middle
    clear = Image.new("RGBA", (32, 32), (9, 9, 9, 0))
    assert torch.equal(system.tokenize(clear), system.tokenize(Image.new("L", (5, 7), 255)))
    assert system.tokenize([]).shape == (0, 4, 4)
    for wrong in (images.float(), images[:, :2], images[0, 0]):
        with pytest.raises(ValueError, match=r"pictures: expected uint8 \[N, 3, H, W\], got"):
            system.tokenize(wrong)
    with pytest.raises(ValueError, match="pictures: expected PIL images or a uint8 tensor, got"):
        system.tokenize(["a.png"])
    with pytest.raises(ValueError, match=r"pictures: expected uint8 .*, or codes of whole numbers \[N, 4, 4\], got"):
        system.likelihood("a fox", torch.zeros(1, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes: expected ids 0 to 19, got 20 to 20"):
        system.likelihood("a fox", torch.full((1, 4, 4), 20))


@pytest.mark.parametrize("attention", ["dense", "three_region", "dalle"])
def test_logits_and_likelihood(text, image, attention):
    """Against the logits of the whole sequence, token by token."""
    system = system_of(text, image, attention)
    codes = torch.randint(20, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    ids = system.encode(CAPTIONS)
    logits, found = system.logits(CAPTIONS, codes), system.likelihood(CAPTIONS, codes)
    assert (logits.shape, logits.dtype) == ((3, 39, system.recipe.vocab.size), torch.float32)
    targets = system.recipe.layout(pad_text(ids), codes.flatten(1))[1]
    p = F.log_softmax(logits, -1).gather(2, targets[..., None])[..., 0]
    for row, tokens in enumerate(ids):
        wanted = torch.tensor(tokens) + 20
        assert torch.equal(targets[row, : len(tokens)], wanted)
        torch.testing.assert_close(found.caption[row], p[row, : len(tokens)].mean())
        there = targets[row] < 20
        assert torch.equal(targets[row, there], codes[row].flatten())
        torch.testing.assert_close(found.picture[row], p[row, there].mean())
    for n in range(3):  # whatever else is in the batch
        alone = system.likelihood(CAPTIONS[n], codes[n])
        torch.testing.assert_close(torch.stack(alone)[:, 0], torch.stack(found)[:, n])
    assert all(part.dtype == torch.float32 and part.max() < 0 for part in found)
    assert system.model.training  # as it was
    empty = system.likelihood([], codes[:0])
    assert [len(part) for part in empty] == [0, 0]
    assert system.logits([], codes[:0]).shape == (0, *logits.shape[1:])


def test_likelihood_of_a_model_that_draws_both(image):
    """CogLM: pictures behind their captions, and captions behind their pictures."""
    text = TextTokenizer.train(CAPTIONS * 3, 310, bilingual=True)
    sizes = {"image_grid": 4, "image_vocab": 20, "text_vocab": text.vocab_size, "chinese_from": text.chinese_from}
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "patch_side": 2, "max_positions": 48}
    torch.manual_seed(0)
    recipe = CogLM(CogLMConfig(**shape, **sizes, max_caption=30, text_rows=31))
    system = System(text, image, recipe, recipe.model())
    for p in system.model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    codes = torch.randint(20, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    found = system.likelihood(CAPTIONS, codes)
    assert torch.equal(found.caption, -system.caploss(CAPTIONS, codes))
    assert all(part.max() < 0 and len(part.unique()) == 3 for part in found)
    p = F.log_softmax(system.logits(CAPTIONS, codes), -1)
    for n, ids in enumerate(system.encode(CAPTIONS)):
        own = p[n, len(ids) : len(ids) + 16].gather(1, codes[n].view(-1, 1))
        torch.testing.assert_close(found.picture[n], own.mean())
    captioning = system.which_draws("captions").likelihood(CAPTIONS, codes)
    assert torch.equal(captioning.caption, found.caption)
    assert captioning.picture.isnan().all()  # which it does not predict
    assert [len(part) for part in system.likelihood([], codes[:0])] == [0, 0]


def test_one_picture_and_many_captions(system, monkeypatch):
    codes = torch.randint(20, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    pictures = system.pictures(codes)
    codes = system.tokenize(pictures)
    many = [f"{word} {n}" for n in range(20) for word in ("fox", "car")]
    scores = system.likelihood(many, pictures[:1])
    again = torch.cat([system.likelihood(one, codes[0]).picture for one in many])
    torch.testing.assert_close(scores.picture, again)
    both = torch.stack([scores.picture, system.likelihood(many, pictures[1]).picture])
    calls = []
    monkeypatch.setattr(system.image, "encode", lambda x, e=system.image.encode: calls.append(len(x)) or e(x))
    assert torch.equal(system.choose(pictures, many), both.argmax(1))
    assert calls == [2]  # a picture is tokenised once
    own = [many[:3], many[5:12]]
    expected = [both[0, :3].argmax(), both[1, 5:12].argmax()]
    assert system.choose(codes, own).tolist() == expected
    assert system.choose(pictures[0], "fox 1").tolist() == [0]
    assert system.choose(codes[:0], many).tolist() == []
    each = system.likelihood("fox 1", codes).picture
    assert torch.equal(each, system.likelihood(["fox 1"] * 2, codes).picture)
    with pytest.raises(ValueError, match=r"pictures: expected as many as captions \(3\), or one, got 2"):
        system.likelihood(many[:3], codes)
    with pytest.raises(ValueError, match="captions: expected a list for each of 2 pictures, got 3"):
        system.choose(codes, [["a"]] * 3)
    with pytest.raises(ValueError, match="captions: expected at least one for each picture, got"):
        system.choose(codes, [["a"], []])


def test_weights_that_are_not_finite(system):
    with torch.no_grad():
        system.model.embedding.words.weight[3] = torch.nan
    codes = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="the model's logits are not finite, at token 1 of 16 drawn"):
        system.draw("a fox")
    for call in (system.likelihood, system.logits, lambda c, p: system.choose(p, c)):
        with pytest.raises(ValueError, match="the model's logits are not finite, in row 0 of"):
            call(CAPTIONS[:2], codes)


def test_the_row_of_what_is_not_finite_is_of_all(system, monkeypatch):
    """Not of those that are computed at once."""
    run = System._run

    def broken(self, batch, **what):
        found = run(self, batch, **what)
        found[7:, -1] = torch.inf if len(batch) < 32 else 0
        return found

    monkeypatch.setattr(System, "_run", broken)
    codes = torch.zeros(41, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="the model's logits are not finite, in row 39 of 41"):
        system.logits("a fox", codes)

    def losses(self, batch, **what):
        return torch.full(batch.targets.shape, torch.nan if len(batch) < 32 else 1.0)

    run = losses
    with pytest.raises(ValueError, match="the model's logits are not finite, in row 32 of 41"):
        system.likelihood("a fox", codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.draw("a fox", seeds=3), r"seeds: .* whole numbers, one for each caption \(1\), got 3"),
        (lambda s: s.draw("a fox", seeds="5"), "seeds: expected a list of whole numbers, .*, got '5'"),
        (lambda s: s.draw("a fox", seeds=[True]), "seeds: expected whole numbers from 0 .*, got True"),
        (lambda s: s.draw("a fox", seeds=[10**5000]), r"seeds: expected whole numbers .*, got a number of 16,610 bits"),
        (lambda s: s.draw("a fox", top_k=True), "top_k: expected a whole number, at least 1, got True"),
        (lambda s: s.draw("a fox", batch_size=True), "batch_size: expected a whole number, at least 1, got True"),
        (lambda s: s.draw("a fox", temperature=True), "temperature: expected a positive and finite number, got True"),
        (lambda s: s.encode(5), "captions: expected a string or a list of strings, got 5"),
        (lambda s: s.encode(None), "captions: expected a string or a list of strings, got None"),
        (lambda s: s.encode(b"abc"), "captions: expected a string or a list of strings, got b'abc'"),
        (lambda s: s.encode({"a": 1}), "captions: expected a string or a list of strings, got {'a': 1}"),
        (lambda s: s.encode(torch.tensor(3)), r"captions: expected a string or a list of strings, got tensor\(3\)"),
        (lambda s: s.encode(np.zeros((9, 9))), r"captions: .*, got ndarray in caption 1: ndarray float64 \[9\]"),
        (lambda s: s.likelihood("a", CODES, seed=-1), r"seed: expected a whole number from 0 to 2\^63 - 1, got -1"),
        (lambda s: s.likelihood("a", CODES, seed="x"), "seed: expected a whole number .*, got 'x'"),
        (lambda s: s.logits("a", CODES, seed=2**63), "seed: expected a whole number .*, got 9223372036854775808"),
        (lambda s: s.choose(CODES, "a", seed=1.5), r"seed: expected a whole number .*, got 1\.5"),
        (lambda s: s.pictures([[0]]), r"codes: expected a tensor of whole numbers \[N, h, w\], got \[\[0\]\]"),
        (lambda s: s.pictures(CODES.bool()), r"codes: expected a tensor of .*, got Tensor torch\.bool \[1, 4, 4\]"),
        (lambda s: s.pictures(CODES.float()), r"codes: expected a tensor of .*, got Tensor torch\.float32"),
        (lambda s: s.pictures(CODES.cfloat()), r"codes: expected a tensor of .*, got Tensor torch\.complex64"),
        (lambda s: s.pictures(CODES[0, 0]), r"codes: expected a tensor of .*, got Tensor torch\.int64 \[4\]"),
        (lambda s: s.pictures(CODES + 20), "codes: expected 0 to 19, got 20 to 20"),
        (lambda s: s.pictures(CODES - 1), "codes: expected 0 to 19, got -1 to -1"),
        (lambda s: s.likelihood("a", CODES.bool()), r"pictures: expected uint8 .*, got Tensor torch\.bool \[1, 4, 4\]"),
        (lambda s: s.likelihood("a", CODES.cfloat()), r"pictures: expected uint8 .*, got Tensor torch\.complex64"),
        (lambda s: s.tokenize(None), "pictures: expected PIL images or a uint8 tensor, got None"),
        (lambda s: s.tokenize("a.png"), "pictures: expected PIL images or a uint8 tensor, got 'a.png'"),
        (lambda s: s.tokenize(np.zeros((64, 64, 3), np.uint8)), r"pictures: .*, got ndarray uint8 \[64, 64, 3\]"),
        (lambda s: s.tokenize([np.zeros((64, 64, 3))]), r"pictures: .*, got ndarray float64 \[64, 64, 3\]"),
        (lambda s: s.tokenize(Image.new("RGB", (0, 0))), "pictures: expected at least one pixel each, got '0 x 0'"),
        (lambda s: s.tokenize(torch.zeros(3, 0, 0, dtype=torch.uint8)), "pictures: expected at least one pixel each"),
        (lambda s: s.choose(CODES, 5), "captions: expected a string or a list of strings, got 5"),
        (lambda s: s.choose(CODES, ["a", ["b"]]), "captions: expected either strings or a list of them for each p"),
        (lambda s: s.choose(CODES, [[["a"]]]), "captions: expected text, got list in caption 1"),
        (lambda s: s.choose(CODES, [[str(n) for n in range(5000)], []]), "captions: expected a list for each of 1"),
    ],
)  # fmt: skip
def test_what_is_none_of_it_is_a_sentence(system, call, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call(system)
    assert len(str(error.value)) < 300


CODES = torch.zeros(1, 4, 4, dtype=torch.int64)


def test_generators_and_single_codes(system):
    codes = torch.randint(20, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    assert system.encode(c for c in CAPTIONS) == system.encode(CAPTIONS)
    assert torch.equal(system.choose(codes, (c for c in CAPTIONS)), system.choose(codes, CAPTIONS))
    own = [CAPTIONS[:2], CAPTIONS[1:]]
    assert torch.equal(system.choose(codes, ((c for c in some) for some in own)), system.choose(codes, own))
    one = system.pictures(codes[0])
    assert torch.equal(one, system.pictures(codes)[:1])
    assert torch.equal(system.pictures(codes.to(torch.uint8)), system.pictures(codes))
    assert torch.equal(system.tokenize(Image.fromarray(one[0].permute(1, 2, 0).numpy())), system.tokenize(one))
    assert system.pictures(codes[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", torch.device("cuda", 99), 5.5])
def test_a_device_that_torch_cannot_use(run, device):
    with pytest.raises(ValueError, match=rf"^device: expected one that torch can use here, got '{device}' \("):
        System.load(run, device)
