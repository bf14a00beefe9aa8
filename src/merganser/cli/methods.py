"""``merganser methods``: what there is to choose from, and one method in detail."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from merganser.cli.common import print_table, tell


@click.command("methods")
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def methods_command(name: str | None, as_json: bool) -> None:
    """List the merging methods, or explain one.

    \b
    merganser methods
    merganser methods ties
    merganser methods auto
    """
    from merganser.errors import RecipeError
    from merganser.methods import IN_TURN, METHODS
    from merganser.methods.auto import AUTO
    from merganser.methods.description import describe, describe_auto
    from merganser.methods.names import suggest_method

    known = {**METHODS, **IN_TURN}
    if name == AUTO:
        _explain_auto(as_json)
        return
    if name is not None and name not in known:
        raise RecipeError(f"unknown method {name!r}", where="methods", mend=suggest_method(name, known, [AUTO]))
    found = [describe(method) for method in known.values() if name in (None, method.name)]
    found = [describe_auto(), *found] if name is None else found
    if as_json:
        listed = [asdict(one) for one in found]
        click.echo(json.dumps(listed if name is None else listed[0], indent=1, ensure_ascii=False))
        return
    if name is None:
        rows = [
            [one.name, one.formula, "; ".join(one.needs) or "nothing", one.reference, one.streaming] for one in found
        ]
        print_table("", ["method", "formula", "needs", "reference", "in memory"], rows)
        tell("merganser methods NAME explains one; docs/methods.md has them all")
        return
    (one,) = found
    tell(f"{one.title} ({one.name}): {one.summary}")
    for title, text in (
        ("formula", one.formula),
        ("needs", "; ".join(one.needs) or "nothing"),
        ("reference", one.reference),
        ("in memory at once", one.streaming),
        ("negative coefficients", "have a meaning" if one.signed else "are refused"),
    ):
        tell(f"  {title}: {text}")
    if one.options:
        print_table(
            "options (--option key=value)",
            ["option", "default", "values", "meaning"],
            [[o.name, json.dumps(o.default), o.kind, o.meaning] for o in one.options],
        )


def _explain_auto(as_json: bool) -> None:
    """The table that ``auto`` looks up, and what was measured."""
    from merganser.methods.auto import ROWS, table
    from merganser.methods.description import describe_auto

    if as_json:
        click.echo(json.dumps({**asdict(describe_auto()), "rows": table()}, indent=1, ensure_ascii=False))
        return
    tell(f"auto: {describe_auto().summary}")
    rows = [[row.have, row.title, row.scores("same"), row.scores("different")] for row in ROWS]
    title = "the first line that fits; scores × 100, beside those of each model on its own test"
    print_table(title, ["you have", "it takes", "one task", "different tasks"], rows)
    for row in ROWS:
        tell(f"  {row.have}: {row.why}. It costs {row.price}.")
    tell("docs/choosing.md says where the figures come from, and what else there is to choose")
