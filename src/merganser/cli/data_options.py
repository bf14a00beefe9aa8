"""Options about data, the same for every command that reads some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--task", default="auto", show_default=True, help="text-classification, multi-label, sts, … or auto."),
    click.option("--split", help="Split of data that have several."),
    click.option("--limit", type=click.IntRange(1), help="Use at most this many rows."),
    click.option(
        "--max-length",
        type=click.IntRange(1),
        help="Tokens at which a text is cut.  [default: collect: the model's own, at most 512; else 128]",
    ),
    click.option("--text-column", help="Column of the text; usual names are found."),
    click.option("--text-pair-column", help="Column of the second text of a pair."),
    click.option("--label-column", help="Column of the label."),
    click.option("--tokens-column", help="Column of the words, for token classification."),
    click.option("--target-column", help="Column of the target text, for generation."),
    click.option("--image-column", help="Column of the image, or of its path beside the data file."),
    click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only)."),
]


def data_options(command: F) -> F:
    """Add the options to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def columns_of(values: dict[str, Any]) -> dict[str, str | None]:
    """Take the column options out of a command's keyword arguments."""
    names = [name for name in values if name.endswith("_column")]
    return {name.removesuffix("_column"): values.pop(name) for name in names}
