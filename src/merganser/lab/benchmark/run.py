"""Running a benchmark: candidates on development data, the choice, and what was chosen on the tests.

    run_benchmark(load_benchmark(["leaderboard/ner"]), results="bench", zoo="zoo")

Both stages are experiments, in ``<results>/dev/<suite>/`` and ``<results>/test/<suite>/``, which go on where they were
stopped; ``<results>/choice.json`` stands between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merganser.engines import Engine
from merganser.errors import ErrorCollector, require
from merganser.lab.benchmark.choice import Choice, choose, write_choice
from merganser.lab.benchmark.config import Benchmark
from merganser.lab.benchmark.summary import suite_scores
from merganser.lab.grid.cells import expand
from merganser.lab.grid.checks import check_inputs
from merganser.lab.grid.compute import cell_id
from merganser.lab.grid.config import ExperimentConfig, localised
from merganser.lab.grid.folder import check_folder, finished, recorded_name, recorded_order
from merganser.lab.grid.jobs import needs_order
from merganser.lab.grid.models import Models
from merganser.lab.grid.planning import Plan, plan_experiment
from merganser.lab.grid.run import Failure, Finished, run_experiment
from merganser.lab.report.rows import ResultRow, read_rows
from merganser.lab.zoo import Zoo

#: The stages, which are folders of the results.
DEV, TEST = "dev", "test"


@dataclass(frozen=True)
class BenchmarkResult:
    """What a run left behind.

    Attributes:
        folder: of the results.
        choice: of each method's options.
        cells: how many cells of both stages there are now.
        done: how many of them this run has added.
        failures: (stage and suite, what could not be done).
    """

    folder: Path
    choice: Choice
    cells: int
    done: int
    failures: tuple[tuple[str, Failure], ...]


def run_benchmark(
    benchmark: Benchmark,
    *,
    results: str | Path,
    zoo: str | Path,
    engine: Engine | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> BenchmarkResult:
    """Run what is not finished of a benchmark.

    Args:
        benchmark: see :func:`merganser.lab.benchmark.config.load_benchmark`.
        results: the folder for everything.
        zoo: a folder or an fsspec URL; models that it does not hold are trained.
        engine: where jobs run; this process by default.
        allow_pickle: see :func:`merganser.lab.grid.run.run_experiment`.
        say: is told what begins.

    Returns:
        What is there now. What cannot be done stops nothing else: a method is then compared on fewer suites.

    Raises:
        UserError: data or models that are not there, options that do not fit, of all suites at once; a results folder
            of something else.
    """
    require("lab", "a benchmark", "accelerate")
    results = Path(results)
    _check(benchmark, results, zoo, allow_pickle)
    done: dict[str, Finished] = {}
    for suite in benchmark.suites:
        for entry in benchmark.entries:
            if (obstacle := entry.obstacle(suite)) is not None:
                say(f"{suite.name}: {entry.title} is left out: {obstacle}")

    def run(stage: str, experiment: ExperimentConfig) -> None:
        name = f"{experiment.name} ({stage})"
        say(f"{name}: {len(experiment.methods)} merges of {len(experiment.keep_seeds or experiment.seeds)} seeds")
        done[name] = run_experiment(
            experiment, results=results / stage, zoo=zoo, engine=engine, allow_pickle=allow_pickle
        )

    for suite in benchmark.suites:
        if (experiment := benchmark.development(suite, benchmark.entries)) is not None:
            run(DEV, experiment)
    choice = choose_so_far(benchmark, results, zoo, allow_pickle)
    write_choice(choice, results)
    chosen = {method.title: method.chosen.name for method in choice.methods}
    for suite in benchmark.suites:
        if (experiment := benchmark.test(suite, chosen)) is not None:
            run(TEST, experiment)
    return BenchmarkResult(
        results,
        choice,
        sum(finished.cells for finished in done.values()),
        sum(finished.done for finished in done.values()),
        tuple((name, failure) for name, finished in done.items() for failure in finished.failures),
    )


def plan_benchmark(
    benchmark: Benchmark, *, results: str | Path, zoo: str | Path, allow_pickle: bool = False
) -> dict[str, Plan]:
    """Check every input as a run does, and list what is there and what is left: suite and stage → its plan.

    Options that are not chosen yet are stood in for by each method's first candidate. Arguments as of
    :func:`run_benchmark`.
    """
    results, plans = Path(results), {}
    for suite in benchmark.suites:
        if (experiment := benchmark.development(suite, benchmark.entries)) is not None:
            plan = plan_experiment(experiment, results=results / DEV, zoo=zoo, allow_pickle=allow_pickle)
            plans[f"{suite.name} ({DEV})"] = plan
    chosen = {entry.title: entry.candidates[0].title for entry in benchmark.entries}
    if not any(plan.problems for plan in plans.values()):
        choice = choose_so_far(benchmark, results, zoo, allow_pickle)
        chosen |= {method.title: method.chosen.name for method in choice.methods}
    for suite in benchmark.suites:
        if (experiment := benchmark.test(suite, chosen)) is not None:
            plan = plan_experiment(experiment, results=results / TEST, zoo=zoo, allow_pickle=allow_pickle)
            plans[f"{suite.name} ({TEST})"] = plan
    return plans


def choose_so_far(benchmark: Benchmark, results: Path, zoo: str | Path, allow_pickle: bool = False) -> Choice:
    """The choice by all rows of development data that are there, those of methods outside this run included."""
    rows: list[ResultRow] = []
    for suite in benchmark.suites:
        if (experiment := benchmark.development(suite, benchmark.known)) is not None:
            rows += _current(localised(experiment), results / DEV, zoo, allow_pickle)
    return choose(benchmark, suite_scores(rows))


def _current(config: ExperimentConfig, results: Path, zoo: str | Path, allow_pickle: bool) -> list[ResultRow]:
    """The rows of an experiment's cells as they would be made today: of these models, data and options."""
    folder = results / config.name
    present = finished(folder)
    if not present:
        return []
    models = Models(config, Zoo(zoo), allow_pickle=allow_pickle, fresh=recorded_name(folder))
    order = recorded_order(models, folder) if needs_order(config) else None
    cells = {cell_id(models, cell) for cell in expand(config, order)}
    return [row for row in read_rows(folder) if row.cell in cells]


def _check(benchmark: Benchmark, results: Path, zoo: str | Path, allow_pickle: bool) -> None:
    """Check the inputs of both stages of all suites before any work."""
    errors = ErrorCollector()
    for suite in benchmark.suites:
        if (experiment := benchmark.whole(suite, benchmark.entries)) is not None:
            for stage in (DEV, TEST):
                errors.catch(check_folder, results / stage / suite.name)
            models = errors.catch(Models, localised(experiment), Zoo(zoo), allow_pickle=allow_pickle)
            if models is not None:
                errors.catch(check_inputs, models)
    errors.raise_all()
