"""The command line of CogView: a command each step; `cogview COMMAND --help` says more.

Threads that wait do not spin for long here, unless the environment says otherwise. GNU OpenMP lets them for a
millisecond or so, which on two cores beside another process is time that the thread they wait for does not get:
training fell to a fifth, with this to six tenths (benchmarks/waiting.py). It reads this once, when torch is imported.
"""

import io
import os
import sys

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a choice of the user's
SPINS = 2000  # what lies between two operators of a model; the default is 300,000


def main(arguments: list[str] | None = None) -> None:
    _prepare()
    from cogview.commands import run

    run(arguments, description=__doc__.partition("\n")[0])


def cogview2(arguments: list[str] | None = None) -> None:
    _prepare()
    from cogview.commands import run_cogview2

    run_cogview2(arguments)


def _prepare() -> None:
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
