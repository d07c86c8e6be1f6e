"""The stability experiment: variants are what they say, overflows are found, verdicts follow the records."""

import dataclasses
import json

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import stability, stability_report
from benchmarks.stability import VARIANTS, Preset, Scenes, Variant, build, first_overflow, train
from cogview.sequence import Context

SMALL = Preset(hidden=32, heads=2, grid=4, text=12, steps=3, rates=(1e-3,), layers=3, batch=2, scenes=6)


@pytest.fixture(scope="module")
def data() -> Scenes:
    return Scenes(SMALL.scenes, SMALL.grid)


def hidden(model: torch.nn.Module) -> torch.Tensor:
    context = Context(torch.arange(20))
    tokens = torch.arange(20).repeat(2, 1)
    model.eval().double()
    return model.stack(model.embedding(tokens, context.positions), context)


def test_scenes_are_tokens(data) -> None:
    text, codes = data.batch(data.order(0, 0)[:2])
    assert (len(text), codes.shape) == (2, (2, 16))
    assert 0 <= int(codes.min()) < int(codes.max()) < 512
    assert bytes(i for i in data.text[0].tolist() if i >= 0).decode().startswith("a")


def test_both_is_the_model_and_pre_ln_is_the_formula() -> None:
    variants = {variant.name: variant for variant in VARIANTS}
    recipe, both = build(SMALL, variants["Sandwich-LN + PB-relax"], lambda x: None)
    model = recipe.model()
    model.load_state_dict(both.state_dict())
    torch.testing.assert_close(hidden(both), hidden(model), atol=1e-12, rtol=0)

    plain = build(SMALL, variants["pre-LN"], lambda x: None)[1].double()
    h = plain.embedding.words.weight[:20] + plain.embedding.positions.weight[:20]
    norm = plain.stack.first_norm
    for layer in plain.stack.layers:
        q, k, v = layer.attention.query_key_value(norm(h)).view(20, 2, 3, 16).permute(2, 1, 0, 3)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + layer.attention.dense(out.transpose(0, 1).reshape(20, 32))
        h, norm = h + layer.mlp(layer.mlp_norm(h)), layer.next_norm
    expected = norm(h).expand(2, 20, 32)
    torch.testing.assert_close(hidden(plain), expected, atol=1e-12, rtol=0)


def test_variants_start_alike() -> None:
    first, *others = (build(SMALL, v, lambda x: None)[1].state_dict() for v in VARIANTS)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize(("relax", "overflows"), [(False, True), (True, False)])
def test_large_scores_overflow_without_pb_relax(data, monkeypatch, relax, overflows) -> None:
    """Queries and keys of about 120 in 16 dimensions: their products reach 10^5."""

    def large(*args):
        recipe, model = build(*args)
        model.stack.layers[1].attention.query_key_value.weight.data.unflatten(0, (2, 3, 16))[:, :2].mul_(1000)
        return recipe, model

    monkeypatch.setattr(stability, "build", large)
    steps = list(train(SMALL, Variant("", True, relax), 1e-3, data, "cpu"))
    found = [step["overflow"] for step in steps]
    if overflows:
        assert [(o["layer"], o["place"], o["value"]) for o in found] == [(2, "attention scores", "inf")] * 3
        assert steps[0]["scores"][0] > 0
        assert steps[0]["scores"][1] is None
    else:
        assert found == [None] * 3
        assert steps[0]["scores"][1] > 500


def test_the_first_overflow_is_the_earliest_computed() -> None:
    values = torch.ones(2, 5)
    assert first_overflow(values, 1.0) is None
    assert first_overflow(values, torch.nan) == {"layer": 2, "place": "logits", "value": "nan"}
    values[1] = torch.nan
    values[0, 3:] = torch.inf
    assert first_overflow(values, torch.nan) == {"layer": 1, "place": "MLP branch", "value": "inf"}


def run(variant: str, losses: list, overflows: dict | None = None) -> dict:
    place = {"layer": 2, "place": "main branch", "value": "inf"}
    found = {i: place | changed for i, changed in (overflows or {}).items()}
    steps = [
        {"loss": loss, "overflow": found.get(i), "scores": [i, 2.0], "branch": [3.0, 4.0], "main": [5.0, None]}
        for i, loss in enumerate(losses, 1)
    ]
    return {"rate": 0.1, "variant": variant, "seconds": 1.0, "steps": steps}


def test_verdicts_follow_the_records() -> None:
    both = run("Sandwich-LN + PB-relax", [5.0, 4.0, 3.0])
    late = run("pre-LN", [5.0, 4.0, None, None], {3: {}, 4: {"layer": 1}})
    scores = run("Sandwich-LN", [5.0, 4.0, None], {1: {}, 3: {"place": "attention scores"}})
    mended = run("pre-LN + PB-relax", [5.0, None, 3.0], {2: {}})
    assert stability_report.verdict(both) == "carries on, 3 steps, loss 5.00 to 3.00"
    assert stability_report.verdict(late) == "overflows at step 3, main branch of layer 2"
    once = "; 1 overflows without consequence from step 1 on"
    assert stability_report.verdict(scores) == f"overflows at step 3, attention scores of layer 2{once}"
    assert stability_report.verdict(mended).startswith("carries on, 3 steps")
    first = run("pre-LN + PB-relax", [None, 5.0, 3.0], {1: {}})
    assert stability_report.verdict(first).startswith("carries on, 3 steps, loss 5.00 to 3.00")
    assert "only both" not in stability_report.summary([late, scores, both])
    others = stability_report.summary([late, mended, scores, both])
    assert others == f"it is not only both together that carry on, but {mended['variant']} and {both['variant']}"
    broken = run("pre-LN + PB-relax", [5.0, None], {2: {}})
    assert stability_report.summary([late, broken, scores, both]) == "only both together carry on"
    assert stability_report.summary([both] * 4).startswith("all carry on")
    assert stability_report.reached(late, "scores") == 4


def test_a_run_that_overflows_at_once_is_drawn() -> None:
    axes = Figure().subplots(1, 3)
    stability_report._draw_run(run("pre-LN", [None], {1: {}}), axes)
    assert [list(line.get_xdata()) for line in axes[0].lines if line.get_marker() == "X"] == [[1]]


def test_runs_are_kept_judged_drawn_and_not_repeated(tmp_path, monkeypatch, capsys, threads) -> None:
    monkeypatch.setitem(stability.PRESETS, "cpu", SMALL)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["stability", "--out", str(tmp_path)])
    calls = []

    def counted(preset, variant, *rest):
        calls.append(variant.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(preset, variant, *rest)

    monkeypatch.setattr(stability, "train", counted)
    assert stability.main() == 130
    assert stability.main() == 0
    names = [v.name for v in VARIANTS]
    assert calls == names[:3] + names[2:]
    (path,) = tmp_path.glob("*.json")
    assert [r["variant"] for r in json.loads(path.read_text())["runs"]] == names
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "Learning rate 0.001: all carry on" in capsys.readouterr().out
    monkeypatch.setitem(stability.PRESETS, "cpu", dataclasses.replace(SMALL, heads=4))
    with pytest.raises(ValueError, match="--again replaces them"):
        stability.main()
