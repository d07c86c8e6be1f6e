"""The report that issues ask for: what is in it, what never is, and that it is there when something is broken."""

import re
from pathlib import Path

import pytest
import torch
from common import python

import cogview_ops
from cogview_ops import _dispatch, _report, _selftest, info
from cogview_ops._manifest import KERNELS, OPERATORS

REPORT = ("-m", "cogview_ops.info", "--report")


def test_report_of_this_machine(tmp_path: Path) -> None:
    """Packages are named though they cannot be imported; what is secret is not."""
    for name in ("natten", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
        (tmp_path / f"{name}-7.8.9.dist-info").mkdir()
        (tmp_path / f"{name}-7.8.9.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 7.8.9\n")
    paths = f"{tmp_path}:{Path(cogview_ops.__file__).parents[1]}"
    secret = {"HF_TOKEN": "s3cret", "COGVIEW_OPS_COMMIT": "s3cret", "HOME": "/home/s3cret", "USER": "s3cret"}
    report = python(*REPORT, PYTHONPATH=paths, COGVIEW_OPS_CPU="baseline", **secret).stdout
    facts = dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", report, re.MULTILINE))
    named = ("system", "processor", "instruction sets", "gpus", "torch", "extension", "packages", "variables")
    assert all(facts.get(name) for name in named), facts
    assert report.startswith(f"### cogview_ops {cogview_ops.__version__}, torch {torch.__version__}, Python ")
    assert "natten 7.8.9" in facts["packages"]
    assert "transformers 7.8.9" in facts["packages"]
    assert "COGVIEW_OPS_CPU=baseline" in facts["variables"]
    assert facts["instruction sets"].startswith("baseline, of baseline")
    assert all(report.count(f"| {operator.name} | ") == 2 for operator in KERNELS)
    assert "\nAll right" in report
    assert "s3cret" not in report
    assert not re.search(r"(?<![\w.])/\w+/", report), "a path"


def test_variables_of_ours_are_told() -> None:
    root = Path(cogview_ops.__file__).parents[1]
    sources = [root / "setup.py", *root.glob("cogview_ops/**/*.py"), *root.glob("csrc/**/*.*")]
    read = set().union(*(re.findall(r'"(COGVIEW_OPS_[A-Z]+)', path.read_text()) for path in sources))
    assert {"COGVIEW_OPS_CPU", "COGVIEW_OPS_CUDA"} <= read
    assert read - {"COGVIEW_OPS_COMMIT"} <= set(_report.VARIABLES)


def test_every_operator_is_tried_that_has_another_implementation() -> None:
    assert list(_selftest.CALLS) == [x.name for x in OPERATORS.values() if x.made_of != "torch"]


@pytest.mark.parametrize(
    "fault",
    [
        lambda y: y * 1.1,
        lambda y: y.roll(1, 0),
        lambda y: y.detach() + 0 * y,
        lambda y: y.register_hook(lambda dy: dy * torch.nan) and y if y.requires_grad else y,
    ],
    ids=["values", "rows", "gradient", "nan in a gradient"],
)
def test_a_wrong_operator_is_told(fault, monkeypatch, capsys) -> None:
    right = cogview_ops.rms_norm

    def wrong(*args, impl, **options):
        y = right(*args, impl=impl, **options)
        return y if impl == "reference" else fault(y)

    monkeypatch.setattr(cogview_ops, "rms_norm", wrong)
    info.main(["--report"])
    out = capsys.readouterr().out
    assert out.count(", wrong** |") == len(_selftest.ways())
    assert re.search(r"^\| rms_norm \|.*, wrong\*\* \|$", out, re.MULTILINE)
    assert f"**{len(_selftest.ways())} wrong or failed.**" in out


def test_an_operator_that_raises_is_told(monkeypatch, capsys) -> None:
    def broken(*_, impl, **__):
        raise MemoryError(f"no room\nfor {impl} in /home/someone/cache/kernel.so")

    monkeypatch.setattr(cogview_ops, "linear_decode", broken)
    info.main(["--report"])
    out = capsys.readouterr().out
    assert f"- linear_decode ({_selftest.ways()[0]}): MemoryError: no room for auto in kernel.so" in out
    assert out.count("**raises**") == len(_selftest.ways())
    assert f"**{len(_selftest.ways())} wrong or failed.**" in out


def test_without_the_compiled_library(monkeypatch) -> None:
    code = (
        "import sys, importlib.util as u; sys.modules['cogview_ops._C'] = None\n"
        "from cogview_ops import info; info.main(sys.argv[1:])"
    )
    report = python("-c", code, "--report", CUDA_VISIBLE_DEVICES="").stdout
    assert re.search(r"^\| extension \| missing \(", report, re.MULTILINE)
    assert "| layer_norm | no (1) |" in report
    assert "No operator was tried: the compiled extension is missing" in report


def test_what_fails_is_in_the_report() -> None:
    report = python(*REPORT, COGVIEW_OPS_CPU="sse9")
    assert report.returncode == 0, report.stderr
    assert re.search(r"^\| instruction sets \| RuntimeError: .*COGVIEW_OPS_CPU: .* got 'sse9'", report.stdout, re.M)
    assert f"| layer_norm |{' **raises** |' * len(_selftest.ways())}" in report.stdout


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("libc.so: cannot open /home/me/a b/libc.so: No such", "libc.so: cannot open … libc.so: No such"),
        ("'/home/alice', /home/j.doe and \"/home/John Smith/x\"", "'…', … and \"…\""),
        ("'/home/John Smith/x/y.so.1' /home/John Smith/x/y.py", "'y.so.1' … y.py"),
        ("there is no /usr/local/cuda-13/bin/nvcc", "there is no nvcc"),
        ("'~/x/y.so', (/opt/z/), a/b, 1/2", "'y.so', (…), a/b, 1/2"),
        (f"{Path.home()}/.cache/torch/kernel.cubin", "kernel.cubin"),
        ("<class 'a'> | a / b", "&lt;class 'a'> | a / b"),
    ],
)
def test_paths_are_left_out(text: str, left: str) -> None:
    assert _report.shown(text) == left


def test_help_and_wrong_options(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        info.main(["--help"])
    assert "--report" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        info.main(["--raport"])


def test_gpus_are_told_with_their_driver(monkeypatch, tmp_path: Path) -> None:
    class Gpu:
        name, major, minor, total_memory = "NVIDIA H100", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    monkeypatch.setattr(_report, "DRIVER", version)
    assert _report._gpus() == "2 x NVIDIA H100 (9.0, 80 GiB); driver 580.65.06"
    monkeypatch.setattr(_report, "DRIVER", tmp_path / "none")
    assert _report._gpus().endswith("driver unknown")
    impls = {str(way) for way in _selftest.ways()}
    assert {"cuda, float32, auto", "cuda, bfloat16, cuda", "cuda, bfloat16, triton"} < impls


def test_an_implementation_that_is_not_there_is_left_empty(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "reason_unavailable", lambda op, impl: "no")
    for way in (_selftest.Way("cpu", torch.float32, "triton"), _selftest.Way("cuda", torch.float32, "auto")):
        assert _selftest.error("rms_norm", way) is None
    assert _selftest.error("dalle_attention", _selftest.Way("cpu", torch.float32, "cpp")) is None
