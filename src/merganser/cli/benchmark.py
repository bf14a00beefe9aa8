"""``merganser benchmark``: every method on every suite, with options chosen on development data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import make_cluster, print_table, quiet_libraries, split_pairs, warn
from merganser.cli.experiment import ListOptions, run_options
from merganser.errors import UserError, raise_all

if TYPE_CHECKING:
    from merganser.lab.benchmark.choice import Choice
    from merganser.lab.grid.planning import Plan


@click.command("benchmark", cls=ListOptions)
@click.argument("suites", nargs=-1, required=True, metavar="SUITE…")
@click.option(
    "--methods",
    multiple=True,
    metavar="FILE.yaml",
    help="Methods and what they may try; several are joined.  [default: leaderboard/methods]",
)
@click.option("--templates", multiple=True, metavar="NAME=VALUE…", help="Values of {name} in the suites.")
@click.option("--only", multiple=True, metavar="METHOD…", help="Run these methods only; the others keep their rows.")
@click.option("--seeds", multiple=True, type=int, metavar="SEED…", help="Work on these of the suites' seeds only.")
@click.option(
    "--dev-seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Seeds of each suite that options are chosen on.",
)
@click.option("--results", default="results/benchmark", show_default=True, help="Folder of the results.")
@click.option("--zoo", help="Folder or URL of the zoo.  [default: $MERGANSER_ZOO or ~/.cache/merganser/zoo]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: what the suites say, else auto]")
@run_options
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: as JSON.")
def benchmark_command(
    suites: tuple[str, ...],
    methods: tuple[str, ...],
    templates: tuple[str, ...],
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    dev_seeds: int,
    results: str,
    zoo: str | None,
    device: str | None,
    allow_pickle: bool,
    engine: str,
    workers: int,
    ray_address: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run every method on every SUITE: an experiment's YAML file, or the name of one that comes with merganser.

    \b
    merganser benchmark leaderboard/ner.yaml leaderboard/glue.yaml --templates resources=… base=… --dry-run
    merganser report results/benchmark -o leaderboard.html

    Each method's options are chosen once, on development data of all suites, and then tested on all seeds. Killed at
    any point, the same command goes on; another suite, seed or method only adds to the results.
    """
    quiet_libraries()
    from merganser.lab.benchmark.config import METHODS_FILE, load_benchmark
    from merganser.lab.benchmark.run import plan_benchmark, run_benchmark
    from merganser.lab.zoo import default_zoo

    benchmark = load_benchmark(
        suites,
        methods or (METHODS_FILE,),
        templates=split_pairs(templates, "--templates", "NAME=VALUE"),
        only=only,
        seeds=seeds,
        dev_seeds=dev_seeds,
        device=device,
    )
    own = {suite.local_zoo_dir for suite in benchmark.suites} - {None}
    place: str = zoo or (own.pop() if len(own) == 1 else None) or str(default_zoo())
    if dry_run:
        plans = plan_benchmark(benchmark, results=results, zoo=place, allow_pickle=allow_pickle)
        _show_plans(plans, as_json)
        return
    cluster = make_cluster(engine, ray_address, "benchmark", workers)
    done = run_benchmark(benchmark, results=results, zoo=place, engine=cluster, allow_pickle=allow_pickle, say=warn)
    for where, failure in done.failures:
        more = f"\n    left out for it: {failure.cells} cells" if failure.cells else ""
        warn(f"{where}: {failure.job}: {failure.error}{more}", lines=True)
    _show_choice(done.choice)
    warn(f"{done.done} cells done, {done.cells} in all; next: merganser report {done.folder}")
    click.echo(str(done.folder))
    if done.failures:
        what = f"{len(done.failures)} jobs could not be done; finished cells are kept"
        raise UserError(what, where=str(done.folder), mend="mend what is said above and give the same command again")


def _show_plans(plans: Mapping[str, Plan], as_json: bool) -> None:
    """A line a suite and stage; mistakes come last and make the exit status 2."""
    from merganser.cli.experiment import MADE
    from merganser.lab.report.sections import duration

    values: dict[str, Any] = {}
    for name, plan in plans.items():
        kinds: dict[str, list[bool]] = {"models": [], "made": [], "cells": []}
        for line in plan.lines:
            kind = {"model": "models"}.get(line.what, "made" if line.what in MADE else "cells")
            kinds[kind].append(line.cached)
        counts = {kind: {"all": len(cached), "there": sum(cached)} for kind, cached in kinds.items()}
        values[name] = {**counts, "estimate": asdict(plan.estimate)}
    told = [(name.endswith("(test)"), problem) for name, plan in plans.items() for problem in plan.problems]
    tests = any(of_tests for of_tests, _ in told)  # which need all that development data need, and have its problems
    problems = list({str(problem): problem for of_tests, problem in told if of_tests == tests}.values())
    if as_json:
        shown = {"stages": values, "problems": list(map(str, problems))}
        click.echo(json.dumps(shown, indent=1, ensure_ascii=False))
    else:
        rows = []
        for name, found in values.items():
            seconds = found["estimate"]["seconds"]
            counted = [f"{found[kind]['there']} of {found[kind]['all']}" for kind in ("models", "made", "cells")]
            rows.append([name, *counted, "?" if seconds is None else duration(seconds)])
        columns = ["suite (stage)", "models there", "statistics, multi-task there", "cells there", "time left"]
        print_table("", columns, rows)
    for remark in dict.fromkeys(remark for plan in plans.values() for remark in plan.remarks):
        warn(remark)
    raise_all(problems)


def _show_choice(choice: Choice) -> None:
    rows = []
    for method in choice.methods:
        mean = method.chosen.mean
        share = "–" if mean is None else f"{100 * mean:.1f}"
        rows.append([method.chosen.name, method.family, method.needs, share, str(len(method.candidates))])
    columns = ["chosen", "family", "needs", "recovery, dev", "candidates"]
    print_table("Options chosen on development data", columns, rows)
