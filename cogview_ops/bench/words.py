"""Figures as people read them."""


def seconds(value: float) -> str:
    return (
        f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 0.9995e-3 else f"{value * 1e6:.3g} µs"
    )


def size(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def ratio(value: float) -> str:
    return f"{value:.{2 if value < 0.95 else 1 if value < 9.95 else 0}f}"
