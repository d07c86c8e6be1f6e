"""`python -m cogview_ops.bench OP`: how fast an operator is on this machine, beside what there is instead.

Results are compared with float64 first, what is wrong is not timed; then all take turns. The floor is the least time in
which this machine could move the bytes or do the arithmetic that no method can avoid, at the speed of its own copy,
matrix product and torch.exp, measured now. A star marks what computes something else, such as dense attention.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from . import machine, peers, shapes, table
from .clock import Clock
from .measure import DTYPES, Rows, direction, made, measured
from .operators import TIMED, differentiable, operator
from .problems import Problem
from .words import why

PATIENCE = 5.0  # seconds of a baseline's call on a CPU beyond which it is timed if asked for by name
COMPILED = ("FlexAttention", "torch.compile")  # half a minute each on a CPU before there is a time
ALONE = ("shape", "baselines", "direction")  # what peers has its own of
FILES = ("json", "plot")


def listing() -> str:
    lines = ["Operators, each with an example line; `peers` is the comparison with other packages.", ""]
    for name, timed in TIMED.items():
        example = " ".join(timed.sweep) or shapes.example(name)
        lines += [f"{name}: {timed.about}", f"    python -m cogview_ops.bench {name} --shape {example}"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    how = argparse.RawDescriptionHelpFormatter
    usage = "python -m cogview_ops.bench [OP] [options], --help says which"
    parser = argparse.ArgumentParser("cogview_ops.bench", usage, __doc__, shapes.__doc__, formatter_class=how)
    parser.add_argument("op", nargs="?", metavar="OP", help="an operator, or peers (default: list what there is)")
    parser.add_argument("--shape", nargs="+", help="one or several, such as 4x4224x64 or heads=4,dim=64")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: %(default)s)")
    directions = [direction(False), direction(True)]
    parser.add_argument("--direction", choices=directions, help=f"(default: {direction(False)})")
    parser.add_argument("--baselines", help="names with commas, or all (default: on a CPU those that are not slow)")
    parser.add_argument("--seconds", type=float, default=2, help="of timing for each shape (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows, as `python -m benchmarks` keeps them"
    )
    parser.add_argument("--plot", type=Path, nargs="?", const=Path("bench.png"), metavar="FILE", help="PNG, SVG or PDF")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    if options.op is None:
        print(listing())
        return 0
    if options.op != "peers" and options.op not in TIMED:
        parse.error(f"OP: expected peers or one of {', '.join(TIMED)}, got {options.op!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parse.error("--device cuda: torch finds no GPU here")
    if not 0 < options.seconds < math.inf:
        parse.error(f"--seconds: expected a number above 0, got {options.seconds}")
    if options.op == "peers" and (given := [name for name in ALONE if getattr(options, name) is not None]):
        parse.error(f"--{', --'.join(given)}: peers has its own sizes, in both directions, against every package")
    if options.plot is not None:
        try:
            from . import figures, plot_style
        except ImportError as error:
            parse.error(f"--plot needs matplotlib, which cannot be imported ({error}): pip install matplotlib")
        if options.plot.suffix not in (".png", ".svg", ".pdf"):
            parse.error(f"--plot: expected a name that ends in .png, .svg or .pdf, got {str(options.plot)!r}")
    for argument in FILES:
        try:
            check_writable(getattr(options, argument))
        except OSError as error:
            parse.error(unwritten(argument, options, error))
    try:
        if options.op == "peers":
            rows = peers.rows(options.dtype, options.device, options.seconds)
        else:
            rows = sweep(options)
    except ValueError as error:
        parse.error(str(error))
    timed = [row for row in rows if "failed" not in row]

    def plot(path: Path) -> None:
        with plot_style.style("light"):
            plot_style.save(figures.of_rows(timed, "light"), path, "white")

    writers: dict[str, Callable[[Path], None]] = {"json": partial(keep, rows)} | ({"plot": plot} if timed else {})
    lost = []
    for argument, write in writers.items():
        if (path := getattr(options, argument)) is None:
            continue
        try:
            write(path)
            print(f"{argument}: {path}")
        except OSError as error:  # the disk is full, say: that costs no other file
            lost.append(unwritten(argument, options, error))
    if lost:
        parse.error("; ".join(lost))
    return int(len(timed) < len(rows))


def check_writable(path: Path | None) -> None:
    """OSError where a file cannot be written there; leaves all as it is."""
    if path is not None:
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            path.open("ab").close()


def unwritten(argument: str, options: argparse.Namespace, error: OSError) -> str:
    return f"--{argument}: cannot write {getattr(options, argument)}: {error.strerror}"


def keep(rows: Rows, path: Path) -> None:
    """Whole, or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(rows, indent=1) + "\n")
    beside.replace(path)


def sweep(options: argparse.Namespace) -> Rows:
    """The row of each shape, printed as it comes. ValueError says which argument is wrong."""
    backward = options.direction == direction(True)
    if backward and not differentiable(options.op):
        raise ValueError(f"--direction {options.direction}: {options.op} has no derivative")
    given = [shapes.parsed(options.op, text) for text in options.shape or [""]]
    clock, rows = Clock(options.device == "cuda"), Rows()
    patience = math.inf if clock.gpu or options.baselines else PATIENCE
    for sizes in given:
        row = {"op": operator(options.op), "shape": shapes.label(options.op, sizes), "dtype": options.dtype}
        row |= {"direction": direction(backward), **clock.facts()}
        left_out: list[str] = []
        try:
            with naming(f"--shape {row['shape']}"):  # what sizes may be together, builders and operators say
                problem = made(partial(TIMED[options.op].build, **sizes), options.dtype, backward, options.device)
            problem, left_out = chosen(problem, options.baselines, clock.gpu)
            with naming(f"--shape {row['shape']}"):
                row |= measured(problem, backward, clock, options.seconds, patience=patience)
        except RuntimeError as error:  # too little memory, say: the other shapes may do
            row |= {"failed": why(error)}
        rows.append(row)
        print(table.of(row, left_out), flush=True)
    return rows


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """ValueErrors begin with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def chosen(problem: Problem, names: str | None, gpu: bool) -> tuple[Problem, list[str]]:
    """With these baselines alone, and the names of those that nobody asked for."""
    there = [*problem.baselines, *problem.others]
    if names == "all":
        return problem, []
    if names is None:
        wanted = [name for name in there if gpu or name not in COMPILED]
    else:
        asked = [name.strip().lower() for name in names.split(",")]
        wanted = [name for name in there if name.lower() in asked]
        if unknown := set(asked) - {name.lower() for name in there}:
            raise ValueError(f"--baselines: expected all or some of {', '.join(there)}, got {', '.join(unknown)}")
    return problem.only(wanted), [name for name in there if name not in wanted] if names is None else []


if __name__ == "__main__":
    machine.keep_freed_pages()
    sys.exit(main())
