"""`cogview demo`."""

from dataclasses import dataclass
from pathlib import Path

from cogview.commands.console import console


@dataclass(frozen=True)
class Demo:
    """Train a small CogView on composed scenes and look at what it draws for captions it never saw."""

    out: Path = Path("runs/demo")
    """Folder for everything; a stopped demo goes on in it."""
    minutes: float = 15
    """Of the whole, four of installation included. Where the machine is slower than planned, training may take three
    times as long. A longer demo in the same folder goes on from a shorter one."""

    def run(self) -> None:
        from cogview.demo import demo

        verdict = demo.run(self.out, self.minutes, console)
        console.print(verdict)
        console.print(f"Look at {self.out / 'samples.png'} and read {self.out / 'report.md'}")
