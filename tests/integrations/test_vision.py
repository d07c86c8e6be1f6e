"""Local attention in ViT, DINOv2 and Swin of transformers: a window of the whole picture is the model itself."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_ops import patterns
from cogview_ops.integrations._patches import attend_patches
from cogview_ops.integrations.vision import use_local_attention

transformers: Any = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 24, "patch_size": 4}
MODELS = {
    "vit": ("ViTConfig", "ViTModel", {"interpolate_pos_encoding": True}),
    "vit with a head": ("ViTConfig", "ViTForImageClassification", {"interpolate_pos_encoding": True}),
    "deit": ("DeiTConfig", "DeiTModel", {"interpolate_pos_encoding": True}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "dinov2 backbone": ("Dinov2Config", "Dinov2Backbone", {}),
    "registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {}),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {}),
}
Model = Callable[[Tensor], Tensor]


def build(name: str, **options: Any) -> tuple[Any, Model]:
    """A model in float64, and what it makes of a picture."""
    config, model, arguments = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **options)).double().eval()

    def call(x: Tensor) -> Tensor:
        first = built(x, **arguments)[0]
        return first[0] if isinstance(first, tuple) else first

    return built, call


def picture(rows: int = 24, columns: int = 24) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: Any, call: Model, *pictures: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.stack([call(x).square().sum() for x in pictures]).sum().backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize(
    "window", [{"kernel_size": 99}, {"kernel_size": (11, 15), "grid": (4, 8)}], ids=["found", "given"]
)
@pytest.mark.parametrize("name", MODELS)
def test_whole_picture(name: str, window: dict[str, Any]) -> None:
    """Of 4 x 8 patches, out and gradients; then undone."""
    model, call = build(name)
    x = picture(16, 32)
    want = [call(x), *gradients(model, call, x)]
    replaced = use_local_attention(model, **window)
    assert len(replaced.names) == 2
    for got, y in zip([call(x), *gradients(model, call, x)], want, strict=True):
        torch.testing.assert_close(got, y)
    replaced.remove()
    assert torch.equal(call(x), want[0])
    assert not any(hasattr(module, "local_attention") for module in model.modules())


@pytest.mark.parametrize("edge", ["clip", "shift"])
def test_who_sees_whom(edge: str) -> None:
    """Of one layer: a patch its window and the tokens that are no patches, these everything."""
    model, _ = build("registers", num_register_tokens=3)
    use_local_attention(model, 3, edge=edge, layers=[0])
    inner = model.encoder.layer[0].attention
    x = torch.randn(1, 4 + 30, 16, dtype=torch.float64)
    seen = (
        torch.autograd.functional.jacobian(lambda x: inner(x, patch_grid=(5, 6))[0].sum(-1), x)[0, :, 0].abs().sum(-1)
        > 0
    )
    cells = torch.arange(30)
    window = patterns.local_2d(cells[:, None], cells, grid=(5, 6), kernel_size=(3, 3), edge=edge, raster_causal=False)
    want = torch.ones(34, 34, dtype=torch.bool)
    want[4:, 4:] = window
    assert torch.equal(seen, want)


def test_layers() -> None:
    model, call = build("vit")
    x, want = picture(), []
    for layers in ([0], [1], [0, 1]):
        replaced = use_local_attention(model, 3, layers=layers)
        assert replaced.names == [f"layers.{i}.attention" for i in layers]
        want.append(call(x))
        replaced.remove()
    replaced = use_local_attention(model, 3, layers=(i for i in [1, 0]))
    assert len(replaced.names) == 2
    replaced.remove()
    both = [use_local_attention(model, 3, layers=[i]) for i in (0, 1)]
    assert torch.equal(call(x), want[2])
    with pytest.raises(
        ValueError, match=r"^layers: expected layers with attention of their own, got layers.1.attention$"
    ):
        use_local_attention(model, 3, layers=[1])
    both[1].remove()
    assert torch.equal(call(x), want[0])
    assert not torch.equal(want[0], want[1])


def test_checkpointing_with_two_shapes() -> None:
    """Both forwards, then both backwards: each recomputes with the grid of its own picture."""
    model, call = build("vit")
    use_local_attention(model, 3)
    pictures = picture(16, 32), picture(32, 16)
    model.train()
    want = gradients(model, call, *pictures)
    model.gradient_checkpointing_enable()
    for got, x in zip(gradients(model, call, *pictures), want, strict=True):
        assert torch.equal(got, x)


def test_compile_and_autocast() -> None:
    model, call = build("vit")
    use_local_attention(model, 3)
    x = picture(16, 32)
    want = call(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, interpolate_pos_encoding=True)[0], want)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (call(x.float()) - want).abs().max() < 0.1


@pytest.mark.parametrize("heads_first", [True, False])
def test_gradients_of_tokens_and_patches(heads_first: bool) -> None:
    """Against all scores and a mask; the query's in its layout; again, of the same graph; transformed and compiled."""
    shape = (2, 3, 32, 8) if heads_first else (2, 32, 3, 8)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    i = torch.arange(30)
    seen = torch.ones(32, 32, dtype=torch.bool)
    seen[2:, 2:] = patterns.local_2d(i[:, None], i, grid=(5, 6), kernel_size=(3, 3), edge="clip", raster_causal=False)

    def local(*qkv: Tensor) -> Tensor:
        query, key, value = (x if heads_first else x.transpose(1, 2) for x in qkv)
        out = attend_patches((query, key, value), 2, (5, 6), kernel_size=(3, 3), dilation=(1, 1), edge="clip")
        return out.square().sum()

    def masked(*qkv: Tensor) -> Tensor:
        query, key, value = (x if heads_first else x.transpose(1, 2) for x in qkv)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen).square().sum()

    want = torch.autograd.grad(masked(*qkv), qkv)
    with torch.no_grad():
        torch.testing.assert_close(local(*qkv), masked(*qkv))
    loss = local(*qkv)
    first = torch.autograd.grad(loss, qkv, retain_graph=True)
    second = torch.autograd.grad(loss, qkv)
    transformed = torch.func.grad(local, (0, 1, 2))(*qkv)
    compiled = torch.autograd.grad(torch.compile(local, fullgraph=True, backend="aot_eager")(*qkv), qkv)
    assert first[0].stride() == qkv[0].stride()
    for a, b, c, d, y in zip(first, second, transformed, compiled, want, strict=True):
        torch.testing.assert_close(a, y)
        assert torch.equal(a, b)
        torch.testing.assert_close(c, y)
        torch.testing.assert_close(d, y)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"attention_probs_dropout_prob": 0.1},
            {},
            "attention_probs_dropout_prob: expected 0 under local attention, got 0.1",
        ),
        ({}, {"output_attentions": True}, "output_attentions: expected none under local attention, got True"),
        (
            {},
            {"attention_mask": torch.arange(37).expand(2, 37) < 30},
            "attention_mask: expected None under local attention, got one",
        ),
    ],
)
def test_refused(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    model, _ = build("vit", **options)
    use_local_attention(model.train(), 3)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(picture(), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size: expected at least 1, got 0"),
        ({"kernel_size": 3, "layers": [2]}, "layers: expected numbers from 0 to 1, got 2"),
        ({"kernel_size": 3, "layers": []}, "layers: expected at least one, got none"),
        (
            {"kernel_size": 3, "grid": (5, 7)},
            "grid: expected rows and columns of 36 patches, behind 1 other tokens, got (5, 7)",
        ),
        (
            {"kernel_size": 3, "prefix_tokens": 2},
            "grid: expected rows and columns of 35 patches, behind 2 other tokens, got (6, 6)",
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    model, call = build("vit")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        use_local_attention(model, **options) and call(picture())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edge": "wrap"}, "edge: expected 'clip' or 'shift', got 'wrap'"),
        ({"dilation": 0}, "dilation: expected at least 1, got 0"),
        ({"grid": (6, 0)}, "grid: expected at least 1, got 0"),
        ({"prefix_tokens": -1}, "prefix_tokens: expected at least 0, got -1"),
    ],
)
def test_options_are_checked_when_given(options: dict[str, Any], message: str) -> None:
    model, _ = build("vit")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        use_local_attention(model, 3, **options)
    assert not any(hasattr(module, "local_attention") for module in model.modules())


def test_other_models() -> None:
    model = transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**SIZES))
    with pytest.raises(
        ValueError, match=r"^model: expected swin, vit, .* or another with prefix_tokens, got data2vec-vision$"
    ):
        use_local_attention(model, 3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=4, **sizes))
    with pytest.raises(ValueError, match=r"^model: expected one whose forward takes pixel_values, got LlamaModel$"):
        use_local_attention(model, 3)
    model, _ = build("vit")
    use_local_attention(model, 3)
    with pytest.raises(
        ValueError, match=r"^patch_grid: expected a call of the model with pixel_values, got one of its parts$"
    ):
        model.layers[0](torch.zeros(1, 37, 16, dtype=torch.float64))


