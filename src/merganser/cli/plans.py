"""What ``merge`` and ``extract`` do with a plan: print it, or carry it out and say what the user should know."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from merganser.cli.common import print_table, tell, warn
from merganser.files import human_bytes

if TYPE_CHECKING:
    from merganser.merging.merge import MergeResult, PreparedMerge


def show_or_carry_out(
    prepared: PreparedMerge, output: str | None, *, overwrite: bool, dry_run: bool, as_json: bool
) -> MergeResult | None:
    """Print a plan, or carry it out; either way its notes go to standard error first.

    Args:
        prepared: the plan with its inputs.
        output: where the result is written; without a place there is only the plan.
        overwrite: replace what an earlier merge has written.
        dry_run: print the plan alone.
        as_json: print it as JSON.

    Returns:
        What was written; None where the plan was printed.
    """
    from merganser.merging import carry_out
    from merganser.merging.memory import keep_freed

    told = prepared.plan.notes + prepared.verdict.notes
    for note in told:
        warn(note)
    if dry_run or output is None:
        show_plan(prepared, as_json)
        return None
    keep_freed()
    result = carry_out(prepared, output, overwrite=overwrite)
    for note in result.notes:
        if note not in told:
            warn(note)
    return result


def show_plan(prepared: PreparedMerge, as_json: bool) -> None:
    """The plan on standard output."""
    plan, schedule = prepared.plan, prepared.schedule
    uncut = schedule.uncut()
    if as_json:
        summary = {
            "method": plan.recipe.method,
            "options": plan.recipe.options,
            "counts": plan.counts,
            "coverage": {**asdict(plan.coverage), "share": plan.coverage.share},
            "treatments": [asdict(part) for part in plan.treatments],
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "peak_bytes": schedule.peak_bytes,
            "rows_at_once": {s.unit.names[0]: r for s, r in zip(plan.steps, schedule.rows, strict=True) if r},
            "uncut": [{"tensor": name, "bytes": nbytes} for name, nbytes in uncut],
            **prepared.verdict.record(),
            **({"choice": plan.choice, "advice": prepared.advice} if plan.choice else {}),
            "plan": plan.to_json(),
        }
        click.echo(json.dumps(summary, indent=1))
        return
    rows = [
        [p.method, p.kind, str(p.tensors), human_bytes(p.nbytes), p.reason or p.rule or ""] for p in plan.treatments
    ]
    options = ", ".join(f"{key}={value}" for key, value in plan.recipe.options.items()) or "no options"
    print_table(
        f"{len(plan.recipe.contributors)} models by {plan.recipe.method} ({options})",
        ["method", "how", "tensors", "size", "why"],
        rows,
    )
    tell(f"{plan.recipe.method} reaches {plan.coverage}")
    if prepared.verdict.influence is not None:
        tell(f"influence: {prepared.verdict.influence}")
    tell(
        f"reads {human_bytes(plan.bytes_read)}, writes {human_bytes(plan.bytes_written)}, "
        f"peak memory about {human_bytes(schedule.peak_bytes)} on {schedule.threads} threads"
    )
    if uncut:
        name, nbytes = uncut[0]
        tell(f"{len(uncut)} units cannot be cut into rows; the largest, of {name}, takes {human_bytes(nbytes)} at once")
