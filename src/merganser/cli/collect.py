"""``merganser collect``: statistics of a model, next to its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from merganser.cli.common import quiet_libraries, warn
from merganser.cli.data_options import columns_of, data_options
from merganser.files import human_bytes


def _sample(_: click.Context, __: click.Parameter, value: str | None) -> float | int | None:
    """A share such as ``0.25``, or a number of tokens such as ``20000``."""
    if value is None:
        return None
    try:
        return int(value) if value.isdecimal() and int(value) else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a share nor a number of tokens") from None


@click.command("collect")
@click.argument("model")
@click.option("--data", required=True, metavar="FILE|DATASET", help="JSONL, CSV, TSV, Parquet, TXT or a dataset name.")
@data_options
@click.option(
    "--fisher",
    type=click.Choice(["expected", "empirical", "predicted"]),
    is_flag=False,
    flag_value="expected",
    help="Also per-example diagonal Fisher information; over the model's own labels unless said otherwise.",
)
@click.option(
    "--kfac",
    type=click.Choice(["auto", "expected", "sampled", "empirical"]),
    is_flag=False,
    flag_value="auto",
    help="Also covariances of the gradients of layers' outputs (K-FAC); labels as above, drawn where they are many.",
)
@click.option("--fisher-examples", type=click.IntRange(1), help="Fisher information and K-FAC from so many examples.")
@click.option("--no-grams", is_flag=True, help="Fisher information alone.")
@click.option("--ignore-labels", is_flag=True, help="Do not read the labels; Gram matrices need none.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples in a batch.")
@click.option(
    "--until-converged",
    type=float,
    is_flag=False,
    flag_value=0.05,
    metavar="[TOL]",
    help="Stop when the Gram matrices' estimated relative error is at most TOL.  [TOL: 0.05]",
)
@click.option(
    "--sample-tokens",
    is_flag=False,
    flag_value="0.25",
    metavar="[SHARE|N]",
    callback=_sample,
    help="Wide layers keep a seeded sample of their tokens: this share, or so many.  [SHARE: 0.25]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order and the sample of these two.")
@click.option(
    "--shard-examples",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Examples summed together before they are added to the others, in float64.",
)
@click.option(
    "--storage",
    default="float32",
    show_default=True,
    metavar="float32|bfloat16|lowrank:R",
    help="Of Gram matrices; see merganser stats compress.",
)
@click.option(
    "--experts",
    type=click.Choice(["shared", "exact", "none"]),
    default="shared",
    show_default=True,
    help="Experts of a layer share the Gram matrix of their inputs, or each has its own.",
)
@click.option("--engine", type=click.Choice(["serial", "ray"]), default="serial", show_default=True)
@click.option("--ray-address", help="Of a running cluster.  [default: $RAY_ADDRESS or auto]")
@click.option("--cpus", type=float, default=1, show_default=True, help="Of each shard's job, on a cluster.")
@click.option("--device", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", show_default=True)
@click.option("--max-memory", metavar="SIZE", help="Keep at most so much of the weights in memory, such as 2GB.")
@click.option(
    "--offload-folder",
    type=click.Path(path_type=Path),
    help="For weights that cannot stay in the model's own files.  [default: a temporary folder]",
)
@click.option("--label", default="", help="Free text about the data, published in the file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: in the model's folder]")
@click.option("--overwrite", is_flag=True, help="Replace existing statistics.")
def collect_command(model: str, data: str, no_grams: bool, ignore_labels: bool, **values: Any) -> None:
    """Compute the statistics of MODEL on its own data, to be published with it.

    \b
    merganser collect my-model --data train.jsonl
    merganser collect my-model --data train.csv --text-column body --fisher
    merganser collect my-model --data train.jsonl --until-converged --sample-tokens

    The file holds Gram matrices of layer inputs, token counts and, if asked for, Fisher information and covariances of
    gradients: no text and no labels. It is computed from them all the same and can leak some of it: read
    docs/statistics.md before publishing. Large data and models: docs/collecting.md.
    """
    quiet_libraries()
    from merganser.collection import collect

    columns = columns_of(values)
    written = collect(model, data, columns=columns, grams=not no_grams, use_labels=not ignore_labels, **values)
    header = written.header
    for note in header.notes:
        warn(note)
    warn(
        f"{human_bytes(written.path.stat().st_size)} written from {header.examples} examples, {header.tokens} tokens; "
        "computed from your data, so publish it only if you would publish summaries of them"
    )
    click.echo(str(written))
