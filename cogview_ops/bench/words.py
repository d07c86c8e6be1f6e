"""Figures as people read them."""

from typing import Any


def seconds(value: float) -> str:
    return (
        f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 0.9995e-3 else f"{value * 1e6:.3g} µs"
    )


def size(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def ratio(value: float) -> str:
    return f"{value:.{2 if value < 0.95 else 1 if value < 9.95 else 0}f}"


def others(baselines: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a row's baselines those that were timed, but "KVCache of ...", which is the operator itself."""
    return {
        name: result for name, result in baselines.items() if "failed" not in result and not name.startswith("KVCache")
    }


def star(result: dict[str, Any]) -> str:
    """What marks a baseline that computes something else."""
    return "" if result.get("same_result", True) else "*"


def ratios(baselines: dict[str, dict[str, Any]]) -> list[str]:
    """How many times as fast as each of the others the operator is."""
    there = {name: result for name, result in others(baselines).items() if "ratio" in result}
    return [f"{name} {ratio(result['ratio'])}{star(result)}" for name, result in there.items()]


def why(error: Exception) -> str:
    """In a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
