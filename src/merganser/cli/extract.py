"""``merganser extract``: a LoRA adapter of what a fine-tuned model has changed in its base."""

from __future__ import annotations

from typing import Any

import click

from merganser.cli.plans import show_or_carry_out


@click.command("extract")
@click.argument("model")
@click.option("--base", required=True, metavar="MODEL", help="The pre-trained model that it started from.")
@click.option("-o", "--output", metavar="FOLDER", help="Where to write the adapter.")
@click.option("--rank", type=int, help="Of every module's factors.")
@click.option(
    "--energy",
    type=float,
    metavar="SHARE",
    help="Each module has the least rank that keeps this share of its squared norm.  [default: 0.95]",
)
@click.option("--max-rank", type=int, help="The largest rank that --energy may ask for.  [default: 128 without both]")
@click.option(
    "--embeddings",
    type=click.Choice(["factors", "whole", "left-out"]),
    default="factors",
    show_default=True,
    help="whole: in modules_to_save.",
)
@click.option(
    "--others",
    type=click.Choice(["whole", "left-out"]),
    default="whole",
    show_default=True,
    help="Norms, biases and whatever else is no matrix.",
)
@click.option("--whole", multiple=True, metavar="PATTERN", help="Tensors to keep whole.")
@click.option("--leave-out", "left_out", multiple=True, metavar="PATTERN", help="Tensors to leave as in the base.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Change nothing but these tensors.")
@click.option("--statistics", metavar="FILE", help="Of the model, if not in its folder: errors count on its inputs.")
@click.option("--dtype", type=click.Choice(["F64", "F32", "F16", "BF16"]), help="Of the adapter.  [default: F32]")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only).")
@click.option("--threads", type=click.IntRange(1), help="Tensors worked on at once.  [default: all cores]")
@click.option("--max-memory", metavar="SIZE", help="What the process may take, such as 2GB; the result is the same.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier merge or extraction has written.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
def extract_command(
    model: str,
    base: str,
    output: str | None,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    embeddings: str,
    others: str,
    statistics: str | None,
    dtype: str | None,
    allow_pickle: bool,
    threads: int | None,
    max_memory: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **patterns: Any,
) -> None:
    """Extract a LoRA adapter from MODEL: the nearest to its difference from the base.

    \b
    merganser extract my-model --base org/base -o adapter
    merganser extract my-model --base org/base -o adapter --rank 16 --embeddings whole
    merganser extract my-model --base org/base -o adapter --energy 0.99 --max-rank 64 --only '*_proj.weight'

    Patterns are of names of tensors, with * and ?. See docs/adapters.md.
    """
    if output is None and not dry_run:
        raise click.UsageError("where to? Add -o FOLDER (or --dry-run to see the plan)")
    from merganser.merging import RunSettings
    from merganser.merging.extract import make_form, prepare_extraction

    kept: dict[str, Any] = {key: list(value) for key, value in patterns.items()}
    kept |= {"embeddings": embeddings.replace("-", " "), "others": others.replace("-", " ")}
    settings = RunSettings.make(threads, max_memory, allow_pickle=allow_pickle)
    form = make_form(rank, energy, max_rank, **kept)
    prepared = prepare_extraction(model, output, base, form, settings, statistics, dtype, overwrite=overwrite)
    if show_or_carry_out(prepared, output, overwrite=overwrite, dry_run=dry_run, as_json=as_json) is not None:
        click.echo(output)
