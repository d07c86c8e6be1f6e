"""DALL-E's image tokenizer: the relaxed codebook, and pictures as logit-Laplace distributions."""

import math

import pytest
import torch

from cogview.cli import main
from cogview.config import TrainConfig
from cogview.data.images import pixels
from cogview.demo.scenes import render, sample_scenes
from cogview.published.convert import _released_image
from cogview.tokenizers import logit_laplace
from cogview.tokenizers.codebook import Relaxed, kl_from_uniform
from cogview.tokenizers.image import PRESETS, VQVAE, VQConfig
from cogview.tokenizers.train_image import TRAINING, train_vqvae
from cogview.train.log import read_log

DALLE = {"codebook": "relaxed", "reconstruction": "logit_laplace"}
TINY = VQConfig(codebook_size=16, dim=8, hidden=8, **DALLE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_likelihood_is_the_formulas():
    pictures, m, of_b = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    found = logit_laplace.negative_log_likelihood(torch.cat([m, of_b], 1), pictures)
    x, b = 0.8 * pictures.double() + 0.1, of_b.double().exp() + 4 * 0.8 / 255
    density = 1 / (2 * b * x * (1 - x)) * torch.exp(-((x / (1 - x)).log() - m.double()).abs() / b)
    torch.testing.assert_close(found.double(), -density.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "of_b"), [(0.0, -2.0), (1.5, -0.5), (-2.0, -1.0), (0.3, -30.0)])
def test_density_integrates_to_one(m, of_b):
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1].view(1, 1, 1, -1)
    decoded = torch.tensor([m, of_b], dtype=torch.float64).view(1, 2, 1, 1)
    density = (-logit_laplace.negative_log_likelihood(decoded, (x - 0.1) / 0.8)).exp()
    assert float(torch.trapezoid(density.flatten(), x.flatten())) == pytest.approx(1, abs=1e-4)


def test_decoded_pictures_are_the_mappings_inverse():
    pictures = torch.rand(2, 3, 4, 5)
    decoded = torch.cat([(0.8 * pictures + 0.1).logit(), torch.randn_like(pictures)], 1)
    torch.testing.assert_close(logit_laplace.pictures_of(decoded), pictures)
    model, codes = VQVAE(TINY).eval(), torch.randint(16, (2, 3, 4))
    with torch.no_grad():
        model.dec.blocks[-1].weight.mul_(20)  # dark and bright ones beyond what there is
        m = model._decoded(model.quantize_t.vectors_of(codes))[:, :3]
        torch.testing.assert_close(model.decode(codes), ((m.sigmoid() - 0.1) / 0.8).clamp(0, 1))
    assert model.decode(codes).min() == 0
    assert model.decode(codes).max() == 1


def test_kl_is_of_equal_and_of_certain_logits():
    logits = torch.zeros(2, 16)
    logits[1, 3] = 1e4
    assert kl_from_uniform(logits).tolist() == pytest.approx([0, math.log(16)], abs=1e-6)
    logits = torch.randn(5, 16)
    expected = (logits.softmax(1) * (logits.softmax(1) * 16).log()).sum(1)
    torch.testing.assert_close(kl_from_uniform(logits), expected)


def test_temperature_and_weight_go_along_half_a_cosine(monkeypatch):
    monkeypatch.setattr(Relaxed, "COOLED", 0.5)
    monkeypatch.setattr(Relaxed, "WEIGHED", 0.1)
    codebook, logits = Relaxed(TINY), torch.randn(7, 16)

    def at(share: float, name: str) -> float:
        return codebook(logits, share).shown[name].item()

    assert [at(s, "temperature") for s in (0, 0.25, 0.5, 1)] == pytest.approx([1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16])
    assert at(0.125, "temperature") == pytest.approx(1 - 15 / 16 * (1 - math.cos(math.pi / 4)) / 2)
    assert [at(s, "kl_weight") for s in (0, 0.05, 0.1, 1)] == pytest.approx([0, 3.3, 6.6, 6.6])
    chosen = codebook(logits, 0.05)
    assert chosen.losses["weighted_kl"].item() == pytest.approx(3.3 / 192 * kl_from_uniform(logits).mean().item())


def test_the_decoder_gets_mixtures_in_training_and_codes_else():
    codebook, logits = Relaxed(TINY), torch.randn(500, 16)
    state = torch.get_rng_state()
    found = codebook(logits, share=0.0)
    torch.set_rng_state(state)
    noise = -torch.log(torch.empty(500, 16).exponential_())
    torch.testing.assert_close(found.vectors, (logits + noise).softmax(1) @ codebook.embed.t())
    assert torch.equal(found.codes, logits.argmax(1))  # whatever the noise
    assert torch.equal(codebook(logits, share=1.0).codes, found.codes)
    judged = codebook.eval()(logits, share=0.0)
    assert torch.equal(judged.vectors, codebook.embed.t()[found.codes])
    assert torch.equal(judged.codes, found.codes)


