"""Published codecs as image tokenizers: codes and pictures are those of the libraries' own models, whose weights are
random here; a run with one is tokenized, trained and drawn from like any other."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogview import cli
from cogview.data.shards import ShardWriter
from cogview.data.tokens import TokenDataset
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.system import System
from cogview.tokenizers import codec_folder
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.published_codec import PublishedCodec
from cogview.tokenizers.text import TextTokenizer

transformers: Any = pytest.importorskip("transformers")
diffusers: Any = pytest.importorskip("diffusers")
JanusVQVAE = transformers.JanusVQVAE

NETWORK: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 4}
JANUS = NETWORK | {"num_embeddings": 20, "latent_channels": 8, "num_patches": 4}
EMU3 = NETWORK | {"codebook_size": 24, "latent_channels": 4, "attn_resolutions": [1], "hidden_size": 32}
VQ: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 32, 32),
    "norm_num_groups": 4,
    "num_vq_embeddings": 18,
    "vq_embed_dim": 5,
}


def spread_out(model: Any, latents: Callable[[Tensor], Tensor] | None = None) -> Any:
    """The model with a codebook that pictures use much of: latents of random pictures around zero, codes alike."""
    with torch.no_grad():
        if latents is not None:
            found = latents(torch.rand(8, 3, 16, 16)).movedim(1, -1).flatten(0, 2)
            model.quant_conv.bias.sub_(found.mean(0)).div_(found.std(0))
            model.quant_conv.weight.div_(found.std(0).view(-1, 1, 1, 1))
        model.quantize.embedding.weight.copy_(torch.randn(model.quantize.embedding.weight.shape))
    return model.eval()


def janus(**change: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**JANUS | change))
    return spread_out(model, lambda images: model.quant_conv(model.encoder(images)))


def emu3(**change: Any) -> Any:
    torch.manual_seed(0)
    return spread_out(transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**EMU3 | change)))


def vq(**change: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.VQModel(**VQ | change)
    return spread_out(model, lambda images: model.encode(images).latents)


def of_janus(model: Any, images: Tensor) -> Tensor:
    return model(images).decoded_pixel_values


def of_emu3(model: Any, images: Tensor) -> Tensor:
    """As a film of equal frames, of which the first comes back."""
    frames = images[:, None].expand(-1, model.config.temporal_downsample_factor, -1, -1, -1)
    codes = torch.stack(model.encode(frames, [images.shape[2:]] * len(images)).image_tokens)
    return model.decode(codes)[:, 0]


def of_vq(model: Any, images: Tensor) -> Tensor:
    return model(images).sample


def pictures(count: int, *size: int) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(janus(), tmp_path_factory.mktemp("codecs") / "janus")


@pytest.fixture(scope="module")
def of_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(vq(), tmp_path_factory.mktemp("codecs") / "vq")


@pytest.mark.parametrize(
    ("make", "change", "itself", "size", "low"),
    [
        pytest.param(janus, {}, of_janus, (8, 8), -1, id="janus"),
        pytest.param(janus, {"channel_multiplier": [1, 1, 1]}, of_janus, (16, 16), -1, id="janus-by-4"),
        pytest.param(emu3, {}, of_emu3, (8, 12), -1, id="emu3"),
        pytest.param(emu3, {"temporal_downsample_factor": 1}, of_emu3, (8, 12), -1, id="emu3-one-frame"),
        pytest.param(emu3, {"temporal_downsample_factor": 2}, of_emu3, (8, 8), -1, id="emu3-two-frames"),
        pytest.param(vq, {}, of_vq, (16, 24), -1, id="vq"),
        pytest.param(vq, {"norm_type": "spatial", "vq_embed_dim": None}, of_vq, (16, 16), -1, id="movq"),
        pytest.param(vq, {"lookup_from_codebook": True, "force_upcast": True}, of_vq, (16, 16), 0, id="amused"),
    ],
)
def test_pictures_come_back_as_from_the_model_itself(make, change, itself, size, low, tmp_path) -> None:
    """In the range of the model, from low to 1."""
    model, images = make(**change), pictures(3, *size)
    codec = codec_folder.read(saved(model, tmp_path))
    step, count = codec.config.downsample, len(model.quantize.embedding.weight)
    codes = codec.encode(images)
    assert (codes.dtype, codes.shape) == (torch.int64, (3, size[0] // step, size[1] // step))
    assert codec.config.codebook_size == count > int(codes.max())
    assert len(codes.unique()) > count / 4
    with torch.no_grad():
        expected = (itself(model, low + images * (1 - low)) - low) / (1 - low)
    found = codec.decode(codes)
    assert found.dtype == torch.float32
    assert found.shape == images.shape
    assert 0 <= found.min() < found.max() <= 1
    torch.testing.assert_close(found, expected.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [janus, vq])
def test_codes_are_the_nearest(make, tmp_path) -> None:
    """By plain distances, row by row."""
    model, images = make(), pictures(2, 16, 24)
    with torch.no_grad():
        vectors = model.quant_conv(model.encoder(images * 2 - 1)).movedim(1, -1)
    distances = (vectors[..., None, :] - model.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(codec_folder.read(saved(model, tmp_path)).encode(images), distances.argmin(-1))


def test_janus_takes_any_grid(of_transformers) -> None:
    """Of a model whose config says 4 x 4, what one of 6 x 6 with the same weights gives, and pictures that are none."""
    codec, images = codec_folder.read(of_transformers), pictures(2, 12, 12)
    with torch.no_grad():
        expected = (of_janus(janus(num_patches=6), images * 2 - 1) / 2 + 0.5).clamp(0, 1)
    assert codec.decode(codec.encode(pictures(2, 8, 20))).shape == (2, 3, 8, 20)
    torch.testing.assert_close(codec.decode(codec.encode(images)), expected, atol=1e-6, rtol=0)


def test_any_number_of_pictures(of_transformers, monkeypatch) -> None:
    """A few go through the codec together, and what a picture's codes are does not depend on the others."""
    codec, images, most, encode = codec_folder.read(of_transformers), pictures(7, 8, 8), list[int](), JanusVQVAE.encode
    together = codec.encode(images)
    monkeypatch.setattr("cogview.tokenizers.published_codec._AT_ONCE", 3 * 64)
    monkeypatch.setattr(JanusVQVAE, "encode", lambda self, x: (most.append(len(x)), encode(self, x))[1])
    assert torch.equal(codec.encode(images), together)
    assert most == [3, 3, 1]
    assert codec.decode(together).shape == (7, 3, 8, 8)
    assert codec.encode(images[:0]).shape == (0, 4, 4)
    assert codec.decode(together[:0]).shape == (0, 3, 8, 8)


