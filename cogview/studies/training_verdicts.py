"""What the study of training found, in sentences computed from its figures."""

import math
import statistics
from typing import Any

from cogview.studies.paired import over_seeds

ALIKE = 0.02  # of a loss: what counts as the same
DOUBLING = 0.5  # of the loss scale: what counts as an effect
KINDS = {
    "": "On the preset tiny",
    "small, ": "with embeddings that begin at 0.02, as published,",
    "deep, ": "with 64 layers at a rate of 0.01",
}
"""Of trainings with and without the shrink; their names begin so."""
SHRINK = tuple(f"{kind}{name}" for kind in KINDS for name in ("not shrunk", "shrunk"))
Found = dict[str, list[dict[str, Any]]]
"""Figures of each way's trainings, one a seed."""


def held_out(trainings: list[dict[str, Any]], loss: str = "loss") -> list[float]:
    return [training["held_out"][loss] for training in trainings]


def against(found: Found, name: str, base: str, loss: str = "loss") -> dict[str, Any]:
    """The held-out loss against another way's, as a share of it, seed by seed."""
    pairs = zip(held_out(found[name], loss), held_out(found[base], loss), strict=True)
    values = [(a - b) / b for a, b in pairs]
    return {**over_seeds(values), "farthest": max(values, key=abs)}


def said(difference: dict[str, Any], form: str = "+.2%") -> str:
    if difference["interval"] is None:
        return format(difference["mean"], form)
    low, high = (format(end, form) for end in difference["interval"])
    return f"{difference['mean']:{form}} (95 % interval {low} to {high})"


def clear(difference: dict[str, Any]) -> bool:
    """Whether the seeds agree on its sign."""
    interval = difference["interval"]
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def _spread(trainings: list[dict[str, Any]], loss: str = "loss") -> float:
    """Standard deviation over the seeds as a share of the mean; 0 of a single one."""
    values = held_out(trainings, loss)
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def precision(found: Found) -> str:
    halves, brain = (against(found, name, "float32") for name in ("float16", "bfloat16"))
    holds = "holds" if abs(halves["farthest"]) <= ALIKE else "does not hold"
    skipped, steps = (sum(t[key] for t in found["float16"]) for key in ("skipped", "steps"))
    ends = ", ".join(f"2^{exponent:g}" for exponent in sorted({t["scale"][-1] for t in found["float16"]}))
    return (
        f"That float16 trains as float32 does, to {ALIKE:.0%} of the held-out loss, {holds}: {said(halves)}, the "
        f"farthest seed {halves['farthest']:+.2%}; bfloat16 {said(brain)}. Seeds of float32 differ by a standard "
        f"deviation of {_spread(found['float32']):.2%}. float16 skipped {skipped} of {steps:,} steps; its loss scale, "
        f"from 2^16 on, ended at {ends}."
    )


