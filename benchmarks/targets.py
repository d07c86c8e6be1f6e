"""What the operators should reach on a GPU, in bfloat16, and whether measured rows say so."""

from typing import Any, NamedTuple

Rows = dict[tuple[str, str, str], dict[str, Any]]  # by operator, shape, direction


class Target(NamedTuple):
    """At least this part of the memory floor, or so many times as fast as the fastest of some baselines."""

    op: str
    shape: str
    direction: str
    goal: float
    against: tuple[str, ...] = ()  # baselines; none: the floor, all bytes at the speed of the device's copy
    memory: bool = False  # the goal is the most extra memory, beside the results, as a part of the baseline's

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"


DENSE = ("causal SDPA", "flash causal SDPA", "cuDNN causal SDPA")
TARGETS = [
    Target("layer_norm", "33792x2560", "forward", 0.90),
    Target("layer_norm", "33792x2560", "backward", 0.85),
    Target("sandwich_layer_norm", "33792x2560", "forward", 0.90),
    Target("sandwich_layer_norm", "33792x2560", "backward", 0.85),
    Target("pb_relax_softmax", "320x1088x1088-causal", "forward", 0.85),
    Target("pb_relax_softmax", "16x4224x4224", "forward", 0.85),
    Target("three_region_attention", "160x4224x64", "forward", 2, DENSE),
    Target("three_region_attention", "160x4224x64", "forward+backward", 1.4, DENSE),
    Target("three_region_attention", "40x33792x64", "forward", 12, DENSE),
    Target("three_region_attention", "40x33792x64", "forward+backward", 10, DENSE),
    Target("local_attention_2d", "320x64x64x64", "forward", 1 / 1.5),
    Target("local_attention_2d", "320x64x64x64", "backward", 1 / 2),
    Target("local_attention_2d", "320x64x64x64", "forward", 3, ("FlexAttention",)),
    Target("local_attention_2d", "320x64x64x64", "forward", 40, ("global vanilla",)),
    Target("local_attention_2d", "320x64x64x64", "forward", 0.01, ("global vanilla",), memory=True),
    Target("cogview2_attention", "48x4096x64-direct", "forward", 60, ("published formula",)),
    Target("cogview2_attention", "48x4096x64-direct", "forward+backward", 60, ("published formula",)),
    Target("three_region_attention_decode", "8x40x4224x64", "forward", 1 / 1.5),
]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each target: what was measured and what was wanted."""
    found = {(r["op"], r["shape"], r["direction"]): r for r in rows if r["dtype"] == "bf16"}
    out = []
    for target in TARGETS:
        try:
            mine, unit = _measured(target, found)
        except LookupError as reason:
            out.append(f"?      {target}: not measured ({str(reason.args[0])[:60]})")
            continue
        if target.memory:
            met, figures = mine <= target.goal, f"{mine:.3f} {unit}, wanted at most {target.goal:.3f}"
        else:
            met, figures = mine >= target.goal, f"{mine:.2f} {unit}, wanted {target.goal:.2f}"
        out.append(f"{'met' if met else 'MISSED':<6} {target}: {figures}")
    return out


def _measured(target: Target, found: Rows) -> tuple[float, str]:
    """A backward is the difference of two rows. LookupError says why there is no figure."""

    def row(direction: str) -> dict[str, Any]:
        it = found.get((target.op, target.shape, direction), {"failed": "no such row"})
        if "failed" in it:
            raise LookupError(it["failed"])
        return it

    if target.against:
        whole = row(target.direction)
        others = {name: whole["baselines"].get(name, {"failed": f"no {name}"}) for name in target.against}
        timed = {name: other for name, other in others.items() if "failed" not in other}
        if not timed:
            raise LookupError(others[target.against[0]]["failed"])
        name, other = min(timed.items(), key=lambda item: item[1]["ratio"])
        if target.memory:
            mine, its = (x["extra_bytes"] - whole["output_bytes"] for x in (whole, other))
            return mine / its, f"of the extra memory of {name}"
        return other["ratio"], f"times as fast as {name}"
    whole = row("forward+backward" if target.direction == "backward" else target.direction)
    floor, time = whole["floors_s"]["memory"], whole["median_s"]
    if target.direction == "backward":
        forward = row("forward")
        floor, time = floor - forward["floors_s"]["memory"], time - forward["median_s"]
    return floor / time, "of copy speed"
