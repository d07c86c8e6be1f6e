"""`cogview plan`: what a training takes, before it is begun."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cogview.commands.console import console
from cogview.commands.presets import of_preset, option
from cogview.commands.train import PRESETS
from cogview.config import Recompute, require
from cogview.hardware import GPUS, gpu_named
from cogview.plan import Plan as Planned
from cogview.plan import Planner, remedy
from cogview.recipes import RECIPES, named, preset

GIB, GB = 2**30, 1e9


@dataclass(frozen=True)
class Plan:
    """Memory of each GPU and time of a step of a preset's training, on any number of GPUs: a Markdown table.

    Formulas and what they take for granted are in docs/scaling.md; nothing is trained."""

    preset: Annotated[
        tyro.conf.Positional[Literal[*PRESETS]],  # type: ignore[valid-type]
        tyro.conf.arg(metavar="PRESET", help_behavior_hint="(default: cogview-4b)"),
    ] = "cogview-4b"
    """Sizes and training: tiny, fashion-tiny, cogview-4b, cogview-large, fashion-3b, dalle-12b or coglm-6b."""
    recipe: Annotated[Literal[*RECIPES] | None, option("RECIPE", "the first that has the preset")] = None  # type: ignore[valid-type]
    """The system or task."""
    gpus: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of GPUs, a column each; beyond 8 whole machines of 8."""
    gpu: str = "h100"
    """Its name, as torch says it or shorter: a100, h100-pcie, h200, b200, l40s, rtx-4090."""
    memory: Annotated[float | None, option("FLOAT", "all that the GPU has")] = None
    """GiB of each GPU."""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, of_preset("dtype")] = None
    """Of the computation; master weights are float32."""
    checkpoint_activations: Annotated[Recompute | None, of_preset("checkpoint_activations")] = None
    """Which activations are computed twice instead of being kept."""
    batch_size: Annotated[int | None, of_preset("batch_size")] = None
    """Sequences a step."""
    micro_batch: Annotated[int | None, option("INT", "the largest that fits")] = None
    """Of them those that a GPU computes at once."""
    tensor_parallel: int = 1
    """GPUs that share the tensors of each layer; divides the heads."""
    reshard: bool = True
    """Free the gathered parameters of a layer behind its forward, and gather them again for its backward."""
    utilisation: float = 0.4
    """Share of the GPU's peak that is reached while it computes."""
    link: Annotated[float | None, option("FLOAT", "the GPU's")] = None
    """GB a second and direction between the GPUs of a machine."""
    network: float = 50.0
    """GB a second and direction between machines, for each of their GPUs: 50 is InfiniBand of 400 Gbit."""

    def run(self) -> None:
        recipe = self.recipe or next(name for name, kind in RECIPES.items() if self.preset in kind.presets)
        config, training = preset(self.preset, recipe)
        blocks = training.gradient_scaling == "blocks" and self.dtype in (None, training.dtype)
        gpu = gpu_named(self.gpu)
        if gpu is None:
            raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {self.gpu!r}")
        require(len(self.gpus) > 0, "gpus", "at least one number", "none")
        for name in ("memory", "link"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "above 0", value)
        gpu = dataclasses.replace(
            gpu,
            memory=gpu.memory if self.memory is None else self.memory * GIB,
            link=gpu.link if self.link is None else self.link * GB,
        )
        planner = Planner(
            named(recipe)(config),
            batch_size=training.batch_size if self.batch_size is None else self.batch_size,
            gpu=gpu,
            size=4 if (self.dtype or training.dtype) == "float32" else 2,
            main_size=4 if blocks else None,
            averaged=training.average is not None,
            checkpointing=self.checkpoint_activations or training.checkpoint_activations,
            tensor_parallel=self.tensor_parallel,
            reshard=self.reshard,
            utilisation=self.utilisation,
            network=self.network * GB,
        )
        plans = [planner.at(count, self.micro_batch) for count in self.gpus]
        for line in (*summary(planner), "", *table(planner, plans, training.steps), "", *remedies(planner, plans)):
            console.print(line)


def summary(planner: Planner) -> Iterator[str]:
    recipe, c = planner.recipe, planner.recipe.config
    model = dataclasses.replace(planner, tensor_parallel=1).parameters.total
    yield f"{model:,} parameters, {c.num_layers} layers of width {c.hidden_size}; {recipe.length:,} tokens a sequence."
    step = planner.batch_size * planner.flops.total
    each = f"{planner.flops.total / 1e12:.4g} TFLOP each"
    yield f"A step of {planner.batch_size:,} sequences: {step / 1e15:,.4g} PFLOP, {each}."


def table(planner: Planner, plans: list[Planned], steps: int | None) -> Iterator[str]:
    """Lines of Markdown, aligned; "!" where memory is too small, and no times there."""

    def bytes_of(name: str) -> Callable[[Planned], str]:
        return lambda plan: f"{plan.bytes[name] / GIB:.3g}"

    def kept(mode: str) -> Callable[[Planned], str]:
        return lambda plan: f"{plan.activations[mode] / GIB:.3g}"

    def timed(value: Callable[[Planned], float], form: str = ".3g") -> Callable[[Planned], str]:
        return lambda plan: f"{value(plan):{form}}" if plan.fits else "–"

    tokens = planner.batch_size * planner.recipe.length
    peak = 1e12 * (planner.gpu.float32 if planner.size == 4 else planner.gpu.half)
    flops = planner.batch_size * planner.flops.total
    chosen = {mode: " (chosen)" if mode == planner.checkpointing else "" for mode in planner.activations}
    rows: dict[str, Callable[[Planned], str]] = {
        "GPUs": lambda plan: f"{plan.gpus:,}",
        "micro-batch": lambda plan: f"{plan.micro_batch}",
        "accumulate": lambda plan: f"{plan.accumulate}",
        "float32 parameters, GiB": bytes_of("parameters"),
        "parameters to compute with": bytes_of("computed with"),
        "gradients": bytes_of("gradients"),
        "AdamW's averages": bytes_of("optimizer"),
        **({"averaged parameters": bytes_of("average")} if planner.averaged else {}),
        **{f"activations, {mode}{mark}": kept(mode) for mode, mark in chosen.items()},
        "logits": bytes_of("logits"),
        f"all, of {plans[0].limit / GIB:.1f} GiB": lambda plan: f"{plan.total / GIB:.3g}{' !' * (not plan.fits)}",
        "compute, s": timed(lambda plan: plan.compute),
        "gather and reduce": timed(lambda plan: plan.gather),
        **({} if planner.tensor_parallel == 1 else {"tensor parallelism": timed(lambda plan: plan.tensor)}),
        "optimizer": timed(lambda plan: plan.optimizer, ".1g"),
        "a step": timed(lambda plan: plan.seconds),
        "a step without overlap": timed(lambda plan: plan.seconds_without_overlap),
        "tokens a second": timed(lambda plan: tokens / plan.seconds, ",.0f"),
        "model FLOPs utilisation": timed(lambda plan: flops / (plan.seconds * plan.gpus * peak), ".2f"),
    }
    if steps is not None:
        rows[f"days of {steps:,} steps"] = timed(lambda plan: plan.seconds * steps / 86400)
    cells = [[title, *map(value, plans)] for title, value in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    yield from (lines[0], rule, *lines[1:])


def remedies(planner: Planner, plans: list[Planned]) -> Iterator[str]:
    for plan in plans:
        if not plan.fits:
            count = "1 GPU" if plan.gpus == 1 else f"{plan.gpus:,} GPUs"
            yield f"{count}: too little memory even for one sequence at once; enough: {remedy(planner, plan.gpus)}."
