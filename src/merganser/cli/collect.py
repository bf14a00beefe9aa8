"""``merganser collect``: statistics of a model, next to its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from merganser.cli.common import human_bytes, quiet_libraries, warn
from merganser.cli.data_options import columns_of, data_options


@click.command("collect")
@click.argument("model")
@click.option(
    "--data", required=True, metavar="FILE|DATASET", help="JSONL, CSV, TSV, Parquet or a dataset name."
)
@data_options
@click.option(
    "--fisher",
    type=click.Choice(["expected", "empirical", "predicted"]),
    is_flag=False,
    flag_value="expected",
    help="Also per-example diagonal Fisher information; over the model's own labels unless said otherwise.",
)
@click.option("--fisher-examples", type=click.IntRange(1), help="Fisher information from so many examples.")
@click.option("--no-grams", is_flag=True, help="Fisher information alone.")
@click.option("--ignore-labels", is_flag=True, help="Do not check the labels; Gram matrices need none.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples in a batch."
)
@click.option("--label", default="", help="Free text about the data, published in the file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: in the model's folder]")
@click.option("--overwrite", is_flag=True, help="Replace existing statistics.")
def collect_command(model: str, data: str, no_grams: bool, ignore_labels: bool, **values: Any) -> None:
    """Compute the statistics of MODEL on its own data, to be published with it.

    \b
    merganser collect my-model --data train.jsonl
    merganser collect my-model --data train.csv --text-column body --fisher

    The file holds Gram matrices of layer inputs, token counts and, if asked for, Fisher information: no text and no
    labels. It is computed from them all the same and can leak some of it: read docs/statistics.md before publishing.
    """
    quiet_libraries()
    from merganser.statistics import Statistics
    from merganser.tasks.collect import collect

    columns = columns_of(values)
    written = collect(
        model, data, columns=columns, grams=not no_grams, use_labels=not ignore_labels, **values
    )
    header = Statistics.open(written).header
    for note in header.notes:
        warn(note)
    warn(
        f"{human_bytes(written.stat().st_size)} written from {header.examples} examples, {header.tokens} tokens; "
        "computed from your data, so publish it only if you would publish summaries of them"
    )
    click.echo(str(written))
