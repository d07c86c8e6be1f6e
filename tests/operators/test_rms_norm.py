"""rms_norm and sandwich_rms_norm. What all operators share is in test_operators.py, what both kinds of norm share in
test_norm_steps.py."""

import pytest
import torch
from common import DTYPES, Case, assert_true, each_impl

from cogview_ops import rms_norm, sandwich_rms_norm

WIDTHS = (1, 3, 37, 2304, 2560, 4096, 5376)


def norm(width: int, rows: int = 5, **options: object) -> Case:
    return Case("rms_norm", f"{width}", {"x": (rows, width), "weight": (width,)}, dict(options))


@each_impl("rms_norm", [norm(width) for width in WIDTHS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    assert_true(case, dtype, impl)


def test_formula() -> None:
    x, weight = torch.randn(5, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (20,), weight, 0.1)
    torch.testing.assert_close(rms_norm(x, weight, eps=0.1), expected)
    h, y = sandwich_rms_norm(x, x, weight, weight, eps=0.1)
    torch.testing.assert_close((h, y), (x + expected, rms_norm(x + expected, weight, eps=0.1)))
