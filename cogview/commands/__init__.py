"""The commands of the command line: a dataclass each, its fields the options, `run` what it does."""

import sys
from typing import Annotated

import tyro

from cogview.commands.caption import Caption, Rerank
from cogview.commands.compare import Compare
from cogview.commands.data import Build, Data
from cogview.commands.demo import Demo
from cogview.commands.export import Export
from cogview.commands.generate import Generate
from cogview.commands.info import Info
from cogview.commands.magnify import Magnify
from cogview.commands.plan import Plan
from cogview.commands.study import Study
from cogview.commands.tokenize import Tokenize
from cogview.commands.train import Train
from cogview.commands.weights import ExportWeights, ImportWeights
from cogview.train.interrupts import Interrupted

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
    | Annotated[Rerank, tyro.conf.subcommand("rerank")]
    | Annotated[Magnify, tyro.conf.subcommand("magnify")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[ImportWeights, tyro.conf.subcommand("import-weights")]
    | Annotated[ExportWeights, tyro.conf.subcommand("export-weights")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def run(arguments: list[str] | None, description: str) -> None:
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="cogview",
        description=description,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    try:
        command.run()
    except (KeyboardInterrupt, Interrupted):
        inner = getattr(command, "command", command)
        resumable = isinstance(command, Study) or isinstance(inner, (Demo, Build, Tokenize, Train))
        sys.exit(f"cogview: stopped{'; the same command goes on from here' if resumable else ''}")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"cogview: {error}")
