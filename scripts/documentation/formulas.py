"""Formulas in LaTeX as MathML, which browsers draw themselves: no script, no font, no other host."""

import html
import re

from latex2mathml.converter import convert

from .shared import outside_code

FORMULA = r"\$\$(?P<block>.+?)\$\$|(?<![\\\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?!\w)"


def replaced(text: str) -> str:
    """`$$...$$` and `$...$` outside of code."""

    def one(found: re.Match[str]) -> str:
        if found["block"]:
            return f'\n<div class="formula">{mathml(found["block"], "block")}</div>\n'
        # Markdown makes a block of <math> where a line begins with it
        return f'<span class="formula-inline">{mathml(found["inline"], "inline")}</span>'

    return outside_code(FORMULA, one, text)


def mathml(latex: str, display: str) -> str:
    """On one line, which Markdown leaves as it is; `*` and `_` in it are no emphasis."""
    math = convert(html.unescape(latex).strip(), display=display)
    return re.sub(r"\s*\n\s*", "", math).replace("*", "&#x2217;").replace("_", "&#95;")
