"""Peaks of GPUs by the names that torch gives them, and of what has none measured."""

import pytest
import torch

from cogview import hardware
from cogview.hardware import GPUS, gpu_named, peak_flops


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100"),
        ("h100-pcie", "H100 PCIe"),
    ],
)
def test_names(name, known):
    assert gpu_named(name) is GPUS[known]


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla T4"])
def test_what_computes_less_or_is_not_known_has_no_figures(name):
    assert gpu_named(name) is None


def test_peak_of_a_gpu_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peaks = {dtype: peak_flops("cuda", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert peaks == pytest.approx({torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12})
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("cuda", torch.float32) == pytest.approx(494.7e12)


def test_peak_of_a_cpu_is_measured_once(monkeypatch):
    monkeypatch.setattr(hardware, "_SECONDS", 0)
    hardware._remembered.cache_clear()
    found = peak_flops("cpu", torch.float32)
    assert found > 1e8
    assert peak_flops("cpu", torch.float32) == found
    hardware._remembered.cache_clear()


def test_float16_where_the_cpu_does_not_multiply_it(monkeypatch):
    """What is computed in float32 could not be faster than that."""
    monkeypatch.setattr(hardware, "_remembered", lambda device, dtype, *_: dtype)
    for native, dtype in ((True, torch.float16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "multiplies_float16", lambda native=native: native)
        assert hardware.peak_flops("cpu", torch.float16) == dtype
        assert hardware.peak_flops("cpu", torch.bfloat16) == torch.bfloat16
