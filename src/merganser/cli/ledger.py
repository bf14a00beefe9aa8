"""``merganser ledger``: contributors join and leave a merge one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import parse_options, print_table, quiet_libraries, tell, warn
from merganser.files import human_bytes

if TYPE_CHECKING:
    from merganser.merging.ledger import LedgerRecord

_DIGITS = 12  # of a hash, where people read it
_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that opens models."""
    for option in (
        click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only)."),
        click.option("--threads", type=click.IntRange(1), help="Parts worked on at once.  [default: all cores]"),
        click.option("--max-memory", metavar="SIZE", help="What the process may take, such as 2GB."),
        click.option("--base", metavar="MODEL", help="Where the base model is, if not where it was."),
    ):
        command = option(command)
    return command


@click.group("ledger")
def ledger_command() -> None:
    """Keep the sums of a merge: contributors join and leave one at a time.

    \b
    merganser ledger init sums --base org/base
    merganser ledger add sums my-model-a
    merganser ledger add sums my-model-b --coefficient 2
    merganser ledger remove sums my-model-a
    merganser ledger solve sums -o merged

    Nothing but the base model and the sums is needed to go on. Sums of Gram matrices can leak as these do.
    """


@ledger_command.command("init")
@_FOLDER
@click.option("--base", required=True, metavar="MODEL", help="The pre-trained model that all start from.")
@click.option("--method", metavar="NAME", help="A wrong name lists them.  [default: by Gram matrices]")
@click.option("--alpha", type=float, help="Multiplier of the Gram matrices' off-diagonals.")
@click.option("--ridge", type=float, help="Pull toward the weighted average; solve can choose another.")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any other option of the method.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Tensors to average instead.")
@click.option("--keep-separate", multiple=True, metavar="PATTERN", help="Tensors that are no part of it (heads).")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only).")
def init_command(
    folder: Path, base: str, alpha: float | None, ridge: float | None, pairs: tuple[str, ...], **keys: Any
) -> None:
    """Start a ledger, for fine-tunes of one base model."""
    quiet_libraries()
    from merganser.merging import ledger

    given = {"alpha": alpha, "ridge": ridge, **parse_options(pairs)}
    options = {key: value for key, value in given.items() if value is not None}
    click.echo(str(ledger.init(folder, base, options=options, **keys)))


@ledger_command.command("add")
@_FOLDER
@click.argument("model")
@click.option("--coefficient", type=float, default=1.0, show_default=True, help="Its weight in the merge.")
@click.option("--statistics", metavar="FILE", help="Its statistics, if not in its folder.")
@click.option("--accept-scales", is_flag=True, help="Add statistics 10,000 times as large as those in it, or as small.")
@_common
def add_command(folder: Path, model: str, **keys: Any) -> None:
    """Add a contributor. Needs the base model, and nothing of the other contributors."""
    quiet_libraries()
    from merganser.merging import ledger

    entry = ledger.add(folder, model, **keys)
    warn(f"{entry.name} added, coefficient {entry.coefficient:g}")
    click.echo(entry.manifest_sha256)


@ledger_command.command("remove")
@_FOLDER
@click.argument("model", metavar="MODEL|HASH")
@click.option("--statistics", metavar="FILE", help="Its statistics, if not in its folder.")
@_common
def remove_command(folder: Path, model: str, **keys: Any) -> None:
    """Remove a contributor. Needs the base model and its own weights and statistics.

    The first digits of its hash, as show lists them, are enough if it is where it was.
    """
    quiet_libraries()
    from merganser.merging import ledger

    entry = ledger.remove(folder, model, **keys)
    warn(f"{entry.name} removed")
    click.echo(entry.manifest_sha256)


@ledger_command.command("solve")
@_FOLDER
@click.option("-o", "--output", required=True, metavar="FOLDER|URL", help="Where to write the model.")
@click.option("--ridge", type=float, help="Pull toward the weighted average, in place of the ledger's.")
@click.option("--dtype", type=click.Choice(["F64", "F32", "F16", "BF16"]), help="Storage dtype of the result.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier merge has written, and nothing else.")
@_common
def solve_command(folder: Path, output: str, ridge: float | None, **keys: Any) -> None:
    """Write the merge of all contributors. Needs the base model and the ledger."""
    quiet_libraries()
    from merganser.merging import ledger

    options = {} if ridge is None else {"ridge": ridge}
    click.echo(str(ledger.solve(folder, output, options=options, **keys)))


@ledger_command.command("sum")
@click.argument("folders", nargs=-1, required=True, metavar="DIR DIR…")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Ledger to make.")
@click.option("--max-memory", metavar="SIZE", help="What the process may take, such as 2GB.")
@click.option("--threads", type=click.IntRange(1), help="Parts worked on at once.  [default: all cores]")
def sum_command(folders: tuple[str, ...], output: Path, threads: int | None, max_memory: str | None) -> None:
    """Add up ledgers of several sites into a new one. They share base and options, and no contributor."""
    from merganser.merging import ledger

    click.echo(str(ledger.combine(folders, output, threads=threads, max_memory=max_memory)))


@ledger_command.command("show")
@_FOLDER
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_command(folder: Path, as_json: bool) -> None:
    """Show what a ledger is for and who is in it."""
    from merganser.merging import ledger

    record = ledger.show(folder)
    size = (folder / record.file).stat().st_size if record.file and (folder / record.file).is_file() else 0
    if as_json:
        fields = record.model_dump(mode="json", exclude={"sums", "parts"})
        click.echo(json.dumps({**fields, "total": record.total, "tensors": record.counts, "bytes": size}, indent=1))
    else:
        _print(record, size)


def _print(record: LedgerRecord, size: int) -> None:
    options = ", ".join(f"{key}={value}" for key, value in record.options.items()) or "no options"
    rows = [
        [
            entry.name,
            f"{entry.coefficient:g}",
            str(entry.statistics.examples) if entry.statistics else "",
            entry.manifest_sha256[:_DIGITS],
            entry.statistics.label if entry.statistics else "",
        ]
        for entry in record.contributors
    ]
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    columns = ["contributor", "coefficient", "examples", "weights", "label"]
    title = f"{len(rows)} {'contributor' if len(rows) == 1 else 'contributors'} to {record.method} ({options})"
    print_table(title, columns[: len(rows[0])] if rows else columns[:-1], rows)
    tell(f"base {record.base.model}, weights {record.base.manifest_sha256[:_DIGITS]}")
    for name, patterns in (("averaged", record.exclude), ("no part of it", record.keep_separate)):
        if patterns:
            tell(f"{name}: {', '.join(patterns)}")
    if record.file:
        tensors = ", ".join(f"{count} by {kind}" for kind, count in record.counts.items())
        click.echo(f"{human_bytes(size)} of sums; tensors: {tensors}")
