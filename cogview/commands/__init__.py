"""The commands of the command line: a dataclass each, its fields the options, `run` what it does."""

import sys
from typing import Annotated, Any

import tyro

from cogview.commands import cogview2
from cogview.commands.attention import Attention
from cogview.commands.caption import Caption, Rerank
from cogview.commands.compare import Compare
from cogview.commands.data import Build, Data
from cogview.commands.demo import Demo
from cogview.commands.evaluate import Evaluate
from cogview.commands.export import Export
from cogview.commands.features import TrainFeatures
from cogview.commands.generate import Generate
from cogview.commands.human import Human
from cogview.commands.info import Info
from cogview.commands.magnify import Magnify
from cogview.commands.page import Page
from cogview.commands.plan import Plan
from cogview.commands.study import Study
from cogview.commands.style import Style
from cogview.commands.tokenize import Tokenize
from cogview.commands.train import Train
from cogview.commands.weights import ExportWeights, ImportWeights
from cogview.train.interrupts import Interrupted

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[TrainFeatures, tyro.conf.subcommand("train-features")]
    | Annotated[Style, tyro.conf.subcommand("style")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
    | Annotated[Rerank, tyro.conf.subcommand("rerank")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Magnify, tyro.conf.subcommand("magnify")]
    | Annotated[Human, tyro.conf.subcommand("human")]
    | Annotated[Attention, tyro.conf.subcommand("attention")]
    | Annotated[Page, tyro.conf.subcommand("page")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[ImportWeights, tyro.conf.subcommand("import-weights")]
    | Annotated[ExportWeights, tyro.conf.subcommand("export-weights")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


CogView2 = (
    Annotated[cogview2.Generate, tyro.conf.subcommand("generate")]
    | Annotated[cogview2.Edit, tyro.conf.subcommand("edit")]
)


def run(arguments: list[str] | None, description: str) -> None:
    flat = tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes
    how: Any = {"prog": "cogview", "description": description, "args": arguments, "config": flat}
    _run(tyro.cli(Command, **how))  # type: ignore[arg-type]


def run_cogview2(arguments: list[str] | None) -> None:
    """Options of a stage have its name before them."""
    how: Any = {"prog": "cogview2", "args": arguments, "config": (tyro.conf.OmitSubcommandPrefixes,)}
    _run(tyro.cli(CogView2, description="Draw and edit pictures with a run's CogView2.", **how))  # type: ignore[arg-type]


def _run(command: Any) -> None:
    try:
        command.run()
    except (KeyboardInterrupt, Interrupted):
        inner = getattr(command, "command", command)
        kinds = (Demo, Build, Tokenize, Train, TrainFeatures, Style, Evaluate)
        resumable = isinstance(command, Study) or isinstance(inner, kinds)
        sys.exit(f"cogview: stopped{'; the same command goes on from here' if resumable else ''}")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"cogview: {error}")
