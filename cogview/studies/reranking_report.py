"""The report of the study of reranking: a table, the curve over candidates, and whether it is more than chance."""

from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.data.files import write_json, written_beside
from cogview.pictures import curves
from cogview.studies.paired import best_of, compare, mcnemar, order_right


def write(out: Path, right: Tensor, scores: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Writes report.md, figures.json and curve.png; returns the first sentence. right: bool [N, M] of M candidates of N
    captions; scores: of those, the lowest is picked."""
    figures = facts | measure(right, scores)
    shares: dict[str, dict[str, float]] = figures["share_right"]
    counts = [int(count) for count in shares]
    lines = {name: ([float(n) for n in counts], [shares[str(n)][name] for n in counts]) for name in shares["1"]}
    curves([("share of scenes right", lines)], out / "curve.png", across="candidates")
    write_json(out / "figures.json", figures)
    verdict = _verdict(figures, len(right), counts[-1])
    with written_beside(out / "report.md") as beside:
        beside.write_text(_page(verdict, figures, len(right), counts), encoding="utf-8")
    return verdict


def measure(right: Tensor, scores: dict[str, Tensor]) -> dict[str, Any]:
    """Shares of captions whose pick is right, by the number of candidates; of the most, each way against a pick at
    random and against each other."""
    captions, most = right.shape
    counts = [2**k for k in range(most.bit_length())]
    mean, oracle = right.float().mean(dim=1), -right.float()
    shares = {
        str(n): {
            "oracle": float(best_of(oracle, right, n).mean()),
            **{name: float(best_of(score, right, n).mean()) for name, score in scores.items()},
            "random": float(mean.mean()),
        }
        for n in counts
    }
    picks = {name: best_of(score, right, most).bool() for name, score in scores.items()}
    against = {name: {"p": mcnemar(pick, right[:, 0]), **compare(pick.float(), mean)} for name, pick in picks.items()}
    (first, a), (second, b) = list(picks.items())[:2]
    against[f"{first} and {second}"] = {"p": mcnemar(a, b), **compare(a.float(), b.float())}
    order = {name: order_right(score, right) for name, score in scores.items()}
    return {"captions": captions, "share_right": shares, "against_random": against, "order_right": order}


def _verdict(figures: dict[str, Any], captions: int, most: int) -> str:
    shares, test = figures["share_right"][str(most)], figures["against_random"]["CapLoss"]
    low, high = test["interval"]
    better = "is better than" if low > 0 else "is not shown to be better than"
    return (
        f"The best of {most} by CapLoss {better} a random one: {shares['CapLoss']:.0%} of {captions} scenes are right "
        f"instead of {shares['random']:.0%} (95 % interval of the difference {low:.0%} to {high:.0%}; one random "
        f"candidate against it, McNemar's exact test: p = {test['p']:.2g})."
    )


def _page(verdict: str, figures: dict[str, Any], captions: int, counts: list[int]) -> str:
    shares, most = figures["share_right"], counts[-1]
    rows = ["| picked by | " + " | ".join(f"of {n}" for n in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    rows += [f"| {name} | " + " | ".join(f"{shares[str(n)][name]:.1%}" for n in counts) + " |" for name in shares["1"]]
    both = figures["against_random"]["CapLoss and contrastive"]
    models, order = figures["models"], figures["order_right"]
    base, judge, other = models["gpt"], models["caption"], models["others/contrastive"]
    return f"""{verdict}

# Self-reranking

{captions} captions that training never saw, {most} candidates each, by a model that was stopped at step
{base["steps"]:,}. Right is a picture with everything that was asked for: the emoji, their places, the background. Of
fewer candidates than {most} every share is the mean over the groups that the {most} fall into; random is the mean of
all.

{chr(10).join(rows)}

![curve](curve.png)

CapLoss against the contrastive model, of {most}: {both["difference"]:+.1%} (95 % interval {both["interval"][0]:+.1%} to
{both["interval"][1]:+.1%}, p = {both["p"]:.2g}). A right candidate is before a wrong one of the same caption in
{order["CapLoss"]:.1%} of the pairs by CapLoss, in {order["contrastive"]:.1%} by the contrastive model.

Candidates of one caption in the order of CapLoss, as in the paper's figure 6:

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
- {figures["threads"]} threads; {figures["minutes_this_time"]:.1f} minutes this time.
"""
