"""`python -m benchmarks.hierarchical`: CogView2 against CogView, by the clock, with untrained weights.

pictures  CogView2's 60 x 60 codes (400 one at a time, all 3,600 at once, six rounds; published settings) beside
          CogView's 64 x 64: as published, 1,024 positions and the 8,448 of its nine windows one at a time, those that
          are there already among them, with a cache of keys and values and in the way of its own code; and by our
          windows, which draw only what is missing, several together
rounds    the six parallel rounds over 60 x 60 codes beside all of them one at a time, by a causal model of the same
          shape
training  a step of direct super-resolution with local attention beside dense attention under the same mask

What goes one at a time is marked (scaled): steps are timed at four lengths of the cache, and what a line through them
gives is summed over all positions. All else is timed whole, contestants in turn. Writes
results/hierarchical/<device>.json, in twenty minutes or so.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.cogview2 import Settings
from cogview.flops import forward_flops
from cogview.generate import draw_batches, generate_batches
from cogview.magnify import magnify_batches
from cogview.parts.transformer import Transformer
from cogview.recipes.coglm import CogLM
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.direct import Direct
from cogview.recipes.iterative import Iterative
from cogview.recipes.recipe import Recipe
from cogview.recipes.superresolution import SuperResolution
from cogview.sampling import Sampling
from cogview.sequence import pad_text
from cogview.superresolve import fine_batches
from cogview_ops.bench import machine

from . import hierarchical_steps, report
from .generation import DTYPES, draw
from .walks import missing, original_walk, published_walk, walk

PARTS = ("pictures", "rounds", "training")
Seconds = dict[str, float]
"""Of each stage."""
Contestants = dict[str, Callable[[], Seconds]]


@dataclass(frozen=True)
class Sizes:
    """Of all models; heads are of 64."""

    layers: int = 12
    width: int = 512
    grid: int = 20
    """CogView2's small pictures; the fine ones have three times as many codes a side."""
    codes: int = 20_000
    cogview_grid: int = 32
    cogview_codes: int = 8192
    text: int = 30
    """Tokens of a caption."""
    longest_text: int = 96
    text_vocab: int = 500
    steps: int = 16
    """Timed at each length of the cache."""

    @property
    def common(self) -> dict[str, Any]:
        heads = {"hidden_size": self.width, "num_heads": self.width // 64}
        return {"num_layers": self.layers, "text_vocab": self.text_vocab, "dropout": 0.0, **heads}


QUICK = Sizes(layers=1, width=64, grid=4, codes=512, cogview_grid=8, cogview_codes=512, longest_text=32, steps=3)


def coglm(sizes: Sizes) -> CogLM:
    rows = sizes.longest_text + 1
    own: dict[str, Any] = {"image_grid": sizes.grid, "max_positions": rows + 1 + sizes.grid**2, "text_rows": rows}
    own |= {"max_caption": rows - 1, "chinese_from": sizes.text_vocab // 2, "patch_side": 2}
    return CogLM(CogLMConfig(**sizes.common, **own, image_vocab=sizes.codes, relax=None, stop=False))


def cogview(sizes: Sizes, grid: int, codes: int, text: int = 61) -> CogView:
    return CogView(CogViewConfig(**sizes.common, image_grid=grid, max_positions=grid**2 + 4 + text, image_vocab=codes))


@dataclass(frozen=True)
class How:
    dtype: str
    batch: int
    rounds: int
    device: torch.device
    compile: bool
    """Steps of one token."""


class Made(NamedTuple):
    recipe: Any
    model: Transformer


def made(recipe: Recipe, how: How) -> Made:
    return Made(recipe, recipe.model().to(how.device, DTYPES[how.dtype]).eval().requires_grad_(False))


def stepping(one: Made, how: How) -> Made:
    """A model that draws one token after the other."""
    if not how.compile:
        return one
    model = copy.deepcopy(one.model)
    model.compile_step()
    return Made(one.recipe, model)


class CogView2:
    """Its three models, which draw as published."""

    def __init__(self, sizes: Sizes, how: How):
        base = coglm(sizes)
        self.base = stepping(made(base, how), how)
        self.direct = made(Direct(Direct.begun(base.config)), how)
        self.iterative = made(Iterative(Iterative.begun(base.config)), how)
        self.how = Settings.published(torch.randint(max(1, sizes.codes // 40), (sizes.codes,)), how.batch)
        self.now = partial(machine.now, how.device)

    @property
    def rounds(self) -> Tensor:
        """int64 [fine codes]: in which of them each is drawn, those of 0 and less in none."""
        return self.iterative.recipe.order

    def draw(self, captions: Sequence[Sequence[int]]) -> Seconds:
        begun = self.now()
        (small,) = generate_batches(*self.base, captions, self.how.base)
        return {"one at a time": self.now() - begun, **self.enlarge(captions, small)}

    def enlarge(self, captions: Sequence[Sequence[int]], small: Tensor) -> Seconds:
        begun = self.now()
        (direct,) = fine_batches(*self.direct, captions, small, self.how.direct)
        between = self.now()
        list(fine_batches(*self.iterative, captions, direct, self.how.iterative, top_k=self.how.top_k))
        return {"all at once": between - begun, "rounds": self.now() - between}

    def warm(self, captions: Sequence[Sequence[int]], small: Tensor) -> None:
        """Draws the first codes, which compiles what is to be, and all at once."""
        seeds = range(len(captions))
        list(draw_batches(*self.base, pad_text(captions), self.how.base, seeds, lambda tokens: None, 3))
        list(fine_batches(*self.direct, captions, small, self.how.direct))


def in_turn(contestants: Contestants, rounds: int, once: Sequence[str], title: str) -> dict[str, list[Seconds]]:
    """What each took, those of `once` in the first round alone."""
    found: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, call in contestants.items():
            if name in once and number > 1:
                continue
            found[name].append(call())
            stages = ", ".join(f"{stage} {report.seconds(s)}" for stage, s in found[name][-1].items())
            print(f"{title}, round {number} of {rounds}: {name}: {stages}", flush=True)
    return found


def row(op: str, shape: str, how: How, found: dict[str, list[Seconds]], about: dict[str, Any]) -> dict[str, Any]:
    """The first of them is ours, the others are its baselines; about: what else there is to say of each."""
    totals = {name: [sum(seconds.values()) for seconds in times] for name, times in found.items()}
    ours, *others = found
    low, mine, high = quantiles(totals[ours], n=4)
    figures: dict[str, dict[str, Any]] = {}
    for name, times in found.items():
        stages = {stage: median(x[stage] for x in times) for stage in times[0]}
        figures[name] = {"median_s": median(totals[name]), "rounds": len(times), "stages_s": stages, **about[name]}
    for name in others:
        figures[name] |= {"ratio": figures[name]["median_s"] / mine, "same_result": False}
    case: dict[str, Any] = {"op": op, "shape": shape, "dtype": how.dtype, "direction": "a picture of each"}
    case |= {**machine.facts_of(how.device), **figures[ours], "iqr_s": high - low}
    return case | {"baselines": {name: figures[name] for name in others}}


def texts(sizes: Sizes, batch: int) -> list[list[int]]:
    return torch.randint(sizes.text_vocab, (batch, sizes.text)).tolist()


def pictures(sizes: Sizes, how: How) -> dict[str, Any]:
    torch.manual_seed(0)
    captions, grid, ours = texts(sizes, how.batch), sizes.cogview_grid, CogView2(sizes, how)
    base = made(cogview(sizes, grid, sizes.cogview_codes), how)
    larger = made(SuperResolution(SuperResolution.begun(base.recipe.config)), how)
    walkers, stages = [stepping(base, how), stepping(larger, how)], (f"{grid} x {grid} codes", "windows")
    text = pad_text(captions[:1]).repeat(how.batch, 1)
    half, nothing = torch.randint(sizes.cogview_codes, (how.batch, grid**2 // 4)), torch.full((how.batch, grid**2), -1)
    prompts = [base.recipe.prompt(text), larger.recipe.continued(text, half, nothing)]
    prompts = [dataclasses.replace(prompt, same=None) for prompt in prompts]  # as of captions that are not the same
    counts, few = [[grid**2], published_walk(grid)], max(2, sizes.steps // 4)  # its steps are long

    def walked(walk: Callable[..., float], models: Sequence[Made], steps: int) -> Seconds:
        parts = zip(stages, models, prompts, counts, strict=True)
        return {stage: walk(one.model, prompt, own, steps) for stage, one, prompt, own in parts}

    def windows() -> Seconds:
        plain, begun = Sampling(batch_size=how.batch), ours.now()
        (found,) = generate_batches(*base, captions, plain)
        between = ours.now()
        list(magnify_batches(*larger, captions, found, plain))
        return dict(zip(stages, (between - begun, ours.now() - between), strict=True))

    contestants: Contestants = {
        "CogView2": partial(ours.draw, captions),
        "published walk (scaled)": partial(walked, walk, walkers, sizes.steps),
        "CogView's own code (scaled)": partial(walked, original_walk, (base, larger), few),
        "our windows": windows,
    }
    if how.device.type != "cpu":
        del contestants["CogView's own code (scaled)"]  # written for CPUs in benchmarks.generation
    ours.warm(captions, torch.zeros(how.batch, sizes.grid, sizes.grid, dtype=torch.int64))
    for prompt, one in zip(prompts, walkers, strict=True):
        draw(one.model, prompt, 0, sizes.steps)
    found = in_turn(contestants, how.rounds, ["our windows"], f"pictures, {how.dtype} batch {how.batch}")
    total, fine = sum(map(sum, counts)), ours.direct.recipe.config.fine_grid**2
    whole = {"codes": 4 * grid**2}
    walks = [whole | {"passes": total, "timed": f"{8 * n} of {total:,} positions a round"} for n in (sizes.steps, few)]
    about = {
        "CogView2": {"codes": fine, "passes": sizes.grid**2 + 1 + int(ours.rounds.max()), "tokens": how.batch * fine},
        "published walk (scaled)": walks[0],
        "CogView's own code (scaled)": walks[1],
        "our windows": whole | {"passes": grid**2 + sum(map(max, missing(grid)))},
    }
    return row("draw", named(sizes, how), how, found, about)


def parallel(sizes: Sizes, how: How) -> dict[str, Any]:
    torch.manual_seed(0)
    captions, ours = texts(sizes, how.batch), CogView2(sizes, dataclasses.replace(how, compile=False))
    grid, small = ours.direct.recipe.config.fine_grid, torch.randint(sizes.codes, (how.batch, sizes.grid, sizes.grid))
    causal = stepping(made(cogview(sizes, grid, sizes.codes, sizes.longest_text), how), how)
    prompt = causal.recipe.prompt(pad_text(captions[:1]).repeat(how.batch, 1))
    prompt, cells = dataclasses.replace(prompt, same=None), grid**2
    contestants: Contestants = {
        "with the direct pass": partial(ours.enlarge, captions, small),
        "one at a time (scaled)": lambda: {"codes": walk(causal.model, prompt, [cells], sizes.steps)},
    }
    draw(causal.model, prompt, 0, sizes.steps)
    found = in_turn(contestants, how.rounds, [], f"rounds, {how.dtype} batch {how.batch}")
    found = {"rounds": [{"rounds": x["rounds"]} for x in found["with the direct pass"]], **found}
    passes, drawn = int(ours.rounds.max()), int((ours.rounds >= 1).sum())
    many, one = (how.batch * sum(forward_flops(x.recipe)[:2]) for x in (ours.iterative, causal))
    head = how.batch * 2 * sizes.codes * sizes.width
    single = {"flops": one + cells * head, "timed": f"{4 * sizes.steps} of {cells:,} positions a round"}
    about = {
        "rounds": {"codes": drawn, "passes": passes, "flops": passes * many + drawn * head},
        "with the direct pass": {"codes": cells, "passes": passes + 1},
        "one at a time (scaled)": {"codes": cells, "passes": cells, **single},
    }
    return row("refine", f"{grid}x{grid}-{named(sizes, how)}", how, found, about)


def named(sizes: Sizes, how: How) -> str:
    return f"{sizes.layers}x{sizes.width}-batch-{how.batch}{'-compiled' if how.compile else ''}"


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    words = [f"{row['op']} {row['shape']} {row['dtype']}: {report.seconds(row['median_s'])}, {row['passes']:,} passes"]
    for name, other in row["baselines"].items():
        words.append(f"{name} {other['ratio']:.2f} times as long, {other['passes']:,} passes")
    return "; ".join(words)


def main(arguments: list[str] | None = None) -> None:
    how: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hierarchical", **how)
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS / "hierarchical", help="folder (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2 (default: %(default)s); 2 of batches")
    parser.add_argument("--pictures", nargs="+", type=int, default=[1], help="batches of pictures (default: 1)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of rounds (default: 1 8)")
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="of what draws (default: %(default)s)")
    parser.add_argument("--width", type=int, default=Sizes.width, help="of what draws (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="timed at each place (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="steps of one token, but those of our windows")
    cases = hierarchical_steps.CASES
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases)[:2], help="of training (default: 2)")
    parser.add_argument("--quick", action="store_true", help="all parts at a toy size, to see that they run")
    options = parser.parse_args(arguments)
    sizes = Sizes(layers=options.layers, width=options.width, steps=options.steps)
    if options.quick:
        sizes, options.batches, options.rounds, options.cases = QUICK, [1, 2], 2, ["direct-quick"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"pictures": (pictures, options.pictures), "rounds": (parallel, options.batches)}
    for part in options.parts:
        for dtype in options.dtypes:
            if part == "training":
                for case in options.cases:
                    for found in hierarchical_steps.rows(case, dtype, options.rounds, device):
                        path = report.save(found, options.out)
                    print(hierarchical_steps.line(found), flush=True)
                continue
            measure, batches = kinds[part]
            for batch in batches:
                rounds = options.rounds if batch == 1 else 2
                found = measure(sizes, How(dtype, batch, rounds, device, options.compile))
                path = report.save(found, options.out)
                print(line(found), flush=True)
    print(path)


if __name__ == "__main__":
    main()
