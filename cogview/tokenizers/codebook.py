"""The codebook of a VQ-VAE, and the ways to train it (CogView, arXiv 2105.13290, section 2.2).

All but `relaxed` take the nearest code when a picture is encoded, and pass the decoder's gradient straight through when
they train. They differ in what moves the codes: moving averages of the vectors that took them, a loss, the gradient of
codes drawn at random, or nothing. There are two of moving averages: they differ in how codes begin, and in what becomes
of unused ones. `relaxed` is DALL-E's: the encoder says how likely each code is, and the decoder trains on mixtures.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from cogview.tokenizers.image import VQConfig

Training = Literal["moving_average", "moving_average_kmeans", "straight_through", "gumbel", "fixed", "relaxed"]


class Chosen(NamedTuple):
    """Of the encoder's outputs at M places."""

    vectors: Tensor
    """For the decoder, [M, dim]: code vectors, with gradient to the encoder."""
    codes: Tensor
    """int64 [M]."""
    losses: dict[str, Tensor]
    """Of encoder and codebook, by name."""
    shown: Mapping[str, Tensor] = MappingProxyType({})
    """What the log has of it besides."""


class Codebook(nn.Module):
    """`embed` [dim, size], a code a column. A subclass says how it is trained."""

    embed: Tensor

    def __init__(self, config: "VQConfig"):
        super().__init__()
        self.commitment = config.commitment
        self._add("embed", torch.randn(config.dim, config.codebook_size))

    def _add(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int64 [M] of vectors [M, dim], and squared distances [M] less |vector|^2."""
        squares = self.embed.square().sum(0)
        parts = [torch.addmm(squares, part, self.embed, alpha=-2).min(dim=1) for part in vectors.split(1 << 14)]
        return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])

    def codes_of(self, outputs: Tensor) -> Tensor:
        """outputs: float32 of the encoder, [M, dim]. Their codes, int64 [M]."""
        return self.nearest(outputs)[0]

    def vectors_of(self, codes: Tensor) -> Tensor:
        """codes: int64 [...]. Their vectors [..., dim]."""
        return F.embedding(codes, self.embed.t())

    def forward(self, vectors: Tensor, share: float = 1.0) -> Chosen:
        """vectors: float32 [M, dim]. share: of the training that is done. In training mode the codes may move."""
        codes, _ = self.nearest(vectors)
        quantized = self.vectors_of(codes).detach()
        losses = {"commitment": self.commitment * F.mse_loss(vectors, quantized)}
        return Chosen(vectors + (quantized - vectors).detach(), codes, losses)


class MovingAverage(Codebook):
    """A code is the mean of the vectors that chose it lately (van den Oord et al., arXiv 1711.00937, appendix A.1):
    `cluster_size` and `embed_avg` are moving averages of their number and their sum.

    A code whose average use falls below a tenth of the mean is replaced by a vector that the others represent badly;
    codes never used yet all start so.
    """

    REVIVE_BELOW = 0.1  # of the mean use
    EPS = 1e-5

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, config: "VQConfig"):
        super().__init__(config)
        self.decay = config.decay
        self.register_buffer("cluster_size", torch.zeros(config.codebook_size))
        self.register_buffer("embed_avg", torch.zeros(config.dim, config.codebook_size))

    def forward(self, vectors: Tensor, share: float = 1.0) -> Chosen:
        if not self.training:
            return super().forward(vectors)
        self._revive(vectors.detach())
        chosen = super().forward(vectors)
        self._update(vectors.detach(), chosen.codes)
        return chosen

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor) -> None:
        n = self.cluster_size.numel()
        counts = torch.bincount(codes, minlength=n).to(vectors.dtype)
        sums = vectors.new_zeros(n, vectors.shape[1]).index_add_(0, codes, vectors)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums.t(), 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.EPS) / (total + n * self.EPS) * total  # Laplace
        self.embed.copy_(self.embed_avg / smoothed)

    @torch.no_grad()
    def _revive(self, vectors: Tensor) -> None:
        use = len(vectors) / self.cluster_size.numel()
        dead = (self.cluster_size < self.REVIVE_BELOW * use).nonzero().flatten()
        if not len(dead):
            return
        if len(dead) == self.cluster_size.numel():
            chosen = torch.linspace(0, len(vectors) - 1, len(dead), device=vectors.device).long()
        else:  # the worst represented, taking every fourth: neighbours in that order are often alike
            distances = self.nearest(vectors)[1] + vectors.square().sum(1)
            dead = dead[: max(1, len(vectors) // 4)]
            chosen = distances.topk(min(4 * len(dead), len(vectors))).indices[::4][: len(dead)]
            dead = dead[: len(chosen)]
        start = 2 * self.REVIVE_BELOW * use  # a revived code nobody takes is free again after ln 2 / (1 - decay) steps
        self.embed[:, dead] = vectors[chosen].t()
        self.cluster_size[dead] = start
        self.embed_avg[:, dead] = vectors[chosen].t() * start


class Fixed(Codebook):
    """Codes are vectors of an encoder that has learned for a while, and stay.

    For a share FREE of the training the decoder gets the encoder's own vectors. Then codes are drawn from a batch's as
    k-means++ draws its centres (Arthur and Vassilvitskii, 2007), one after the other, each with a chance in proportion
    to its squared distance from those before: spread over what there is, none twice. Where a batch has fewer different
    vectors than there are codes, the next ones give the others. `begun` counts.
    """

    FREE = 0.1

    begun: Tensor

    def __init__(self, config: "VQConfig"):
        super().__init__(config)
        self.register_buffer("begun", torch.tensor(0))

    def forward(self, vectors: Tensor, share: float = 1.0) -> Chosen:
        if not self.training:
            return super().forward(vectors)
        if share < self.FREE and not self.begun:
            return Chosen(vectors, self.nearest(vectors)[0], {"commitment": vectors.new_zeros(())})
        self._begin(vectors.detach())
        return self._choose(vectors, share)

    def _choose(self, vectors: Tensor, share: float) -> Chosen:
        """In training, once codes have begun."""
        return super().forward(vectors)

    @torch.no_grad()
    def _begin(self, vectors: Tensor) -> None:
        begun, size = int(self.begun), self.embed.shape[1]
        if begun == size:
            return
        far = vectors.new_ones(len(vectors))
        if begun:
            far = torch.cdist(vectors, self.embed[:, :begun].t()).square().amin(1)
        alike = 1e-6 * float(vectors.square().sum(1).mean())  # rounding of the same vector
        while begun < size and float(far.max()) > alike:
            code = vectors[torch.multinomial(far, 1)]
            self.embed[:, begun] = code[0]
            far = torch.minimum(far if begun else torch.full_like(far, torch.inf), (vectors - code).square().sum(1))
            begun += 1
        self.begun.fill_(begun)


class StraightThrough(Fixed):
    """Begins as `Fixed`; then codes move to the vectors that choose them by the gradient of their mean squared distance
    (the codebook loss of van den Oord et al., arXiv 1711.00937, equation 3)."""

    def _add(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value))

    def _choose(self, vectors: Tensor, share: float) -> Chosen:
        chosen = super()._choose(vectors, share)
        chosen.losses["codebook"] = F.mse_loss(self.vectors_of(chosen.codes), vectors.detach())
        return chosen


class Gumbel(StraightThrough):
    """Begins as `Fixed`; then in training codes are drawn, by p(k) = softmax_k(-|v_k - x|^2 / t), as the argmax of
    logits and Gumbel noise, and the gradient is that of the softmax of both (Jang et al., arXiv 1611.01144), to encoder
    and codes.

    The temperature t falls from FIRST to LAST, by the same factor at every step.
    """

    FIRST, LAST = 1.0, 1 / 16

    def _choose(self, vectors: Tensor, share: float) -> Chosen:
        temperature = self.FIRST * (self.LAST / self.FIRST) ** share
        distances = vectors.square().sum(1, keepdim=True) + torch.addmm(
            self.embed.square().sum(0), vectors, self.embed, alpha=-2
        )
        noise = -torch.empty_like(distances).exponential_().log()
        scores = noise - distances / temperature
        codes, soft = scores.argmax(1), scores.softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, codes[:, None], 1.0)
        quantized = (hard - soft.detach() + soft) @ self.embed.t()
        losses = {"commitment": self.commitment * F.mse_loss(vectors, self.vectors_of(codes).detach())}
        return Chosen(quantized, codes, losses)


class MovingAverageKMeans(MovingAverage, Fixed):
    """Begins as `Fixed`; then a code is a moving average, as above, and unused ones are left to themselves."""

    def forward(self, vectors: Tensor, share: float = 1.0) -> Chosen:
        return Fixed.forward(self, vectors, share)

    @torch.no_grad()
    def _begin(self, vectors: Tensor) -> None:
        new = slice(int(self.begun), None)
        super()._begin(vectors)
        self.cluster_size[new] = len(vectors) / len(self.cluster_size)
        self.embed_avg[:, new] = self.embed[:, new] * self.cluster_size[new]

    def _choose(self, vectors: Tensor, share: float) -> Chosen:
        chosen = super()._choose(vectors, share)
        self._update(vectors.detach(), chosen.codes)
        return chosen


class Relaxed(Codebook):
    """That of DALL-E's discrete VAE (Ramesh et al., arXiv 2102.12092, section 2.1 and appendix A): the encoder gives
    logits [M, size], q = softmax(logits), and a picture's codes are their argmax.

    In training the decoder gets softmax((logits + Gumbel noise) / t) @ codes, a mixture (Jang et al., arXiv
    1611.01144), whose gradient reaches encoder and codes as it is; t falls from FIRST to LAST. The loss has
    KL(q || uniform) = ln size + sum q ln q, a place's mean, by a weight that rises from 0 to `kl_weight`. Both go along
    half a cosine. A place is 3 downsample^2 values of a picture, by whose mean its error counts, and so by that
    number the KL's weight is divided: the paper's 6.6 / 192.

    Of its training the paper takes 5 % until t is lowest (150,000 of 3,000,000 updates), and 0.17 % until the weight
    is highest. A short one does better where t falls to its end: 400 steps on scenes, by pixels, came to 19.44 dB so,
    with 5 % to 17.25; 1,250 steps to 29.34. A weight of 1 came to 20.49 in 400, with 28 codes used and not 207; that it
    rose over 20 % was no better (logit-Laplace, 16.94 and 17.14).
    """

    FIRST, LAST = 1.0, 1 / 16
    COOLED, WEIGHED = 1.0, 5 / 3000  # shares of the training

    def __init__(self, config: "VQConfig"):
        super().__init__(config)
        self.kl_weight, self.values = config.kl_weight, config.in_channels * config.downsample**2

    def _add(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value))

    def codes_of(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def forward(self, vectors: Tensor, share: float = 1.0) -> Chosen:
        """vectors: the logits, float32 [M, size]."""
        logits, codes = vectors, self.codes_of(vectors)
        temperature = self.FIRST + (self.LAST - self.FIRST) * _eased(share / self.COOLED)
        weight = self.kl_weight * _eased(share / self.WEIGHED)
        if self.training:
            noise = -torch.empty_like(logits).exponential_().log()
            found = ((logits + noise) / temperature).softmax(1) @ self.embed.t()
        else:
            found = self.vectors_of(codes)
        kl = kl_from_uniform(logits).mean()
        shown = {"kl": kl, "temperature": kl.new_tensor(temperature), "kl_weight": kl.new_tensor(weight)}
        return Chosen(found, codes, {"weighted_kl": weight / self.values * kl}, shown)


def kl_from_uniform(logits: Tensor) -> Tensor:
    """logits: float [M, size]. Of q = softmax(logits), KL(q || uniform) = ln size + sum q ln q in nats, [M]."""
    logs = logits.log_softmax(1)
    return math.log(logits.shape[1]) + (logs.exp() * logs).sum(1)


def _eased(share: float) -> float:
    """From 0 to 1 along half a cosine, and 1 from there."""
    return (1 - math.cos(math.pi * min(share, 1.0))) / 2


KINDS: dict[Training, type[Codebook]] = {
    "moving_average": MovingAverage,
    "moving_average_kmeans": MovingAverageKMeans,
    "straight_through": StraightThrough,
    "gumbel": Gumbel,
    "fixed": Fixed,
    "relaxed": Relaxed,
}
