"""``merganser zoo``: the trained models that there are, what they were made from, and removing them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import print_table, split_pairs, tell, warn
from merganser.errors import UserError, raise_all
from merganser.files import human_bytes
from merganser.text import shortened

if TYPE_CHECKING:
    from merganser.lab.zoo import Entry, Zoo

#: What is shown of an entry: rows of a table, and characters of a name or a value.
_MOST_ROWS, _MOST_CHARACTERS = 200, 300
_ZOO = click.option(
    "--zoo", "url", help="Folder or URL of the zoo.  [default: $MERGANSER_ZOO or ~/.cache/merganser/zoo]"
)


@click.group("zoo")
def zoo_command() -> None:
    """List, show and remove trained models.

    A model is found by what it was made from; statistics and outputs lie beside it.
    """


def _open(url: str | None) -> Zoo:
    from merganser.lab.zoo import Zoo, default_zoo

    return Zoo(url or default_zoo())


@zoo_command.command("ls")
@_ZOO
@click.option(
    "--filter",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only models whose key has this value; nested keys with dots, * for anything.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def ls_command(url: str | None, pairs: tuple[str, ...], as_json: bool) -> None:
    """List the models."""
    from merganser.lab.zoo.keys import explain, matches

    filters = split_pairs(pairs, "--filter", "KEY=VALUE")
    zoo = _open(url)
    entries, problems = zoo.scan()
    found = [entry for entry in entries if matches(entry.key, filters)]
    if filters and not found and not problems:
        raise explain([entry.key for entry in entries], filters)
    if as_json:
        click.echo(json.dumps([_fields(zoo, entry) for entry in found], indent=1))
    elif found:
        _print(zoo, found)
    elif not problems:
        warn(f"{zoo.url}: no models")
    raise_all(problems)


def _fields(zoo: Zoo, entry: Entry) -> dict[str, Any]:
    files = zoo.files(entry)
    return {
        "id": entry.id,
        "key": dict(entry.key),
        "facts": dict(entry.facts),
        "created": entry.created,
        "size": sum(files.values()),
        "statistics": _count_statistics(files),
        "path": str(entry.path),
    }


def _count_statistics(files: dict[str, int]) -> int:
    return sum(name.startswith("statistics/") for name in files)


def _print(zoo: Zoo, entries: Sequence[Entry]) -> None:
    from merganser.cli.zoo_listing import print_listing

    digits = _digits([entry.id for entry in entries])
    files = [zoo.files(entry) for entry in entries]
    facts = {
        "score": ["" if entry.score is None else f"{100 * entry.score:.1f}" for entry in entries],
        "size": [human_bytes(sum(sizes.values())) for sizes in files],
        "stats": [str(_count_statistics(sizes)) for sizes in files],
        "age": [_age(entry.created) for entry in entries],
    }
    width = shutil.get_terminal_size().columns  # 80 where the output goes elsewhere and $COLUMNS says nothing
    print_listing([entry.key for entry in entries], [entry.id[:digits] for entry in entries], facts, width)


def _digits(identities: Sequence[str]) -> int:
    """How many first digits tell these apart, and will do so for a while."""
    return next((n for n in range(8, 16) if len({one[:n] for one in identities}) == len(identities)), 16)


def _age(created: str) -> str:
    """How long ago a time was, in the largest whole unit."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    except (ValueError, TypeError):
        return "unknown"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"


@zoo_command.command("show")
@_ZOO
@click.argument("identity", metavar="ID")
@click.option("--verify", is_flag=True, help="Read every file and compare it with its recorded hash.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_command(url: str | None, identity: str, verify: bool, as_json: bool) -> None:
    """Show a model: what it was made from, its facts and its files. The first digits of ID are enough."""
    from merganser.lab.zoo.keys import flatten

    zoo = _open(url)
    entry = zoo.entry(identity)
    if as_json:
        click.echo(json.dumps({**_fields(zoo, entry), "files": zoo.files(entry)}, indent=1))
    else:
        for line in (f"id: {entry.id}", f"created: {entry.created}", f"path: {entry.path}"):
            tell(line)
        for title, fields in (("made from", entry.key), ("facts", entry.facts)):
            print_table(title, ["name", "value"], _shown(flatten(fields)))
        rows = [[name, human_bytes(size)] for name, size in zoo.files(entry).items()]
        print_table("files", ["name", "size"], rows)
    if verify:
        warn(f"{zoo.verify(entry)} files are as recorded")


def _shown(fields: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table that stays readable, whatever an entry holds; ``--json`` shows all of it."""
    from merganser.lab.zoo.keys import show

    cells = ((name, show(value)) for name, value in fields.items())
    rows = [[shortened(cell, _MOST_CHARACTERS) for cell in row] for row in cells]
    left = len(rows) - _MOST_ROWS
    return [*rows[:_MOST_ROWS], ["…", f"{left} more, see --json"]] if left > 0 else rows


@zoo_command.command("rm")
@_ZOO
@click.argument("identities", nargs=-1, required=True, metavar="ID…")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm_command(url: str | None, identities: tuple[str, ...], yes: bool) -> None:
    """Remove models with everything beside them. The first digits of each ID are enough."""
    zoo = _open(url)
    found = list(dict.fromkeys(zoo.resolve(identity) for identity in identities))  # all of them, before the first goes
    if not yes:
        if not _on_terminal():
            raise UserError("there is no terminal to ask on, nothing was removed", mend="give --yes")
        for identity in found:
            click.echo(f"{zoo.url}: {identity}", err=True)
        click.confirm(f"Remove {len(found)} {'model' if len(found) == 1 else 'models'}?", abort=True, err=True)
    for identity in found:
        click.echo(zoo.remove(identity))


def _on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()
