"""A report as Markdown, as long-format CSV, and on a terminal."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from merganser.lab.report.sections import Section
from merganser.lab.report.tables import Table, TableCell
from merganser.text import markdown, printable

#: Columns of the CSV: where a number stands, and what it is.
_PLACE = ("experiment", "model", "heads", "layout", "table", "group", "row", "column")
_NUMBER = ("mean", "std", "units", "seeds", "partial", "mark", "text", "cells")
CSV_COLUMNS = (*_PLACE, *_NUMBER)


def render_markdown(sections: Sequence[Section]) -> str:
    """All tables as GitHub Markdown: best merge bold, second best in italics."""
    parts = []
    for section in sections:
        parts.append(f"# {section.title}")
        parts.append("\n".join(f"- **{name}**: {markdown(value)}" for name, value in section.facts))
        parts.extend(f"> {markdown(notice)}" for notice in section.notices)
        parts.append("In Markdown the second best is in italics. " + " ".join(map(markdown, section.how[:-1])))
        for block in section.blocks:
            parts.append(f"## {markdown(block.title)}")
            parts.extend(f"> {markdown(notice)}" for notice in block.notices)
            parts.extend(f"Order: {markdown(order)}" for order in block.orders)
            for table in block.tables:
                parts.append(f"### {markdown(table.title)}")
                parts.append(markdown_table(table))
                if table.caption:
                    parts.append(markdown(table.caption))
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table as GitHub Markdown."""
    grouped = any(line.group for line in table.lines)
    rules = ["---:" if table.is_numeric(index) else "---" for index in range(len(table.columns))]
    rows = [["", table.corner, *table.columns], ["---", "---", *rules]]
    for line in table.lines:
        title = f"**{markdown(line.title)}**" if line.total else markdown(line.title)
        rows.append([markdown(line.group), title, *map(_md_cell, line.cells)])
    return "\n".join(f"| {' | '.join(row if grouped else row[1:])} |" for row in rows)


def _md_cell(cell: TableCell) -> str:
    shown = markdown(cell.shown)
    shown = {"best": f"**{shown}**", "second": f"*{shown}*"}.get(cell.mark, shown)
    more = [markdown(cell.stars), cell.deviation and f" {cell.deviation}", f" (n={cell.n})" if cell.counted else ""]
    return shown + "".join(filter(None, more))


def render_csv(sections: Sequence[Section]) -> str:
    """All tables, a line a number: means and deviations in points, unrounded, with the ids of their cells."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section in sections:
        for block in section.blocks:
            place = (section.title, block.grid.model, block.grid.heads, block.grid.layout)
            writer.writerows(place + row for table in block.tables for row in _csv_rows(table))
    return stream.getvalue()


def _csv_rows(table: Table) -> Iterator[tuple[object, ...]]:
    for line in table.lines:
        for column, cell in zip(table.columns, line.cells, strict=True):
            if cell.value is not None or cell.text is not None:
                place = (table.key, line.group, line.title, column)
                counts = (cell.n or "", cell.seeds or "", "yes" if cell.counted else "")
                yield (*place, cell.value, cell.std, *counts, cell.mark, cell.text, " ".join(cell.cells))


def terminal_tables(sections: Sequence[Section]) -> Iterator[RichTable | str]:
    """The main tables and what is missing, for a terminal."""
    for section in sections:
        yield f"[bold]{_plain(section.title)}[/bold]"
        for block in section.blocks:
            yield from (f"[yellow]{_plain(notice)}[/yellow]" for notice in block.notices)
            for table in block.tables:
                if table.main:
                    yield f"[dim]{_plain(block.title)}:[/dim] {_plain(table.title)}"
                    yield rich_table(table)


def rich_table(table: Table) -> RichTable:
    """A table for a terminal."""
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column(_plain(table.corner), no_wrap=True)
    for index, column in enumerate(table.columns):
        heading = textwrap.fill(column, 12, break_long_words=False, break_on_hyphens=False)
        drawn.add_column(_plain(heading), justify="right" if table.is_numeric(index) else "left", no_wrap=True)
    for _, lines in groupby(table.lines, key=lambda line: line.group):
        for line in lines:
            drawn.add_row(_plain(line.title), *map(_rich_cell, line.cells))
        drawn.add_section()
    return drawn


def _rich_cell(cell: TableCell) -> str:
    shown = _plain(cell.shown)
    style = {"best": "bold", "second": "underline"}.get(cell.mark)
    shown = f"[{style}]{shown}[/{style}]" if style else shown
    more = cell.stars + (f" {cell.deviation}" if cell.deviation else "")
    return shown + more + (f" n={cell.n}" if cell.counted else "")


def _plain(text: str) -> str:
    """A text that is no markup of rich's."""
    return escape(printable(text, lines=True))
