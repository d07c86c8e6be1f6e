"""CogView (arXiv 2105.13290): a causal GPT over text and image, text first.

The published 4B shape is that of the paper (section 2.3 and its released checkpoint); the shape of the 3B fashion model
(section 3, 50 x 50 tokens) was never published and is ours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from cogview.config import ModelConfig, TrainConfig, require
from cogview.parts.attend import Attention, Dense, PBRelax, ThreeRegion
from cogview.recipes.recipe import Draws, Recipe
from cogview.sequence import Context
from cogview_ops import sample_pivots

Kind = Literal["dense", "dense_pb_relax", "three_region"]


@dataclass(frozen=True)
class CogViewConfig(ModelConfig):
    attention: Kind = "dense"
    block_size: int = 128
    window_blocks: int = 6
    num_pivots: int = 768
    """Text and sampled image tokens that three_region attention keeps visible beyond the window."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_size", "window_blocks", "num_pivots"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        kinds = get_args(Kind)
        require(self.attention in kinds, "attention", f"one of {', '.join(kinds)}", self.attention)
        enough = self.attention != "three_region" or self.num_pivots >= self.always_pivots
        require(enough, "num_pivots", f"at least all that always are pivots ({self.always_pivots})", self.num_pivots)

    @property
    def always_pivots(self) -> int:
        """Tokens that are pivots in every layer, at most: text and commands."""
        return self.max_text + 4


# The demo: 8 x 8 image tokens, 96 tokens fed, three-region attention in every layer.
_TINY = CogViewConfig(
    num_layers=5,
    hidden_size=256,
    num_heads=4,
    image_grid=8,
    max_positions=97,
    image_vocab=512,
    text_vocab=500,
    attention="three_region",
    block_size=16,
    window_blocks=2,
    num_pivots=48,
    image_positions="fixed",
    init_std=0.06,
    embedding_std=0.1,
    branch_gain=0.3,
    dropout=0.0,
)
# The fashion model's small counterpart: 20 x 20 image tokens of 320 pixels; windows of six rows.
_FASHION_TINY = dataclasses.replace(
    _TINY, image_grid=20, max_positions=20**2 + 4 + 40, block_size=32, window_blocks=4, num_pivots=96
)
_4B = CogViewConfig(num_layers=48, hidden_size=2560, num_heads=40, image_grid=32, max_positions=1089, relax="tensor")
_LARGE = dataclasses.replace(_4B, num_layers=72, hidden_size=3072, num_heads=24, relax="row")
_FASHION = CogViewConfig(
    num_layers=36, hidden_size=2560, num_heads=40, image_grid=50, max_positions=2561, attention="three_region"
)
# What the demo has is minutes: small batches, less of the noise of unpredictable captions, and hidden context, without
# which the model learned to finish pictures long before it learned to read what they show.
_TINY_TRAINING = TrainConfig(
    seconds=390.0,
    batch_size=16,
    learning_rate=1e-3,
    text_weight=0.2,
    hide_context=0.7,
    save_every=200,
    save_seconds=60.0,
    validate_every=200,
)
_PUBLISHED = TrainConfig(
    steps=144_000,
    batch_size=6144,
    accumulate=96,
    checkpoint_activations="full",
    save_every=1000,
    validate_samples=2048,
)


class CogView(Recipe):
    name = "cogview"
    Config = CogViewConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {
        "tiny": (_TINY, _TINY_TRAINING),
        "cogview-4b": (_4B, _PUBLISHED),
        "cogview-large": (_LARGE, _PUBLISHED),
        "fashion-3b": (_FASHION, _PUBLISHED),
        "fashion-tiny": (_FASHION_TINY, dataclasses.replace(_TINY_TRAINING, seconds=1200.0, batch_size=8)),
    }
    config: CogViewConfig

    def attention(self, index: int) -> Attention:
        c = self.config
        three_region = partial(
            ThreeRegion,
            block_size=c.block_size,
            window_blocks=c.window_blocks,
            num_pivots=c.num_pivots,
            fed=self.length,
        )
        kinds: dict[Kind, Callable[..., Attention]] = {
            "dense": Dense,
            "dense_pb_relax": PBRelax,
            "three_region": three_region,
        }
        return kinds[c.attention](c, index)

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vocab.text2image(text, codes, self.config.max_positions)
        return tokens[:, :-1], tokens[:, 1:]

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        context = super().context(inputs)
        if self.config.attention == "three_region":
            context = dataclasses.replace(context, attention={"pivots": self.draw_pivots(inputs, draws)})
        return context

    def draw_pivots(self, inputs: Tensor, draws: Draws = None) -> Tensor:
        """int32 [B, L, P]: for every row and layer all its text, and a sample of its image's places."""
        layers, pivots = self.config.num_layers, self.config.num_pivots
        if isinstance(draws, Sequence):
            draws = [stream for stream in draws for _ in range(layers)]
        text, image = (places.repeat_interleave(layers, 0) for places in self.pivot_places(inputs))
        return sample_pivots(text, image, pivots, generator=draws).view(-1, layers, pivots)

    def pivot_places(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B, S] twice: what always is a pivot, and what a sample is drawn of."""
        return self.vocab.is_text(inputs), self.vocab.is_image(inputs)

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        return cls._with_pivots(super().fit(dataclasses.replace(config, attention="dense"), **sizes), config)

    @classmethod
    def begun(cls, config: Any) -> Any:
        return cls._with_pivots(super().begun(dataclasses.replace(config, attention="dense")), config)

    @staticmethod
    def _with_pivots(config: Any, like: CogViewConfig) -> Any:
        """Attention as another config has it, with pivots for all text and commands and some of the image."""
        pivots = max(like.num_pivots, config.always_pivots + config.image_tokens // 4)
        return dataclasses.replace(config, attention=like.attention, num_pivots=pivots)
