"""What becomes of benchmarks' results: ratios that are out of line, tables of one commit, figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import outliers, plots, readme, report
from cogview_ops.bench import figures, plot_style, roofs, words

FORWARD, BOTH = "forward", "forward+backward"


def row(shape: str, dtype: str = "bf16", direction: str = FORWARD, **more: Any) -> dict[str, Any]:
    """Vanilla takes as many milliseconds as the shape has tokens; twice in fp32, three times with backward."""
    tokens = int(shape.split("x")[1])
    time = tokens * 1e-3 * (2 if dtype == "fp32" else 1) * (3 if direction == BOTH else 1)
    vanilla = {"median_s": time, "ratio": 10.0, "rounds": 3, "extra_bytes": 10**8 * tokens, "same_result": True}
    out = {"op": "layer_attention", "shape": shape, "dtype": dtype, "direction": direction, "device": "A machine"}
    out |= {"bytes": tokens, "flops": 10 * tokens, "floors_s": {"memory": tokens * 1e-6, "matmul": tokens * 1e-5}}
    out |= {"commit": "abc123", "median_s": time / 10, "iqr_s": 0.0, "floor_s": time / 30, "bound": "memory"}
    return out | {"tokens": tokens, "extra_bytes": 10**7 * tokens, "baselines": {"vanilla": vanilla}} | more


def case(tokens: int) -> list[dict[str, Any]]:
    runs = [("bf16", FORWARD), ("fp32", FORWARD), ("bf16", BOTH)]
    return [row(f"2x{tokens}x8", dtype, direction) for dtype, direction in runs]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [x for tokens in (64, 128, 256, 512) for x in case(tokens)]


def test_a_time_that_no_sibling_foretells_is_out_of_line(rows) -> None:
    assert outliers.found(rows) == {}
    slow = next(x for x in rows if report.key(x) == ("layer_attention", "2x256x8", FORWARD, "bf16"))
    slow["baselines"]["vanilla"]["median_s"] *= 2
    ((key, name), why), *others = outliers.found(rows).items()
    assert (key, name, others) == (report.key(slow), "vanilla", [])
    assert why == "out of line: 512 ms, where its other dtypes and directions foretell 256 ms to 256 ms"
    shown = {report.key(x): x["baselines"]["vanilla"] for x in outliers.without(rows)}
    assert shown.pop(key) == {"failed": why}
    assert all(result["ratio"] == 10 for result in shown.values())
    slow["baselines"]["vanilla"]["median_s"] /= 1.5
    assert outliers.found(rows) == {}


def test_a_call_that_takes_longer_than_with_backward_is_out_of_line(rows) -> None:
    two = [x for x in rows if x["dtype"] == "bf16"][:4]  # nothing is foretold
    for i, x in enumerate(two):
        x["shape"] += f"-{i // 2}"  # nor do sizes tell
    assert outliers.judged(two) == {(report.key(x), "vanilla") for x in two if x["direction"] == FORWARD}
    assert outliers.found(two) == {}
    two[2]["baselines"]["vanilla"]["median_s"] *= 3.01
    assert outliers.found(two) == {(report.key(two[2]), "vanilla"): "out of line: 385 ms, and with backward 384 ms"}


def test_a_time_that_other_sizes_do_not_allow_is_out_of_line(rows) -> None:
    one = rows[::3]  # 64, 128, 256 and 512 ms
    assert len(outliers.judged(one)) == 4
    assert outliers.found(one) == {}
    for i, longest, said in ((3, 1024, "1.02 s"), (1, 256, "256 ms")):  # four times half of it; no more than twice it
        result = one[i]["baselines"]["vanilla"]
        before, result["median_s"] = result["median_s"], 1.7501e-3 * longest
        ((of, why),) = outliers.found(one).items()
        assert of == (report.key(one[i]), "vanilla")
        assert why.endswith(f"where its other sizes allow {said}")
        result["median_s"] = 1.749e-3 * longest
        assert outliers.found(one) == {}
        result["median_s"] = before
    others = ("2x64x8", "2x64x8,kernel=3", "3x32x8", "4x8x8x8", "kind=row")
    assert outliers.judged([one[0] | {"shape": shape} for shape in others]) == set()


def test_what_is_out_of_line_is_in_no_table(rows, tmp_path) -> None:
    rows[6]["baselines"]["vanilla"]["median_s"] *= 2
    rows = [x | {"torch": "2", "compiler": "c", "cpu": "avx2"} for x in rows]
    shown = [x["baselines"]["vanilla"] for x in report.shown(kept(tmp_path, rows) / "a.json")]
    assert ["failed" in x for x in shown] == [x is rows[6] for x in rows]
    table = report.tables(tmp_path)
    assert table.count("vanilla 10 (") == len(rows) - 1
    assert table.count("vanilla not timed (out of line: 512 ms, ") == 1


def test_what_a_row_is_compared_with() -> None:
    timed = {"ratio": 12.34, "median_s": 1.0, "extra_bytes": None}
    baselines = {
        "vanilla": timed | {"same_result": True},
        "SDPA": timed | {"ratio": 0.5, "same_result": False},
        "KVCache of 9": timed | {"same_result": False},
        "Liger": {"failed": "why"},
    }
    assert words.ratios(baselines) == ["vanilla 12", "SDPA 0.50*"]
    assert report.contestants(baselines) == ["vanilla 12", "SDPA 0.50*", "Liger not timed (why)"]
    drawn = figures._curves([row("2x64x8") | {"baselines": baselines}], "ratio")
    assert list(drawn) == ["vanilla", "SDPA*"]


def test_what_is_slow_in_every_way_is_not_out_of_line(rows) -> None:
    """Nor one that is fast, nor one of two that disagree, nor where too few cases tell the factor."""
    for x in rows:
        if x["shape"] == "2x256x8":
            x["baselines"]["vanilla"]["median_s"] *= 3
    assert outliers.found(rows) == {}
    rows[0]["baselines"]["vanilla"]["median_s"] /= 2
    assert outliers.found(rows) == {}
    rows[0]["baselines"]["vanilla"]["median_s"] *= 2
    two = [x for x in rows if x["dtype"] == "bf16"]
    two[2]["baselines"]["vanilla"]["median_s"] *= 1.9
    assert outliers.found(two) == {}
    few = [x for tokens in (64, 128, 256) for x in case(tokens)]
    few[0]["baselines"]["vanilla"]["median_s"] *= 1.9
    assert outliers.found(few) == {}


def table(marker: str, *lines: str) -> str:
    return f"<!-- results/a.json{marker} -->\n| operator, shape | a | b | c | d |\n|---|---|---|---|---|\n" + "".join(
        f"| `layer_attention`, {line} | bf16 | forward | ? | ? |\n" for line in lines
    )


def kept(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "a.json").write_text(json.dumps(rows))
    return folder


def test_a_table_is_filled_and_tells_what_it_leaves_out(rows, tmp_path) -> None:
    text = f"before\n\n{table(' @abc', '2x64x8', '2x256x8')}\nafter\n"
    filled = readme.filled(text, kept(tmp_path, rows))
    assert "| `layer_attention`, 2x64x8 | bf16 | forward | 6.4 ms | vanilla 10 |" in filled
    assert filled.startswith("before\n\n<!-- results/a.json @abc -->\n")
    assert filled.endswith("\nafter\n")
    assert readme.filled(filled, tmp_path) == filled
    assert readme.left_out(text, tmp_path) == []
    rows[6]["baselines"]["vanilla"]["median_s"] *= 2
    assert "| `layer_attention`, 2x256x8 | bf16 | forward | 25.6 ms |  |" in readme.filled(text, kept(tmp_path, rows))
    (line,) = readme.left_out(text, tmp_path)
    assert line.startswith("a.json: layer_attention, 2x256x8, forward, bf16, vanilla: out of line: 512 ms, ")
    assert readme.left_out(table(" @abc", "2x64x8"), tmp_path) == []
    assert readme.not_judged(text, tmp_path) == (0, 1)  # of two rows, one without its ratio
    kept(tmp_path, [x for x in rows if (x["dtype"], x["direction"]) == ("bf16", FORWARD)])
    assert readme.not_judged(text, tmp_path) == (0, 2)
    kept(tmp_path, rows[6:7])
    assert readme.not_judged(table(" @abc", "2x256x8"), tmp_path) == (1, 1)


@pytest.mark.parametrize(
    ("marker", "commits", "said"),
    [
        (
            " @abc",
            ("abc123", "def456"),
            "commit abc, but these rows are not: layer_attention, 2x256x8, forward, bf16",
        ),
        (" @def4", ("abc123", "def456"), "of commit def4, but these rows are not: layer_attention, 2x64x8, "),
        (
            "",
            ("abc123", "def456"),
            "2x256x8, forward, bf16 (of def456). Measure them again at it, or all at",
        ),
        (" @abc123", ("abc123", "abc123-dirty"), "2x256x8, forward, bf16 (of abc123-dirty)"),
        (" @abc123", ("abc123", None), "2x256x8, forward, bf16 (of None)"),
    ],
)
def test_rows_of_other_commits_are_refused(marker: str, commits: tuple, said: str, rows, tmp_path) -> None:
    chosen = [rows[0] | {"commit": commits[0]}, rows[6] | {"commit": commits[1]}]
    with pytest.raises(SystemExit, match=re.escape(said)):
        readme.filled(table(marker, "2x64x8", "2x256x8"), kept(tmp_path, chosen))
    one = table(f" @{commits[0]}", "2x64x8")
    assert "6.4 ms" in readme.filled(one, tmp_path)  # a file may have rows of several


def test_rows_that_are_not_there_are_named(rows, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"no figure of layer_attention, 2x9x8, forward, bf16 in a\.json"):
        readme.filled(table("", "2x9x8"), kept(tmp_path, rows))


def test_figures_are_made_light_and_dark_and_the_same_twice(rows, tmp_path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    rows[1]["failed"] = "why"
    made = plots.make(tmp_path / "one", kept(results, rows))
    names = [f"layer_attention-{x}" for x in ("ratio", "memory", "over-tokens", "over-tokens-backward")]
    assert [figure.name for figure in made] == ["floor", "roofline", *names]
    assert {figure.commits for figure in made} == {("abc123",)}
    assert all("A machine" in figure.alt for figure in made)
    again = plots.make(tmp_path / "two", results)
    for one, two in zip(made, again, strict=True):
        for theme, path in (("light", one.light), ("dark", one.dark)):
            assert path == tmp_path / "one" / "a" / f"{one.name}-{theme}.svg"
            text = path.read_text()
            assert text == getattr(two, theme).read_text()
            assert "<dc:date>" not in text
            assert plot_style.INK[theme] in text
            assert re.search(r'<g id="patch_1">\s*<path d="[^"]*" style="fill: none"', text)  # no background


def test_figures_of_one_name_are_refused(rows, tmp_path) -> None:
    wider = [x | {"shape": x["shape"].replace("2x", "4x", 1)} for x in rows]
    with pytest.raises(ValueError, match=r"a\.json: several figures would be layer_attention-over-tokens, "):
        plots.make(tmp_path / "out", kept(tmp_path, rows + wider) / "")
    assert not (tmp_path / "out").exists()


def test_the_roofline_has_both_ceilings_and_a_dot_for_each_product(rows) -> None:
    with plot_style.style():
        axes = roofs.roofline([*rows[:5], rows[5] | {"flops": 0}], "light", "a title").axes[0]
    slope, flat = (line.get_xydata().tolist() for line in axes.lines)
    assert slope[1] == flat[0] == pytest.approx([1.0, 1e6])  # FLOP per byte, FLOP/s: 1e6 bytes and operations a second
    assert slope[0][1] == pytest.approx(1e6 * slope[0][0])
    assert flat[1][1] == pytest.approx(1e6)
    dots = [dot.get_offsets().tolist() for dot in axes.collections]
    assert dots == [[pytest.approx([10, x["flops"] / x["median_s"]])] for x in rows[:5]]
    assert [roofs.rate(x) for x in (999.0, 1e9, 3.02e12, 1e15)] == ["999 ", "1 G", "3.02 T", "1 P"]


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ("4x1088x64", (1088, "tokens")),
        ("4x32x48x64-alone", (1536, "image tokens")),
        ("1024x64", (64, "columns")),
        ("2x64x8,kernel=3x3", (64, "tokens")),
        ("6x8x64-of-128-to-2048", (8, "tokens")),
        ("4x16x33792x64-ragged", (540672, "image tokens")),
        ("16/4x33792x64", (0, "tokens")),
        ("kind=row", (0, "tokens")),
    ],
)
def test_where_a_shape_lies_in_a_sweep(shape: str, place: tuple[int, str]) -> None:
    x = {"op": "x", "dtype": "bf16", "direction": FORWARD, "shape": shape}
    assert figures.place(x)[1:] == place


def test_a_sweep_differs_by_its_length_alone(rows) -> None:
    assert [len(sweep) for sweep in figures.sweeps(rows)] == [4, 4, 4]
    assert figures.sweeps([x | {"op": str(i)} for i, x in enumerate(rows)]) == []
    (sweep,) = figures.sweeps(rows[::-3])
    assert [x["tokens"] for x in sweep] == [64, 128, 256, 512]


def test_the_commands_plot_of_one_row_and_of_many(rows) -> None:
    with plot_style.style():
        assert len(figures.of_rows(rows[::3], "light").axes) == 3  # time, memory, ratio
        assert [label.get_text() for label in figures.of_rows(rows[:1], "light").axes[0].get_yticklabels()] == [
            "vanilla"
        ]
        both = figures.of_rows([rows[0], rows[1] | {"op": "other"}], "dark")
        labels = [label.get_text() for label in both.axes[0].get_yticklabels()]
        assert labels == ["layer_attention: vanilla", "other: vanilla"]
