"""DALL-E (arXiv 2102.12092): rows, columns and squares of the image, which sees all text before it.

Its text has a fixed length, so that every image token has the same place in every sequence. Where the text ends earlier
there is padding: hidden, or as in DALL-E seen, a token that is learned for each place (section 2.2). It is never
predicted: [BASE] ends the text. Of the preset dalle-12b layers, heads, schedule, places, batch, rates and decays are
those of the paper's appendix B, but the rate falls as a cosine and not in five steps; that nothing is dropped, and that
the head is the table of tokens, as in CogView, is ours.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig, require
from cogview.parts.attend import Attention, Dense, summand
from cogview.recipes.cogview import CogView
from cogview.recipes.recipe import Draws, Recipe
from cogview.sequence import Context, Vocabulary
from cogview_ops import dalle_attention, dalle_attention_decode, local_attention_2d, local_attention_2d_decode, patterns
from cogview_ops import pairs as pairs_of

Kind = Literal["row", "column", "convolutional", "dense"]
KERNEL = 11  # of the convolutional layer
MOST_TEXT = 256  # places of text that a model gets of its data at most


@dataclass(frozen=True)
class DalleConfig(ModelConfig):
    padding: Literal["masked", "learned"] = "masked"
    schedule: tuple[Kind, ...] = ()
    """What the image sees of itself in each layer; (): DALL-E's, see `kind_of`."""
    softmax: Literal["joint", "separate"] = "joint"
    """One for all that the image sees, or one for text and one for the image, whose results are added (footnote 7)."""

    def __post_init__(self):
        super().__post_init__()
        require(self.relax != "tensor", "relax", "row or None, since padding would count", self.relax)
        require(self.padding in ("masked", "learned"), "padding", "masked or learned", self.padding)
        require(self.softmax in ("joint", "separate"), "softmax", "joint or separate", self.softmax)
        kinds, layers = get_args(Kind), self.num_layers
        known = isinstance(self.schedule, tuple) and all(kind in kinds for kind in self.schedule)
        require(known, "schedule", f"a tuple of {', '.join(kinds)}", self.schedule)
        fits = len(self.schedule) in (0, layers)
        require(fits, "schedule", f"a kind for each of {layers} layers, or none for DALL-E's", self.schedule)
        alone = "dense" not in self.schedule or (self.padding == "learned" and self.softmax == "joint")
        require(alone, "schedule", "no dense layers but with padding learned and softmax joint", self.schedule)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of the layers."""
        return self.schedule or tuple(kind_of(index, self.num_layers) for index in range(self.num_layers))

    @property
    def ways_of_positions(self) -> tuple[str, ...]:
        return ("following", "fixed", "rows_columns")

    @property
    def position_rows(self) -> int:
        return self.text_slots + 2 * self.image_grid if self.image_positions == "rows_columns" else self.max_positions

    @property
    def text_slots(self) -> int:
        """Places of the longest text and of [ROI1] [BASE] [BOI1]."""
        return self.max_text + 3


def kind_of(index: int, num_layers: int) -> Kind:
    """Of layer `index`, from 0: row, column, row, row, and again; the last is convolutional (appendix B.1)."""
    if index == num_layers - 1:
        return "convolutional"
    return "column" if index % 4 == 1 else "row"


class DalleAttention(Attention):
    def __init__(self, config: DalleConfig, index: int):
        super().__init__(config, index)
        self.takes = ("text_mask",) if config.padding == "masked" else ()
        self.kind, self.text_len, self.side = config.kinds[index], config.text_slots, config.image_grid
        self.pattern: dict[str, Any] = {
            "kind": self.kind,
            "wrap": self.kind == "row",
            "text_len": self.text_len,
            "kernel_size": KERNEL,
        }

    def attend(self, q, k, v, context):
        text_mask, image = context.attention.get("text_mask"), q.shape[2] - self.text_len
        if image == 0:
            return self._text(q, k, v, text_mask)
        require(image > 0 and image % self.side == 0, "inputs", f"whole rows of {self.side} image tokens", image)
        return self.whole(q, k, v, (image // self.side, self.side), text_mask)

    def _text(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None) -> Tensor:
        """Causal attention of the text alone."""
        if text_mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = text_mask[:, None, None].expand(-1, 1, self.text_len, -1).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], text_mask: Tensor | None) -> Tensor:
        """Of text and the image of a grid."""
        return dalle_attention(q, k, v, grid=grid, text_mask=text_mask, **self.pattern)

    def added(self, context, tokens):
        place = torch.arange(tokens, device=context.positions.device)
        grid = (tokens - self.text_len) // self.side, self.side
        near = patterns.dalle(place[:, None], place, grid=grid, **self.pattern)
        if "text_mask" not in context.attention:
            return summand(near)
        there = F.pad(context.attention["text_mask"], (0, tokens - self.text_len), value=True)
        return summand(near & (there[:, None] | (place[:, None] == place)))  # padding sees itself

    def pairs(self, tokens):
        return pairs_of.dalle(grid=((tokens - self.text_len) // self.side, self.side), **self.pattern)

    def also_saved(self, tokens):
        return self.num_heads * tokens * self.head_dim  # text's and image's outputs are copied into one

    def decode(self, q, k, v, context, cache, ends):
        if context.prompt:
            return self.attend(q, k, v, context)
        whole = self.text_len + self.side**2
        keys, values = cache.keys[:, :, :whole], cache.values[:, :, :whole]
        return self.last(q, keys, values, ends, context.attention.get("text_mask"))

    def last(self, q: Tensor, keys: Tensor, values: Tensor, ends: Tensor, text_mask: Tensor | None) -> Tensor:
        """Of the last image tokens, against the keys and values of the whole sequence."""
        grid = (self.side, self.side)
        return dalle_attention_decode(q, keys, values, ends, grid=grid, text_mask=text_mask, **self.pattern)


class SeparateAttention(DalleAttention):
    """The image's attention to text and that to itself are normalised apart, and added."""

    def whole(self, q, k, v, grid, text_mask):
        (tq, iq), (tk, ik), (tv, iv) = (x.tensor_split([self.text_len], dim=2) for x in (q, k, v))
        near = local_attention_2d(iq, ik, iv, raster_causal=True, **self._window(grid))
        return torch.cat([self._text(tq, tk, tv, text_mask), near + self._of_text(iq, tk, tv, text_mask)], dim=2)

    def last(self, q, keys, values, ends, text_mask):
        (tk, ik), (tv, iv) = (x.tensor_split([self.text_len], dim=2) for x in (keys, values))
        near = local_attention_2d_decode(q, ik, iv, ends - self.text_len, **self._window((self.side, self.side)))
        return near + self._of_text(q, tk, tv, text_mask)

    def _window(self, grid: tuple[int, int]) -> dict[str, Any]:
        window, kernel = patterns.dalle_window(self.kind, grid, KERNEL, self.pattern["wrap"])
        return {"grid": window, "kernel_size": kernel}

    def _of_text(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None) -> Tensor:
        mask = None if text_mask is None else text_mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def added(self, context, tokens):
        raise ValueError("softmax: expected joint, got separate, which has no scores that are comparable")

    def also_saved(self, tokens):
        image = tokens - self.text_len
        return self.num_heads * self.head_dim * (tokens + image)  # and its attention to text


