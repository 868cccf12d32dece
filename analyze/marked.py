"""Sentences in which names and formulas are marked, and how they read as Markdown and as LaTeX."""

from __future__ import annotations

import re
import unicodedata

from analyze import latex

# Control characters, which no name has once it was cleaned.
_CODE = ("\x0e", "\x0f")
_MATH = ("\x11", "\x12")
_MARKED = re.compile(f"({_CODE[0]}.*?{_CODE[1]}|{_MATH[0]}.*?{_MATH[1]})")


def code(text: object) -> str:
    """Mark a name; control characters in it become spaces."""
    clean = "".join(" " if unicodedata.category(c) == "Cc" else c for c in str(text))
    return f"{_CODE[0]}{clean}{_CODE[1]}"


def math(formula: str) -> str:
    """Mark a formula in the project's notation."""
    return f"{_MATH[0]}{formula}{_MATH[1]}"


def markdown(text: str) -> str:
    """Write marked text as Markdown: names as code, formulas as they are."""
    return "".join(map(_in_markdown, _MARKED.split(text)))


def tex(text: str) -> str:
    """Write marked text as LaTeX."""
    return "".join(map(_in_tex, _MARKED.split(text)))


def _in_markdown(piece: str) -> str:
    if piece[:1] == _MATH[0]:
        return piece[1:-1]
    if piece[:1] != _CODE[0]:
        return piece
    # Between more backticks than the name has itself.
    longest = max(map(len, re.findall("`+", piece)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{piece[1:-1]}{space}{fence}"


def _in_tex(piece: str) -> str:
    if piece[:1] == _CODE[0]:
        return latex.code(piece[1:-1])
    return f"${latex.math(piece[1:-1])}$" if piece[:1] == _MATH[0] else latex.escape(piece)
