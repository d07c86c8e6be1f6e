"""What the study of DALL-E's choices found, in sentences computed from its figures."""

import math
import statistics
from typing import Any

from cogview.studies.paired import over_seeds
from cogview.studies.training_verdicts import Found, against, clear, held_out, said

FORMS = {"usual": "as in training", "turned": "turned round", "terse": "terse"}
ALIKE = 0.02  # of a loss: what counts as hardly changed
DEPTHS = {"tiny": "preset tiny", "deep": "64 layers"}
"""Parts that compare float16 with float32, and what is trained there."""


def attentions(found: dict[str, Found]) -> dict[str, Found]:
    """The parts that compare attentions, attention-8 and so on, by the codes of a side."""
    begin = "attention-"
    return {part.removeprefix(begin): some for part, some in found.items() if part.startswith(begin)}


def dense_of(name: str) -> str:
    """The dense attention of the same recipe, that another attention is compared with."""
    return "cogview dense" if name in ("cogview dense", "three_region") else "dense"


def share(trainings: list[dict[str, Any]], what: str, form: str = "usual") -> float:
    """The mean of the seeds of "drawn" or "chosen" of a form of captions."""
    return statistics.fmean(training[what][form] for training in trainings)


def _points(found: Found, name: str, base: str, what: str, form: str) -> dict[str, Any]:
    """The difference of such shares, seed by seed."""
    pairs = zip(found[name], found[base], strict=True)
    return over_seeds([a[what][form] - b[what][form] for a, b in pairs])


def carries_on(trainings: list[dict[str, Any]]) -> bool:
    """Whether all came to their end with losses that are finite."""
    return all(math.isfinite(t["held_out"].get("loss", math.nan)) for t in trainings)


def _end(trainings: list[dict[str, Any]]) -> str:
    """Where there is nothing to compare with."""
    return "carries on" if carries_on(trainings) else "diverged"


def text(found: Found) -> str:
    named = {"0": "text 0", "1/8": "dalle", "1": "text 1"}
    parts = [
        f"at {weight} {share(found[name], 'drawn'):.0%} of the captions are drawn right and "
        f"{share(found[name], 'chosen'):.0%} of the pictures know their own caption among eight"
        for weight, name in named.items()
    ]
    without = _points(found, "text 0", "dalle", "drawn", "usual")
    plain = _points(found, "nothing hidden, text 0", "nothing hidden", "drawn", "usual")
    seen = ["is seen" if clear(part) and part["mean"] < 0 else "is not shown" for part in (without, plain)]
    losses = [said(against(found, name, "dalle", "image_loss")) for name in ("text 0", "text 1")]
    drawn = [said(part, "+.1%") for part in (without, _points(found, "text 1", "dalle", "drawn", "usual"))]
    return (
        f"CogView's paper finds that without a loss of text, text and pictures do not come together. Where some of "
        f"what was drawn is hidden in training, so that text has to tell, that {seen[0]}: {'; '.join(parts)}. The "
        f"difference to 1/8 is {drawn[0]} of the captions at 0 and {drawn[1]} at 1, that of the held-out loss of "
        f"images {losses[0]} and {losses[1]}. Where nothing is hidden, as in the papers, it {seen[1]}: "
        f"{share(found['nothing hidden'], 'drawn'):.0%} are drawn right at 1/8, "
        f"{share(found['nothing hidden, text 0'], 'drawn'):.0%} at 0, {said(plain, '+.1%')}."
    )


def padding(found: Found) -> str:
    losses = {kind: against(found, "dalle", "masked", f"{kind}_loss") for kind in ("image", "text")}
    rises = [kind for kind, part in losses.items() if clear(part) and part["mean"] > 0]
    first = f"The first is seen, of {' and '.join(rises)}" if rises else "The first is not shown"
    other = {form: _points(found, "dalle", "masked", "drawn", form) for form in FORMS}
    gains = [FORMS[form] for form in ("turned", "terse") if clear(other[form]) and other[form]["mean"] > 0]
    second = f"the second is, for captions {' and '.join(gains)}" if gains else "the second is not"
    shares = "; ".join(
        f"{FORMS[form]} {share(found['dalle'], 'drawn', form):.0%} with learned padding, "
        f"{share(found['masked'], 'drawn', form):.0%} masked, {said(part, '+.1%')}"
        for form, part in other.items()
    )
    ends = ", ".join(f"{said(losses[kind])} of {name}" for kind, name in {"image": "images", "text": "text"}.items())
    return (
        f"DALL-E saw a higher validation loss with learned padding, and better results on captions of another kind. "
        f"{first}: learned padding's held-out losses differ from masked padding's by {ends}; {second}. Drawn right of "
        f"captions {shares}."
    )