_DALLE: dict[str, Any] = {
    "relax": None,
    "norms": "pre",
    "embedding_grad_scale": 1.0,
    "dropout": 0.0,
    "padding": "learned",
}
_TINY = DalleConfig(
    num_layers=5,
    hidden_size=256,
    num_heads=4,
    image_grid=8,
    max_positions=97,
    image_vocab=512,
    text_vocab=500,
    image_positions="fixed",
    init_std=0.06,
    embedding_std=0.1,
    **_DALLE,
)
_12B = DalleConfig(
    num_layers=64,
    hidden_size=62 * 64,
    num_heads=62,
    image_grid=32,
    max_positions=256 + 32**2 + 4,
    image_vocab=8192,
    text_vocab=16384,
    image_positions="rows_columns",
    **_DALLE,
)
_LOSSES: dict[str, Any] = {"text_weight": 1 / 8, "image_weight": 7 / 8, "loss_mean": "kinds", "bpe_dropout": 0.1}
_TINY_TRAINING = replace(CogView.presets["tiny"][1], average=0.98, **_LOSSES)
_PUBLISHED = TrainConfig(
    steps=430_000,
    batch_size=1024,
    learning_rate=4.5e-4,
    final_rate=1 / 32,
    warmup=5000 / 430_000,
    betas=(0.9, 0.96),
    weight_decay=0.045,
    clip=4.0,
    dtype="float16",
    gradient_scaling="blocks",
    average=0.99,
    average_every=25,
    checkpoint_activations="full",
    save_every=1000,
    validate_samples=2048,
    **_LOSSES,
)


class Dalle(Recipe):
    name = "dalle"
    Config = DalleConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {
        "tiny": (_TINY, _TINY_TRAINING),
        "dalle-12b": (_12B, _PUBLISHED),
    }
    config: DalleConfig

    def __init__(self, config: DalleConfig):
        super().__init__(config)
        paddings = config.max_text if config.padding == "learned" else 0
        self.vocab = Vocabulary(config.image_vocab, config.text_vocab, paddings=paddings)

    def attention(self, index: int) -> Attention:
        c = self.config
        if c.kinds[index] == "dense":
            return Dense(c, index)
        return (DalleAttention if c.softmax == "joint" else SeparateAttention)(c, index)

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.vocab.fixed_text(text, codes, self.config.max_text)

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        there = inputs != self.vocab["PAD"]
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        if self.config.image_positions == "following":  # as if the holes were not there
            positions = there.cumsum(dim=1) - 1
        masked = {"text_mask": there[:, : self.config.text_slots]} if self.config.padding == "masked" else {}
        return Context(positions, masked)

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        """With the places for text that the config has, or as many as the data need up to DALL-E's 256."""
        places = max(config.max_text, min(MOST_TEXT, sizes["max_text"]))
        return super().fit(config, **sizes | {"max_text": places})
