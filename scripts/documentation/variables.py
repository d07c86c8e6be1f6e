"""The table of environment variables, from cogview_ops/_environment.py."""

from cogview_ops._environment import VARIABLES


def table() -> str:
    parts = []
    for when, variables in VARIABLES.items():
        rows = [f"| `{v.name}` | {v.values} | {v.what} |" for v in variables]
        parts.append("\n".join([f"## {when}", "", "| variable | values | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)
