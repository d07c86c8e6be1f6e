"""Sizes of the models and settings of their training: frozen dataclasses and named presets.

The published 4B shape is that of the CogView paper (arXiv 2105.13290, section 2.3 and its released
checkpoint); the shape of the 3B fashion model (section 3, 50 x 50 tokens) was never published and is ours.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a CogView transformer. Everything a checkpoint needs to be rebuilt."""

    num_layers: int
    hidden_size: int
    num_heads: int
    image_grid: int
    """Image tokens per side: the image is image_grid x image_grid codes in raster order."""
    max_positions: int
    """Rows of the position table, and the stored length of a training sequence (one less is fed)."""
    image_vocab: int = 8192
    text_vocab: int = 50000
    attention: Literal["dense", "dense_pb_relax", "three_region", "dalle"] = "dense"
    """dalle: DALL-E's rows, columns and, in the last layer, squares of the image, after all text."""
    block_size: int = 128
    window_blocks: int = 6
    num_pivots: int = 768
    """Text and sampled image tokens that three_region attention keeps visible beyond the window."""
    relax: Literal["row", "tensor"] | None = "row"
    """PB-relax of the layer norms; "tensor" is what the published weights were trained with."""
    embedding_grad_scale: float = 0.1
    image_positions: Literal["following", "fixed"] = "following"
    """Rows of the position table that image tokens take: those after their text's, as published, or the same for
    every text length, as in CogView2, which a short training learns faster."""
    init_std: float = 0.02
    """Of the initial matrices; 0.02 is about 1 / sqrt(2560), the natural scale of the published width."""
    embedding_std: float = 0.02
    """Of the initial token and position embeddings."""
    branch_gain: float = 1.0
    """Initial weight of the norm that ends each branch. Below 1 tokens are not drowned by untrained branches."""
    dropout: float = 0.1
    """On the embeddings and on each branch. Attention weights are never dropped."""

    def __post_init__(self):
        for name in ("num_layers", "hidden_size", "num_heads", "image_grid", "max_positions", "image_vocab"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("text_vocab", "block_size", "window_blocks", "num_pivots"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}",
        )
        _require(
            self.max_text >= 1,
            f"max_positions must be at least {self.image_tokens + 5} for {self.image_tokens} image tokens, "
            f"got {self.max_positions}",
        )
        kinds = ("dense", "dense_pb_relax", "three_region", "dalle")
        _require(self.attention in kinds, f"attention must be one of {kinds}, got {self.attention!r}")
        _require(
            self.attention != "three_region" or self.num_pivots >= self.max_text + 4,
            f"num_pivots must hold all text and command tokens ({self.max_text + 4}), got {self.num_pivots}",
        )
        _require(self.relax in ("row", "tensor", None), f"relax must be row, tensor or None, got {self.relax!r}")
        _require(
            self.attention != "dalle" or self.relax != "tensor",
            "relax must be row or None with attention dalle, whose padding would count, got 'tensor'",
        )
        places = ("following", "fixed")
        _require(
            self.image_positions in places, f"image_positions must be one of {places}, got {self.image_positions!r}"
        )
        for name in ("init_std", "embedding_std", "branch_gain"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{name} must be positive and finite, got {value}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        _require(
            0 <= self.embedding_grad_scale <= 1,
            f"embedding_grad_scale must be in [0, 1], got {self.embedding_grad_scale}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def image_tokens(self) -> int:
        return self.image_grid**2

    @property
    def max_text(self) -> int:
        """Longest caption in tokens: what [ROI1] [BASE] [BOI1] image [EOI1] leave of a stored sequence."""
        return self.max_positions - self.image_tokens - 4

    @property
    def text_slots(self) -> int:
        """Places of the longest text and of [ROI1] [BASE] [BOI1]."""
        return self.max_text + 3

    @property
    def pivot_bias(self) -> float:
        """Each pivot stands for floor(S / P) tokens of the S fed (paper, appendix B)."""
        return math.log(max(1, (self.max_positions - 1) // self.num_pivots))


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Exactly one of steps and seconds sets its length."""

    steps: int | None = None
    seconds: float | None = None
    """Wall-clock budget: the learning rate follows the share of it used, so the run ends on time whatever
    the machine's speed. Time spent is kept in checkpoints. Bitwise repeatable runs need steps instead."""
    batch_size: int = 32
    """Sequences per optimizer step."""
    accumulate: int = 1
    """Micro-batches a step is computed in; divides batch_size."""
    learning_rate: float = 3e-4
    final_rate: float = 0.1
    """Cosine decay ends at this share of learning_rate."""
    warmup: float = 0.02
    """Share of the run with linearly rising learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip: float = 1.0
    text_weight: float = 1.0
    image_weight: float = 1.0
    hide_context: float = 0.0
    """Share of sequences that see only a random part of their own image tokens, so that the text has to tell."""
    truncate_text: bool = False
    """Cut captions that are too long, and count them; off: they are an error."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype; master weights and optimizer state are float32 always. float16 has a dynamic loss scale."""
    checkpoint_activations: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    validate_every: int = 500
    validate_batches: int = 8

    def __post_init__(self):
        _require((self.steps is None) != (self.seconds is None), "give exactly one of steps and seconds")
        _require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(
            self.seconds is None or 0 < self.seconds < math.inf,
            f"seconds must be positive and finite, got {self.seconds}",
        )
        counts = ("batch_size", "accumulate", "log_every", "save_every", "keep", "validate_every")
        for name in (*counts, "validate_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.batch_size % self.accumulate == 0,
            f"accumulate must divide batch_size, got {self.accumulate} and {self.batch_size}",
        )
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be positive, got {value}")
        _require(0 <= self.final_rate <= 1, f"final_rate must be in [0, 1], got {self.final_rate}")
        _require(0 <= self.hide_context <= 1, f"hide_context must be in [0, 1], got {self.hide_context}")
        _require(0 <= self.warmup < 1, f"warmup must be in [0, 1), got {self.warmup}")
        for name in ("weight_decay", "text_weight", "image_weight"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must not be negative, got {value}")
        _require(self.text_weight + self.image_weight > 0, "text_weight and image_weight must not both be 0")
        dtypes = ("bfloat16", "float16", "float32")
        _require(self.dtype in dtypes, f"dtype must be one of {dtypes}, got {self.dtype!r}")


# The demo: 8 x 8 image tokens, 96 tokens fed, three-region attention in every layer.
_TINY = GPTConfig(
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
_COGVIEW_4B = GPTConfig(
    num_layers=48, hidden_size=2560, num_heads=40, image_grid=32, max_positions=1089, relax="tensor"
)

PRESETS: dict[str, GPTConfig] = {
    "tiny": _TINY,
    "cogview-4b": _COGVIEW_4B,
    "cogview-large": dataclasses.replace(_COGVIEW_4B, num_layers=72, hidden_size=3072, num_heads=24, relax="row"),
    "fashion-3b": GPTConfig(
        num_layers=36,
        hidden_size=2560,
        num_heads=40,
        image_grid=50,
        max_positions=2561,
        attention="three_region",
    ),
}

_PUBLISHED = TrainConfig(steps=144_000, batch_size=6144, accumulate=96, checkpoint_activations=True, save_every=1000)
TRAINING: dict[str, TrainConfig] = {
    # What the demo has is minutes: small batches, less of the noise of unpredictable captions, and hidden context,
    # without which the model learned to finish pictures long before it learned to read what they show.
    "tiny": TrainConfig(
        seconds=390.0,
        batch_size=16,
        learning_rate=1e-3,
        text_weight=0.2,
        hide_context=0.7,
        save_every=200,
        validate_every=200,
    ),
    "cogview-4b": _PUBLISHED,
    "cogview-large": _PUBLISHED,
    "fashion-3b": _PUBLISHED,
}


def preset(name: str) -> tuple[GPTConfig, TrainConfig]:
    """The shape and the training settings of a named preset; ValueError lists the names."""
    _require(name in PRESETS, f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name], TRAINING[name]