def level(training: dict[str, Any]) -> float:
    """The mean exponent of the loss scale over the second half of the steps."""
    scale = training["scale"]
    return statistics.fmean(scale[len(scale) // 2 :])


def shrink(found: Found) -> str:
    parts = []
    for kind, where in KINDS.items():
        shrunk, plain = found[f"{kind}shrunk"], found[f"{kind}not shrunk"]
        higher = over_seeds([level(a) - level(b) for a, b in zip(shrunk, plain, strict=True)])
        seen = "is not seen" if higher["mean"] < DOUBLING else "is seen" if clear(higher) else "may be there"
        skipped = [statistics.fmean(t["skipped"] for t in trainings) for trainings in (shrunk, plain)]
        end = against(found, f"{kind}shrunk", f"{kind}not shrunk")
        parts.append(
            f"{where} it {seen}: its exponent differs by {said(higher, '+.2f')} over the second half of the steps, "
            f"{skipped[0]:.1f} steps were skipped instead of {skipped[1]:.1f}, and the held-out loss differs by "
            f"{said(end)}"
        )
    return f"The paper finds that the shrink keeps the loss scale higher. {'; '.join(parts)}."


def late(trainings: list[dict[str, Any]], group: str) -> float:
    """The mean largest gradient of a group in the second half of a training."""
    ends = [t["largest"][group][len(t["largest"][group]) // 2 :] for t in trainings]
    values = [y for curve in ends for _, y in curve]
    return statistics.fmean(values) if values else math.nan


def gradients(found: Found) -> str:
    runs = [t for name in SHRINK for t in found[name]]
    overflowed = {group: sum(t["overflowed"][group] for t in runs) for group in runs[0]["overflowed"]}
    words, read = (
        [late(found[f"{kind}not shrunk"], group) / late(found[f"{kind}not shrunk"], "other") for kind in KINDS]
        for group in ("words", "read")
    )
    return (
        f"Why: in these three, without the shrink, the token table's largest gradient is {_list(words)} times that of "
        f"the layers, and what reading tokens adds to it, all that is shrunk, is {_list(read)} times; the rest is the "
        f"head's, which is the same table. Of {sum(t['skipped'] for t in runs)} skipped steps, in "
        f"{overflowed['words']} the table's gradient overflowed, in {overflowed['other']} one of the layers', in "
        f"{overflowed['positions']} that of the positions."
    )


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def attention(found: Found, facts: dict[str, Any]) -> str:
    of = {name: against(found, "three_region", "dense", f"{name}_loss") for name in ("image", "text")}
    parts = [
        f"Of the {name} loss it is {said(part)}, where seeds differ by {_spread(found['dense'], f'{name}_loss'):.2%}."
        for name, part in of.items()
    ]
    apart = "".join(f", but not for the {name} loss" for name, part in of.items() if clear(part))
    both, noise = against(found, "three_region", "dense"), _spread(found["dense"])
    holds = "holds" if abs(both["mean"]) <= noise else "does not hold"
    share = f"{facts['share_seen']:.0%} of the pairs"
    early = {name: _early(found, name) for name in ("three_region", "three_region, whole")}
    return (
        f"That three-region attention's loss is nearly identical to dense attention's {holds}{apart}: with {share} "
        f"it is {said(both)} off, where seeds of dense attention differ by {noise:.2%} (standard deviation). "
        + " ".join(parts)
        + f" Behind an eighth of the steps and up to a quarter, its training loss of text is "
        f"{said(early['three_region'])} off; with windows that reach everything {said(early['three_region, whole'])}."
    )


def _early(found: Found, name: str) -> dict[str, Any]:
    """The training loss of text against dense attention's, in the second eighth of the steps."""

    def mean(training: dict[str, Any]) -> float:
        steps = training["steps"]
        points = training["curves"]["text_loss"]
        return statistics.fmean([y for x, y in points if steps / 8 <= x <= steps / 4] or [points[-1][1]])

    pairs = zip(map(mean, found[name]), map(mean, found["dense"]), strict=True)
    return over_seeds([(a - b) / b for a, b in pairs])


def batch(found: Found) -> str:
    named = {"x2": "bfloat16", "x4": "x4"}
    linear = {name: against(found, way, "x1") for name, way in named.items()}
    root = {name: against(found, f"{name}, square root", "x1") for name in named}
    holds = "holds" if all(abs(part["mean"]) <= ALIKE for part in linear.values()) else "does not hold"
    steps = f"{found['x4'][0]['steps']} to {found['x1'][0]['steps']} steps"
    each, rooted = (", ".join(f"{name} {said(part)}" for name, part in of.items()) for of in (linear, root))
    return (
        f"That a batch and learning rate twice as large end at a very similar loss after the same tokens {holds}, to "
        f"{ALIKE:.0%}, in trainings as short as {steps}: {each}; with the rate times the square root {rooted}."
    )


def optimizer(found: Found, facts: dict[str, Any]) -> str:
    steps, time = against(found, "muon", "bfloat16"), against(found, "muon", "adamw, longer")
    longer = facts["step_seconds"]["muon"] / facts["step_seconds"]["bfloat16"]
    words = [_compared(part) for part in (steps, time)]
    return (
        f"Muon ends {words[0]} AdamW at equal steps, {said(steps)}, and {words[1]} it at equal time, {said(time)}; "
        f"its steps take {longer:.2f} times as long (both in turn, {facts['threads']} thread(s), batches of 8)."
    )


def _compared(difference: dict[str, Any]) -> str:
    if not clear(difference):
        return "not clearly apart from"
    return "below" if difference["mean"] < 0 else "above"
