"""``merganser merge``: models and flags, or a recipe; a plan on ``--dry-run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import make_cluster, parse_options, print_table, quiet_libraries, warn
from merganser.files import human_bytes

if TYPE_CHECKING:
    from merganser.merging import Plan


@click.command("merge")
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL… | RECIPE.yaml")
@click.option("-o", "--output", metavar="FOLDER|URL", help="Where to write.")
@click.option("--method", help="auto, simple, fisher, regmean, actmat, ot, task_arithmetic, ties.  [default: auto]")
@click.option("--base", metavar="MODEL", help="The pre-trained model that all started from (actmat and ties need it).")
@click.option("--weights", "coefficients", metavar="C1,C2,…", help="Coefficients, in the order of the models.")
@click.option("--statistics", multiple=True, metavar="FILE", help="One for each model, if not in its folder.")
@click.option("--alpha", type=float, help="RegMean: multiplier of the Gram matrices' off-diagonals.")
@click.option("--ridge", type=float, help="Pull toward the weighted average.")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any other option of the method.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Tensors to average instead.")
@click.option("--keep-separate", multiple=True, metavar="PATTERN", help="Tensors that each model keeps (heads).")
@click.option("--labels", type=click.Choice(["same", "union"]), help="union: one head that knows every label.")
@click.option("--vocabulary", type=click.Choice(["same", "largest"]), help="largest: accept appended tokens.")
@click.option("--dtype", type=click.Choice(["F64", "F32", "F16", "BF16"]), help="Storage dtype of the result.")
@click.option("--max-shard-size", metavar="SIZE", help="Largest weight file.  [default: 5GB]")
@click.option("--allow-pickle", is_flag=True, default=None, help="Accept pytorch_model.bin (weights_only).")
@click.option("--threads", type=click.IntRange(1), help="Units worked on at once.  [default: all cores]")
@click.option("--max-memory", metavar="SIZE", help="What the process may take, such as 2GB; the result is the same.")
@click.option("--device", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", show_default=True)
@click.option(
    "--engine",
    type=click.Choice(["serial", "ray"]),
    default="serial",
    show_default=True,
    help="ray: one task a weight file, all over a cluster.",
)
@click.option("--ray-address", metavar="HOST:PORT", help="Of the cluster.  [default: $RAY_ADDRESS, or this machine's]")
@click.option("--as-adapter", type=int, metavar="RANK", help="Write the nearest LoRA adapter of this rank.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON, tensor by tensor.")
def merge_command(
    models: tuple[str, ...],
    output: str | None,
    coefficients: str | None,
    statistics: tuple[str, ...],
    alpha: float | None,
    ridge: float | None,
    pairs: tuple[str, ...],
    threads: int | None,
    max_memory: str | None,
    device: str,
    engine: str,
    ray_address: str | None,
    as_adapter: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **keys: Any,
) -> None:
    """Merge models of one pre-trained model into one.

    \b
    merganser merge my-model-a my-model-b -o merged
    merganser merge my-model-a my-model-b --method actmat --base org/base -o merged
    merganser merge recipe.yaml -o merged

    A recipe is a YAML mapping with the same keys as the flags; flags win.
    """
    if output is None and not dry_run:
        raise click.UsageError("where to? Add -o FOLDER (or --dry-run to see the plan)")
    quiet_libraries(bars=False)  # no model is loaded
    from merganser.merging import carry_out, load_recipe, make_recipe, prepare
    from merganser.merging.memory import keep_freed
    from merganser.merging.merge import contributors_of

    values: dict[str, Any] = {}
    where = "command line"
    if len(models) == 1 and Path(models[0]).suffix in (".yaml", ".yml"):
        where = models[0]
        values = load_recipe(Path(models[0]))
        if coefficients or statistics:
            raise click.UsageError("--weights and --statistics go with models; in a recipe they belong to contributors")
    else:
        values["contributors"] = contributors_of(models, _numbers(coefficients), statistics or None)
    flags = {key: list(v) if isinstance(v, tuple) else v for key, v in keys.items() if v not in (None, ())}
    given = {"alpha": alpha, "ridge": ridge, **parse_options(pairs)}
    chosen = {key: value for key, value in given.items() if value is not None}
    if chosen:
        flags["options"] = {**(values.get("options") or {}), **chosen}
    recipe = make_recipe({**values, **flags}, where)
    plan = prepare(recipe, output, overwrite=overwrite, threads=threads, max_memory=max_memory, device=device)
    if plan.choice:
        warn(f"method {plan.method.name}, because {plan.choice}")
    for note in plan.notes:
        warn(note)
    if dry_run:
        show_plan(plan, as_json)
        return
    if output is None:  # refused above
        return
    if as_adapter is not None:
        if engine != "serial":
            raise click.UsageError("--as-adapter works in one process; leave --engine out")
        from merganser.merging.adapter_output import carry_out_adapter

        carry_out_adapter(plan, Path(output), as_adapter, overwrite=overwrite)
        click.echo(output)
        return
    keep_freed()
    carry_out(plan, output, overwrite=overwrite, engine=make_cluster(engine, ray_address, "merge"))
    treated = ", ".join(f"{count} {method}" for method, count in plan.counts.items())
    warn(f"{human_bytes(plan.bytes_written)} written; tensors: {treated}")
    click.echo(output)


def show_plan(plan: Plan, as_json: bool) -> None:
    """The plan on standard output."""
    if as_json:
        steps = [
            {
                "tensors": step.unit.names,
                "method": step.method,
                "how": step.unit.kind,
                "reason": step.reason,
                "rows_at_once": step.slice_rows,
                "bytes": step.nbytes,
            }
            for step in plan.steps
        ]
        summary = {
            "method": plan.method.name,
            "options": plan.recipe.options,
            "counts": plan.counts,
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "peak_bytes": plan.peak_bytes,
            "uncut": [{"tensor": name, "bytes": nbytes} for name, nbytes in plan.uncut()],
            "notes": plan.notes,
            "steps": steps,
        }
        click.echo(json.dumps(summary, indent=1))
        return
    groups: dict[tuple[str, str, str], list[int]] = {}
    sizes = {spec.name: spec.nbytes for spec in plan.outputs}
    for step in plan.steps:
        count = groups.setdefault((step.method, step.unit.kind, step.reason or ""), [0, 0])
        count[0] += len(step.unit.names)
        count[1] += sum(sizes[name] for name in step.unit.names)
    rows = [[m, h, str(n), human_bytes(size), why] for (m, h, why), (n, size) in groups.items()]
    kept = sum(len(names) for names in plan.separate)
    if kept:
        rows.append(["kept separate", "copy", str(kept), "", "as the recipe says"])
    options = ", ".join(f"{key}={value}" for key, value in plan.recipe.options.items()) or "no options"
    print_table(
        f"{len(plan.parents)} models by {plan.method.name} ({options})",
        ["method", "how", "tensors", "size", "why not the method"],
        rows,
    )
    click.echo(
        f"reads {human_bytes(plan.bytes_read)}, writes {human_bytes(plan.bytes_written)}, "
        f"peak memory about {human_bytes(plan.peak_bytes)} on {plan.threads} threads"
    )
    if whole := plan.uncut():
        name, nbytes = whole[0]
        click.echo(
            f"{len(whole)} units cannot be cut into rows; the largest, of {name}, takes {human_bytes(nbytes)} at once"
        )


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers, such as 1,1,0.5", param_hint="--weights") from None
