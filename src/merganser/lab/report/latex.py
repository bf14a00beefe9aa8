r"""A report's tables as LaTeX with booktabs, to be read by ``\input`` into a paper.

merganser report RESULTS -o tables.tex
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from merganser.lab.report.sections import Section, anchor
from merganser.lab.report.tables import Table, TableCell

#: A table with more lines than this may break across pages: it is a longtable, which does not float.
MOST_LINES = 40
#: What a table stands in: one that is wider than the page is scaled down to it, others keep their size.
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"

_ESCAPES = {
    **{character: f"\\{character}" for character in "_%&#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\symbol{34}",  # a shorthand in some languages of babel
    "`": r"\textasciigrave{}",
    # At the beginning of a line these two would be arguments of the \\ before them.
    "[": "{[}",
    "*": "{*}",
    "]": "{]}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "λ": r"$\lambda$",
    "…": r"\ldots{}",
    "–": "--",
    "—": "---",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "\N{NO-BREAK SPACE}": "~",
}
#: Two of these in a row would become one.
_JOINING = "-–—'‘’“”,"
_SPECIAL = re.compile(rf"[{_JOINING}](?=[{_JOINING}])|[{re.escape(''.join(_ESCAPES))}]|\s+")


def escape(text: str) -> str:
    """Text as LaTeX prints it, character by character: nothing in it is a command, or joins with its neighbour."""

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        if found.isspace() and found not in _ESCAPES:
            return " "
        joins = found in _JOINING and match.end() < len(text) and text[match.end()] in _JOINING
        return _ESCAPES.get(found, found) + ("{}" if joins else "")

    return _SPECIAL.sub(escaped, text)


def render_latex(sections: Sequence[Section]) -> str:
    """All tables: best merge bold, second best underlined. What is to be said beside them is in comments."""
    tables = [table for section in sections for block in section.blocks for table in block.tables]
    packages = ["booktabs", "graphicx", *(["longtable"] if any(map(_is_long, tables)) else [])]
    parts = [_comment("Needs " + " ".join(rf"\usepackage{{{name}}}" for name in packages))]
    for section in sections:
        notices = (section.title, *section.notices, " ".join(section.how[:-1]))
        parts.append("\n".join(map(_comment, notices)))
        for number, block in enumerate(section.blocks, 1):
            parts.append("\n".join(map(_comment, (block.title, *block.notices, *block.orders))))
            for table in block.tables:
                about = f"{table.title} ({section.title}; {block.title}). {table.caption}"
                label = f"tab:{anchor(section.title)}-{number}-{table.key}"
                named = rf"\caption{{{escape(about)}}}\label{{{label}}}"
                parts.append("\n".join((_long if _is_long(table) else _floating)(table, named)))
    return "\n\n".join(parts) + "\n"


def _comment(text: str) -> str:
    return "\n".join(f"% {line}" for line in textwrap.wrap(text, 108, break_long_words=False))


def _is_long(table: Table) -> bool:
    return len(table.lines) > MOST_LINES


def _floating(table: Table, caption: str) -> list[str]:
    opened = [r"\begin{table}", r"\centering", r"\small", caption, _FITTED, rf"\begin{{tabular}}{_columns(table)}"]
    closed = [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    return [*opened, *_head(table), *_lines(table), *closed]


def _long(table: Table, caption: str) -> list[str]:
    first = [r"{\small", rf"\begin{{longtable}}{_columns(table)}", rf"{caption} \\", *_head(table), r"\endfirsthead"]
    further = [*_head(table), r"\endhead"]
    return [*first, *further, *_lines(table), r"\bottomrule", r"\end{longtable}}"]


def _columns(table: Table) -> str:
    sides = ["r" if table.is_numeric(index) else "l" for index in range(len(table.columns))]
    return "{l" + "".join(sides) + "}"


def _head(table: Table) -> list[str]:
    return [r"\toprule", *_spans(table), _row([table.corner, *table.columns]), r"\midrule"]


def _spans(table: Table) -> Iterator[str]:
    """The line above the columns' names, and the rules below its parts."""
    if not table.spans:
        return
    cells, rules, first = [""], [], 2
    for title, count in table.spans:
        cells.append(rf"\multicolumn{{{count}}}{{c}}{{{escape(title)}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
        first += count
    yield f"{' & '.join(cells)} \\\\"
    yield " ".join(rules)


def _row(texts: Sequence[str]) -> str:
    return f"{' & '.join(map(escape, texts))} \\\\"


def _lines(table: Table) -> Iterator[str]:
    group = ""
    for number, line in enumerate(table.lines):
        if line.group and line.group != group:
            if number:
                yield r"\midrule"
            yield rf"\multicolumn{{{len(table.columns) + 1}}}{{l}}{{\emph{{{escape(line.group)}}}}} \\"
            group = line.group
        title = rf"\textbf{{{escape(line.title)}}}" if line.total else escape(line.title)
        yield f"{' & '.join([title, *map(_cell, line.cells)])} \\\\"


def _cell(cell: TableCell) -> str:
    shown = escape(cell.shown)
    shown = {"best": rf"\textbf{{{shown}}}", "second": rf"\underline{{{shown}}}"}.get(cell.mark, shown)
    small = [cell.deviation, f"(n = {cell.n})" if cell.counted else ""]
    more = "".join(rf" {{\scriptsize {escape(text)}}}" for text in small if text)
    return shown + (rf"\textsuperscript{{{cell.stars}}}" if cell.stars else "") + more
