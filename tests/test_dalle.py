"""Recipe dalle: what its image sees, its padding, its losses, its captions in other pieces, the published sizes."""

import dataclasses
import io
import math
import re
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from test_generate_codes import CAPTIONS
from test_memory import BATCH, kept
from test_memory import SIZES as MEASURED
from test_train_command import header, tokens, train
from test_train_run import TRAIN, Pairs
from test_transformer import SIZES, dalle_mask, formula, recipe_of, sample

from cogview.commands.train_model import Before, training_of
from cogview.config import TrainConfig
from cogview.generate import generate
from cogview.memory import activations
from cogview.models import load_model
from cogview.recipes import preset
from cogview.recipes.dalle import Dalle, DalleConfig
from cogview.recipes.recipe import Recipe
from cogview.sequence import pad_text
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint
from cogview.train.feed import streams
from cogview.train.log import read_log
from cogview.train.token_task import TokenTask

LEARNED: dict[str, Any] = {"padding": "learned"}
WAYS: list[dict[str, Any]] = [
    LEARNED,
    LEARNED | {"schedule": ("row", "dense", "column", "dense")},
    {"softmax": "separate"},
    LEARNED | {"softmax": "separate", "norms": "pre"},
    LEARNED | {"image_positions": "rows_columns"},
]
KINDS = dataclasses.replace(TRAIN, loss_mean="kinds", text_weight=1 / 8, image_weight=7 / 8)


def made(**change: Any) -> tuple[Recipe, Any]:
    torch.manual_seed(0)
    recipe = recipe_of("dalle", **{"num_layers": 4} | change)
    model = recipe.model().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return recipe, model


def test_a_padding_token_for_each_place() -> None:
    recipe, _ = made(**LEARNED)
    c, vocab = recipe.config, recipe.vocab
    assert (c.max_text, vocab.size) == (9, 128)
    batch = recipe.batch(pad_text([[1, 2, 3], []]), torch.randint(20, (2, 16)))
    first = vocab["POS8"] + 1  # behind the commands
    own = [first + place for place in range(9)]
    text = [vocab["ROI1"], 21, 22, 23, vocab["BASE"], *own[3:], vocab["BOI1"]]
    assert batch.inputs[0, :12].tolist() == text
    assert batch.inputs[1, :12].tolist() == [vocab["ROI1"], vocab["BASE"], *own, vocab["BOI1"]]
    assert batch.context.attention == {}
    assert (batch.context.positions == torch.arange(28)).all()
    places = batch.targets == vocab["PAD"]  # they are no targets
    assert torch.equal(places[:, :12].sum(1), torch.tensor([6, 9]))
    assert not batch.weights[places].any()
    assert not any(kind[batch.inputs >= first].any() for kind in recipe.input_kinds(batch.inputs).values())


def test_places_of_the_image_are_a_row_and_a_column() -> None:
    recipe, model = made(**LEARNED, image_positions="rows_columns")
    table, text = model.embedding.positions.weight, recipe.config.text_slots
    assert table.shape == (text + 8, 32)
    places = model.embedding.table()
    assert torch.equal(places[:text], table[:text])
    for y in range(4):
        for x in range(4):
            assert torch.equal(places[text + 4 * y + x], table[text + y] + table[text + 4 + x])
    batch = sample(recipe)
    states = model.embedding(batch.inputs, batch.context.positions)
    assert torch.equal(states[:, text + 6], model.embedding.words(batch.inputs[:, text + 6]) + places[text + 6])
    with pytest.raises(ValueError, match="image_positions: expected following or fixed, got 'rows_columns'"):
        recipe_of("dense", image_positions="rows_columns")


def test_each_padding_token_is_learned_and_matters() -> None:
    recipe, model = made(**LEARNED)
    batch = sample(recipe)
    model(batch.inputs, batch.context, targets=batch.targets, weights=batch.weights)[0].backward()
    rows = model.embedding.words.weight.grad[recipe.vocab.first_padding :][:9]
    assert (rows.norm(dim=1) > 0).all()
    before = model(batch.inputs, batch.context)
    with torch.no_grad():
        model.embedding.words.weight[recipe.vocab.first_padding + 8] += 1
    after = model(batch.inputs, batch.context)
    others = torch.arange(before.shape[-1]) != recipe.vocab.first_padding + 8
    assert torch.equal(after[0][:, others], before[0][:, others])  # the text fills all places
    assert not torch.equal(after[2, -1], before[2, -1])


