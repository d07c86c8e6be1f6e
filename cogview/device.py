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
