import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogview.config import TrainConfig
from cogview.tokenizers.codebook import KINDS, Codebook
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.train_image import TRAINING, train_vqvae
from cogview.train import checkpoint


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(kind: str, size: int, dim: int, **how) -> Codebook:
    return KINDS[kind](VQConfig(codebook_size=size, dim=dim, hidden=8, **how))


def gradients(of: torch.Tensor, *to: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(of, to, retain_graph=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relaxed"])
def test_nearest_code_against_all_distances(kind):
    codebook = made(kind, 50, 8).eval()
    vectors = torch.randn(20000, 8)
    expected = torch.cdist(vectors.double(), codebook.embed.detach().t().double()).argmin(1)
    assert torch.equal(codebook.nearest(vectors)[0], expected)
    quantized, codes, *_ = codebook(vectors)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(quantized, codebook.embed.detach().t()[expected])


@pytest.mark.parametrize("kind", ["moving_average", "moving_average_kmeans", "straight_through", "fixed"])
def test_the_decoders_gradient_reaches_the_encoder_unchanged(kind):
    codebook = made(kind, 16, 4)
    vectors, weights = torch.randn(100, 4, requires_grad=True), torch.randn(100, 4)
    quantized, _, losses, _ = codebook(vectors)
    (passed,) = gradients((quantized * weights).sum(), vectors)
    torch.testing.assert_close(passed, weights)
    assert set(losses) == {"commitment", "codebook"} - ({"codebook"} if kind != "straight_through" else set())
    (committed,) = gradients(losses["commitment"], vectors)
    torch.testing.assert_close(committed, 0.25 * 2 / 400 * (vectors - quantized).detach())


@pytest.mark.parametrize("kind", ["straight_through", "gumbel", "fixed"])
def test_codes_begin_as_different_vectors_of_the_first_batches(kind):
    codebook = made(kind, 12, 3)
    few, more = torch.randn(5, 3), torch.randn(40, 3)
    codebook(few.repeat(30, 1))
    assert int(codebook.begun) == 5
    begun = codebook.embed.detach().t()[:5].clone()
    assert sorted(map(tuple, begun.tolist())) == sorted(map(tuple, few.tolist()))
    codebook(more)
    found = codebook.embed.detach().t()
    assert int(codebook.begun) == 12
    assert torch.equal(found[:5], begun)
    assert len({tuple(code) for code in found.tolist()} & {tuple(vector) for vector in more.tolist()}) == 7
    codebook(100 + torch.randn(40, 3))
    assert torch.equal(codebook.embed.detach().t(), found)  # all have begun: only gradients move them now


@pytest.mark.parametrize("kind", ["moving_average_kmeans", "straight_through", "gumbel", "fixed"])
def test_the_encoder_learns_without_codes_first(kind):
    codebook = made(kind, 12, 3)
    vectors = torch.randn(40, 3)
    early = codebook(vectors, share=0.09)
    assert torch.equal(early.vectors, vectors)
    assert int(codebook.begun) == 0
    codebook(vectors, share=0.1)
    assert int(codebook.begun) == 12
    assert not torch.equal(codebook(vectors, share=0.05).vectors, vectors)  # a training that goes on for longer


def test_first_codes_are_spread():
    """Of two clusters that hold 999 and 1 of the vectors both have a code, among the first two."""
    vectors = torch.cat([torch.randn(999, 2) * 1e-3, torch.tensor([[50.0, 50.0]])])
    codebook = made("fixed", 2, 2)
    codebook(vectors)
    assert sorted(codebook.embed.norm(dim=0).tolist())[1] > 70


def test_fixed_codes_never_change():
    model = VQVAE(VQConfig(codebook_size=16, dim=4, hidden=8, codebook="fixed"))
    images = torch.rand(4, 3, 32, 32)
    model(images)
    before = model.quantize_t.embed.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(images)[1]["total"].backward()
        optimizer.step()
    assert torch.equal(model.quantize_t.embed, before)
    assert "quantize_t.embed" not in dict(model.named_parameters())


def test_codebook_loss_moves_codes_to_their_vectors():
    codebook = made("straight_through", 4, 3)
    vectors = torch.randn(60, 3, requires_grad=True)
    _, codes, losses, _ = codebook(vectors)
    moved, still = torch.autograd.grad(losses["codebook"], (codebook.embed, vectors), allow_unused=True)
    assert still is None
    for code in range(4):
        mine = vectors[codes == code].detach()
        expected = 2 / 180 * (codebook.embed[:, code].detach() - mine).sum(0)
        torch.testing.assert_close(moved[:, code], expected)
    decoded = torch.autograd.grad(codebook(vectors).vectors.sum(), codebook.embed, allow_unused=True)
    assert decoded == (None,)  # the decoder's gradient is the encoder's alone


def test_gumbel_at_a_temperature_of_zero_takes_the_nearest():
    codebook = made("gumbel", 16, 4)
    vectors = torch.randn(500, 4)
    codebook(vectors)
    codebook.LAST = 1e-9
    quantized, codes, *_ = codebook(vectors, share=1.0)
    assert torch.equal(codes, codebook.nearest(vectors)[0])
    torch.testing.assert_close(quantized, codebook.embed.t()[codes])
    assert (codebook(vectors, share=0.0).codes != codes).float().mean() > 0.05


def test_gumbel_draws_by_the_softmax_of_distances():
    codebook = made("gumbel", 3, 2)
    codebook.embed.data = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    codebook.begun.fill_(3)
    count, t = 40_000, math.sqrt(codebook.FIRST * codebook.LAST)  # halfway
    codes = codebook(torch.tensor([[0.2, 0.3]]).repeat(count, 1), share=0.5).codes
    distances = [0.04 + 0.09, 0.64 + 0.09, 0.04 + 2.89]
    expected = torch.tensor([math.exp(-d / t) for d in distances])
    found = torch.bincount(codes, minlength=3) / count
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.01, rtol=0)


def test_gumbel_gradient_is_the_softmaxs():
    codebook = made("gumbel", 8, 4)
    vectors, weights = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4)
    codebook(vectors)
    state = torch.get_rng_state()
    quantized, codes, *_ = codebook(vectors, share=0.0)
    got = gradients((quantized * weights).sum(), vectors, codebook.embed)
    torch.set_rng_state(state)
    noise = -torch.log(torch.empty(30, 8).exponential_())
    embed = codebook.embed.detach().clone().requires_grad_()
    scores = noise - (vectors[:, None] - embed.t()[None]).square().sum(-1) / codebook.FIRST
    assert torch.equal(codes, scores.argmax(1))
    soft, hard = scores.softmax(1), F.one_hot(codes, 8).float()
    of_choice = gradients((soft * (weights @ embed.detach())).sum(), vectors, embed)
    of_code = gradients((hard @ embed.t() * weights).sum(), embed)[0]
    torch.testing.assert_close(got[0], of_choice[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], of_choice[1] + of_code, rtol=1e-4, atol=1e-5)


