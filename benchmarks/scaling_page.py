"""`python -m benchmarks.scaling_page`: writes the tables of docs/scaling.md: of plans, each below the command that
prints it, and of `benchmarks.scaling`, from its results."""

import contextlib
import io
import re
from pathlib import Path

from cogview import commands

from . import scaling

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def filled(text: str) -> str:
    """The page with what the commands of today print."""
    measured = r"(?<=<!-- measured -->\n\n)(?:.*\n)*?(?=<!-- end -->)"
    text = re.sub(measured, lambda _: scaling.tables() + "\n", text)
    return re.sub(r"(```sh\ncogview (plan .*)\n```\n\n)(?:(?!```|#).*\n)*?(<!-- end -->)", _answer, text)


def _answer(found: re.Match[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        commands.run(found[2].split(), "")
    return f"{found[1]}{printed.getvalue().rstrip()}\n\n{found[3]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