def test_learned_padding_equals_the_formula() -> None:
    recipe, model = made(**LEARNED, num_layers=6)
    model.double()
    batch = sample(recipe)
    expected = formula(recipe, model, batch).float()
    torch.testing.assert_close(model(batch.inputs, batch.context), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["masked", "learned"])
@pytest.mark.parametrize("kind", ["row", "column", "convolutional"])
def test_separate_softmaxes_equal_the_formula(kind: Any, padding: Any) -> None:
    """Attention to text plus attention to the image, text as ever."""
    recipe, _ = made(schedule=(kind,) * 4, softmax="separate", padding=padding)
    batch, attention = sample(recipe), recipe.attention(0)
    q, k, v = torch.randn(3, 3, 2, 28, 16, dtype=torch.float64)
    found = attention.attend(q, k, v, batch.context)
    scores, start = q @ k.mT / 4, recipe.config.text_slots
    mask = torch.ones(28, 28).tril().bool() & (batch.inputs != recipe.vocab["PAD"])[:, None]
    if kind != "convolutional":
        mask = mask & dalle_mask(recipe, batch.inputs, kind)
    parts = [mask.clone(), mask.clone()]
    parts[0][..., start:], parts[1][..., :start] = False, False
    text, image = (scores.masked_fill(~part[:, None], -math.inf).softmax(-1).nan_to_num() @ v for part in parts)
    there = (batch.inputs != recipe.vocab["PAD"])[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[there], (text + image)[there])
    with pytest.raises(ValueError, match="softmax: expected joint, got separate"):
        attention.added(batch.context, 28)


@pytest.mark.parametrize("way", WAYS)
def test_drawing_equals_the_full_forward(way: dict[str, Any]) -> None:
    recipe, model = made(**way)
    codes = generate(recipe, model, CAPTIONS, top_k=1)
    batch = recipe.batch(pad_text(CAPTIONS), codes.flatten(1))
    logits = model(batch.inputs, batch.context)[:, recipe.config.text_slots - 1 : -1, :20]
    assert torch.equal(logits.argmax(-1), codes.flatten(1))


@pytest.mark.parametrize("way", WAYS)
def test_bytes_and_pairs_of_each_way(way: dict[str, Any]) -> None:
    recipe = Dalle(DalleConfig(**MEASURED, **way | ({"schedule": way["schedule"][:3]} if "schedule" in way else {})))
    model = recipe.model()
    batch = recipe.batch(torch.randint(50, (BATCH, recipe.config.max_text)), torch.randint(100, (BATCH, 64)))
    head = 4 * recipe.vocab.size * recipe.config.hidden_size
    with pytest.MonkeyPatch.context() as patch:
        found = kept(patch, model, batch, "none")
    assert found == pytest.approx(BATCH * activations(recipe, "none", 4).kept + head, rel=0.006)  # and masks


