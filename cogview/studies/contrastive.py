"""A small contrastive model of pictures and captions, as CLIP (arXiv 2103.00020), to compare CapLoss with.

It reads image codes, not pixels: candidates are drawn as codes, so it judges exactly what CapLoss judges, trains on the
same token files, and needs no decoder, whose blur it would have to see through.

    s_ij = e^t <f(picture_i), g(caption_j)>,   f, g of length 1
    loss = (mean_i -log softmax_j(s_ij)_i + mean_j -log softmax_i(s_ij)_j) / 2
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import require
from cogview.sequence import pad_text
from cogview.train import checkpoint
from cogview.train.ranks import ALONE
from cogview.train.token_task import Pairs

_MOST = math.log(100)  # of t, as in CLIP


@dataclass(frozen=True)
class ContrastiveConfig:
    image_vocab: int
    image_tokens: int
    text_vocab: int
    max_text: int
    width: int = 128
    layers: int = 2
    heads: int = 4


class Encoder(nn.Module):
    """Unit vectors [B, width] of tokens [B, S], -1 where there is none: a transformer, and the mean over the tokens."""

    def __init__(self, vocab: int, length: int, config: ContrastiveConfig):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab, config.width), nn.Embedding(length, config.width)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        how: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(config.width, config.heads, 4 * config.width, **how)
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        most = len(self.positions.weight)
        require(tokens.shape[1] <= most, "tokens", f"at most {most} a row", tokens.shape[1])
        there = tokens >= 0
        x = self.words(tokens.clamp_min(0)) + self.positions.weight[: tokens.shape[1]]
        x = self.norm(self.layers(x, src_key_padding_mask=None if bool(there.all()) else ~there))
        mean = (x * there[..., None]).sum(dim=1) / there.sum(dim=1, keepdim=True)
        return F.normalize(self.head(mean), dim=-1)


class Contrastive(nn.Module):
    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.picture = Encoder(config.image_vocab, config.image_tokens, config)
        self.caption = Encoder(config.text_vocab, config.max_text, config)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """The symmetric loss of text [B, T] (-1 padded) and codes [B, N]. Pairs of one picture are no negatives of each
        other: their captions fit both."""
        scores = self.scale.clamp_max(_MOST).exp() * self.picture(codes) @ self.caption(text).T
        same = (codes[:, None] == codes).all(dim=-1)
        scores = scores.masked_fill(same & ~torch.eye(len(codes), dtype=torch.bool, device=codes.device), -torch.inf)
        own = torch.arange(len(codes), device=codes.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    @torch.no_grad()
    def similarity(self, captions: Sequence[Sequence[int]], codes: Tensor, batch_size: int = 256) -> Tensor:
        """Cosine float32 [N] of captions as raw text ids and their pictures, codes int64 [N, ...]: the higher, the
        better they fit."""
        parts = zip(pad_text(captions).split(batch_size), codes.flatten(1).split(batch_size), strict=True)
        return torch.cat([(self.picture(c) * self.caption(t)).sum(dim=-1) for t, c in parts])


@dataclass(frozen=True)
class PairBatch:
    text: Tensor
    codes: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def chunk(self, count: int) -> list["PairBatch"]:
        """Itself: every pair is judged against all others."""
        require(count == 1, "accumulate", "1, since the loss is of a whole batch", count)
        return [self]


class ContrastiveTask:
    """As the loop trains it."""

    title, unit, units, flops, ranks, inside = "contrastive model", "pairs", 1, 0, ALONE, None

    def __init__(self, model: Contrastive, data: Pairs, held_out: Pairs | None = None):
        self.model, self.data, self.held_out, self.counts = model, data, held_out, dict[str, int]()

    def batch(
        self, samples: Pairs, indices: np.ndarray, draws: Sequence[torch.Generator], training: bool = True
    ) -> PairBatch:
        return PairBatch(*samples.batch(indices))

    def loss(self, part: PairBatch, batch: PairBatch) -> tuple[Tensor, Tensor]:
        loss = self.model(part.text, part.codes)
        return loss, loss.detach()

    def compile(self) -> None:
        self.model.compile()

    def metrics(self, outputs: list[Tensor]) -> dict[str, float]:
        return {"loss": float(torch.stack(outputs).mean())}

    def identity(self) -> dict[str, Any]:
        config = asdict(self.model.config)
        return {"recipe": "contrastive", "config": config, "tokenizers": self.data.tokenizers, "data": len(self.data)}


def load(path: Path) -> Contrastive:
    """The model of a checkpoint, in evaluation mode."""
    tensors, header = checkpoint.weights(path)
    model = Contrastive(ContrastiveConfig(**header["config"]))
    checkpoint.check_fits(path, tensors, model.state_dict())
    model.load_state_dict(tensors)
    return model.eval()
