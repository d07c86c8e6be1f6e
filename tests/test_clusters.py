"""Clusters of codes: their labels, and that a token is drawn as CogView2's code draws it."""

import numpy as np
import pytest
import torch

from cogview.clusters import Clusters, k_means, read_labels
from cogview.sampling import Sampling, sample_token


def test_k_means_finds_what_lies_together():
    centres = 10 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    own = torch.arange(6).repeat_interleave(40)
    vectors = centres[own] + 0.1 * torch.randn(240, 8, generator=torch.Generator().manual_seed(2))
    labels = k_means(vectors, 6)
    assert labels.dtype == torch.int64
    together = labels[:, None] == labels
    assert torch.equal(together, own[:, None] == own)
    assert torch.equal(k_means(vectors, 6), labels)
    assert int(k_means(vectors).max()) == 5  # a 40th of 240
    assert int(k_means(vectors[:1].expand(50, -1), 3).max()) == 0  # what lost all is none
    for count in (0, 241):
        with pytest.raises(ValueError, match=f"clusters: expected 1 to 240, got {count}"):
            k_means(vectors, count)


@pytest.mark.parametrize(("top", "inner"), [(4, 0.5), (1, 1.0), (99, 2.0)])
def test_what_is_drawn(top, inner):
    """Frequencies over an even grid of chances, against the formula of coglm_strategy.py."""
    stream = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, generator=stream), torch.randint(7, (50,), generator=stream)
    labels[:7] = torch.arange(7)
    allowed = torch.rand(50, generator=stream) < 0.8
    count = 20_000
    chances = (torch.arange(count) + 0.5) / count
    how = Sampling(temperature=0.8, clusters=Clusters(labels, top, inner))
    found = sample_token(logits.expand(count, 50), allowed, chances, how).bincount(minlength=50) / count
    p = (logits.masked_fill(~allowed, -torch.inf) / 0.8).softmax(0)
    sums = torch.zeros(7).index_add_(0, labels, p)
    best, which = sums.topk(min(top, 7))
    expected = torch.zeros(50)
    for share, cluster in zip(best / best.sum(), which, strict=True):
        inside = (logits.masked_fill(~allowed | (labels != cluster), -torch.inf) / 0.8 / inner).softmax(0)
        expected += share * inside
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_many_alike_are_one():
    """42 nearly white codes of a large sum, of which top-k keeps a few: the cluster keeps them all."""
    logits = torch.full((100,), 0.0)
    logits[50:] = 0.5  # each likelier than each white one, all of them together less likely
    labels = torch.arange(100)
    labels[:42] = 0
    chances = (torch.arange(1000) + 0.5) / 1000
    by_clusters = Sampling(clusters=Clusters(labels, 8))
    white = sample_token(logits.expand(1000, 100), torch.ones(100, dtype=torch.bool), chances, by_clusters) < 42
    assert white.float().mean() > 0.7
    plain = sample_token(logits.expand(1000, 100), torch.ones(100, dtype=torch.bool), chances, Sampling(top_k=8)) < 42
    assert not plain.any()


def test_published_labels(tmp_path):
    labels = np.arange(30) % 5
    np.save(tmp_path / "labels.npy", labels.astype(np.int32))
    found = read_labels(tmp_path / "labels.npy", 30)
    assert found.dtype == torch.int64
    assert found.tolist() == labels.tolist()
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "real.npy", labels / 2)
    np.save(tmp_path / "below.npy", labels - 1)
    np.save(tmp_path / "above.npy", labels + 26)
    (tmp_path / "text.npy").write_text("hello")
    for name, said in (
        ("labels.npy", "cluster labels: expected whole numbers, one for each of 31 codes"),
        ("real.npy", "cluster labels: expected whole numbers"),
        ("below.npy", r"cluster labels: expected numbers from 0 to 29 in .*below\.npy, got '-1 to 3'"),
        ("above.npy", r"cluster labels: expected numbers from 0 to 29 in .*above\.npy, got '26 to 30'"),
        ("objects.npy", r"cluster labels: .*objects\.npy is no \.npy file of numbers"),
        ("text.npy", r"cluster labels: .*text\.npy is no \.npy file of numbers"),
        ("none.npy", r"cluster labels: cannot read .*none\.npy"),
    ):
        with pytest.raises(ValueError, match=said):
            read_labels(tmp_path / name, 31 if name == "labels.npy" else 30)


def test_bad_input():
    labels = torch.tensor([0, 1, 1])
    for change, said in (
        ({"labels": labels.float()}, r"labels: expected int64 \[V\]"),
        ({"labels": labels - 1}, "labels: expected none below 0, got -1"),
        ({"labels": labels + 2}, "labels: expected fewer than codes, got 3"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"temperature": 0.0}, "cluster temperature: expected a positive and finite number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            Clusters(**{"labels": labels} | change)
    with pytest.raises(ValueError, match=r"top_p: expected 1 with clusters, got 0\.9"):
        Sampling(top_p=0.9, clusters=Clusters(labels))
    with pytest.raises(ValueError, match="clusters: expected labels of 4 codes, as the model draws, got '3'"):
        sample_token(
            torch.zeros(1, 4), torch.ones(4, dtype=torch.bool), torch.zeros(1), Sampling(clusters=Clusters(labels))
        )
