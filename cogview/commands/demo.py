"""`cogview demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cogview.commands.console import console
from cogview.commands.presets import option


@dataclass(frozen=True)
class Demo:
    """Train a small CogView on composed scenes and look at what it draws for captions it never saw."""

    system: Literal["cogview", "cogview2"] = "cogview"
    """cogview2: one CogLM that draws, captions and completes, and both super-resolutions."""
    out: Annotated[Path | None, option("PATH", "runs/demo, runs/demo-cogview2")] = None
    """Folder for everything; a stopped demo goes on in it."""
    minutes: Annotated[float | None, option("FLOAT", "15, of cogview2 40")] = None
    """Of the whole, of cogview four of installation included. Where the machine is slower than planned, training may
    take three times as long, or of cogview2 as long as it takes. A longer demo of cogview in the same folder goes on
    from a shorter one."""

    def run(self) -> None:
        from cogview.demo import cogview2, demo

        out = self.out or Path("runs/demo" if self.system == "cogview" else "runs/demo-cogview2")
        if self.system == "cogview":
            verdict = demo.run(out, demo.MINUTES if self.minutes is None else self.minutes, console)
        else:
            verdict = cogview2.run(out, cogview2.MINUTES if self.minutes is None else self.minutes, console)
        console.print(verdict)
        console.print(f"Look at {out / 'samples.png'} and read {out / 'report.md'}")
