"""What GPUs compute, hold and send a second, by their names, and what other processors compute, measured.

Peaks are dense, without sparsity, of the makers' data sheets; half: bfloat16 and float16 summed in float32.
"""

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

from cogview.half import multiplies_float16

_SECONDS = 0.2  # of measuring


@dataclass(frozen=True)
class Gpu:
    half: float
    """TFLOPS of bfloat16 and float16."""
    tf32: float
    """Of float32 products where torch may round their factors to TF32."""
    float32: float
    memory: float
    """Bytes, as torch reports them: less than the name says by what the driver keeps."""
    bandwidth: float
    """Bytes a second, of its own memory."""
    link: float
    """Bytes a second and direction, to the others of its machine."""


_GB, _GIB, _PCIE4, _PCIE5 = 1e9, 2**30, 32e9, 64e9
GPUS: dict[str, Gpu] = {
    "A100": Gpu(312, 156, 19.5, 79.2 * _GIB, 2039 * _GB, 300 * _GB),
    "A100 40GB": Gpu(312, 156, 19.5, 39.4 * _GIB, 1555 * _GB, 300 * _GB),
    "H100": Gpu(989.4, 494.7, 66.9, 79.1 * _GIB, 3350 * _GB, 450 * _GB),
    "H100 PCIe": Gpu(756, 378, 51.2, 79.1 * _GIB, 2000 * _GB, _PCIE5),
    "H100 NVL": Gpu(835, 417.5, 60, 93.1 * _GIB, 3900 * _GB, _PCIE5),
    "H200": Gpu(989.4, 494.7, 66.9, 139.8 * _GIB, 4800 * _GB, 450 * _GB),
    "H200 NVL": Gpu(835, 417.5, 60, 139.8 * _GIB, 4800 * _GB, 450 * _GB),
    "GH200": Gpu(989.4, 494.7, 66.9, 94.5 * _GIB, 4000 * _GB, 450 * _GB),
    "B200": Gpu(2250, 1100, 75, 178.4 * _GIB, 7700 * _GB, 900 * _GB),
    "GB200": Gpu(2500, 1250, 80, 184.3 * _GIB, 8000 * _GB, 900 * _GB),
    "A10": Gpu(125, 62.5, 31.2, 22.1 * _GIB, 600 * _GB, _PCIE4),
    "L4": Gpu(121, 60, 30.3, 22.0 * _GIB, 300 * _GB, _PCIE4),
    "L40": Gpu(181, 90.5, 90.5, 44.4 * _GIB, 864 * _GB, _PCIE4),
    "L40S": Gpu(362, 183, 91.6, 44.4 * _GIB, 864 * _GB, _PCIE4),
    "RTX A6000": Gpu(154.8, 77.4, 38.7, 47.4 * _GIB, 768 * _GB, _PCIE4),
    "RTX 3090": Gpu(71, 35.6, 35.6, 23.6 * _GIB, 936 * _GB, _PCIE4),
    "RTX 4090": Gpu(165.2, 82.6, 82.6, 23.5 * _GIB, 1008 * _GB, _PCIE4),
    "RTX 5090": Gpu(209.5, 104.8, 104.8, 31.4 * _GIB, 1792 * _GB, _PCIE5),
}
_LESS = {"laptop", "mobile", "max", "d", "mig"}  # words in the names of chips, or parts of one, that compute less


def gpu_named(name: str) -> Gpu | None:
    """The GPU that torch or a person calls so, "NVIDIA H100 80GB HBM3" or "h100"; None: none that is known."""
    words = set(re.split(r"[\s_-]+", name.lower()))
    fits = [known for known in GPUS if set(known.lower().split()) <= words]
    return None if not fits or words & _LESS else GPUS[max(fits, key=lambda known: len(known.split()))]


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Floating-point operations a second at most, of dense products: of a known GPU its data sheet's, of others and of
    CPUs the best of some big products, measured once and for this number of threads."""
    device = torch.device(device)
    if device.type == "cpu" and dtype == torch.float16 and not multiplies_float16():
        dtype = torch.float32  # in which it is computed
    precise = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if device.type == "cuda" and (gpu := gpu_named(torch.cuda.get_device_name(device))) is not None:
        known = {torch.bfloat16: gpu.half, torch.float16: gpu.half, torch.float32: gpu.float32 if precise else gpu.tf32}
        if dtype in known:
            return 1e12 * known[dtype]
    return _remembered(device, dtype, precise, torch.get_num_threads())


@cache
def _remembered(device: torch.device, dtype: torch.dtype, precise: bool, threads: int) -> float:
    return rate_of_products(device, dtype)


def rate_of_products(device: torch.device | str, dtype: torch.dtype) -> float:
    """Operations a second of the fastest big product within 0.2 s."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + _SECONDS
    while best == 0 or time.perf_counter() < end:
        begun = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best
