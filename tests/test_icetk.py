"""CogView2's image tokenizer: icetk's formulas on a file of its layout at reduced width, and what is refused."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import released
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli_tokenize import captions, shard, tokenize
from torch import Tensor

from cogview import cli
from cogview.data.tokens import TokenDataset
from cogview.published import icetk
from cogview.published.image import read_image_tokenizer
from cogview.published.torch_file import TorchFile
from cogview.system import System
from cogview.tokenizers.icetk import IcetkConfig, IcetkTokenizer, Quantizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer

RATES = pytest.mark.parametrize("rate", [4, 8, 16])
CODES, DIM, LATENT, CHANNELS = 60, 12, 20, 32
ENCODER, DECODERS = (1, 2, 4), ((1, 1, 1, 2, 4), (1, 1, 2, 4), (1, 2, 4))
EMBED = "quantize.embed.weight"
Shapes = dict[str, list[int]]


def conv(name: str, before: int, width: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": [width, before, kernel, kernel], f"{name}.bias": [width]}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def block(name: str, before: int, width: int) -> Shapes:
    made = norm(f"{name}.norm1", before) | conv(f"{name}.conv1", before, width)
    made |= norm(f"{name}.norm2", width) | conv(f"{name}.conv2", width, width)
    return made if before == width else made | conv(f"{name}.nin_shortcut", before, width, 1)


def attention(name: str, width: int) -> Shapes:
    made = norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        made |= conv(f"{name}.{part}", width, width, 1)
    return made


def middle(name: str, width: int) -> Shapes:
    return (
        block(f"{name}.block_1", width, width)
        | attention(f"{name}.attn_1", width)
        | block(f"{name}.block_2", width, width)
    )


def encoder(channels: int, latent: int) -> Shapes:
    made, before = conv("enc.conv_in", 3, channels), channels
    for i, times in enumerate(ENCODER):
        for j in range(2):
            made |= block(f"enc.down.{i}.block.{j}", before, channels * times)
            before = channels * times
        if i < 2:
            made |= conv(f"enc.down.{i}.downsample.conv", before, before)
    return made | middle("enc.mid", before) | norm("enc.norm_out", before) | conv("enc.conv_out", before, latent)


def decoder(number: int, channels: int, dim: int) -> Shapes:
    times, at = DECODERS[number], f"decs.{number}"
    before = channels * times[-1]
    made = conv(f"{at}.conv_in", dim, before) | middle(f"{at}.mid", before)
    for i in reversed(range(len(times))):
        made |= block(f"{at}.up.{i}.block.0", before, channels * times[i])
        before = channels * times[i]
        if 256 >> i == 16:  # of 256 pixels a side, as it was built for
            made |= attention(f"{at}.up.{i}.attn.0", before)
        if i:
            made |= conv(f"{at}.up.{i}.upsample.conv", before, before)
    return made | norm(f"{at}.norm_out", before) | conv(f"{at}.conv_out", before, 3)


def halving(number: int, latent: int) -> Shapes:
    return conv(f"down_samplers.{number}.conv_down_sampler.conv", latent, latent)


def quantizer(codes: int, dim: int, latent: int) -> Shapes:
    return conv("quantize.proj", latent, dim, 1) | {EMBED: [codes, dim]}


def of_rate(rate: int, codes: int, dim: int, latent: int, channels: int) -> Shapes:
    """What codes of so many pixels a side need."""
    steps = {4: 0, 8: 1, 16: 2}[rate]
    made = encoder(channels, latent) | quantizer(codes, dim, latent) | decoder(2 - steps, channels, dim)
    for i in range(steps):
        made |= halving(i, latent)
    return made


def random_module() -> released.Module:
    g = torch.Generator().manual_seed(3)
    sizes = CODES, DIM, LATENT, CHANNELS
    shapes = {name: shape for rate in (4, 8, 16) for name, shape in of_rate(rate, *sizes).items()}
    made = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        made[name] = torch.randn(shape, generator=g) * scale + (".norm" in name and name.endswith("weight"))
    return made | {"quantize.cluster_size": torch.rand(CODES, generator=g), "quantize.embed_avg": made[EMBED] + 1}


@functools.cache
def spread() -> Tensor:
    """A codebook that pictures use much of at each size: of their vectors, and something else."""
    formulas, g = Formulas(random_module()), torch.Generator().manual_seed(4)
    found = [formulas.vectors(pictures(3, 64, 48), rate).flatten(0, 2) for rate in (4, 8, 16)]
    chosen = torch.cat([some[torch.randperm(len(some), generator=g)[: CODES // 3]] for some in found])
    return (chosen + 0.2 * chosen.std(0) * torch.randn(chosen.shape, generator=g)).float()


def module() -> released.Module:
    """All that the file has."""
    return random_module() | {EMBED: spread().clone()}


class Formulas:
    """icetk's, in plain torch and float64."""

    def __init__(self, weights: released.Module):
        self.w = {name: value.double() for name, value in weights.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride=stride, padding=padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Over the pixels of a 32nd of the channels."""
        B, C, H, W = x.shape
        groups = x.reshape(B, 32, -1)
        variance = groups.var(2, unbiased=False, keepdim=True)
        normed = ((groups - groups.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()).view(B, C, H, W)
        return normed * self.w[f"{name}.weight"].view(1, C, 1, 1) + self.w[f"{name}.bias"].view(1, C, 1, 1)

    def active(self, x: Tensor, name: str) -> Tensor:
        x = self.norm(x, name)
        return x * torch.sigmoid(x)

    def block(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(self.active(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.active(h, f"{name}.norm2"), f"{name}.conv2")
        return (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.w else x) + h

    def attention(self, x: Tensor, name: str) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").reshape(B, C, H * W) for part in "qkv")
        weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * C**-0.5, dim=2)
        attended = torch.bmm(v, weights.permute(0, 2, 1)).reshape(B, C, H, W)
        return x + self.conv(attended, f"{name}.proj_out")

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1")
        return self.block(x, f"{name}.block_2")

    def halved(self, x: Tensor, name: str) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), name, stride=2)

    def vectors(self, images: Tensor, rate: int) -> Tensor:
        x = self.conv((images.double() - released.MEAN) / released.STD, "enc.conv_in")
        for i in range(3):
            for j in range(2):
                x = self.block(x, f"enc.down.{i}.block.{j}")
            if i < 2:
                x = self.halved(x, f"enc.down.{i}.downsample.conv")
        x = self.conv(self.active(self.middle(x, "enc.mid"), "enc.norm_out"), "enc.conv_out")
        for i in range({4: 0, 8: 1, 16: 2}[rate]):
            x = F.avg_pool2d(x, 2, 2) + self.halved(x, f"down_samplers.{i}.conv_down_sampler.conv")
        return self.conv(x, "quantize.proj").permute(0, 2, 3, 1)

    def codes(self, images: Tensor, rate: int) -> Tensor:
        return (self.vectors(images, rate)[..., None, :] - self.w[EMBED]).square().sum(-1).argmin(-1)

    def pictures(self, codes: Tensor, rate: int) -> Tensor:
        number = {4: 2, 8: 1, 16: 0}[rate]
        at = f"decs.{number}"
        x = self.middle(self.conv(self.w[EMBED][codes].permute(0, 3, 1, 2), f"{at}.conv_in"), f"{at}.mid")
        for i in reversed(range(len(DECODERS[number]))):
            x = self.block(x, f"{at}.up.{i}.block.0")
            if f"{at}.up.{i}.attn.0.q.weight" in self.w:
                x = self.attention(x, f"{at}.up.{i}.attn.0")
            if i:
                x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{at}.up.{i}.upsample.conv")
        x = self.conv(self.active(x, f"{at}.norm_out"), f"{at}.conv_out")
        return x * released.STD + released.MEAN


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def write(path: Path, weights: released.Module) -> Path:
    """With what a trainer leaves beside it."""
    torch.save({"module": weights | {"loss.logvar": torch.zeros(1)}, "iteration": 7, "lr": {0.1}}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("icetk") / "ice_image.pt", module())


@RATES
def test_codes_and_pictures_are_those_of_the_formulas(file, rate):
    model, formulas, images = icetk.read(file, rate), Formulas(module()), pictures(3, 64, 48)
    codes = formulas.codes(images, rate)
    assert codes.shape == (3, 64 // rate, 48 // rate)
    assert len(codes.unique()) > 12
    found = model.encode(images)
    assert found.dtype == torch.int64
    assert torch.equal(found, codes)
    drawn = torch.randint(CODES, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    truth = formulas.pictures(drawn, rate)
    assert truth.min() < 0 or truth.max() > 1  # so that clamping tells
    decoded = model.decode(drawn.int())
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), truth.clamp(0, 1), atol=1e-5, rtol=0)


@RATES
def test_names_and_values_are_those_of_the_file(file, rate):
    found, weights = icetk.read(file, rate).state_dict(), module()
    assert {name: list(value.shape) for name, value in found.items()} == of_rate(rate, CODES, DIM, LATENT, CHANNELS)
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


@RATES
def test_the_released_sizes(rate):
    """From the formulas of layers alone: 3 x 3 and 1 x 1 convolutions with a bias, norms of two numbers a channel."""

    def three(a: int, b: int) -> int:
        return 9 * a * b + b

    def one(a: int, b: int) -> int:
        return a * b + b

    def res(a: int, b: int) -> int:
        return 2 * a + three(a, b) + 2 * b + three(b, b) + (one(a, b) if a != b else 0)

    def attends(c: int) -> int:
        return 2 * c + 4 * one(c, c)

    mid = 2 * res(512, 512) + attends(512)
    enc = three(3, 128) + 2 * res(128, 128) + three(128, 128) + res(128, 256) + res(256, 256) + three(256, 256)
    enc += res(256, 512) + res(512, 512) + mid + 2 * 512 + three(512, 256)
    dec = three(256, 512) + mid + res(512, 512) + three(512, 512) + res(512, 256) + three(256, 256)
    dec += res(256, 128) + 2 * 128 + three(128, 3)  # of 4 pixels a code
    halvings = {4: 0, 8: 1, 16: 2}[rate]
    dec += halvings * (res(128, 128) + three(128, 128)) + (attends(512) if rate == 16 else 0)
    total = enc + dec + halvings * three(256, 256) + one(256, 256) + 20000 * 256
    model = IcetkTokenizer.without_weights(IcetkConfig(downsample=rate))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == total
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == of_rate(
        rate, 20000, 256, 256, 128
    )


def test_pictures_go_through_in_groups(file, monkeypatch):
    """As many as there may be at once; none, too."""
    model, images = icetk.read(file), pictures(5, 16, 24)
    codes, seen = model.encode(images), list[int]()
    decoded = model.decode(codes)
    monkeypatch.setattr("cogview.tokenizers.icetk._AT_ONCE", 2 * 16 * 24)
    model.enc.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    model.decs["1"].register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), decoded, atol=1e-5, rtol=0)
    assert seen == [2, 2, 1, 2, 2, 1]
    assert model.encode(images[:0]).shape == (0, 2, 3)
    assert model.decode(codes[:0]).shape == (0, 3, 16, 24)


def test_no_more_than_64_megabytes_of_distances(monkeypatch):
    quantizer, sizes, addmm = Quantizer(IcetkConfig(dim=8)), list[int](), torch.addmm
    vectors = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))

    def counted(*arguments, **how):
        found = addmm(*arguments, **how)
        assert found.dtype == torch.float32
        sizes.append(found.numel() * found.itemsize)
        return found

    monkeypatch.setattr(torch, "addmm", counted)
    with torch.no_grad():
        codes = quantizer.nearest(vectors)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer.nearest(vectors), codes)
        found = torch.cdist(vectors, quantizer.embed.weight, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert len(sizes) > 2
    assert max(sizes) <= 64 << 20
    assert (codes == found).float().mean() > 0.999  # but for the rounding of what is equally far


@RATES
def test_save_and_load(file, rate, tmp_path):
    model = icetk.read(file, rate)
    model.save(path := tmp_path / "m.safetensors")
    loaded = load_image_tokenizer(path)
    assert isinstance(loaded, IcetkTokenizer)
    assert loaded.config == model.config == IcetkConfig(CODES, DIM, LATENT, (32, 64, 128), downsample=rate)
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    codes = model.encode(pictures(2, 32, 32))
    assert torch.equal(loaded.encode(pictures(2, 32, 32)), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    with safe_open(path, "pt") as stored:
        assert stored.metadata()["sha256"] == model.sha256 == loaded.sha256
        assert set(stored.keys()) == of_rate(rate, CODES, DIM, LATENT, CHANNELS).keys()
    assert model.sha256 != icetk.read(file, 4 if rate != 4 else 8).sha256


def test_float16_and_odd_layouts_are_read_as_float32(file, tmp_path):
    weights = {name: value.half() for name, value in module().items()}
    weights["enc.conv_in.weight"] = weights["enc.conv_in.weight"].to(memory_format=torch.channels_last)
    model = icetk.read(write(tmp_path / "half.pt", weights))
    plain = icetk.read(write(tmp_path / "plain.pt", {name: value.float() for name, value in weights.items()}))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert model.sha256 == plain.sha256
    before = model.sha256
    (tmp_path / "half.pt").write_bytes(b"\0" * (tmp_path / "half.pt").stat().st_size)
    assert model.sha256 == before


def test_which_tokenizer_a_file_has(file, tmp_path):
    assert isinstance(read_image_tokenizer(file), IcetkTokenizer)
    torch.save(released.image_tokenizer(), tmp_path / "vqvae.pt")
    assert not icetk.holds(TorchFile(tmp_path / "vqvae.pt"))
    assert read_image_tokenizer(tmp_path / "vqvae.pt").config.codebook_size == released.CODES


def without(name):
    return lambda m: m.pop(name)


def replaced(name, value):
    return lambda m: m.update({name: value})


BIAS = "decs.1.up.0.block.0.conv1.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(BIAS), rf"{BIAS}: expected \[32\], got absent"),
        (without("down_samplers.0.conv_down_sampler.conv.weight"), r"expected \[20, 20, 3, 3\], got absent"),
        (without(EMBED), f"{EMBED}: expected 2 dimensions, got absent"),
        (without("enc.down.1.block.0.conv1.weight"), r"enc\.down\.1\.block\.0\.conv1\.weight: expected 4 dimensions"),
        (replaced(BIAS, torch.ones(31)), rf"{BIAS}: expected \[32\], got \[31\]"),
        (replaced(BIAS, torch.ones(32) / 0), f"{BIAS}: expected finite floating-point values, got others"),
        (replaced(BIAS, torch.full((32,), torch.nan)), f"{BIAS}: expected finite floating-point values, got others"),
        (replaced(BIAS, torch.ones(32, dtype=torch.int16)), f"{BIAS}: expected finite floating-point values"),
        (replaced(BIAS, 3), f"image tokenizer: expected tensors by name, got '{BIAS}'"),
        (replaced("enc.\x1b[2J", torch.ones(1)), r"image tokenizer: expected tensors by name, got 'enc\.\\x1b\[2J'"),
        (replaced("enc.down.3.block.0.conv1.bias", torch.ones(1)), r"enc\.down\.3.*: expected absent, got \[1\]"),
        (replaced("decs.1.up.3.attn.0.q.bias", torch.ones(1)), r"attn\.0\.q\.bias: expected absent, got \[1\]"),
        (
            replaced("enc.down.0.block.0.conv1.weight", torch.ones(33, 32, 3, 3)),
            "widths: expected multiples of 32, got 33",
        ),
        (replaced(EMBED, torch.ones(60, 0)), "is no image tokenizer of CogView2: dim: expected a number from 1"),
        (replaced(EMBED, torch.ones(1).expand(60, 12)), f"{EMBED} is larger than what is stored of it"),
        (lambda m: m.clear(), f"{EMBED}: expected 2 dimensions, got absent"),
    ],
)
def test_files_that_are_not_whole(tmp_path, change, said):
    weights = module()
    change(weights)
    path = write(tmp_path / "ice_image.pt", weights)
    with pytest.raises(ValueError, match=rf"ice_image\.pt.*{said}") as error:
        read_image_tokenizer(path)
    assert "\n" not in str(error.value)


def test_what_another_size_needs_is_not_looked_at(tmp_path):
    weights = {name: value for name, value in module().items() if not re.match(r"decs\.[02]|down_samplers\.1", name)}
    icetk.read(path := write(tmp_path / "a.pt", weights))
    for rate in (4, 16):
        with pytest.raises(ValueError, match=r"(decs|down_samplers)\.\d\..*: expected .*, got absent|decoder_blocks"):
            icetk.read(path, rate)
    with pytest.raises(ValueError, match="downsample: expected 4, 8 or 16, got 32"):
        icetk.read(path, 32)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "text").write_text("hello")
    torch.save(released.image_tokenizer(), tmp_path / "vqvae.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"text is no whole file of torch\.save: "):
        icetk.read(tmp_path / "text")
    for name in ("vqvae.pt", "list.pt"):
        with pytest.raises(ValueError, match=rf"{name} is no image tokenizer of CogView2: expected tensors by name"):
            icetk.read(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        icetk.read(tmp_path / "nothing")


def test_what_is_no_picture_and_no_code(file):
    model = icetk.read(file)
    for codes in (torch.tensor([[[CODES]]]), torch.tensor([[[-1]]])):
        with pytest.raises(ValueError, match="codes: expected 0 to 59, got "):
            model.decode(codes)
    with pytest.raises(ValueError, match=r"codes: expected integers \[B, h, w\], got torch\.float32"):
        model.decode(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="H and W multiples of 8"):
        model.encode(pictures(1, 16, 20))
    with pytest.raises(TypeError, match=r"images: expected floating point in \[0, 1\]"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_what_cannot_be_loaded_says_why(file, tmp_path):
    icetk.read(file).save(path := tmp_path / "m.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as stored:
        config = json.loads(stored.metadata()["config"])

    def refused(said: str, tensors: released.Module = tensors, **change: object) -> None:
        metadata = {"format": "cogview-icetk-1", "config": json.dumps(config | change)}
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=said):
            load_image_tokenizer(path)

    refused("has no valid config .*widths: expected three of them, got", widths=[32, 64])
    refused("has no valid config .*widths: expected a number from 1 to 65,536, got '32'", widths=["32", 64, 128])
    refused("has no valid config .*blocks: expected a number from 1 to 100, got 1000000000", blocks=10**9)
    refused("has no valid config .*downsample: expected 4, 8 or 16, got 12", downsample=12)
    refused("has no valid config .*unexpected keyword", other=1)
    refused(r"decs\.2\.conv_in\.weight: expected \(128, 12, 3, 3\), got nothing", downsample=4)
    refused(r"quantize\.embed\.weight: expected \(61, 12\), got \(60, 12\)", codebook_size=61)
    refused(f"{BIAS}: expected .*, got nothing", {name: value for name, value in tensors.items() if name != BIAS})
    whole = path.read_bytes()
    icetk.read(file).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert whole != damaged
    with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
        load_image_tokenizer(path)


def test_a_run_with_it(file, tmp_path, capsys):
    """Tokenized without the file the second time; another one is refused."""
    a, run = shard(tmp_path / "a.tar", captions(6)), tmp_path / "run"
    moved = tmp_path / "ice_image.pt"
    moved.write_bytes(file.read_bytes())
    tokenize(a, "--run", run, "--image-size", "16", "--codec", moved)
    assert f"image tokenizer: 60 codes, in {run}, of {moved}" in capsys.readouterr().out.replace("\n", "")
    moved.unlink()
    tokenize(shard(tmp_path / "b.tar", captions(3, 6)), "--run", run, "--split", "test")
    model = icetk.read(file)
    for split in ("train", "test"):
        data = TokenDataset(run / "tokens" / split)
        assert (data.tokenizers[1], data.meta["codebook_size"], data.meta["grid"]) == (model.sha256, CODES, [2, 2])
    torch.save(released.image_tokenizer(), tmp_path / "vqvae.pt")
    with pytest.raises(SystemExit, match=r"codec: .*run has another image tokenizer than .*vqvae\.pt: name another"):
        tokenize(a, "--run", run, "--codec", tmp_path / "vqvae.pt")
    tokenize(a, "--run", tmp_path / "second", "--image-size", "16", "--codec", tmp_path / "vqvae.pt")
    assert TokenDataset(tmp_path / "second" / "tokens" / "train").meta["codebook_size"] == released.CODES


def test_a_model_of_its_codes_is_imported(file, tmp_path):
    text = TextTokenizer.train(captions(6), 300)
    text.save(tmp_path / "text.model")
    rows = -(-(CODES + text.vocab_size + 27) // 128) * 128
    source = released.write_model(tmp_path / "model", released.module(rows))
    run, given = tmp_path / "run", ["--text", str(tmp_path / "text.model"), "--vqvae", str(file)]
    cli.main(["import-weights", str(source), "--run", str(run), *given])
    cli.main(["import-weights", str(source), "--run", str(run), "--name", "other"])
    system = System.load(run, name="other")
    assert system.image.sha256 == icetk.read(file).sha256
    assert system.recipe.config.image_vocab == CODES
    assert system.draw(["a fox"], seeds=[0]).shape == (1, 3, 32, 32)
    with pytest.raises(SystemExit, match="image tokenizer: expected a VQ-VAE, got 'IcetkTokenizer'"):
        cli.main(["export-weights", str(run), "--out", str(tmp_path / "out")])
