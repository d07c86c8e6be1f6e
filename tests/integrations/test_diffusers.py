"""Local attention in models of diffusers: a window of the whole picture is the model itself."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_ops import patterns

diffusers: Any = pytest.importorskip("diffusers")
local: Any = pytest.importorskip("cogview_ops.integrations.diffusers")

UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
OF_TRANSFORMERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
}
OF_DIT = OF_TRANSFORMERS | {"sample_size": 12, "patch_size": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 10}
SD3 = OF_TRANSFORMERS | {"sample_size": 16, "patch_size": 2, "caption_projection_dim": 16, "joint_attention_dim": 6}
SD3 |= {"pooled_projection_dim": 5, "pos_embed_max_size": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
FLUX = OF_TRANSFORMERS | {"patch_size": 1, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 6}
FLUX |= {"pooled_projection_dim": 5, "axes_dims_rope": (2, 2, 4)}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def cells(rows: int, columns: int) -> Tensor:
    index = torch.arange(rows * columns)
    return torch.stack((index * 0, index // columns, index % columns), -1)


TEXT, POOLED, TIME = draw(2, 5, 6), draw(2, 5), torch.tensor([3, 3])
# class, options, what it is called with behind latents of 8 rows and 12 columns, how many self-attentions, their grid
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, Any]] = {
    "unet": ("UNet2DConditionModel", UNET, {"timestep": 3, "encoder_hidden_states": draw(2, 5, 8)}, 7, None),
    "dit": ("DiTTransformer2DModel", OF_DIT, {"timestep": TIME, "class_labels": TIME}, 2, None),
    "pixart": (
        "PixArtTransformer2DModel",
        OF_DIT | {"caption_channels": 6, "cross_attention_dim": 16, "use_additional_conditions": False},
        {"timestep": TIME, "encoder_hidden_states": TEXT},
        2,
        None,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        SD3,
        {"timestep": TIME, "encoder_hidden_states": TEXT, "pooled_projections": POOLED},
        3,
        None,
    ),
    "flux": (
        "FluxTransformer2DModel",
        FLUX,
        {
            "timestep": TIME,
            "encoder_hidden_states": TEXT,
            "pooled_projections": POOLED,
            "img_ids": cells(8, 12),
            "txt_ids": torch.zeros(5, 3),
        },
        2,
        (8, 12),
    ),
}


def build(name: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    kind, options, arguments, *_ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**options).double().eval()
    for x in model.parameters():  # gates and modulations begin at 0
        if not x.any():
            torch.nn.init.normal_(x, std=0.3)
    return model, lambda x: model(x, **arguments).sample


def latents(name: str, *sizes: int) -> Tensor:
    rows, columns = sizes or (8, 12)
    return draw(2, rows * columns, 4) if name == "flux" else draw(2, 4, rows, columns)


def gradients(model: Any, call: Callable[[Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.stack([call(x).square().sum() for x in inputs]).sum().backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_whole_picture(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Out and gradients; then undone. Nothing is said of arguments that are not expected."""
    (model, call), x, grid = build(name), latents(name), MODELS[name][4]
    want = [call(x), *gradients(model, call, x)]
    before = {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")}
    diffusers.utils.logging.enable_propagation()
    replaced = local.use_local_attention(model, 63, grid=grid)
    assert len(replaced.names) == MODELS[name][3]
    for got, y in zip([call(x), *gradients(model, call, x)], want, strict=True):
        torch.testing.assert_close(got, y)
    replaced.remove()
    replaced = local.use_local_attention(model, 3, grid=grid)
    assert (call(x) - want[0]).abs().max() > 1e-3
    replaced.remove()
    diffusers.utils.logging.disable_propagation()
    assert "expected" not in caplog.text
    assert torch.equal(call(x), want[0])
    assert {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")} == before


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_who_sees_whom(name: str) -> None:
    """Of one attention: a patch its window and all text, the text everything, in order of its class."""
    (model, _), grid = build(name), (5, 4)
    where = {"unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "sd3": "transformer_blocks.0.attn"}
    attn = model.get_submodule(where.get(name, "transformer_blocks.0.attn"))
    kind = {
        "unet": local.LocalUNetAttnProcessor,
        "sd3": local.LocalJointAttnProcessor,
        "flux": local.LocalFluxAttnProcessor,
    }
    attn.set_processor(kind[name](3, edge="shift", grid=grid))
    width = attn.to_q.in_features
    parts = [draw(1, 20, width)] + ([] if name == "unet" else [draw(1, 3, width)])

    def out(*parts: Tensor) -> Tensor:
        both = attn(parts[0], encoder_hidden_states=parts[1]) if parts[1:] else attn(parts[0])
        return torch.cat(both if parts[1:] else (both,), 1).sum((0, 2))

    seen = torch.cat([x.abs().sum((1, 3)) for x in torch.autograd.functional.jacobian(out, tuple(parts))], -1) > 0
    i = torch.arange(20)
    want = torch.ones(seen.shape, dtype=torch.bool)
    want[:20, :20] = patterns.local_2d(i[:, None], i, grid=grid, kernel_size=(3, 3), edge="shift", raster_causal=False)
    assert torch.equal(seen, want)


def test_levels_of_a_unet() -> None:
    """Latents of odd sizes: 7 x 9, and 4 x 5 below; and one level alone."""
    model, call = build("unet")
    x = latents("unet", 7, 9)
    want = call(x)
    replaced = local.use_local_attention(model, 63)
    torch.testing.assert_close(call(x), want)
    replaced.remove()
    replaced = local.use_local_attention(model, 63, where=lambda name: "down_blocks.0" in name)
    assert replaced.names == ["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    torch.testing.assert_close(call(x), want)


def test_checkpointing_with_two_shapes() -> None:
    """Both forwards, then both backwards: each recomputes with the grid of its own picture."""
    model, call = build("unet")
    local.use_local_attention(model, 3)
    model.train()
    pictures = latents("unet", 8, 12), latents("unet", 12, 8)
    want = gradients(model, call, *pictures)
    model.enable_gradient_checkpointing()
    for got, x in zip(gradients(model, call, *pictures), want, strict=True):
        assert torch.equal(got, x)


def test_attention_of_an_autoencoder() -> None:
    """Of 4-D tensors, whose grid is theirs."""
    torch.manual_seed(0)
    block = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).double().encoder.mid_block
    x = draw(1, 8, 5, 7)
    want = block(x)
    block.attentions[0].set_processor(local.LocalAttnProcessor(63))
    torch.testing.assert_close(block(x), want)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {"kernel_size": (3, 0)}, "kernel_size: expected at least 1, got 0"),
        (
            "unet",
            {"kernel_size": 3, "where": lambda name: "attn2" in name},
            "where: expected one self-attention layer at ",
        ),
        (
            "flux",
            {"kernel_size": 3},
            "grid: expected rows and columns of the latents in LocalFluxAttnProcessor, got None",
        ),
        (
            "flux",
            {"kernel_size": 3, "grid": (8, 11)},
            "grid: expected rows and columns of 96 patches, behind 5 other tokens",
        ),
        (
            "flux",
            {"kernel_size": 3, "grid": (40, 40)},
            "grid: expected rows and columns of 96 patches, behind 5 other tokens",
        ),
        (
            "dit",
            {"kernel_size": 3, "grid": (5, 5)},
            "grid: expected rows and columns of 24 patches, behind 0 other tokens",
        ),
        (  # of its latents: a transformer has no levels
            "dit",
            {"kernel_size": 3, "grid": (8, 12)},
            "grid: expected rows and columns of 24 patches, behind 0 other tokens",
        ),
        ("dit", {"kernel_size": 3, "grid": (8, 0)}, "grid: expected at least 1, got 0"),
        ("dit", {"kernel_size": 3, "edge": "wrap"}, "edge: expected 'clip' or 'shift', got 'wrap'"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    model, call = build(name)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        local.use_local_attention(model, **options) and call(latents(name))


def test_refused() -> None:
    model, _ = build("unet")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    attn = model.get_submodule(name)
    attn.set_processor(local.LocalUNetAttnProcessor(3, grid=(8, 12)))
    with pytest.raises(ValueError, match=r"^attention_mask: expected None under local attention, got one$"):
        attn(draw(2, 96, 8), attention_mask=torch.ones(2, 96))
    attn.set_processor(diffusers.models.attention_processor.SlicedAttnProcessor(1))
    rule = f"{name}: expected the processor AttnProcessor2_0 or JointAttnProcessor2_0 or FluxAttnProcessor, got "
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}SlicedAttnProcessor$"):
        local.use_local_attention(model, 3)