def test_arguments_are_checked(of_transformers) -> None:
    codec = codec_folder.read(of_transformers)
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], H and W multiples of 2"):
        codec.encode(torch.rand(1, 3, 7, 8))
    with pytest.raises(TypeError, match="images: expected floating"):
        codec.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes: expected 0 to 19, got 0 to 20"):
        codec.decode(torch.tensor([[[0, 20]]]))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_range_of_the_folders_image_processor(name, of_diffusers, tmp_path) -> None:
    """Normalised pictures, or such as they are."""
    folder, model, images = shutil.copytree(of_diffusers, tmp_path / "vq"), vq(), pictures(2, 16, 16)
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    says: dict[str, Any] = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    nested = name.startswith("processor")
    (folder / name).write_text(json.dumps({"image_processor": says} if nested else says))
    codec, mean, std = codec_folder.read(folder), mean.view(3, 1, 1), std.view(3, 1, 1)
    with torch.no_grad():
        expected = of_vq(model, (images - mean) / std) * std + mean
    torch.testing.assert_close(codec.decode(codec.encode(images)), expected.clamp(0, 1), atol=1e-5, rtol=0)
    (folder / name).write_text(json.dumps(says | {"do_normalize": False}))
    plain = codec_folder.read(folder)
    with torch.no_grad():
        expected = of_vq(model, images)
    torch.testing.assert_close(plain.decode(plain.encode(images)), expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert plain.sha256 != codec.sha256


def small_janus(inside: Any) -> Any:
    """A whole Janus with this codec."""
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 30}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    part = JANUS | {"projection_dim": 8, "image_token_embed_dim": 8}
    config = transformers.JanusConfig(
        text_config=text, vision_config=vision | {"projection_dim": 16}, vq_config=part, image_token_id=3
    )
    model = transformers.JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(inside.state_dict())
    return model


