import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cogview.config import TrainConfig
from cogview.tokenizers.adversarial import VQGAN, Discriminator
from cogview.tokenizers.image import PRESETS, VQVAE, VQConfig
from cogview.tokenizers.train_image import TRAINING, Pictures, PictureTask, crop_of, train_vqvae
from cogview.train import checkpoint
from cogview.train.feed import streams
from cogview.train.log import read_log

TINY = VQConfig(codebook_size=16, dim=8, hidden=8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pictures(n: int, side: int = 32) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8)


def training(steps: int, **change) -> TrainConfig:
    return TrainConfig(steps=steps, **TRAINING | {"batch_size": 4} | change)


def test_each_loss_reaches_its_own_part():
    model = VQGAN(VQVAE(TINY))
    images = torch.rand(2, 3, 32, 32)
    _, losses, _ = model(images)
    ours, its = list(model.vqvae.parameters()), list(model.discriminator.parameters())

    def reached(loss: torch.Tensor, weights: list[torch.Tensor]) -> set[bool]:
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return {g is not None and bool(g.abs().sum() > 0) for g in found}

    assert reached(losses["discriminator"], ours) == {False}
    assert True in reached(losses["discriminator"], its)
    for name in ("features", "verdict"):
        assert True in reached(losses[name], ours)
        assert reached(losses[name], its) == {False}


def test_losses_against_plain_formulas():
    model, images = VQGAN(VQVAE(TINY)), torch.rand(2, 3, 32, 32)
    model.vqvae(images)  # the codes begin
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rebuilt, losses, _ = model(images)
    model.load_state_dict(state)
    plain, of_plain, _ = model.vqvae(images)
    torch.testing.assert_close(rebuilt, plain)
    on_true, on_drawn = (model.discriminator((x - model.vqvae.mean) / model.vqvae.std) for x in (images, plain))
    hinge = (F.relu(1 - on_true[-1]).mean() + F.relu(1 + on_drawn[-1]).mean()) / 2
    torch.testing.assert_close(losses["discriminator"], hinge)
    features = sum((a - b).abs().mean() for a, b in zip(on_true[:-1], on_drawn[:-1], strict=True)) / 2
    torch.testing.assert_close(losses["features"], features)
    last, verdict = model.vqvae.dec.blocks[-1].weight, -on_drawn[-1].mean()
    of_others, of_verdict = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (of_plain["total"] + features, verdict)
    )
    torch.testing.assert_close(losses["verdict"], 0.8 * of_others / (of_verdict + 1e-4) * verdict)
    total = of_plain["total"] + features + losses["verdict"] + hinge
    torch.testing.assert_close(losses["total"], total)


def test_the_verdict_counts_from_a_quarter_on():
    model, images = VQGAN(VQVAE(TINY)), torch.rand(2, 3, 32, 32)
    assert model(images, 0.24)[1]["verdict"].item() == 0
    assert model(images, 0.25)[1]["verdict"].item() != 0
    model.eval()
    assert set(model(images)[1]) == {"reconstruction", "edges", "commitment", "total"}


def test_a_patch_is_judged_by_22_pixels():
    judge = Discriminator()
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    verdict = judge(image)[-1]
    assert verdict.shape == (1, 1, 15, 15)
    found = F.conv2d(image, judge.layers[0][0].weight, stride=2, padding=1)  # without the norm, which sees everything
    found = F.conv2d(found, judge.layers[1][0].weight, stride=2, padding=1)
    found = F.conv2d(found, judge.layers[2].weight, padding=1)
    (seen,) = torch.autograd.grad(found[0, 0, 7, 7], image)
    rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 22


def test_resume_gives_the_same_weights(tmp_path, monkeypatch):
    images, forward, calls = pictures(10), VQGAN.forward, 0

    def interrupted(self, *given):
        nonlocal calls
        calls += 1
        if calls in (3, 7):  # before and after the verdict counts
            signal.raise_signal(signal.SIGINT)  # the step is done all the same
        return forward(self, *given)

    config = VQConfig(codebook_size=16, dim=8, hidden=8, codebook="gumbel")  # random numbers, too
    how = {"adversarial": True, "held_out": np.array([9])}
    train_vqvae(images, config, training(12, log_every=1), tmp_path / "whole", **how)
    monkeypatch.setattr(VQGAN, "forward", interrupted)
    reports = [train_vqvae(images, config, training(12, log_every=1), tmp_path / "parts", **how) for _ in range(3)]
    assert [(r.steps, r.finished) for r in reports] == [(3, False), (7, False), (12, True)]
    whole, parts = (checkpoint.read(checkpoint.latest(tmp_path / name / "vqvae"))[0] for name in ("whole", "parts"))
    assert any(name.startswith("optimizer.exp_avg.discriminator.") for name in whole)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [[e["discriminator"] for e in read_log(tmp_path / n / "vqvae") if "loss" in e] for n in ("whole", "parts")]
    assert lines[0] == lines[1]
    with pytest.raises(ValueError, match="of another run: recipe: expected 'vqvae', got 'vqgan'"):
        train_vqvae(images, config, training(12), tmp_path / "parts", held_out=np.array([9]))
    with pytest.raises(ValueError, match="of another run: codebook: expected 'fixed', got 'gumbel'"):
        train_vqvae(images, VQConfig(16, 8, 8, codebook="fixed"), training(12), tmp_path / "parts", **how)


def test_the_result_is_an_ordinary_tokenizer(tmp_path):
    report = train_vqvae(pictures(6), TINY, training(3), tmp_path, adversarial=True)
    model = VQVAE.load(report.model)
    assert model.config == TINY
    assert load_file(report.model).keys() == VQVAE(TINY).state_dict().keys()


def test_fashion_presets_have_50_by_50_codes():
    for name, pixels in (("fashion-400", 400), ("fashion-800", 800)):
        side, config = PRESETS[name]
        assert side == pixels == 50 * config.downsample
    assert crop_of(PRESETS["fashion-400"][1]) == 64
    large = VQConfig(codebook_size=16, dim=8, hidden=8, downsample=16)
    task = PictureTask(VQVAE(large), Pictures(pictures(2, 160)))
    assert task.batch(task.data, np.array([1]), streams(range(1))).shape == (1, 3, 128, 128)
