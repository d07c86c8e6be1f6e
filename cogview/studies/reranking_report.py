"""The report of the study of reranking: a table, the curve over candidates, and whether it is more than chance."""

from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.data.files import write_json, write_text
from cogview.pictures import curves
from cogview.studies.paired import best_of, compare, mcnemar, order_right


def write(out: Path, right: Tensor, psnr: Tensor, scores: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Writes report.md, figures.json and curve.png; returns the first sentence. Of M candidates of N captions, [N, M]:
    whether they are right, their PSNR to the true pictures, and scores, of which the lowest is picked."""
    figures = facts | measure(right, psnr, scores)
    panels = []
    for title, name in (("share of scenes right", "share_right"), ("dB to the true picture", "psnr")):
        by_count: dict[str, dict[str, float]] = figures[name]
        counts = [float(count) for count in by_count]
        lines = {way: (counts, [some[way] for some in by_count.values()]) for way in by_count["1"]}
        panels.append((title, lines))
    curves(panels, out / "curve.png", across="candidates")
    write_json(out / "figures.json", figures)
    verdict = _verdict(figures, right.shape[1])
    write_text(out / "report.md", _page(verdict, figures, right.shape[1]))
    return verdict


def measure(right: Tensor, psnr: Tensor, scores: dict[str, Tensor]) -> dict[str, Any]:
    """By the number of candidates, the share of captions whose pick is right, and the picks' mean PSNR; of the most,
    each way to pick against one at random and against each other."""
    captions, most = right.shape
    counts = [2**k for k in range(most.bit_length())]
    picks = {name: best_of(score, right, most).bool() for name, score in scores.items()}
    mean = right.float().mean(dim=1)
    against = {name: {"p": mcnemar(pick, right[:, 0]), **compare(pick, mean)} for name, pick in picks.items()}
    (first, a), (second, b) = list(picks.items())[:2]
    nearer, other = (best_of(scores[name], psnr, most) for name in (first, second))
    return {
        "captions": captions,
        "share_right": {str(n): _by_way(right.float(), scores, n) for n in counts},
        "psnr": {str(n): _by_way(psnr, scores, n) for n in counts},
        "against_random": against,
        "against_each_other": {"p": mcnemar(a, b), **compare(a, b), "psnr": compare(nearer, other)},
        "order_right": {name: order_right(score, right) for name, score in scores.items()},
    }


def _by_way(values: Tensor, scores: dict[str, Tensor], count: int) -> dict[str, float]:
    """Mean of what is picked of so many candidates."""
    picked = {name: best_of(score, values, count) for name, score in ({"oracle": -values} | scores).items()}
    return {name: float(value.mean()) for name, value in (picked | {"random": values}).items()}


def _verdict(figures: dict[str, Any], most: int) -> str:
    shares, test = figures["share_right"][str(most)], figures["against_random"]["CapLoss"]
    low, high = test["interval"]
    better = "is better than" if low > 0 else "is not shown to be better than"
    return (
        f"The best of {most} by CapLoss {better} a random one: {shares['CapLoss']:.0%} of {figures['captions']} scenes "
        f"are right instead of {shares['random']:.0%} (95 % interval of the difference {low:.0%} to {high:.0%}; "
        f"against one random candidate of each by McNemar's exact test: p = {test['p']:.2g})."
    )


def _saturated(by_count: dict[str, dict[str, float]]) -> str:
    if any(values["CapLoss"] < values["oracle"] for values in by_count.values()):
        return ""
    return " CapLoss picks a right one wherever there is one, so that these scenes cannot tell a better judge."


def _table(by_count: dict[str, dict[str, float]], shown: str) -> str:
    rows = ["| picked by | " + " | ".join(f"of {n}" for n in by_count) + " |", "|---" * (len(by_count) + 1) + "|"]
    rows += [f"| {way} | " + " | ".join(f"{v[way]:{shown}}" for v in by_count.values()) + " |" for way in by_count["1"]]
    return "\n".join(rows)


def _page(verdict: str, figures: dict[str, Any], most: int) -> str:
    both, order, models = figures["against_each_other"], figures["order_right"], figures["models"]
    base, judge, other = models["gpt"], models["caption"], models["others/contrastive"]
    apart = "" if both["p"] < 0.05 else "; neither is shown to be better"
    low, high = both["psnr"]["interval"]
    return f"""{verdict}

# Self-reranking

{figures["captions"]} captions that training never saw, {most} candidates each, by a model that was stopped at step
{base["steps"]:,}. Right is a picture with everything that was asked for: the emoji, their places, the background. Of
fewer candidates than {most} every share is the mean over the groups that the {most} fall into; random is the mean of
all; the oracle picks a right one where there is one.{_saturated(figures["share_right"])}

{_table(figures["share_right"], ".1%")}

How near the picks are to the true pictures, in dB (PSNR; the oracle picks the nearest):

{_table(figures["psnr"], ".1f")}

![curve](curve.png)

CapLoss against the contrastive model, of {most}: {both["difference"]:+.1%} right (95 % interval
{both["interval"][0]:+.1%} to {both["interval"][1]:+.1%}, p = {both["p"]:.2g}){apart}; {both["psnr"]["difference"]:+.1f}
dB ({low:+.1f} to {high:+.1f}). A right candidate is before a wrong one of the same caption in {order["CapLoss"]:.1%} of
the pairs by CapLoss, in {order["contrastive"]:.1%} by the contrastive model.

Candidates of one caption in the order of CapLoss, as in the paper's figure 6. It says whether a picture tells its
caption, not whether it is clean:

![candidates](candidates.png)

## How

- Drawing: a GPT of the preset tiny, {base["steps"]:,} steps in {base["seconds"] / 60:.1f} minutes; held out
  {base["held_out"]["image_loss"]:.3f} nats an image token.
- CapLoss: the same weights finetuned on pictures before their captions ({judge["steps"]:,} steps,
  {judge["seconds"] / 60:.1f} minutes), {figures["parameters"]["caption"] / 1e6:.1f}M parameters; held out
  {judge["held_out"]["text_loss"]:.3f} nats a text token. Of the true pictures it captions
  {figures["captions_right"]:.0%} rightly (in either language, and of two emoji in either order).
- Contrastive: two small transformers over image codes and text, {other["steps"]:,} steps of 128 pairs,
  {other["seconds"] / 60:.1f} minutes, {figures["parameters"]["others/contrastive"] / 1e6:.1f}M parameters.
- {figures["threads"]} threads; these trainings took {sum(model["seconds"] for model in models.values()) / 60:.1f}
  minutes. The last call took {figures["minutes_this_time"]:.1f} with what was not done before.
"""
