"""Settings that all recipes share: the sizes of a model, and those of a training. Frozen dataclasses that check
themselves."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Recompute = Literal["none", "full", "selective"]
"""What a backward computes again of each layer instead of keeping it: nothing, all, or all but its attention."""


def require(ok: bool, name: str, expected: str, got: Any) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {briefly(got)}")


def briefly(value: Any) -> str:
    """A value in an error: its repr, of a long one the beginning, and of arrays dtype and shape."""
    if getattr(value, "shape", None) and hasattr(value, "dtype"):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > 20:
        return f"{type(value).__name__} of {len(value):,}"
    try:
        shown = " ".join(repr(value).splitlines())
    except ValueError:  # Python writes no more than 4,300 digits
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a transformer over text and image tokens. With its recipe, all that a checkpoint needs to be rebuilt."""

    num_layers: int
    hidden_size: int
    num_heads: int
    image_grid: int
    """Image tokens per side: the image is image_grid x image_grid codes in raster order."""
    max_positions: int
    """Rows of the position table, and the stored length of a training sequence (one less is fed)."""
    image_vocab: int = 8192
    text_vocab: int = 50000
    relax: Literal["row", "tensor"] | None = "row"
    """PB-relax of the layer norms; "tensor" is what the published weights were trained with: the largest value of the
    batch then decides how much epsilon counts, and rows do depend on their batch, slightly."""
    embedding_grad_scale: float = 0.1
    image_positions: Literal["following", "fixed", "rows_columns"] = "following"
    """Rows of the position table that image tokens take: those after their text's, as published, or the same for
    every text length, as in CogView2, which a short training learns faster. Recipe dalle alone: the sum of one of their
    row of the image and one of their column."""
    init_std: float = 0.02
    """Of the initial matrices; 0.02 is about 1 / sqrt(2560), the natural scale of the published width."""
    embedding_std: float = 0.02
    """Of the initial token and position embeddings."""
    branch_gain: float = 1.0
    """Initial weight of the norm that ends each branch. Below 1 tokens are not drowned by untrained branches."""
    dropout: float = 0.1
    """On the embeddings and on each branch. Attention weights are never dropped."""
    norms: Literal["sandwich", "pre"] = "sandwich"
    """Around each branch, or before it alone, as in DALL-E (pre-LN)."""

    def __post_init__(self):
        counts = ("num_layers", "hidden_size", "num_heads", "image_grid", "max_positions", "image_vocab", "text_vocab")
        for name in counts:
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        heads, fewest = self.num_heads, self.image_tokens + 5
        require(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_heads ({heads})", self.hidden_size)
        for_image = f"at least {fewest} for {self.image_tokens} image tokens"
        require(self.max_text >= 1, "max_positions", for_image, self.max_positions)
        require(self.relax in ("row", "tensor", None), "relax", "row, tensor or None", self.relax)
        places = self.ways_of_positions
        require(self.image_positions in places, "image_positions", " or ".join(places), self.image_positions)
        for name in ("init_std", "embedding_std", "branch_gain"):
            require(0 < getattr(self, name) < math.inf, name, "a positive and finite number", getattr(self, name))
        require(0 <= self.dropout < 1, "dropout", "a number in [0, 1)", self.dropout)
        require(self.norms in ("sandwich", "pre"), "norms", "sandwich or pre", self.norms)
        scale = self.embedding_grad_scale
        require(0 <= scale <= 1, "embedding_grad_scale", "a number in [0, 1]", scale)

    @property
    def ways_of_positions(self) -> tuple[str, ...]:
        """What image_positions may be."""
        return ("following", "fixed")

    @property
    def position_rows(self) -> int:
        """Of the position table."""
        return self.max_positions

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def image_tokens(self) -> int:
        return self.image_grid**2

    @property
    def text_end(self) -> int:
        """Rows of the position table before those of images, where these are fixed, or all."""
        return self.max_text + 2 if self.image_positions == "fixed" else self.max_positions  # [ROI1] text [BASE] first

    @property
    def max_text(self) -> int:
        """Longest caption in tokens: what [ROI1] [BASE] [BOI1] image [EOI1] leave of a stored sequence."""
        return self.max_positions - self.image_tokens - 4


@dataclass(frozen=True)
class TrainConfig:
    """One training. `steps` or `seconds` set its length; with both it ends at whichever comes first."""

    steps: int | None = None
    seconds: float | None = None
    """Wall-clock budget: the learning rate follows the share of it used, so the run ends on time whatever
    the machine's speed. Time spent is kept in checkpoints. Bitwise repeatable runs need steps alone."""
    batch_size: int = 32
    """Samples per optimizer step."""
    accumulate: int = 1
    """Micro-batches a step is computed in; divides batch_size."""
    learning_rate: float = 3e-4
    final_rate: float = 0.1
    """Cosine decay ends at this share of learning_rate."""
    warmup: float = 0.02
    """Share of the run with linearly rising learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the layers' matrices; all else is AdamW's. Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982),
    so that both take the same learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip: float = 1.0
    """Largest norm of the gradients; math.inf: any."""
    text_weight: float = 1.0
    image_weight: float = 1.0
    loss_mean: Literal["tokens", "kinds"] = "tokens"
    """Over all tokens by these weights, or of text and of images alone, which are then weighed (DALL-E, arXiv
    2102.12092, section 2.2)."""
    hide_context: float = 0.0
    """Share of sequences that see only a random part of their own image tokens, so that the text has to tell."""
    drop_text: float = 0.0
    """Of the sequences to draw pictures the share that loses its caption, for guidance (classifier-free, arXiv
    2207.12598)."""
    bpe_dropout: float = 0.0
    """Chance of each merge of a caption's tokens to be left out, drawn anew whenever it is trained on (Provilkov et
    al., arXiv 1910.13267). What would not fit any more then stays as it is."""
    truncate_text: bool = False
    """Cut captions that are too long, and count them; off: they are an error."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype; master weights and optimizer state are float32 always. float16 has a dynamic loss scale."""
    gradient_scaling: Literal["loss", "blocks"] = "loss"
    """Of float16: a scale of the loss, or one for each attention and each MLP, between which all is float32, see
    train/block_scales.py."""
    scale_patience: int = 1000
    """Good steps after which a scale has doubled."""
    average: float | None = None
    """Decay of an exponentially weighted average of the parameters, which is validated and drawn with; None: none."""
    average_every: int = 1
    """Steps between two parameters of the average."""
    checkpoint_activations: Recompute = "none"
    compile: bool = False
    """Each layer, or what has none whole."""
    reshard: bool = True
    """Of several processes: parameters that were gathered for a layer's forward are dropped until its backward."""
    seed: int = 0
    log_every: int = 10
    watch: bool = False
    """Log the largest absolute values of each layer, too, which takes a forward of a part of the batch."""
    save_every: int = 500
    save_seconds: float = math.inf
    """Or after so many seconds."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    validate_every: int = 500
    validate_samples: int = 256
    """Held-out samples of a validation, or all where there are fewer."""

    def __post_init__(self):
        length = (self.steps, self.seconds)
        require(length != (None, None), "steps, seconds", "at least one of them", length)
        require(self.steps is None or self.steps >= 1, "steps", "at least 1", self.steps)
        finite = self.seconds is None or 0 < self.seconds < math.inf
        require(finite, "seconds", "a positive and finite number", self.seconds)
        counts = ("batch_size", "accumulate", "log_every", "save_every", "keep", "validate_every", "validate_samples")
        for name in (*counts, "scale_patience", "average_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        divides = self.batch_size % self.accumulate == 0
        require(divides, "accumulate", f"a divisor of batch_size ({self.batch_size})", self.accumulate)
        for name in ("clip", "save_seconds"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        rate = self.learning_rate
        require(0 < rate < math.inf, "learning_rate", "a positive and finite number", rate)
        require(0 <= self.seed < 2**63, "seed", "a whole number from 0 to 2^63 - 1", self.seed)
        for name in ("final_rate", "hide_context", "drop_text", "bpe_dropout"):
            require(0 <= getattr(self, name) <= 1, name, "a number in [0, 1]", getattr(self, name))
        require(0 <= self.warmup < 1, "warmup", "a number in [0, 1)", self.warmup)
        for name in ("weight_decay", "text_weight", "image_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "a finite number that is not negative", value)
        weights = (self.text_weight, self.image_weight)
        require(sum(weights) > 0, "text_weight, image_weight", "one that is not 0", weights)
        dtypes = ("bfloat16", "float16", "float32")
        require(self.dtype in dtypes, "dtype", f"one of {', '.join(dtypes)}", self.dtype)
        kinds = get_args(Recompute)
        got = self.checkpoint_activations
        require(got in kinds, "checkpoint_activations", f"one of {', '.join(kinds)}", got)
        require(self.optimizer in ("adamw", "muon"), "optimizer", "adamw or muon", self.optimizer)
        require(self.loss_mean in ("tokens", "kinds"), "loss_mean", "tokens or kinds", self.loss_mean)
        scaling = self.gradient_scaling
        require(scaling in ("loss", "blocks"), "gradient_scaling", "loss or blocks", scaling)
        fits = scaling == "loss" or self.dtype == "float16"
        require(fits, "gradient_scaling", f"loss with dtype {self.dtype}, which needs none", scaling)
        decays = self.average is None or 0 < self.average < 1
        require(decays, "average", "a decay above 0 and below 1, or None", self.average)
