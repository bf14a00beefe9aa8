"""``merganser merge``: models and flags, or a recipe; a plan on ``--dry-run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import make_cluster, parse_options, quiet_libraries, warn
from merganser.cli.plans import show_or_carry_out
from merganser.cli.sources import check_effect, make_earlier_stages, read_source, show_ready_stages
from merganser.files import human_bytes

if TYPE_CHECKING:
    from merganser.merging import RunSettings
    from merganser.merging.plan import AdapterForm


@click.command("merge")
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL… | RECIPE.yaml")
@click.option("-o", "--output", metavar="FOLDER|URL", help="Where to write.")
@click.option("--method", metavar="NAME", help="auto, or one that merganser methods lists.  [default: auto]")
@click.option("--base", metavar="MODEL", help="The pre-trained model that all started from, where a method needs it.")
@click.option("--weights", "coefficients", metavar="C1,C2,…", help="Coefficients, in the order of the models.")
@click.option("--statistics", multiple=True, metavar="FILE", help="One for each model, if not in its folder.")
@click.option("--alpha", type=float, help="Multiplier of the Gram matrices' off-diagonals.")
@click.option("--ridge", type=float, help="Pull toward the weighted average.")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any other option of the method.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|DATASET",
    help="Texts at hand, for methods that look at what models do on them; for regmean_pp one for each model.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Tensors to average instead.")
@click.option("--keep-separate", multiple=True, metavar="PATTERN", help="Tensors that each model keeps (heads).")
@click.option("--labels", type=click.Choice(["same", "union"]), help="union: one head that knows every label.")
@click.option(
    "--vocabulary",
    type=click.Choice(["same", "largest", "union", "tokenizer"]),
    help="largest: accept appended tokens. union: every token of any. tokenizer: those of --tokenizer-from alone.",
)
@click.option("--missing-rows", metavar="mean|base|NAME", help="Rows of tokens that not all know.  [default: mean]")
@click.option("--config-from", metavar="NAME|base", help="Whose configuration is written where they differ.")
@click.option("--tokenizer-from", metavar="NAME|base", help="Whose tokenizer, chat template and generation settings.")
@click.option("--dtype", type=click.Choice(["F64", "F32", "F16", "BF16"]), help="Storage dtype of the result.")
@click.option(
    "--names",
    type=click.Choice(["first", "canonical"]),
    help="Of the result's tensors: the first model's, or those that transformers would save.",
)
@click.option(
    "--require-coverage",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="An error unless the method reaches this share of the linear weights.",
)
@click.option(
    "--accept-scales",
    is_flag=True,
    default=None,
    help="Merge statistics that are 10,000 times as large as the others', or as small.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Largest weight file.  [default: 5GB]")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only); no recipe can.")
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
@click.option(
    "--as-adapter",
    metavar="RANK|sum",
    help="Write the nearest LoRA adapter of this rank; sum: of adapters, that of all ranks together, which is exact.",
)
@click.option(
    "--without-base",
    is_flag=True,
    default=None,
    help="Merge LoRA adapters with one another into an adapter; their base is not read, --base only names it.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier merge has written, and nothing else.")
@click.option("--explain", is_flag=True, help="Print the recipe and write nothing; of a mergekit file, ours for it.")
@click.option(
    "--intermediate",
    metavar="FOLDER",
    help="Of a file with several merges: for all but the last.  [default: beside -o]",
)
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
    data: tuple[str, ...],
    threads: int | None,
    max_memory: str | None,
    device: str,
    engine: str,
    ray_address: str | None,
    as_adapter: str | None,
    allow_pickle: bool,
    overwrite: bool,
    explain: bool,
    intermediate: str | None,
    dry_run: bool,
    as_json: bool,
    **keys: Any,
) -> None:
    """Merge models of one pre-trained model into one.

    \b
    merganser merge my-model-a my-model-b -o merged
    merganser merge my-model-a my-model-b --base org/base --dry-run
    merganser merge recipe.yaml -o merged

    A recipe is a YAML mapping with the same keys as the flags; flags win. A configuration of mergekit is one, too.
    """
    if output is None and not (dry_run or explain):
        raise click.UsageError("where to? Add -o FOLDER (or --dry-run to see the plan)")
    from merganser.merging import RunSettings, make_recipe, prepare

    intermediates = Path(intermediate or f"{output or 'merged'}-intermediate")
    source = read_source(models, _numbers(coefficients), statistics, intermediates)
    flags = {key: list(v) if isinstance(v, tuple) else v for key, v in keys.items() if v not in (None, ())}
    given = {"alpha": alpha, "ridge": ridge, **parse_options(pairs)}
    chosen = {key: value for key, value in given.items() if value is not None}
    if {**source.values, **flags}.get("method") == "regmean_pp":
        if output is None or dry_run or explain or as_adapter is not None or engine != "serial" or statistics:
            raise click.UsageError(
                "regmean_pp merges layer after layer, here: it has no plan, engine, adapter or statistics"
            )
        settings = RunSettings.make(threads, max_memory, device, allow_pickle=allow_pickle)
        _merge_in_turn({**source.values, **flags}, chosen, data, output, settings, overwrite=overwrite)
        return
    if len(data) > 1:
        raise click.UsageError("--data is given once, but for --method regmean_pp")
    chosen |= {"data": data[0]} if data else {}
    check_effect(source, chosen)
    if chosen:
        flags["options"] = {**(source.values.get("options") or {}), **chosen}
    if explain:
        make_recipe({**source.values, **flags}, source.where)  # nothing is explained that is no recipe
        click.echo(source.explained(flags), nl=False)
        return
    for note in source.notes:
        warn(note)
    recipe = make_recipe({**source.values, **flags}, source.where)
    cluster = make_cluster(engine, ray_address, "merge")
    settings = RunSettings.make(threads, max_memory, device, engine=cluster, allow_pickle=allow_pickle)
    if dry_run and show_ready_stages(source, flags, settings, as_json):
        return
    if not dry_run:
        make_earlier_stages(source, flags, settings, overwrite=overwrite)
    prepared = prepare(recipe, output, settings, overwrite=overwrite, adapter=_form(as_adapter), reads=source.reads)
    plan = prepared.plan
    if plan.choice:
        warn(f"auto chose {plan.recipe.method}, because {plan.choice}")
    for line in prepared.advice:
        warn(line)
    result = show_or_carry_out(prepared, output, overwrite=overwrite, dry_run=dry_run, as_json=as_json)
    if result is None:
        return
    treated = ", ".join(f"{count} {method}" for method, count in plan.counts.items())
    warn(f"{human_bytes(plan.bytes_written)} merged in {result.seconds:.1f} s; tensors: {treated}")
    warn(f"{plan.recipe.method} reached {plan.coverage}")
    if result.influence is not None:
        warn(f"influence: {result.influence}")
    click.echo(output)


def _merge_in_turn(
    values: dict[str, Any],
    options: dict[str, Any],
    data: tuple[str, ...],
    output: str,
    settings: RunSettings,
    *,
    overwrite: bool,
) -> None:
    """RegMean++, whose statistics are collected while it merges."""
    from merganser.sequential import merge_regmean_pp

    quiet_libraries()
    recipe = {key: value for key, value in values.items() if key not in ("method", "options", "contributors")}
    given = {**(values.get("options") or {}), **options}
    said = given.pop("data", ())
    texts = data or ((said,) if isinstance(said, str) else said)
    result = merge_regmean_pp(
        values["contributors"], texts, output, options=given, overwrite=overwrite, settings=settings, **recipe
    )
    for note in result.notes:
        warn(note)
    warn(f"{human_bytes(result.plan.bytes_written)} merged in {result.seconds:.1f} s by RegMean++: {result.coverage}")
    warn(f"made from the statistics in {output}-statistics, which verify and reproduce read again")
    click.echo(output)


def _form(text: str | None) -> AdapterForm | None:
    """What ``--as-adapter`` says."""
    from merganser.merging.plan import AdapterForm

    if text is None or text == "sum":
        return None if text is None else AdapterForm()
    try:
        return AdapterForm(int(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no rank, such as 16, nor sum", param_hint="--as-adapter") from None


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers, such as 1,1,0.5", param_hint="--weights") from None
