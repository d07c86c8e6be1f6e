"""Where models compute."""

import torch


def available(device: torch.device | str) -> torch.device:
    """A device that torch can compute on here; ValueError for others."""
    try:
        torch.zeros(1, device=device).item()  # what torch was built without comes as any of these
    except (RuntimeError, AssertionError, ImportError, NotImplementedError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use here, got {str(device)!r} ({reason})") from error
    return torch.device(device)


@torch.compiler.assume_constant_result
def multiplies_float16() -> bool:
    """Whether this CPU does; others take 10 to 30 times as long for it as for float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
