"""What studies are made of: paired comparisons, the contrastive model; and that of reranking from its beginning on."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train_run import Pairs

from cogview.commands.study import Reranking
from cogview.config import TrainConfig
from cogview.demo import demo
from cogview.recipes.cogview import CogView
from cogview.studies import contrastive
from cogview.studies.contrastive import Contrastive, ContrastiveConfig, ContrastiveTask
from cogview.studies.paired import best_of, compare, mcnemar, order_right
from cogview.studies.reranking_report import measure
from cogview.tokenizers.image import VQConfig
from cogview.train.loop import Trainer

CONFIG = ContrastiveConfig(image_vocab=20, image_tokens=16, text_vocab=10, max_text=5, width=16, layers=1, heads=2)
TEXT = torch.tensor([[1, 2, 3, -1, -1], [4, 5, -1, -1, -1], [6, 7, 8, 9, 0]])
CODES = torch.randint(20, (3, 16), generator=torch.Generator().manual_seed(0))


def test_mcnemar_is_the_binomial_test_of_what_one_alone_has_right():
    def p(first, second):  # first alone, second alone, and some that both or neither have
        a = [True] * first + [False] * second + [True, True, False]
        b = [False] * first + [True] * second + [True, True, False]
        return mcnemar(torch.tensor(a), torch.tensor(b))

    assert p(0, 0) == p(3, 3) == 1
    assert p(10, 0) == p(0, 10) == pytest.approx(2 / 2**10)
    assert p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_paired_differences():
    first, second = torch.tensor([1.0, 1, 1, 0] * 50), torch.tensor([0.0, 1, 0, 0] * 50)
    found = compare(first, second)
    assert found["difference"] == pytest.approx(0.5)
    error = 1.96 * float((first - second).std()) / math.sqrt(200)
    assert found["interval"] == pytest.approx([0.5 - error, 0.5 + error], abs=0.01)


def test_picks():
    """Of groups of candidates one after the other, the lowest score."""
    scores = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 3]])
    right = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]]).bool()
    assert best_of(scores, right, 4).tolist() == [0, 1]
    assert best_of(scores, right, 2).tolist() == [0, 0.5]
    assert best_of(scores, right, 1).tolist() == right.float().mean(1).tolist()
    by_hand = [
        float(scores[n, a] < scores[n, b])
        for n in range(2)
        for a in range(4)
        for b in range(4)
        if right[n, a] and not right[n, b]
    ]
    assert order_right(scores, right) == pytest.approx(sum(by_hand) / len(by_hand))
    assert math.isnan(order_right(scores, right | True))
    figures = measure(right, scores, {"CapLoss": scores, "contrastive": -scores})
    assert figures["share_right"]["4"] == {"oracle": 1.0, "CapLoss": 0.5, "contrastive": 1.0, "random": 0.5}
    assert figures["share_right"]["1"]["CapLoss"] == figures["share_right"]["1"]["oracle"] == 0.5
    assert figures["psnr"]["2"] == {"oracle": (3 + 2 + 1 + 3) / 4, "CapLoss": 0.75, "contrastive": 2.25, "random": 1.5}


def test_the_contrastive_loss_is_its_formula():
    torch.manual_seed(0)
    model = Contrastive(CONFIG).eval()
    pictures = torch.stack([model.picture(c[None])[0] for c in CODES])
    captions = torch.stack([model.caption(t[t >= 0][None])[0] for t in TEXT])  # padding does not matter
    assert torch.allclose(pictures.norm(dim=-1), torch.ones(3))
    s = math.exp(float(model.scale.detach())) * pictures @ captions.T
    own = (F.log_softmax(s, 0).diagonal() + F.log_softmax(s, 1).diagonal()).sum() / 6
    torch.testing.assert_close(model(TEXT, CODES), -own)
    texts = [row[row >= 0].tolist() for row in TEXT]
    torch.testing.assert_close(model.similarity(texts, CODES, 2), (pictures * captions).sum(-1))


def test_pairs_of_one_picture_are_no_negatives():
    torch.manual_seed(0)
    model = Contrastive(CONFIG).eval()
    double = model(torch.cat([TEXT, TEXT[:1]]), torch.cat([CODES, CODES[:1]]))
    cosines = model.picture(CODES) @ model.caption(TEXT).T
    s = math.exp(float(model.scale.detach())) * cosines[[0, 1, 2, 0]][:, [0, 1, 2, 0]]
    s[0, 3] = s[3, 0] = -torch.inf
    own = (F.log_softmax(s, 0).diagonal() + F.log_softmax(s, 1).diagonal()).sum() / 8
    torch.testing.assert_close(double, -own)


def test_the_contrastive_model_learns_by_the_loop_and_resumes(tmp_path):
    data = Pairs(6)
    config = ContrastiveConfig(**vars(CONFIG) | {"max_text": data.text.shape[1], "image_tokens": data.codes.shape[1]})
    training = TrainConfig(steps=60, batch_size=6, learning_rate=1e-2, dtype="float32", save_every=20)

    def trainer(folder):
        torch.manual_seed(0)
        return Trainer(ContrastiveTask(Contrastive(config), data, data), training, tmp_path / folder)

    whole, begun = trainer("whole").run(), trainer("parts")
    for _ in range(25):
        begun.step()
    begun.save()
    resumed = trainer("parts")
    assert resumed.resume()
    assert resumed.run().validation == whole.validation
    text, codes = data.batch(np.arange(6))
    model = contrastive.load(whole.checkpoint)
    scores = model.picture(codes) @ model.caption(text).T
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == list(range(6))
    split = Trainer(ContrastiveTask(model, data), dataclasses.replace(training, accumulate=2), tmp_path / "split")
    with pytest.raises(ValueError, match="accumulate: expected 1, since the loss is of a whole batch, got 2"):
        split.step()


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "TRAIN_SCENES": 24,
        "TEST_SCENES": 8,
        "IMAGE_STEPS": 2,
        "IMAGE": VQConfig(codebook_size=32, dim=8, hidden=8),
    }.items():
        monkeypatch.setattr(demo, name, value)
    config, training = CogView.presets["tiny"]
    config = dataclasses.replace(config, num_layers=1, hidden_size=64, num_heads=1)
    monkeypatch.setitem(CogView.presets, "tiny", (config, training))


SIZES = {"captions": 3, "candidates": 2, "on_sheet": 3, "base_steps": 2, "caption_steps": 1, "contrastive_steps": 1}


def test_the_study_of_reranking(small, tmp_path, capsys):
    """Everything once; again nothing is trained or drawn; from another folder's tokens the same comes out."""
    first, second = tmp_path / "first", tmp_path / "second"
    Reranking(out=first, **SIZES).run()
    assert "of 3 scenes are right instead of" in capsys.readouterr().out
    for name in ("curve.png", "candidates.png"):
        with Image.open(first / name) as picture:
            assert picture.size[0] > 100
    figures = json.loads((first / "figures.json").read_text())
    assert list(figures["share_right"]) == ["1", "2"]
    assert figures["models"]["caption"]["steps"] == 1
    assert "![curve](curve.png)" in (first / "report.md").read_text()
    drawn, log = (first / "candidates.safetensors").stat().st_mtime_ns, (first / "gpt" / "log.jsonl").read_text()
    Reranking(out=first, **SIZES).run()
    assert (first / "candidates.safetensors").stat().st_mtime_ns == drawn
    assert (first / "gpt" / "log.jsonl").read_text() == log
    assert json.loads((first / "figures.json").read_text())["share_right"] == figures["share_right"]
    Reranking(out=second, source=first, **SIZES).run()
    Reranking(out=second, **SIZES).run()  # goes on with what was copied
    assert json.loads((second / "figures.json").read_text())["share_right"] == figures["share_right"]
    with pytest.raises(ValueError, match="candidates: expected a power of two, got 3"):
        Reranking(out=second, source=first, **SIZES | {"candidates": 3}).run()
    with pytest.raises(ValueError, match="from: expected the folder of a demo with its tokens"):
        Reranking(out=tmp_path / "third", source=tmp_path).run()