def swin(**options: Any) -> Any:
    """One layer a stage without shift, of a picture that is one window there: 7 x 7 patches."""
    torch.manual_seed(0)
    sizes = {"image_size": 28, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 7}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes | {"drop_path_rate": 0.0} | options)).double().eval()
    for name, x in model.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(x)
    return model


@pytest.mark.parametrize("window", [{"kernel_size": 13}, {"kernel_size": 7, "edge": "shift"}], ids=["clip", "shift"])
def test_swin_of_one_window(window: dict[str, Any]) -> None:
    model = swin(depths=[1], num_heads=[2])
    x = picture(28, 28)

    def call(x: Tensor) -> Tensor:
        return model(x).last_hidden_state

    want = [call(x), *gradients(model, call, x)]
    replaced = use_local_attention(model, **window)
    assert replaced.names == ["encoder.layers.0.blocks.0"]
    for got, y in zip([call(x), *gradients(model, call, x)], want, strict=True):
        torch.testing.assert_close(got, y)
    replaced.remove()
    assert torch.equal(call(x), want[0])


@pytest.mark.parametrize(
    "window", [{"kernel_size": 5}, {"kernel_size": 4, "edge": "shift", "dilation": 2}], ids=["clip", "shift"]
)
def test_swin_of_many_windows(window: dict[str, Any]) -> None:
    """Out of a layer against all scores, bias and mask; a picture that no window divides."""
    model = swin()
    use_local_attention(model, **window)
    layer, grid = model.encoder.layers[0].blocks[0], (10, 9)
    x = torch.randn(2, 90, 8, dtype=torch.float64)
    inner, normed = layer.attention, layer.layernorm_before(x)
    query, key, value = (getattr(inner, f"{name}_proj")(normed).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv")
    i, j = torch.arange(90)[:, None], torch.arange(90)
    size, step = (window["kernel_size"],) * 2, (window.get("dilation", 1),) * 2
    seen = patterns.local_2d(
        i, j, grid=grid, kernel_size=size, dilation=step, edge=window.get("edge", "clip"), raster_causal=False
    )
    table = inner.relative_position_bias.relative_position_bias_table.view(13, 13, 2)
    rows, columns = (i // 9 - j // 9) // step[0] + 6, (i % 9 - j % 9) // step[1] + 6
    bias = table[rows.clamp(0, 12), columns.clamp(0, 12)].permute(2, 0, 1)
    scores = (query @ key.mT / 2 + bias).masked_fill(~seen, -torch.inf)
    h = x + inner.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    want = h + layer.mlp(layer.layernorm_after(h))
    torch.testing.assert_close(layer(x, grid)[0], want)


def test_swin_of_any_size() -> None:
    """Two stages, a picture of 6 x 4 patches, the second of 3 x 2: smaller than the window."""
    model = swin()
    use_local_attention(model, 7, edge="shift")
    x = picture(24, 16)

    def call(x: Tensor) -> Tensor:
        return model(x).last_hidden_state

    want = gradients(model, call, x)
    model.train()
    model.gradient_checkpointing_enable()
    for got, y in zip(gradients(model, call, x), want, strict=True):
        assert torch.equal(got, y)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).last_hidden_state, call(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 15}, "kernel_size: expected at most 13, what the position bias knows, got (15, 15)"),
        (
            {"kernel_size": 9, "edge": "shift"},
            "kernel_size: expected at most 7, what the position bias knows, got (9, 9)",
        ),
        ({"kernel_size": 3, "grid": (7, 7)}, "grid: expected None: Swin's layers are told it, got (7, 7)"),
    ],
)
def test_errors_of_swin(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        use_local_attention(swin(), **options)
    model = swin(attention_probs_dropout_prob=0.1).train()
    use_local_attention(model, 3)
    with pytest.raises(ValueError, match=r"^attention_probs_dropout_prob: expected 0 under local attention, got 0.1$"):
        model(picture(28, 28))
