"""Sizes of CogView2's models (arXiv 2204.14217), and the presets of CogLM."""

from collections.abc import Mapping
from dataclasses import dataclass

from cogview.bilingual import ICETK
from cogview.config import ModelConfig, TrainConfig, require


@dataclass(frozen=True)
class BilingualConfig(ModelConfig):
    """Of the models of CogView2."""

    max_caption: int = 111
    """Tokens of the longest caption."""
    text_rows: int = 512
    """Of the position table, before those of [SOI] and the image."""
    chinese_from: int = ICETK
    """The text id from which on pieces are not English."""

    def __post_init__(self):
        super().__post_init__()
        rows = self.max_caption + 1
        require(self.text_rows >= rows, "text_rows", f"at least {rows} for captions of {rows - 1}", self.text_rows)
        require(
            self.max_positions >= self.image_rows_end,
            "max_positions",
            f"at least {self.image_rows_end}",
            self.max_positions,
        )
        known = 1 <= self.chinese_from <= self.text_vocab
        require(known, "chinese_from", f"1 to {self.text_vocab}", self.chinese_from)

    @property
    def max_text(self) -> int:
        return self.max_caption

    @property
    def text_end(self) -> int:
        return self.text_rows

    @property
    def image_rows_end(self) -> int:
        """Rows of the position table up to the last of the image."""
        return self.text_rows + 1 + self.image_tokens


@dataclass(frozen=True)
class CogLMConfig(BilingualConfig):
    caption_share: float = 0.3
    """Of the samples, those from image to text."""
    spans_share: float = 0.0
    """Of the samples, which all have a picture, those that lose it and are text alone."""
    patch_side: int = 4
    patch_share: float = 0.8
    """Cells of all patches, as a share of the picture, where none overlap."""
    stop: bool = True
    """Whether </s> ends a caption; the released weights know no end."""

    def __post_init__(self):
        super().__post_init__()
        shares = (self.caption_share, self.spans_share)
        fits = min(shares) >= 0 and sum(shares) <= 1
        require(fits, "caption_share, spans_share", "shares that come to 1 at most", shares)
        fits = 1 <= self.patch_side < self.image_grid
        require(fits, "patch_side", f"1 to {self.image_grid - 1}", self.patch_side)
        require(0 <= self.patch_share <= 1, "patch_share", "a number in [0, 1]", self.patch_share)

    @property
    def patches(self) -> int:
        """Of a picture."""
        return int(self.patch_share * self.image_tokens / self.patch_side**2)


def check_bilingual(sizes: Mapping[str, int]) -> None:
    """ValueError unless the sizes of some data, those of `Recipe.fit`, are of bilingual text."""
    bilingual = "those of a bilingual text tokenizer (cogview tokenize --text-vocabulary bilingual)"
    require("chinese_from" in sizes, "tokens", bilingual, "others")


TINY = CogLMConfig(
    num_layers=5,
    hidden_size=256,
    num_heads=4,
    image_grid=8,
    max_positions=97,
    max_caption=29,
    text_rows=32,
    image_vocab=512,
    text_vocab=500,
    chinese_from=300,
    spans_share=0.05,
    init_std=0.06,
    embedding_std=0.1,
    branch_gain=0.3,
    dropout=0.0,
)
SIX_BILLION = CogLMConfig(
    num_layers=48,
    hidden_size=3072,
    num_heads=48,
    image_grid=20,
    max_positions=1024,
    image_vocab=20_000,
    text_vocab=130_000,
    relax=None,  # PB-relax is there in the released code, and never switched on
    embedding_grad_scale=1.0,
    stop=False,
)
TINY_TRAINING = TrainConfig(
    seconds=480.0,
    batch_size=16,
    learning_rate=1e-3,
    hide_context=0.7,
    text_weight=4.0,  # of 700 predicted tokens of a batch 50 are text, which was learned last
    save_every=200,
    save_seconds=60.0,
    validate_every=200,
)
# the article has no rates; these are CogView's
PUBLISHED = TrainConfig(
    steps=300_000,
    batch_size=4096,
    accumulate=64,
    checkpoint_activations="full",
    save_every=1000,
    validate_samples=2048,
)