def test_schedules() -> None:
    assert DalleConfig(**SIZES | {"num_layers": 5}).kinds == ("row", "column", "row", "row", "convolutional")
    own = DalleConfig(**SIZES, schedule=("column", "row"))
    assert [recipe.kind for recipe in map(Dalle(own).attention, range(2))] == ["column", "row"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": ("row",)}, "schedule: expected a kind for each of 2 layers, or none for DALL-E's, got ('row',)"),
        (
            {"schedule": ("row", "diagonal")},
            "schedule: expected a tuple of row, column, convolutional, dense, got ('row', 'diagonal')",
        ),
        ({"schedule": "row"}, "schedule: expected a tuple of row, column, convolutional, dense, got 'row'"),
        (
            {"schedule": ("row", "dense")},
            "schedule: expected no dense layers but with padding learned and softmax joint, got ('row', 'dense')",
        ),
        ({"padding": "none"}, "padding: expected masked or learned, got 'none'"),
        ({"softmax": "two"}, "softmax: expected joint or separate, got 'two'"),
        ({"norms": "post"}, "norms: expected sandwich or pre, got 'post'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        DalleConfig(**SIZES | change)


def test_published_sizes() -> None:
    config, training = preset("dalle-12b", "dalle")
    recipe = Dalle(config)
    with torch.device("meta"):
        model = recipe.model()
    assert sum(p.numel() for p in model.parameters()) == 12_195_810_688
    assert (config.num_heads, config.head_dim, config.max_text, recipe.length) == (62, 64, 256, 259 + 1024)
    assert [config.kinds.count(kind) for kind in ("row", "column", "convolutional")] == [47, 16, 1]
    assert recipe.vocab.paddings == 256
    assert training.text_weight + training.image_weight == 1
    fitted = Dalle.fit(config, image_grid=32, max_text=20, image_vocab=8192, text_vocab=16384)
    assert fitted == config  # 256 places, however short the captions, and however long
    assert Dalle.fit(config, image_grid=32, max_text=400, image_vocab=8192, text_vocab=16384) == config
    tiny = preset("tiny", "dalle")[0]
    sizes = [Dalle.fit(tiny, image_grid=8, max_text=n, image_vocab=512, text_vocab=500).max_text for n in (9, 40, 300)]
    assert sizes == [29, 40, 256]
    with pytest.raises(ValueError, match="text: expected at most 256 tokens beside 1024 image tokens in 1284, got 257"):
        recipe.layout(torch.zeros(1, 257, dtype=torch.int64), torch.zeros(1, 1024, dtype=torch.int64))


def task_of(config: TrainConfig, recipe: Recipe | None = None, **how: Any) -> TokenTask:
    recipe = recipe or recipe_of("dalle", **LEARNED)
    torch.manual_seed(0)
    return TokenTask(recipe, recipe.model(), Pairs(12), config, **how)


@pytest.mark.parametrize("name", ["dalle", "dense"])
def test_losses_have_a_mean_of_each_kind(name: str) -> None:
    """In parts of any size the same, and its gradients; the metric is the loss."""
    recipe = recipe_of(name)
    task, rows = task_of(KINDS, recipe), np.arange(6)
    batch = task.batch(task.data, rows, streams(range(6), 0))
    nll = task.model(batch.inputs, batch.context, targets=batch.targets)
    text, image = recipe.vocab.is_text(batch.targets), recipe.vocab.is_image(batch.targets)
    expected = nll[text].mean() / 8 + nll[image].mean() * 7 / 8
    grads = []
    for count in (1, 3):
        task.model.zero_grad()
        found = [task.loss(part, batch) for part in batch.chunk(count)]
        whole = sum(loss for loss, _ in found)
        whole.backward()
        grads.append([p.grad.clone() for p in task.model.parameters()])
        assert whole.item() == pytest.approx(expected.item(), rel=1e-5)
        metrics = task.metrics([output for _, output in found])
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["image_loss"] == pytest.approx(nll[image].mean().item(), rel=1e-5)
    task.model.zero_grad()
    expected.backward()
    for p, *ours in zip(task.model.parameters(), *grads, strict=True):
        for grad in ours:
            torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)


def test_a_kind_that_is_not_there_has_no_loss() -> None:
    task = task_of(dataclasses.replace(KINDS, text_weight=0.0))
    batch = task.batch(task.data, np.arange(3), streams(range(3), 0))
    loss, output = task.loss(batch, batch)
    assert loss.item() == pytest.approx(7 / 8 * task.metrics([output])["image_loss"], rel=1e-5)


CAPTIONS_OF = ["a fox above a tree", "the quick brown fox jumps over the lazy dog", "a red car on a blue background"]


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS_OF * 40, 330)


class Texts(Pairs):
    """Captions of a tokenizer."""

    def __init__(self, text: TextTokenizer):
        super().__init__(3)
        self.text, self.tokenizers_ = pad_text([text.encode(c) for c in CAPTIONS_OF]), [text.sha256, "image"]

    tokenizers = property(lambda self: self.tokenizers_)


def dropping(words: TextTokenizer, longest: int, **change: Any) -> TokenTask:
    sizes = {"text_vocab": words.vocab_size, "max_positions": longest + 20, "padding": "learned"}
    recipe = recipe_of("dalle", **sizes)
    return TokenTask(recipe, recipe.model(), Texts(words), dataclasses.replace(KINDS, **change), text=words)


def captions_in(task: TokenTask, batch: Any, words: TextTokenizer) -> list[list[int]]:
    vocab = task.recipe.vocab
    return [[i - 20 for i in row.tolist() if vocab.is_caption(torch.tensor(i))] for row in batch.inputs]


def test_captions_come_in_other_pieces(words: TextTokenizer) -> None:
    """The same text, drawn by each sample's stream alone, only in training; a tenth of the merges are left out."""
    task = dropping(words, 60, bpe_dropout=0.1)
    whole = [words.encode(caption) for caption in CAPTIONS_OF]
    drawn = [
        captions_in(task, task.batch(task.data, np.arange(3), streams(range(3), step)), words) for step in range(30)
    ]
    assert all([words.decode(ids) for ids in some] == CAPTIONS_OF for some in drawn)
    assert 0.4 < np.mean([ids != own for some in drawn for ids, own in zip(some, whole, strict=True)]) < 1
    last = captions_in(task, task.batch(task.data, np.arange(3)[2:], streams(range(2, 3), 7)), words)
    assert last == drawn[7][2:]
    held_out = task.batch(task.data, np.arange(3), streams(range(3), 0), training=False)
    assert captions_in(task, held_out, words) == whole


