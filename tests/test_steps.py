"""The benchmark of training steps times what it says, at a small size."""

import json

import pytest
import torch

from benchmarks import steps


def test_every_part_is_timed_and_kept(tmp_path, capsys):
    steps.main(["--quick", "--dtypes", "fp32", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    rows = {(row["shape"], row["direction"]): row for row in json.loads(path.read_text())}
    assert set(rows) == {(shape, part) for shape in ("quick", "quick-window-2") for part in steps.PARTS}
    for row in rows.values():
        assert set(row["baselines"]) == {"SDPA", "materialised scores"}
        assert row["median_s"] > 0
    whole, narrow = (rows[shape, "step"] for shape in ("quick", "quick-window-2"))
    assert narrow["flops"] < whole["flops"] == whole["baselines"]["SDPA"]["flops"]  # a window of all that there is
    assert whole["mfu"] > 0
    assert "materialised scores" in capsys.readouterr().out


def test_dense_contestants_compute_the_same():
    small = steps.Steps(steps.recipes(steps.CASES["quick"]), "float32", torch.device("cpu"))
    losses = []
    for name in ("SDPA", "materialised scores"):
        small.take(name)  # puts its attention in
        batch = small.contestants[name].batch
        with torch.no_grad():
            losses.append(small.model(batch.inputs, batch.context, targets=batch.targets, weights=batch.weights)[0])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)  # a step lies between them
