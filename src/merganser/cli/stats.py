"""``merganser stats``: arithmetic on statistics files, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merganser.cli.common import print_table, warn
from merganser.errors import ErrorCollector, StatisticsError
from merganser.files import human_bytes, space_error

if TYPE_CHECKING:
    from torch import Tensor

    from merganser.files import Output
    from merganser.statistics import Statistics, StatisticsHeader

_FILE = click.Path(path_type=Path)
_OUTPUT = click.option("-o", "--output", type=_FILE, required=True, help="The file to write.")
_OVERWRITE = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an existing statistics file, which may be an input: it stays until the new one is whole.",
)
_STORAGE = "float32, bfloat16 or lowrank:R (a diagonal and R eigenpairs of each Gram matrix)."
#: Bytes for each entry of the widest (d, d) Gram matrix that are in memory at the worst moment, measured.
_ADDING, _COMPARING, _COMPRESSING = 20, 32, 34


@click.group("stats")
def stats_command() -> None:
    """Add, weight, compress and compare statistics files.

    Each is read and written tensor by tensor, so that files larger than memory are no obstacle, and the result
    appears whole or not at all. A FILE may be the folder that holds merge_statistics.safetensors.
    """


@stats_command.command("add")
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE…")
@_OUTPUT
@_OVERWRITE
@click.option("--storage", help=f"Of the sum: {_STORAGE}  [default: float32]")
def add_command(files: tuple[Path, ...], output: Path, overwrite: bool, storage: str | None) -> None:
    """Statistics of several data sets, of one checkpoint, as if they had been collected together.

    \b
    merganser stats add monday.safetensors tuesday.safetensors -o both.safetensors
    """
    from merganser.statistics import Statistics
    from merganser.statistics.algebra import add
    from merganser.statistics.storage import compress, parse_storage

    wanted = None if storage is None else parse_storage(storage)
    parts, place = _open(files, output, overwrite)
    _check_memory(parts, _ADDING if wanted is None else _COMPRESSING)
    errors = ErrorCollector()
    for part in parts:  # a sum does not show whose matrix was none
        errors.catch(part.validate)
    errors.raise_all()
    header, tensors = add(parts)
    if wanted is not None:
        header, tensors = compress(Statistics.in_memory(header, tensors), wanted)
    _write(place, header, tensors)


@stats_command.command("scale")
@click.argument("file", type=_FILE, metavar="FILE")
@click.argument("factor", type=float)
@_OUTPUT
@_OVERWRITE
def scale_command(file: Path, factor: float, output: Path, overwrite: bool) -> None:
    """Multiply the weight of FILE as evidence by FACTOR: what it counts for when it is added to other statistics.

    \b
    merganser stats scale last-year.safetensors 0.5 -o old.safetensors
    merganser stats add old.safetensors this-year.safetensors -o all.safetensors

    Gram matrices, means and Fisher information are averages and stay as they are; the numbers of rows, tokens and
    Fisher examples that they are weighted by change, in whole numbers. By 2, it counts as if it were added twice.
    This is not the weight of a contributor in a merge, which no row count enters: that is 'merge --weights'.
    """
    from merganser.statistics.algebra import scale

    (statistics,), place = _open((file,), output, overwrite)
    _write(place, *scale(statistics, factor))


@stats_command.command("compress")
@click.argument("file", type=_FILE, metavar="FILE")
@click.option("--storage", required=True, help=_STORAGE)
@_OUTPUT
@_OVERWRITE
def compress_command(file: Path, storage: str, output: Path, overwrite: bool) -> None:
    """Store FILE in fewer bytes.

    \b
    merganser stats compress model/merge_statistics.safetensors --storage bfloat16 -o small.safetensors

    Diagonals stay exact and every Gram matrix positive semi-definite. docs/statistics.md has a table of what each
    storage costs a merge; float32 makes a compressed file readable by older versions, without what it has lost.
    """
    from merganser.statistics.storage import compress, parse_storage

    wanted = parse_storage(storage)
    (statistics,), place = _open((file,), output, overwrite)
    _check_memory([statistics], _COMPRESSING)
    before = sum(info.nbytes for info in statistics.tensors.values())
    header, tensors = compress(statistics, wanted)
    _write(place, header, tensors, before)


@stats_command.command("diff")
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def diff_command(a: Path, b: Path, as_json: bool) -> None:
    """Compare two statistics files: their headers, and ‖A − B‖/‖A‖ of each layer's Gram matrix and mean, each
    embedding's shares of tokens and each parameter's Fisher information."""
    from merganser.statistics import Statistics
    from merganser.statistics.comparison import distances, header_differences

    left, right = Statistics.open(a), Statistics.open(b)
    _check_memory([left, right], _COMPARING)
    headers = header_differences(left, right)
    found = list(distances(left, right))
    same = left.header.manifest_hash == right.header.manifest_hash
    if as_json:
        items = [{**vars(d), "relative": d.relative if math.isfinite(d.relative or 0) else None} for d in found]
        value = {"same_weights": same, "header": headers, "distances": items}
        click.echo(json.dumps(value, indent=1))
        return
    click.echo(f"weights: {'the same' if same else 'different'}")
    if headers:
        print_table("headers", ["field", "A", "B"], [[key, *values] for key, values in headers.items()])
    else:
        click.echo("headers: the same")
    rows = [[d.kind, d.name, _shown(d.relative, d.only)] for d in found]
    print_table("relative distances", ["statistic", "of", "distance"], rows)


def _shown(relative: float | None, only: str) -> str:
    if relative is None:
        return "other shape" if only == "both" else f"only in {only}"
    return "0" if relative == 0 else f"{relative:.2e}"


def _open(files: tuple[Path, ...], output: Path, overwrite: bool) -> tuple[list[Statistics], Output]:
    """The inputs and the output, and every mistake in them at once.

    An input may be replaced: the new file is whole by then, and the user has said so.
    """
    from merganser.statistics import Statistics
    from merganser.statistics.writing import statistics_output

    errors = ErrorCollector()
    found = [errors.catch(Statistics.open, file) for file in files]
    place = statistics_output(output, files, overwrite=overwrite, allowed=files)
    problems = place.problems()
    if not problems and not output.parent.is_dir():
        what = "the output is in no folder that exists"
        problems = [StatisticsError(what, where=output, mend="make the folder, or choose another with -o")]
    errors.add(*problems)
    errors.raise_all()
    return [one for one in found if one is not None], place


def _check_memory(files: Sequence[Statistics], bytes_an_entry: int) -> None:
    """Say before any work that the widest Gram matrix, which a low-rank file does not show, is too large."""
    from merganser.merging.memory import available_bytes

    widest = max((one.width(input) for one in files for input in one.inputs), default=0)
    needed, available = bytes_an_entry * widest**2, available_bytes()
    if needed > available:
        raise StatisticsError(
            f"the Gram matrix of {widest} inputs takes {human_bytes(needed)} of memory to work on, "
            f"{human_bytes(available)} are available",
            where=next(one.path for one in files if any(one.width(input) == widest for input in one.inputs)),
            mend="use a machine with more memory",
        )


def _write(output: Output, header: StatisticsHeader, tensors: Mapping[str, Tensor], before: int | None = None) -> None:
    """Write the result, if there is room for it, and say how large it is."""
    from merganser.statistics import write_statistics
    from merganser.statistics.writing import infos_of

    size = sum(info.nbytes for info in infos_of(tensors).values())
    if problem := space_error(output.path, size, mend="make room, or choose another disk with -o"):
        raise problem
    write_statistics(output.path, header, tensors, output=output)
    for note in header.notes:
        if note.startswith("storage:"):
            warn(note)
    of = "" if before is None else f" instead of {human_bytes(before)} ({before / size:.1f} times smaller)"
    warn(f"{human_bytes(size)} written{of}")
    click.echo(str(output.path))