def test_pieces_that_do_not_fit(words: TextTokenizer) -> None:
    """Captions stay as they were, or are cut and counted where they may be."""
    whole = [words.encode(caption) for caption in CAPTIONS_OF]
    longest = max(map(len, whole))
    task = dropping(words, longest, bpe_dropout=1.0)
    found = captions_in(task, task.batch(task.data, np.arange(3), streams(range(3), 0)), words)
    assert found[1] == whole[1]  # the longest
    cut = dropping(words, longest, bpe_dropout=1.0, truncate_text=True)
    batch = cut.batch(cut.data, np.arange(3), streams(range(3), 0))
    assert batch.cut == sum(len(c) + 1 > longest for c in CAPTIONS_OF)  # letters, and a mark of the beginning
    assert words.decode(captions_in(cut, batch, words)[1]) == CAPTIONS_OF[1][: longest - 1]


def test_pieces_need_the_tokenizer_of_the_tokens(words: TextTokenizer) -> None:
    said = "bpe_dropout: expected 0 without the text tokenizer that made the tokens, got 0.1"
    with pytest.raises(ValueError, match=said):
        task_of(dataclasses.replace(KINDS, bpe_dropout=0.1))
    with pytest.raises(ValueError, match=said):
        task_of(dataclasses.replace(KINDS, bpe_dropout=0.1), text=words)
    with pytest.raises(ValueError, match=r"bpe_dropout: expected a number in \[0, 1\], got 1.5"):
        dataclasses.replace(KINDS, bpe_dropout=1.5)


def test_pieces_of_other_tokenizers(words: TextTokenizer) -> None:
    """A unigram model has no merges; a caption with characters that a model does not know stays as it is."""
    assert words.is_bpe
    how: dict[str, Any] = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    how |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    made = {}
    for kind in ("unigram", "bpe"):
        model = io.BytesIO()
        captions = iter(CAPTIONS_OF * 40)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=captions, model_writer=model, model_type=kind, **how)
        made[kind] = TextTokenizer(model.getvalue())
    assert (made["unigram"].is_bpe, made["bpe"].is_bpe) == (False, True)
    with pytest.raises(ValueError, match="bpe_dropout: expected 0 with a text tokenizer that is not of byte-pair"):
        dropping(made["unigram"], 60, bpe_dropout=0.1)
    task = dropping(made["bpe"], 60, bpe_dropout=1.0)
    strange = [made["bpe"].encode("a fox 猫 above"), made["bpe"].encode("a fox")]
    found = task._pieces_anew(pad_text(strange), streams(range(2), 0))
    assert found[0][found[0] >= 0].tolist() == strange[0]
    assert found[1][found[1] >= 0].tolist() != strange[1]


def test_samples_of_a_text_follow_their_seed(words: TextTokenizer) -> None:
    text = CAPTIONS_OF[1]
    drawn = [words.sample(text, 0.3, seed) for seed in (1, 2, 3, 1, 2, 3)]
    assert drawn[:3] == drawn[3:]
    assert len({tuple(ids) for ids in drawn}) > 1
    assert words.sample(text, 0.0, 5) == words.encode(text)
    letters = words.sample(text, 1.0, 5)
    assert len(letters) == len(text) + 1


def test_a_tokenizer_of_lower_case_letters() -> None:
    text = TextTokenizer.train(["A Fox above ÄNNE", "Ω and ω"] * 20, lowercase=True)
    assert text.lowercase
    assert not TextTokenizer.train(["A Fox above ÄNNE"] * 20).lowercase
    assert text.decode(text.encode("A FOX Above Änne ΩΩ")) == "a fox above änne ωω"
    assert text.encode("FOX") == text.encode("fox")
    again = TextTokenizer(text._model)
    assert again.lowercase