def test_a_whole_model_has_its_codec_inside(of_transformers, tmp_path) -> None:
    alone = codec_folder.read(of_transformers)
    inside = codec_folder.read(saved(small_janus(janus()), tmp_path))
    assert inside.state_dict().keys() == alone.state_dict().keys()
    images = pictures(2, 8, 8)
    assert torch.equal(inside.encode(images), alone.encode(images))
    assert torch.equal(inside.decode(alone.encode(images)), alone.decode(alone.encode(images)))


@pytest.mark.parametrize("kind", ["of_transformers", "of_diffusers"])
def test_in_one_file(kind, request, tmp_path) -> None:
    """Which is enough; its hash is of weights, sizes and range. In parts, a codec is the same."""
    folder = request.getfixturevalue(kind)
    codec, images = codec_folder.read(folder), pictures(2, 16, 16)
    codec.save(tmp_path / "codec.safetensors")
    loaded = load_image_tokenizer(tmp_path / "codec.safetensors")
    assert isinstance(loaded, PublishedCodec)
    assert (loaded.sha256, loaded.config) == (codec.sha256, codec.config)
    assert torch.equal(loaded.encode(images), codec.encode(images))
    assert torch.equal(loaded.decode(codec.encode(images)), codec.decode(codec.encode(images)))
    make, other = {"of_transformers": (janus, {"dropout": 0.5}), "of_diffusers": (vq, {"scaling_factor": 1})}[kind]
    parts = saved(make(), tmp_path / "parts", max_shard_size="20KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert codec_folder.read(parts).sha256 == codec.sha256
    assert codec_folder.read(saved(make(**other), tmp_path / "other")).sha256 != codec.sha256
    half = codec_folder.read(saved(make().half(), tmp_path / "half"))
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    assert half.sha256 != codec.sha256


def config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def pickled(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))


def truncated(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def leading_out(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    index = {"weight_map": dict.fromkeys(load_file(path), f"../{path.name}")}
    shutil.move(path, folder.parent / path.name)
    save_file({"x": torch.zeros(10**6)}, folder / "other.safetensors")
    (folder / f"{path.name}.index.json").write_text(json.dumps(index))


BIAS = "quant_conv.bias"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-config": (lambda f: (f / "config.json").unlink(), "expected a folder with config.json, cannot read"),
    "no-json": (lambda f: (f / "config.json").write_text("[1"), "expected a folder with config.json, cannot read"),
    "a-list": (lambda f: (f / "config.json").write_text("[1]"), "expected a folder with config.json, cannot read"),
    "unknown": (lambda f: config(f, model_type="bert", _class_name="AutoencoderKL"), "got one of 'AutoencoderKL'"),
    "many": (lambda f: config(f, in_channels="many"), r"(JanusVQVAE|VQModel) cannot be made of its config: "),
    "deep": (lambda f: config(f, num_res_blocks=10**9, layers_per_block=10**9), "expected at most 100 layers"),
    "huge": (lambda f: config(f, num_embeddings=10**12, num_vq_embeddings=10**12), r"weights of [4-5],000,000,\d"),
    "other-sizes": (lambda f: config(f, num_embeddings=21, num_vq_embeddings=19), "cannot read|no whole"),
    "gray": (lambda f: config(f, in_channels=1), "cannot read|no whole"),
    "quantized": (lambda f: config(f, quantization_config={"quant_method": "bitsandbytes"}), "expected plain weights"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "expected plain weights, got 'an adapter"),
    "pickled": (pickled, r"weights as \*.safetensors, which cannot execute code, got 'none in "),
    "truncated": (truncated, "cannot read"),
    "leading-out": (leading_out, "expected plain names of files"),
    "missing": (lambda f: weights(f, lambda t: t.pop(BIAS)), f"no whole .*: 1 missing tensors, as {BIAS}"),
    "more": (lambda f: weights(f, lambda t: t.update(x=torch.zeros(3))), "no whole .*: 1 unexpected tensors, as x"),
    "processor": (
        lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": 0, "image_std": 0}'),
        "std: expected three numbers, of std positive",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["of_transformers", "of_diffusers"])
def test_a_wrong_folder_is_refused_in_a_sentence(wrong, kind, request, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "codec")
    spoil, message = WRONG[wrong]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        codec_folder.read(folder)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param("Emu3VQVAE", EMU3 | {"temporal_downsample_factor": 3}, id="emu3-three-frames"),
        pytest.param("JanusVQVAE", JANUS | {"in_channels": 1}, id="janus-gray"),
    ],
)
def test_sizes_that_give_no_pictures(kind, sizes, tmp_path) -> None:
    model = getattr(transformers, kind)(getattr(transformers, f"{kind}Config")(**sizes))
    with pytest.raises(ValueError, match="does not give pictures back"):
        codec_folder.read(saved(model, tmp_path))


