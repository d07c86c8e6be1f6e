import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cogview.config import TrainConfig
from cogview.demo.scenes import render, sample_scenes
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.train_image import TRAINING, Pictures, PictureTask, passes_of, steps_for, train_vqvae
from cogview.train.feed import streams
from cogview.train.log import read_log

TINY = VQConfig(codebook_size=16, dim=8, hidden=8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scenes(n: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(render(s))).permute(2, 0, 1) for s in sample_scenes("train", n)])


def test_names_and_shapes_are_those_of_the_released_weights():
    shapes = {name: list(value.shape) for name, value in VQVAE(VQConfig()).state_dict().items()}
    weights = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    assert weights == {
        "enc_b.blocks.0.weight": [512, 3, 4, 4],
        "enc_b.blocks.2.weight": [512, 512, 4, 4],
        "enc_b.blocks.4.weight": [512, 512, 4, 4],
        "enc_b.blocks.6.weight": [256, 512, 1, 1],
        "quantize_t.embed": [256, 8192],
        "quantize_t.cluster_size": [8192],
        "quantize_t.embed_avg": [256, 8192],
        "dec.blocks.0.weight": [256, 512, 4, 4],
        "dec.blocks.2.weight": [512, 512, 4, 4],
        "dec.blocks.4.weight": [512, 512, 4, 4],
        "dec.blocks.6.weight": [3, 512, 1, 1],
    }
    assert len(shapes) - len(weights) == 8  # one bias for each of eight convolutions


