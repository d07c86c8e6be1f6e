"""The codebook's moving averages beside those of vector-quantize-pytorch."""

import pytest
import torch

from cogview.tokenizers.codebook import MovingAverage
from cogview.tokenizers.image import VQConfig

vq = pytest.importorskip("vector_quantize_pytorch")

CODES, DIM, DECAY = 24, 6, 0.8


def test_the_same_codes_and_moving_averages_from_the_same_start():
    torch.manual_seed(0)
    ours = MovingAverage(VQConfig(codebook_size=CODES, dim=DIM, hidden=8, decay=DECAY, commitment=0.25))
    theirs = vq.VectorQuantize(
        dim=DIM, codebook_size=CODES, decay=DECAY, eps=MovingAverage.EPS, commitment_weight=0.25, rotation_trick=False
    )
    ours.embed.copy_(torch.randn(DIM, CODES))
    ours.cluster_size.fill_(30.0)
    ours.embed_avg.copy_(ours.embed * 30)
    book = theirs._codebook
    for name in ("embed", "embed_avg"):
        getattr(book, name).copy_(getattr(ours, name).t()[None])
    book.cluster_size.fill_(30.0)
    for _ in range(6):
        vectors = torch.randn(1, 900, DIM)
        mine, other = (vectors.clone().requires_grad_() for _ in range(2))
        chosen = ours(mine[0])
        quantized, codes, loss = theirs(other)
        assert torch.equal(chosen.codes, codes[0])
        torch.testing.assert_close(chosen.vectors, quantized[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chosen.losses["commitment"], loss.squeeze())
        weights = torch.randn(900, DIM)
        ((chosen.vectors * weights).sum() + chosen.losses["commitment"]).backward()
        ((quantized[0] * weights).sum() + loss.sum()).backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.cluster_size, book.cluster_size[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.embed_avg.t(), book.embed_avg[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.embed.t(), book.embed[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.embed_avg, ours.embed * 30)