def softmax(found: Found) -> str:
    loss = against(found, "separate", "dalle", "image_loss")
    drawn = _points(found, "separate", "dalle", "drawn", "usual")
    worse = clear(loss) and loss["mean"] > 0
    better = clear(loss) and loss["mean"] < 0
    verdict = "is seen" if worse else "does not hold" if better else "is not shown"
    return (
        f"That one softmax over text and image does better than two whose results are added {verdict} here: with two "
        f"the held-out loss of images differs by {said(loss)}, what is drawn right by {said(drawn, '+.1%')} of the "
        f"captions ({share(found['separate'], 'drawn'):.0%} and {share(found['dalle'], 'drawn'):.0%})."
    )


def attention(found: dict[str, Found], facts: dict[str, Any]) -> str:
    """facts: seconds, and entropy of the codes, by the part."""
    parts = []
    for grid, trainings in attentions(found).items():
        times, entropy = (facts[kind][f"attention-{grid}"] for kind in ("seconds", "entropy"))
        each = []
        for name in trainings:
            if name == (base := dense_of(name)):
                continue
            loss = against(trainings, name, base, "image_loss")
            each.append(f"{name.replace('_', '-')} {said(loss)} and {times[name] / times[base]:.2f} of the time")
        dense = statistics.fmean(held_out(trainings["dense"], "image_loss"))
        parts.append(f"{grid} x {grid} (dense {dense:.2f}, their entropy {entropy:.2f}): {', '.join(each)}")
    return (
        "Held-out loss of images against dense attention's, and the time of a step, after equal steps, of codes "
        + "; of ".join(parts)
        + ". Dense attention is SDPA's, of the same recipe."
    )


def scaling(found: dict[str, Found], yardstick: str) -> str:
    """The verdict on either cure, and both, against float32 with pre-LN."""
    parts = []
    for part, name in zip(DEPTHS, ("At the preset tiny", "With 64 layers"), strict=True):
        trainings = found[part]
        each = []
        for way, runs in trainings.items():
            if way == yardstick:
                continue
            skipped = statistics.fmean(t["skipped"] for t in runs)
            both = carries_on(runs) and carries_on(trainings[yardstick])
            ends = said(against(trainings, way, yardstick)) if both else _end(runs)
            each.append(f"{way} {ends}, {skipped:.1f} steps skipped")
        parts.append(f"{name} held-out losses differ from those of {yardstick} by: {'; '.join(each)}")
    relaxed = "Sandwich-LN + PB-relax, float32"
    finite = [part for part in DEPTHS if all(carries_on(found[part][way]) for way in (relaxed, yardstick))]
    hardly = {part: against(found[part], relaxed, yardstick) for part in finite}
    alike = bool(hardly) and all(abs(one["mean"]) <= ALIKE for one in hardly.values())
    holds = "holds" if alike and len(finite) == len(DEPTHS) else "does not hold"
    of_loss, of_blocks = (
        [t for part in DEPTHS for name, runs in found[part].items() if name.endswith(kind) for t in runs]
        for kind in ("float16", "blocks")
    )
    whole = [statistics.fmean(t["skipped"] for t in some) for some in (of_loss, of_blocks)]
    left_out = statistics.fmean(t["left_out"] for t in of_blocks)
    return (
        f"{'. '.join(parts)}. That Sandwich-LN with PB-relax hardly changes convergence, to {ALIKE:.0%}, {holds} in "
        f"float32: {', '.join(f'{part} {said(one)}' for part, one in hardly.items())}. A scale of the loss skipped "
        f"{whole[0]:.1f} steps a training; scales of blocks {whole[1]:.1f}, and they left a block out {left_out:.1f} "
        f"times."
    )