def test_moving_averages_against_a_plain_computation():
    codebook = made("moving_average", 6, 3, decay=0.9)
    codebook(torch.randn(60, 3))  # starts every code
    size, total = codebook.cluster_size.double(), codebook.embed_avg.double()
    for _ in range(5):
        vectors = torch.randn(60, 3)
        codes = torch.cdist(vectors, codebook.embed.t()).argmin(1)
        assert (size >= 1).all()  # a tenth of the mean use, 60 / 6: nothing is revived here
        assert torch.equal(codebook(vectors).codes, codes)
        for code in range(6):
            mine = vectors[codes == code].double()
            size[code] = 0.9 * size[code] + 0.1 * len(mine)
            total[:, code] = 0.9 * total[:, code] + 0.1 * mine.sum(0)
        smoothed = (size + 1e-5) / (size.sum() + 6e-5) * size.sum()
        torch.testing.assert_close(codebook.embed.double(), total / smoothed, rtol=1e-4, atol=1e-5)


def test_moving_averages_that_begin_alike_leave_unused_codes():
    """They begin where `fixed` does with the same draws, then follow their vectors; one that nothing takes stays."""
    vectors, used = torch.randn(60, 3), slice(0, 5)
    begun, codebook = made("fixed", 6, 3), made("moving_average_kmeans", 6, 3, decay=0.9)
    for one in (begun, codebook):
        torch.manual_seed(1)
        one._begin(vectors)
    assert torch.equal(codebook.embed, begun.embed)
    torch.testing.assert_close(codebook.embed_avg / codebook.cluster_size, begun.embed)
    codebook.embed[:, 5] = codebook.embed_avg[:, 5] = 1e3
    codebook.cluster_size[5] = 1
    for _ in range(60):
        codes = codebook(vectors).codes
    assert codes.max() < 5
    assert float(codebook.embed[:, 5].min()) > 900  # as far away as it was, up to the smoothing of uses
    means = torch.stack([vectors[codes == code].mean(0) for code in range(5)], dim=1)
    torch.testing.assert_close(codebook.embed[:, used], means, rtol=1e-2, atol=1e-2)