def test_drawn_codes_are_as_likely_as_the_encoder_says():
    codebook, count = Relaxed(VQConfig(codebook_size=3, dim=3, hidden=8, codebook="relaxed")), 40_000
    codebook.embed.data, codebook.LAST = torch.eye(3), 1e-6  # a mixture is then one code
    mean = codebook(torch.tensor([[0.2, -0.5, 1.0]]).repeat(count, 1)).vectors.mean(0)
    torch.testing.assert_close(mean, torch.tensor([0.2, -0.5, 1.0]).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("reconstruction", ["pixels", "logit_laplace"])
def test_gradients_reach_encoder_and_codes(reconstruction):
    model = VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8, codebook="relaxed", reconstruction=reconstruction))
    rebuilt, losses, codes = model(torch.rand(2, 3, 16, 24), 0.5)
    assert rebuilt.shape == (2, 3, 16, 24)
    assert codes.shape == (2, 2, 3)
    parts = {"reconstruction", "weighted_kl"} | ({"edges"} if reconstruction == "pixels" else set())
    assert set(losses) == parts | {"total", "kl", "temperature", "kl_weight"}
    torch.testing.assert_close(losses["total"], torch.stack([losses[name] for name in parts]).sum())
    losses["total"].backward()
    weights = dict(model.named_parameters())
    assert "quantize_t.embed" in weights
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in weights.values())


@pytest.mark.parametrize("codebook", ["relaxed", "moving_average"])
def test_encode_and_decode_agree_with_forward(codebook, tmp_path):
    config = VQConfig(codebook_size=16, dim=8, hidden=8, codebook=codebook, reconstruction="logit_laplace")
    model, images = VQVAE(config), torch.rand(3, 3, 24, 16)
    model(images)
    model.eval().save(tmp_path / "m.safetensors")
    loaded = VQVAE.load(tmp_path / "m.safetensors")
    assert (loaded.config, loaded.sha256) == (config, model.sha256)
    with torch.no_grad():
        rebuilt, _, codes = loaded(images)
        assert torch.equal(model.encode(images), codes)
        torch.testing.assert_close(model.decode(codes), rebuilt.clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert loaded.codebook.shape == (16, 8)


@pytest.mark.parametrize("reconstruction", ["pixels", "logit_laplace"])
def test_a_short_training_on_scenes(reconstruction, tmp_path):
    images = torch.stack([pixels(render(scene), 64) for scene in sample_scenes("train", 32)])[:, :, :32, :32]
    config = VQConfig(codebook_size=64, dim=16, hidden=32, codebook="relaxed", reconstruction=reconstruction)
    how = TRAINING | {"batch_size": 16, "learning_rate": 4e-3}
    report = train_vqvae(images, config, TrainConfig(steps=150, **how), tmp_path)
    first, *_, last = read_log(tmp_path / "vqvae")
    assert last["reconstruction"] < first["reconstruction"] - 0.2
    assert report.psnr > first["psnr"] + 1.5
    assert report.used_codes > 10
    assert first["kl_weight"] == pytest.approx(6.6 * 19 / 20)  # of the first steps' mean one has none
    assert last["kl_weight"] == pytest.approx(6.6)
    assert 1 > first["temperature"] > 0.9 > 0.07 > last["temperature"] > 1 / 16
    assert 0 < first["kl"] < last["kl"] < math.log(64)


def test_beside_a_discriminator(tmp_path):
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    how = TRAINING | {"batch_size": 4, "log_every": 1}
    report = train_vqvae(images, TINY, TrainConfig(steps=4, **how), tmp_path, adversarial=True)
    last = read_log(tmp_path / "vqvae")[-1]
    assert last["verdict"] != 0
    assert last["temperature"] < 1
    assert all(math.isfinite(value) for value in last.values())
    assert VQVAE.load(report.model).config == TINY


def test_presets_are_dalles():
    (side, config), (small, tiny) = PRESETS["dalle"], PRESETS["dalle-tiny"]
    assert (side, config.codebook_size, config.downsample, small) == (256, 8192, 8, 64)
    assert {(c.codebook, c.reconstruction, c.kl_weight) for c in (config, tiny)} == {("relaxed", "logit_laplace", 6.6)}
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in VQVAE(config).state_dict().items()}
    assert shapes["enc_b.blocks.6.weight"] == (8192, 512, 1, 1)
    assert shapes["quantize_t.embed"] == (128, 8192)
    assert shapes["dec.blocks.6.weight"] == (6, 512, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"kl_weight": -0.1}, "kl_weight: expected a finite number of at least 0, got -0.1"),
        ({"kl_weight": math.nan}, "kl_weight: expected a finite number of at least 0, got nan"),
        ({"kl_weight": math.inf}, "kl_weight: expected a finite number of at least 0, got inf"),
        ({"reconstruction": "x"}, "reconstruction: expected one of pixels, logit_laplace, got 'x'"),
    ],
)
def test_bad_configs_are_refused(sizes, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        VQConfig(**sizes)


@pytest.mark.parametrize("how", [{"codebook": "relaxed"}, {"reconstruction": "logit_laplace"}])
def test_they_are_no_files_of_cogviews(how):
    with pytest.raises(ValueError, match="image tokenizer: expected nearest codes and pixels, as CogView's"):
        _released_image(VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8, **how)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (["--image-preset", "dalle-tiny", "--kl-weight", "nan"], "kl_weight: expected a finite number of at least 0"),
        (["--image-preset", "dalle-tiny", "--kl-weight", "-1"], "kl_weight: expected a finite number of at least 0"),
        (["--kl-weight", "1"], "kl_weight: expected none without --codebook-training relaxed, got 1.0"),
        (
            ["--image-preset", "dalle", "--codebook-training", "fixed", "--kl-weight", "1"],
            "kl_weight: expected none without --codebook-training relaxed",
        ),
    ],
)
def test_bad_options_are_refused(how, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        main(["tokenize", str(tmp_path / "a.tar"), "--run", str(tmp_path / "run"), *how])
    assert not (tmp_path / "run").exists()