def test_a_wrong_file_is_refused_in_a_sentence(of_transformers, tmp_path) -> None:
    path = tmp_path / "codec.safetensors"
    codec_folder.read(of_transformers).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, sizes = load_file(path), json.loads(metadata["config"])
    no_hash = {name: value for name, value in metadata.items() if name != "sha256"}
    for change, message in (
        ({"kind": "Pipeline"}, "kind: expected one of JanusVQVAE, Emu3VQVAE, VQModel, got 'Pipeline'"),
        ({"downsample": 0}, "downsample: expected a positive number, got 0"),
        ({"surprise": 1}, "has no valid config"),
        ({"settings": sizes["settings"] | {"num_embeddings": 10**12}}, r"expected \(1000000000000, 4\), got \(20, 4\)"),
        ({"settings": sizes["settings"] | {"dropout": "much"}}, "JanusVQVAE cannot be made of its config"),
        ({"settings": []}, "has no valid config .settings: expected an object"),
    ):
        save_file(tensors, path, no_hash | {"config": json.dumps(sizes | change)})
        with pytest.raises(ValueError, match=message):
            load_image_tokenizer(path)
    tensors["model.quantize.embedding.weight"][0, 0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
        load_image_tokenizer(path)


def test_a_model_of_fewer_codes(of_transformers) -> None:
    recipe = CogView(
        CogViewConfig(num_layers=1, hidden_size=16, num_heads=2, image_vocab=19, image_grid=4, max_positions=50)
    )
    text = TextTokenizer.train(["a fox above a tree", "a red car"])
    with pytest.raises(ValueError, match="image tokenizer: expected 19 codes, as the model has, got 20"):
        System(text, codec_folder.read(of_transformers), recipe, recipe.model())


def shard(path: Path, first: int = 0) -> str:
    """Twelve pairs."""
    with ShardWriter(path) as writer:
        for number in range(first, first + 12):
            png, pixels = io.BytesIO(), np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(png, "PNG")
            writer.write(f"{number:03d}", {"png": png.getvalue(), "txt": f"picture number {number}".encode()})
    return str(path)


def cogview(*arguments: Any) -> None:
    cli.main([str(argument) for argument in arguments])


def test_a_run_with_a_codec(of_transformers, tmp_path, capsys) -> None:
    """Tokenized, trained, moved and drawn from, without the folder that the codec came from."""
    folder, a, run = shutil.copytree(of_transformers, tmp_path / "codec"), shard(tmp_path / "a.tar"), tmp_path / "run"
    cogview("tokenize", a, "--run", run, "--image-size", 8, "--codec", folder, "--hidden", 7)
    said = capsys.readouterr().out.replace("\n", "")
    assert f"image tokenizer: 20 codes, in {run}, of {folder}" in said
    assert "not used, since the tokenizers are there: --hidden" in said
    codec = codec_folder.read(folder)
    data = TokenDataset(run / "tokens" / "train")
    assert (data.tokenizers[1], data.meta["codebook_size"], data.meta["grid"]) == (codec.sha256, 20, [4, 4])
    shutil.rmtree(folder)
    cogview("tokenize", shard(tmp_path / "b.tar", 12), "--run", run, "--split", "test")
    sizes = ["--layers", 1, "--hidden-size", 16, "--heads", 2, "--batch-size", 4, "--dtype", "float32"]
    cogview("train", "--run", run, "--steps", 2, *sizes)
    moved = run.rename(tmp_path / "moved")
    cogview("generate", "--run", moved, "--captions", "picture number 3", "--count", 2, "--out", tmp_path / "p.png")
    system = System.load(moved)
    drawn = system.draw(["picture number 3"] * 2, seeds=[0, 1], top_k=200, temperature=0.9)
    assert drawn.shape == (2, 3, 8, 8)
    written = [np.array(Image.open(path)) for path in sorted((tmp_path / "p").glob("*.png"))]
    assert np.array_equal(np.stack(written), drawn.permute(0, 2, 3, 1).numpy())
    codes = system.tokenize(drawn)
    assert torch.equal(codes, codec.encode(drawn.float() / 255))
    expected = (codec.decode(codes) * 255).round().to(torch.uint8)
    assert torch.equal(system.pictures(codes), expected)
    cogview("tokenize", a, "--run", tmp_path / "second", "--from", moved)
    assert TokenDataset(tmp_path / "second" / "tokens" / "train").tokenizers == data.tokenizers


def test_a_stopped_run_goes_on(of_transformers, tmp_path, monkeypatch) -> None:
    a, run, encode = shard(tmp_path / "a.tar"), tmp_path / "run", PublishedCodec.encode

    def stopped(self: PublishedCodec, images: Tensor) -> Tensor:
        if len(images) == 12:
            raise KeyboardInterrupt
        return encode(self, images)

    command = ("tokenize", a, "--run", run, "--image-size", 8, "--codec", of_transformers)
    with monkeypatch.context() as patch:
        patch.setattr(PublishedCodec, "encode", stopped)
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            cogview(*command)
    before = (run / "vqvae.safetensors").read_bytes()
    cogview(*command)
    assert len(TokenDataset(run / "tokens" / "train")) == 12
    assert (run / "vqvae.safetensors").read_bytes() == before


def test_codecs_and_runs_that_do_not_fit(of_transformers, of_diffusers, tmp_path, capsys) -> None:
    a, run = shard(tmp_path / "a.tar"), tmp_path / "run"
    with pytest.raises(SystemExit, match="image_size: expected a multiple of 4, got 6"):
        cogview("tokenize", a, "--run", run, "--image-size", 6, "--codec", of_diffusers)
    with pytest.raises(SystemExit, match="codec: expected no --from"):
        cogview("tokenize", a, "--run", run, "--codec", of_diffusers, "--from", run)
    with pytest.raises(SystemExit, match=r"codec: expected a folder with config\.json, cannot read"):
        cogview("tokenize", a, "--run", run, "--codec", tmp_path)
    assert not run.exists()
    cogview("tokenize", a, "--run", run, "--image-size", 8, "--codec", of_transformers)
    with pytest.raises(SystemExit, match=r"codec: .*run has another image tokenizer than .*vq: name another run, or"):
        cogview("tokenize", a, "--run", run, "--codec", of_diffusers)
    cogview("tokenize", a, "--run", run, "--codec", of_diffusers, "--retrain-tokenizers")
    first, second = (load_image_tokenizer(f / "vqvae.safetensors").config for f in (run / "tokenizers-1", run))
    assert (first.codebook_size, second.codebook_size) == (20, 18)
    assert TokenDataset(run / "tokens" / "train").meta["grid"] == [2, 2]
    VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8)).save(run / "vqvae.safetensors")
    with pytest.raises(SystemExit, match="the image tokenizer was retrained after these tokens, or is damaged"):
        cogview("train", "--run", run, "--steps", 2)
