"""``merganser evaluate``: models × data sets, as one table."""

from __future__ import annotations

from typing import Any

import click

from merganser.cli.common import parse_options, quiet_libraries
from merganser.cli.data_options import columns_of, data_options


@click.command("evaluate")
@click.argument("models", nargs=-1, required=True, metavar="MODEL…")
@click.option("--data", multiple=True, required=True, metavar="FILE|DATASET", help="May be given several times.")
@data_options
@click.option("--ensemble", is_flag=True, help="Add the mean of the models' logits as one more model.")
@click.option("--metric", help="Metric to show instead of the task's key metric.")
@click.option("--task-option", "pairs", multiple=True, metavar="KEY=VALUE", help="Such as threshold=0.3.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Examples in a batch.")
@click.option("--bootstrap", type=click.IntRange(0), default=200, show_default=True, help="Bootstrap samples.")
@click.option("--device", help="cpu or cuda.  [default: a GPU where there is one]")
@click.option("--json", "as_json", is_flag=True, help="All metrics, in full, as JSON.")
def evaluate_command(
    models: tuple[str, ...], data: tuple[str, ...], pairs: tuple[str, ...], as_json: bool, **values: Any
) -> None:
    """Score models on data sets.

    \b
    merganser evaluate merged model-a model-b --data a.jsonl --data b.jsonl --ensemble
    merganser evaluate merged::heads/model-b --data b.jsonl
    merganser evaluate merged encoder-a --data stsb.csv --task sts
    merganser evaluate merged encoder-a --data pairs.jsonl --task retrieval
    """
    quiet_libraries()
    from merganser.evaluation import evaluate

    columns = columns_of(values)
    result = evaluate(models, data, columns=columns, task_options=parse_options(pairs), **values)
    click.echo(result.to_json() if as_json else result.table())
