"""Where the commands print: names from outside are shown as they are, and long lines are left to the terminal."""

from rich.console import Console

console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