def test_captions_that_are_too_long_are_refused_or_cut(tmp_path, capsys) -> None:
    tokens(tmp_path, length=12)
    how = ["--recipe", "dalle", "--bpe-dropout", "0", "--max-text", "8"]
    said = r"the longest caption has 12 tokens, and .*gpt has places for 8: .* or train with --truncate-text"
    with pytest.raises(SystemExit, match=said):
        train(tmp_path, *how)
    train(tmp_path, *how, "--truncate-text")
    assert "done at step 3" in capsys.readouterr().out
    assert load_model(checkpoint.latest(tmp_path / "gpt"))[0].config.max_text == 8
    assert header(tmp_path)["counts"]["truncated"] == 12  # 3 steps of 4
    assert any(entry.get("truncated") == 12 for entry in read_log(tmp_path / "gpt"))
    train(tmp_path, "--recipe", "dalle", "--bpe-dropout", "0", "--name", "other", "--schedule", "column")
    found = header(tmp_path, "other")["config"]
    assert (found["schedule"], found["padding"], found["max_positions"]) == (["column"], "learned", 29 + 16 + 4)
    assert load_model(checkpoint.latest(tmp_path / "other"))[0].config.kinds == ("column",)


def test_captions_beyond_256_tokens(tmp_path) -> None:
    """There are no more places: they are refused, or cut and counted."""
    tokens(tmp_path, length=300)
    how = ["--recipe", "dalle", "--bpe-dropout", "0"]
    with pytest.raises(SystemExit, match=r"the longest caption has 300 tokens, and .*gpt has places for 256: tokenize"):
        train(tmp_path, *how, steps=1)
    train(tmp_path, *how, "--truncate-text", steps=1)
    assert header(tmp_path)["config"]["max_positions"] == 256 + 16 + 4
    assert header(tmp_path)["counts"]["truncated"] == 4


def test_no_average_where_none_is_asked_for(tmp_path) -> None:
    tokens(tmp_path)
    how = ["--recipe", "dalle", "--bpe-dropout", "0"]
    train(tmp_path, *how, steps=1)
    assert header(tmp_path)["averaged"]
    train(tmp_path, *how, "--average", "none", "--name", "other", steps=1)
    assert "averaged" not in header(tmp_path, "other")


def test_a_run_of_before_goes_on_with_the_training_that_it_had(tmp_path) -> None:
    """Also of a preset that the recipe has no more."""
    before = Before(tmp_path, {"config": {"num_layers": 5}}, own=True)
    for name in ("tiny", "fashion-tiny"):
        assert training_of(before, name, "dalle") == preset(name, "cogview")[1]
    now = Before(tmp_path, {"config": {"norms": "pre"}}, own=True)
    for one in (now, None, dataclasses.replace(before, own=False)):
        assert training_of(one, "tiny", "dalle") == preset("tiny", "dalle")[1]


def test_capital_letters_are_told(tmp_path, capsys) -> None:
    capitals = TextTokenizer.train([caption.title() for caption in CAPTIONS_OF] * 40, 330)
    said = "captions keep their capital letters; DALL-E has none (tokenize --text-lowercase, in a new run)"
    lower = TextTokenizer.train(CAPTIONS_OF * 40, 330, lowercase=True)
    assert min(capitals.vocab_size, lower.vocab_size) >= 300  # of the tokens
    for name, text in (("a", capitals), ("b", lower)):
        run = tmp_path / name
        tokens(run, text_sha256=text.sha256, text_vocab_size=text.vocab_size)
        text.save(run / "text.model")
        train(run, "--recipe", "dalle", steps=1)
        assert (said in " ".join(capsys.readouterr().out.split())) == (text is capitals)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--schedule", "row", "row"], "schedule: expected a kind for each of 1 layers, or none for DALL-E's, got"),
        (["--average", "1"], "average: expected a decay above 0 and below 1, or None, got 1.0"),
        (["--gradient-scaling", "blocks"], "gradient_scaling: expected loss with dtype float32, which needs none, got"),
        (["--attention", "dense"], "attention: expected none with recipe dalle, which has its own, got 'dense'"),
        ([], "no text tokenizer at"),
    ],
)
def test_what_the_command_refuses(tmp_path, more: list[str], said: str) -> None:
    tokens(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(said)):
        train(tmp_path, "--recipe", "dalle", *more)
    assert not (tmp_path / "gpt" / "log.jsonl").exists()


def test_options_of_other_recipes(tmp_path) -> None:
    tokens(tmp_path)
    with pytest.raises(
        SystemExit, match="padding: expected none with recipe cogview, which has its own, got 'learned'"
    ):
        train(tmp_path, "--padding", "learned")
    with pytest.raises(SystemExit, match="max_text: expected none with recipe coglm, got 5"):
        train(tmp_path, "--recipe", "coglm", "--max-text", "5")
    with pytest.raises(SystemExit, match="truncate_text: expected none with recipe coglm, got True"):
        train(tmp_path, "--recipe", "coglm", "--truncate-text")