def test_upsampling_is_the_transposed_convolution():
    layer = VQVAE(TINY).dec.blocks[0]
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 8, 5, 3)
    expected = torch.nn.functional.conv_transpose2d(x, layer.weight, layer.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_gradient_passes_the_codebook_straight_through():
    model = VQVAE(TINY)
    images = torch.rand(2, 3, 16, 16)
    vectors = model._encoded(images).detach()
    model.quantize_t(vectors.flatten(0, 2))
    model.eval()
    quantized = model.quantize_t(vectors.flatten(0, 2)).vectors.view_as(vectors)
    at_encoder = vectors.clone().requires_grad_()
    model._decoded(at_encoder + (quantized - at_encoder).detach()).square().sum().backward()
    at_codes = quantized.clone().requires_grad_()
    model._decoded(at_codes).square().sum().backward()
    torch.testing.assert_close(at_encoder.grad, at_codes.grad)
    assert at_codes.grad.abs().sum() > 0
    _, losses, _ = model(images)
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.enc_b.blocks[0].weight.grad.abs().sum() > 0


def test_encode_decode_agree_with_forward():
    model = VQVAE(TINY).eval()
    images = torch.rand(3, 3, 24, 16)
    with torch.no_grad():
        reconstruction, _, codes = model(images)
        assert codes.shape == (3, 3, 2)
        assert torch.equal(model.encode(images), codes)
        torch.testing.assert_close(model.decode(codes), reconstruction.clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_save_and_load(tmp_path):
    model = VQVAE(TINY)
    model.train()(torch.rand(2, 3, 16, 16))
    model.save(tmp_path / "m.safetensors")
    loaded = VQVAE.load(tmp_path / "m.safetensors")
    assert loaded.config == TINY
    assert loaded.sha256 == model.sha256 != VQVAE(TINY).sha256
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_cannot_be_loaded_says_why(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="path: no image tokenizer"):
        VQVAE.load(path)
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        VQVAE.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected cogview-vqvae-1"):
        VQVAE.load(path)
    VQVAE(TINY).save(path)
    tensors = load_file(path)
    metadata = {
        "format": "cogview-vqvae-1",
        "config": json.dumps({"codebook_size": 17, "dim": 8, "hidden": 8}),
    }
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"quantize_t.embed: expected \(8, 17\), got \(8, 16\)"):
        VQVAE.load(path)
    for config in ("{", '{"codebook_size": "many"}', '{"surprise": 1}', "[]"):
        save_file(tensors, path, metadata | {"config": config})
        with pytest.raises(ValueError, match=r"path: .* has no valid config"):
            VQVAE.load(path)


def test_arguments_are_checked():
    model = VQVAE(TINY)
    with pytest.raises(ValueError, match="images: expected"):
        model.encode(torch.rand(1, 3, 15, 16))
    with pytest.raises(TypeError, match="images: expected floating"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes: expected 0 to 15"):
        model.decode(torch.full((1, 2, 2), 16))
    with pytest.raises(ValueError, match="downsample: expected a power of two"):
        VQConfig(downsample=6)


def training(steps: int, **change) -> TrainConfig:
    return TrainConfig(steps=steps, **TRAINING | {"batch_size": 4} | change)


def test_overfits_a_few_pictures_and_reports(tmp_path):
    images = scenes(4)[:, :, 16:48, 16:48]
    config = VQConfig(codebook_size=64, dim=16, hidden=32)
    report = train_vqvae(images, config, training(160, learning_rate=4e-3), tmp_path)
    assert report.psnr > 16
    assert report.finished
    assert report.used_codes > 16
    log = read_log(tmp_path / "vqvae")
    assert [record["step"] for record in log] == list(range(20, 161, 20))
    assert log[-1]["total"] < 0.5 * log[0]["total"]
    assert Image.open(report.reconstructions).size == (4 * 64, 128)
    assert VQVAE.load(report.model).config == config


def test_resume_gives_the_same_weights(tmp_path, monkeypatch):
    images, forward, calls = scenes(10), VQVAE.forward, 0

    def interrupted(self, *given):
        nonlocal calls
        calls += 1
        if calls in (8, 20):
            signal.raise_signal(signal.SIGINT)  # the step is done all the same
        return forward(self, *given)

    train_vqvae(images, TINY, training(30), tmp_path / "whole")
    monkeypatch.setattr(VQVAE, "forward", interrupted)
    reports = [train_vqvae(images, TINY, training(30), tmp_path / "parts") for _ in range(3)]
    assert [(r.steps, r.finished) for r in reports] == [(8, False), (20, False), (30, True)]
    whole, parts = (load_file(tmp_path / name / "vqvae.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ValueError, match="of another run: seed: expected 1, got 0"):
        train_vqvae(images, TINY, training(30, seed=1), tmp_path / "parts")
    with pytest.raises(ValueError, match="of another run: dim: expected 9, got 8"):
        train_vqvae(images, VQConfig(codebook_size=16, dim=9, hidden=8), training(30), tmp_path / "parts")


def test_a_step_in_parts(tmp_path):
    """Of the same pictures, whose codebook moves once a part."""
    for count in (1, 2):
        train_vqvae(scenes(4), TINY, training(1, accumulate=count, log_every=1), tmp_path / str(count))
    one, two = (read_log(tmp_path / name)[0] for name in ("1/vqvae", "2/vqvae"))
    assert one["reconstruction"] == pytest.approx(two["reconstruction"], rel=0.2)
    assert one["step"] == two["step"] == 1


def test_parts_of_a_batch_add_up_to_its_loss():
    model = VQVAE(TINY).eval()
    task = PictureTask(model, Pictures(scenes(6)))
    task.bfloat16 = False
    batch = task.batch(task.data, np.arange(6), streams(range(6)))
    whole, _ = task.loss(batch, batch)
    parts = [task.loss(part, batch)[0] for part in batch.chunk(4)]
    assert len(parts) == 3
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_training_arguments_are_checked(tmp_path):
    images = scenes(2)
    with pytest.raises(ValueError, match="images: expected uint8"):
        train_vqvae(images.float(), TINY, training(1), tmp_path)
    with pytest.raises(ValueError, match="images: expected uint8"):
        train_vqvae(images[:0], TINY, training(1), tmp_path)


def test_training_sees_squares_of_large_pictures_and_validation_whole_ones():
    torch.manual_seed(1)
    images = torch.randint(256, (5, 3, 72, 88), dtype=torch.uint8)
    task = PictureTask(VQVAE(TINY).train(), Pictures(images), Pictures(images))
    batch = (task.batch(task.data, np.array([4, 0, 0]), streams(range(3))) * 255).round().to(torch.uint8)
    assert batch.shape == (3, 3, 64, 64)
    places = [(t, l) for t in range(9) for l in range(25)]
    found = [
        [(t, l) for t, l in places if torch.equal(square, images[row][:, t : t + 64, l : l + 64])]
        for row, square in zip((4, 0, 0), batch, strict=True)
    ]
    assert all(len(where) == 1 for where in found)
    assert found[1] != found[2]
    again = task.batch(task.data, np.array([4, 0, 0]), streams(range(3)))
    assert torch.equal((again * 255).round().to(torch.uint8), batch)
    draws = streams(range(1))
    state = draws[0].get_state()
    assert task.batch(task.held_out, np.array([1]), draws, training=False).shape == (1, 3, 72, 88)
    task.batch(Pictures(images[:, :, :64, :64]), np.array([1]), draws)
    assert torch.equal(draws[0].get_state(), state)  # whole pictures need no draws


def test_held_out_pictures_are_judged_by_and_not_trained_on(tmp_path):
    images = scenes(12)
    images[[3, 7]] = 255 - images[[3, 7]]
    report = train_vqvae(images, TINY, training(8), tmp_path, held_out=np.array([3, 7]))
    model = VQVAE.load(report.model)
    with torch.no_grad():
        rebuilt = model.decode(model.encode(images[[3, 7]].float() / 255))
    squared = ((rebuilt * 255).round() - images[[3, 7]]).square().mean() / 255**2
    assert report.held_out == 2
    assert report.psnr == pytest.approx(float(-10 * squared.log10()), abs=1e-3)
    assert report.used_codes == len(model.encode(images[[3, 7]].float() / 255).unique())
    validated = [entry["validation_psnr"] for entry in read_log(tmp_path / "vqvae") if "validation_psnr" in entry]
    assert validated[-1] == pytest.approx(report.psnr, abs=0.2)  # in bfloat16 where that is native
    other = images.clone()
    other[[3, 7]] = 0
    again = train_vqvae(other, TINY, training(8), tmp_path / "again", held_out=np.array([3, 7]))
    before, after = load_file(report.model), load_file(again.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("pictures", "size", "passes", "steps"),
    [
        (3000, 64, None, 1250),
        (3000, 128, None, 1250),
        (24, 64, None, 1250),
        (16384, 128, None, 4096),  # two passes
        (10**6, 128, None, 5000),
        (3000, 64, 2.0, 188),
        (3000, 128, 2.0, 750),
        (10, 32, 1.0, 1),
    ],
)
def test_steps_and_passes(pictures, size, passes, steps):
    assert steps_for(pictures, size, passes) == steps
    seen = steps * 32 * min(size, 64) ** 2
    assert passes_of(steps, pictures, size) == pytest.approx(seen / (pictures * size**2))
