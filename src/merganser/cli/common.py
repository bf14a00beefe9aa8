"""What several commands share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from merganser.documents import parse_yaml
from merganser.text import printable, shortened

_LONGEST_WARNING = 4000  # characters


def quiet_libraries() -> None:
    """Keep transformers' banners, load reports and bars off the terminal; its errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def split_pairs(pairs: Sequence[str], option: str, shape: str) -> dict[str, str]:
    """The values of an option that is given as ``name=value``, as often as one likes."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} is not {shape}", param_hint=option)
        found[name] = value
    return found


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` flags as a dictionary; values are read as YAML, so that numbers are numbers."""
    found = {}
    for key, value in split_pairs(pairs, "--option", "KEY=VALUE").items():
        found[key.replace("-", "_")] = parse_yaml(value, f"--option {key}", mend="give a value as YAML has it")
    return found


def make_cluster(name: str, address: str | None, description: str, workers: int = 1) -> Any:
    """The engine that ``--engine`` and ``--workers`` name; None for this process.

    Args:
        name: ``serial`` or ``ray``.
        address: of the Ray cluster.
        description: what the jobs are for, shown in front of the bar.
        workers: processes of this machine that work at once.
    """
    if name == "serial" and workers == 1:
        return None
    if name == "serial":
        from merganser.engines import ProcessEngine

        return ProcessEngine(workers, description=description)
    if workers != 1:
        raise click.UsageError("--workers is of this machine: a Ray cluster knows what it has.")
    from merganser.engines import RayEngine

    return RayEngine(address, description=description)


def warn(message: str, *, lines: bool = False) -> None:
    """A line on standard error, or several; what a stranger wrote in it does not steer the terminal."""
    click.echo(f"merganser: {shortened(printable(message, lines=lines), _LONGEST_WARNING)}", err=True)


def tell(message: str) -> None:
    """A line for people on standard output, likewise."""
    click.echo(printable(message))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; numbers to the right when every cell of a column is one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)) if title else None, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        cells = [row[number].strip().split(" ")[0] for row in rows]
        numeric = bool(cells) and all(cell.replace(".", "").replace("-", "").isdigit() or not cell for cell in cells)
        table.add_column(Text(printable(column)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # as text: names may look like markup
    Console(file=sys.stdout).print(table)
