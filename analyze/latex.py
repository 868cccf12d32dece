r"""Text as LaTeX that plain `pdflatex` reads: escaped, in the notation of the project.

    escape   running text; letters with accents and the symbols of the formulas are kept
    code     a name, in a typewriter face, that may break after a slash
    math     a formula, such as ⟨g_t, e_t⟩ / ‖e_t‖², between dollars
    decimal  three significant digits

What has no LaTeX of its own becomes its code point, [U+4E2D]: nothing is lost silently.
"""

from __future__ import annotations

import math as arithmetic
import re
import unicodedata
from collections.abc import Mapping

_SPECIAL: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # By number: babel makes a shorthand of one, and in text they are curled.
    '"': r"{\char34}",
    "`": r"{\char96}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "\u00a0": "~",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
}
# Symbols of formulas; a command is followed by a space where a letter could follow.
_MATH: Mapping[str, str] = {
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "‖": r"\|",
    "−": "-",
    "·": r"\cdot ",
    "×": r"\times ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "√": r"\surd ",
    "Σ": r"\textstyle\sum ",
    "→": r"\to ",
    "°": r"^\circ ",
    "⁰": "^0",
    "¹": "^1",
    "²": "^2",
    "³": "^3",
    "⁺": "^+",
    "⁻": "^-",
    "₀": "_0",
    "ᵢ": "_i",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "ε": r"\varepsilon ",
    "η": r"\eta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "ρ": r"\rho ",
    "σ": r"\sigma ",
    "τ": r"\tau ",
    "φ": r"\varphi ",
    "ω": r"\omega ",
    "Δ": r"\Delta ",
    "Ω": r"\Omega ",
    "%": r"\%",
}
_ACCENTS: Mapping[str, str] = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}
# Symbols of the notation as they stand in sentences: w_0, w_T, w*, ‖w_0‖, e_t, a_t, γ⁰.
_NOTATION = re.compile(
    r"‖?\b[weguma]_(?:\{[^{}]*\}|[stNT0])(?!\w|/|\.\w)‖?|\bw\*|⟨[^⟩]*⟩|[γηλ][⁰*]?"
)


def escape(text: str) -> str:
    """Escape running text; formulas in it are set as such."""
    parts, start = [], 0
    for found in _NOTATION.finditer(text):
        parts += [_plain(text[start : found.start()]), f"${math(found.group())}$"]
        start = found.end()
    return "".join([*parts, _plain(text[start:])])


def code(text: str) -> str:
    r"""Set a name as \texttt, character by character: no formula is looked for in it."""
    return rf"\texttt{{{_plain(text).replace('/', '/' + chr(92) + 'allowbreak{}')}}}"


def math(formula: str) -> str:
    """Write a formula of the project's notation in LaTeX, without the dollars around it."""
    # w* and η* carry their star as an index.
    formula = re.sub(r"(?<=[wη])\*", "^*", formula)
    formula = re.sub("[A-Z]{2,}", lambda word: rf"\mathrm{{{word[0]}}}", formula)
    written = "".join(_MATH.get(letter, _in_math(letter)) for letter in formula)
    return re.sub(r" +(?=[ ^_]|$)", "", written)


def decimal(value: float, digits: int = 3) -> str:
    """Write a number, without the dollars around it; ``--`` where it is not finite."""
    if not arithmetic.isfinite(value):
        return "--"
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return rf"{mantissa} \times 10^{{{int(exponent)}}}" if exponent else mantissa


def _in_math(letter: str) -> str:
    return letter if letter.isascii() else rf"\mathrm{{[U+{ord(letter):04X}]}}"


def _plain(text: str) -> str:
    return "".join(map(_letter, unicodedata.normalize("NFC", text)))


def _letter(letter: str) -> str:
    if letter in _SPECIAL:
        return _SPECIAL[letter]
    if " " <= letter <= "~":
        return letter
    if letter in _MATH:
        return f"${_MATH[letter].strip()}$"
    base, marks = (whole := unicodedata.normalize("NFD", letter))[0], whole[1:]
    if base.isascii() and base.isalpha() and marks and all(mark in _ACCENTS for mark in marks):
        for mark in marks:
            base = rf"\{_ACCENTS[mark]}{{{base}}}"
        return f"{{{base}}}"
    return " " if letter in "\t\n\r" else f"[U+{ord(letter):04X}]"