def test_dead_codes_are_revived_where_they_help():
    codebook = made("moving_average", 8, 2, decay=0.99)
    cluster = torch.randn(64, 2) * 0.01
    for _ in range(10):
        codebook(cluster)
    far = torch.tensor([[5.0, 5.0]]).repeat(16, 1)
    error = []
    for _ in range(300):
        quantized = codebook(torch.cat([cluster, far])).vectors
        error.append(float((quantized[64:] - far).square().mean()))
    assert error[0] > 1
    assert error[-1] < 1e-2
    codebook.eval()
    before = codebook.embed.clone()
    codebook(far)
    assert torch.equal(codebook.embed, before)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    config = VQConfig(codebook_size=16, dim=8, hidden=8, codebook=kind)
    model = VQVAE(config)
    images = torch.rand(2, 3, 16, 16)
    model(images)
    model.save(tmp_path / "m.safetensors")
    loaded = VQVAE.load(tmp_path / "m.safetensors")
    assert loaded.config == config
    assert loaded.sha256 == model.sha256
    assert torch.equal(loaded.encode(images), model.eval().encode(images))


OLDEST = ["codebook_size", "dim", "hidden", "in_channels", "downsample", "decay", "commitment"]


def test_files_of_before_keep_their_name(tmp_path):
    """Their config has no word about what came later, and neither has that of a file with the defaults now."""
    path, model = tmp_path / "m.safetensors", VQVAE(VQConfig(codebook_size=16, dim=8, hidden=8))
    model.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(json.loads(metadata["config"])) == OLDEST
    assert VQVAE.load(path).sha256 == metadata["sha256"]
    assert list(VQConfig(codebook="gumbel").stored()) == [*OLDEST, "codebook"]
    save_file(
        load_file(path),
        path,
        {"format": metadata["format"], "config": json.dumps(json.loads(metadata["config"]) | {"codebook": "k"})},
    )
    with pytest.raises(ValueError, match=r"path: .* has no valid config"):
        VQVAE.load(path)


def test_other_kinds_are_refused():
    with pytest.raises(
        ValueError,
        match=rf"codebook: expected one of {', '.join(KINDS)}, got 'x'",
    ):
        VQConfig(codebook="x")


def test_trainings_of_before_go_on_with_moving_averages(tmp_path):
    """Their checkpoints have no word about the codebook."""
    images, training = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), TRAINING | {"batch_size": 2}
    sizes = {"codebook_size": 8, "dim": 4, "hidden": 4}
    train_vqvae(images, VQConfig(**sizes), TrainConfig(steps=2, **training), tmp_path)
    path = checkpoint.latest(tmp_path / "vqvae")
    tensors, header = checkpoint.read(path)
    header["config"] = {name: header["config"][name] for name in OLDEST}
    checkpoint.save(path, tensors, header)
    with pytest.raises(ValueError, match="of another run: codebook: expected 'fixed', got 'moving_average'"):
        train_vqvae(images, VQConfig(**sizes, codebook="fixed"), TrainConfig(steps=3, **training), tmp_path)
    assert train_vqvae(images, VQConfig(**sizes), TrainConfig(steps=3, **training), tmp_path).steps == 3
