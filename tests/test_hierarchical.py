"""The benchmark of CogView2 against CogView counts the positions it scales by and times what it says, at a toy size."""

import json

import pytest
import torch

from benchmarks import hierarchical, hierarchical_steps, readme, report, steps, walks
from benchmarks.hierarchical import QUICK, CogView2, How, Sizes
from cogview.magnify import magnify_batches, windows
from cogview.parts.transformer import Transformer
from cogview.recipes.superresolution import SuperResolution
from cogview.sampling import Sampling

HOW = How("fp32", 1, 2, torch.device("cpu"), False)
CODES = [[3, 4, 5]]


def test_positions_of_the_published_walk():
    """Rows of windows as released code has them (generation/magnify.py), each 32 wide, and what is new in each."""
    rows = {(0, 0): 18, (0, 1): 30, (0, 2): 30, (1, 1): 30, (1, 0): 30, (1, 2): 30, (2, 0): 32, (2, 1): 32, (2, 2): 32}
    assert [(w.top // 16, w.left // 16) for w in windows(16)] == list(rows)
    assert walks.published_walk(32) == [32 * count for count in rows.values()]
    assert sum(walks.published_walk(32)) == 8448
    new = [576, 672, 480, 512, 448, 256, 576, 288, 288]
    found = walks.missing(32)
    assert sorted(count for level in found for count in level) == sorted(new)
    assert sum(new) == 64 * 64
    assert len(found) < len(new)  # some go together


def test_a_line_is_summed_over_all_positions():
    def step(position: float) -> float:
        return 0.25 + 0.5 * position

    seconds = {place + 2.5: step(place + 2.5) for place in (8, 24, 40, 56)}
    whole = sum(step(position) for count in (64, 40) for position in range(1, count))
    assert walks.summed(seconds, [64, 40]) == pytest.approx(whole)


def passes(monkeypatch, call) -> int:
    count, states = [0], Transformer.states

    def counted(*args, **kwargs):
        count[0] += 1
        return states(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "states", counted)
        call()
    return count[0]


def test_passes_are_those_of_the_models(tmp_path, monkeypatch):
    """What rows say is what is called: of CogView2, and of our windows."""
    ours = CogView2(QUICK, HOW)
    assert passes(monkeypatch, lambda: ours.draw(CODES)) == 4 * 4 + 1 + 6
    base = hierarchical.cogview(QUICK, 8, QUICK.cogview_codes)
    recipe, model = hierarchical.made(SuperResolution(SuperResolution.begun(base.config)), HOW)
    small = torch.zeros(1, 8, 8, dtype=torch.int64)
    drawn = passes(monkeypatch, lambda: list(magnify_batches(recipe, model, CODES, small, Sampling())))
    assert drawn == sum(map(max, walks.missing(8))) < sum(walks.published_walk(8))


def test_sizes_are_the_published_ones():
    sizes = Sizes()
    base = hierarchical.coglm(sizes).config
    assert (base.image_tokens, base.head_dim, base.num_layers, base.image_vocab) == (400, 64, 12, 20_000)
    direct = hierarchical.Direct(hierarchical.Direct.begun(base))
    assert (
        direct.length == hierarchical_steps.Direct(hierarchical_steps.CASES["direct-4x512"]).length == 96 + 400 + 3600
    )
    assert hierarchical.cogview(sizes, 32, 8192).config.max_positions == 1089


def test_every_part_is_timed_kept_and_printed(tmp_path, capsys):
    hierarchical.main(["--quick", "--dtypes", "fp32", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    rows = {(row["op"], row["shape"], row["direction"]): row for row in json.loads(path.read_text())}
    pictures, refined = rows["draw", "1x64-batch-1", "a picture of each"], []
    assert set(pictures["baselines"]) == {"published walk (scaled)", "CogView's own code (scaled)", "our windows"}
    assert set(pictures["stages_s"]) == {"one at a time", "all at once", "rounds"}
    assert (pictures["codes"], pictures["passes"], pictures["rounds"]) == (144, 23, 2)
    walk = pictures["baselines"]["published walk (scaled)"]
    assert walk["passes"] == 64 + sum(walks.published_walk(8))
    assert walk["timed"] == f"24 of {walk['passes']} positions a round"
    assert pictures["baselines"]["our windows"]["rounds"] == 1
    for batch in (1, 2):
        refined.append(rows["refine", f"12x12-1x64-batch-{batch}", "a picture of each"])
        assert (refined[-1]["codes"], refined[-1]["passes"]) == (4 * 23, 6)
        assert refined[-1]["baselines"]["one at a time (scaled)"]["passes"] == 144
    assert refined[1]["flops"] == 2 * refined[0]["flops"]
    trained = [row for row in rows.values() if row["op"] == "training"]
    assert {row["direction"] for row in trained} == set(steps.PARTS)
    for row in (pictures, *refined, *trained):
        assert row["median_s"] > 0
        assert row["iqr_s"] >= 0
        for other in row["baselines"].values():
            assert other["ratio"] == pytest.approx(other["median_s"] / row["median_s"])
    told = capsys.readouterr().out
    assert "pictures, fp32 batch 1, round 2 of 2: CogView2: one at a time" in told
    assert "| draw | 1x64-batch-1 | fp32 |" in report.tables(tmp_path)
    table = f"<!-- results/{path.name} -->\n| a |\n|---|\n| `refine`, 12x12-1x64-batch-1 | fp32 | a picture of each |\n"
    assert "one at a time (scaled) " in readme.filled(table, tmp_path)


def test_contestants_of_training_compute_the_same():
    recipes = hierarchical_steps.recipes(hierarchical_steps.CASES["direct-quick"])
    small = steps.Steps(recipes, "float32", torch.device("cpu"))
    gradients = []
    for name in recipes:
        small.take(name)  # puts its attention in
        batch, model = small.contestants[name].batch, small.model
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
            p.grad = None
        loss, _ = model(batch.inputs, batch.context, targets=batch.targets, weights=batch.weights)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-3, rtol=1e-3)


def test_operations_bound_what_local_attention_gains():
    bounds = {
        name: hierarchical_steps.bound(hierarchical_steps.Direct(c)) for name, c in hierarchical_steps.CASES.items()
    }
    assert 2.2 < bounds["direct-4x512"] < 2.6
    assert (
        bounds["direct-4x256"]
        > bounds["direct-4x512"]
        > bounds["direct-4x512-20000-codes"]
        > bounds["direct-1x2560"]
        > 1
    )
