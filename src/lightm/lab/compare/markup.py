"""Text tables in three forms: Markdown, LaTeX (booktabs) and CSV, with names escaped."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from lightm.lab.complexity.text import markdown

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "–": "--",
    "−": "$-$",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}


@dataclass(frozen=True)
class TextCell:
    """One cell as plain text, in bold where it is the best of its column."""

    text: str
    best: bool = False


def as_markdown(headings: Sequence[str], rows: Sequence[Sequence[TextCell]], *, left: int, below: Sequence[str]) -> str:
    """A Markdown table, its first `left` columns flush left, with the sentences of `below` as a list under it."""
    body = [tuple(f"**{escape_markdown(c.text)}**" if c.best else escape_markdown(c.text) for c in row) for row in rows]
    lines = markdown([tuple(map(escape_markdown, headings)), *body], left=left)
    return "\n".join([*lines, "", *(f"- {escape_markdown(sentence)}" for sentence in below), ""])


def as_latex(headings: Sequence[str], rows: Sequence[Sequence[TextCell]], *, left: int, below: Sequence[str]) -> str:
    """A `tabular` for \\input, its first `left` columns flush left; needs booktabs.

    The sentences of `below` become comments at its top.
    """
    columns = "l" * left + "r" * (len(headings) - left)
    lines = [f"% {' '.join(sentence.split())}" for sentence in (r"Needs \usepackage{booktabs}.", *below)]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [_latex_row([escape_latex(heading) for heading in headings]), r"\midrule"]
    for row in rows:
        lines.append(
            _latex_row([rf"\textbf{{{escape_latex(c.text)}}}" if c.best else escape_latex(c.text) for c in row])
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV with a heading; None becomes an empty field, numbers keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return text.getvalue()


def escape_latex(text: str) -> str:
    """Text on one line with every character escaped that LaTeX would act on."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def escape_markdown(text: str) -> str:
    """Text on one line that no Markdown reader takes for markup."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\`*_|[]~$" else letter for letter in escaped)


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with a bracket would be read as the optional argument of the \\ before it.
    first = "{}" + cells[0] if cells[0].startswith(("[", "*")) else cells[0]
    return " & ".join([first, *cells[1:]]) + r" \\"
