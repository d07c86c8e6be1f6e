"""The report of the study of image tokenizers: a page, its figures, loss curves, reconstructions."""

import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.data.files import write_json, write_text
from cogview.pictures import contact_sheet, curves

NAMES = {
    "moving_average": "moving average, unused codes moved",
    "moving_average_kmeans": "moving average",
    "straight_through": "straight-through",
    "gumbel": "Gumbel",
    "fixed": "fixed",
    "vqgan": "VQGAN (moving average, unused codes moved)",
}
FOUR = ("moving_average_kmeans", "straight_through", "gumbel", "fixed")  # that begin alike: the paper's
ALIKE, OF_FALL = 1.0, 0.05  # what counts as evenly matched: dB apart, and as a share of what the squared error fell by
SHOWN = 8  # pictures of the sheet
Found = dict[str, list[dict[str, Any]]]
"""Figures of each way's trainings, one a seed."""


def write(out: Path, settings: dict[str, int], found: Found, true: Tensor, rebuilt: dict[str, Tensor]) -> str:
    """Writes everything into `out`; the verdict in a sentence. true, rebuilt: held-out pictures, uint8 [N, 3, H, W]."""
    codebooks = [way for way in found if way != "vqgan"]
    panels = [
        ("squared error, training", {NAMES[way]: _line(found[way], "training") for way in codebooks}),
        ("squared error, held out", {NAMES[way]: _line(found[way], "validation") for way in codebooks}),
        (
            "held out, with the VQGAN",
            {NAMES[way]: _line(found[way], "validation") for way in ("moving_average", "vqgan")},
        ),
    ]
    curves(panels, out / "curves.png")
    rows = [("originals", list(true[:SHOWN]))] + [
        (NAMES[way], list(pictures[:SHOWN])) for way, pictures in rebuilt.items()
    ]
    contact_sheet(rows, out / "reconstructions.png", columns=1, zoom=2, note="held-out scenes, seed 0")
    verdict = f"{_verdict({way: found[way] for way in FOUR})} {_moved(found)}"
    write_json(out / "figures.json", {"settings": settings, "verdict": verdict, "trainings": found})
    write_text(out / "report.md", _page(settings, found, verdict))
    return verdict


def _line(trainings: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps, and the mean of the seeds at each."""
    steps = [step for step, _ in trainings[0][name]]
    return steps, [
        statistics.fmean(values) for values in zip(*([y for _, y in t[name]] for t in trainings), strict=True)
    ]


def _of(trainings: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; 0 of a single one."""
    values = [training[name] for training in trainings]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(trainings: list[dict[str, Any]], name: str, digits: int, times: float = 1.0) -> str:
    mean, spread = (times * value for value in _of(trainings, name))
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(trainings) > 1 else "")


def _verdict(found: Found) -> str:
    means = {way: _of(trainings, "psnr")[0] for way, trainings in found.items()}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    apart, spread = means[best] - means[worst], max(_of(trainings, "psnr")[1] for trainings in found.values())
    ends = [_of(trainings, "squared")[0] for trainings in found.values()]
    begin = statistics.fmean(trainings[0]["training"][0][1] for trainings in found.values())
    share = (max(ends) - min(ends)) / (begin - min(ends))
    says = "holds" if apart <= ALIKE and share <= OF_FALL else "does not hold"
    seeds = len(found[best])
    said = (
        f"The paper's finding, that all four end at a similar loss, {says} here: held out, the best ({NAMES[best]}) "
        f"and the worst ({NAMES[worst]}) are {apart:.2f} dB apart, {share:.1%} of what the squared error fell by"
    )
    return (
        f"{said}; seeds of the same way differ by a standard deviation of up to {spread:.2f} dB."
        if seeds > 1
        else f"{said}."
    )


def _moved(found: Found) -> str:
    """What it comes to that unused codes are moved."""
    plain, moved = (_of(found[way], "psnr")[0] for way in ("moving_average_kmeans", "moving_average"))
    used = [_of(found[way], "used_codes")[0] for way in ("moving_average_kmeans", "moving_average")]
    return (
        f"Where unused codes are moved to where they help, which none of the four does, moving averages end "
        f"{moved - plain:+.2f} dB from those alone, with {used[1]:.0f} codes used instead of {used[0]:.0f}."
    )


def _page(settings: dict[str, int], found: Found, verdict: str) -> str:
    head = "| codebook | squared error x 1000 | PSNR, dB | codes used | perplexity | edges | differences | seconds |"
    lines = [head, "|---" * 8 + "|"]
    for way, trainings in found.items():
        cells = [_cell(trainings, "squared", 2, 1000)]
        for name, digits in (("psnr", 2), ("used_codes", 0), ("perplexity", 0), ("edges", 3), ("differences", 3)):
            cells.append(_cell(trainings, name, digits))
        lines.append(f"| {' | '.join([NAMES[way], *cells, format(_of(trainings, 'seconds')[0], '.0f')])} |")
    plain, gan = (found[way] for way in ("moving_average", "vqgan"))
    gained = _of(gan, "psnr")[0] - _of(plain, "psnr")[0]
    longer = _of(gan, "seconds")[0] / _of(plain, "seconds")[0]
    return f"""# Four ways to train an image tokenizer, and a VQGAN

{verdict}

Seeds of each: {settings["seeds"]}; mean ± standard deviation over the seeds, of {settings["held_out"]} held-out scenes.
All have {settings["codebook"]} codes of {settings["code_dim"]} numbers, {settings["hidden"]} channels and
{settings["steps"]:,} steps of {settings["batch_size"]} pictures of 64 x 64: the same {settings["pictures"]:,} scenes in
the same order, and for a seed the same first weights of encoder and decoder. "Similar" is
{ALIKE:g} dB or less between the best and the worst, and {OF_FALL:.0%} or less of what the squared error fell by.

{chr(10).join(lines)}

![curves](curves.png)

- moving average: a code is the mean of the vectors that took it lately.
- straight-through: nearest code, moved by the gradient of the codebook loss.
- Gumbel: codes are drawn at a temperature that falls; nearest at the end.
- fixed: codes never change.
- All four begin as outputs of an encoder that has learned for a tenth of the training, spread as by k-means++; unused
  codes stay. Where unused codes are moved, which is this package's default, moving averages begin at once.

## VQGAN

The tokenizer whose unused codes are moved, beside a discriminator: hinge loss, and the distance of the discriminator's
features in place of a perceptual network; {gained:+.2f} dB against it alone, and a step takes {longer:.1f} times the
time. "edges": how steep edges are where the original has them, 1 as in the original; "differences": all differences of
neighbouring pixels against the original's, made-up ones too.

![reconstructions](reconstructions.png)
"""
