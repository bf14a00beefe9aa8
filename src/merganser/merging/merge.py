"""The verb merge: from models or a recipe to a prepared plan, carried out into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from merganser.checkpoints.opening import model_reference
from merganser.engines import Engine, make_engine
from merganser.errors import ErrorCollector, RecipeError, UserError, raise_all
from merganser.files import local_path
from merganser.merging.activations import recorded_activations
from merganser.merging.auto import advice_on
from merganser.merging.distributed import run_on
from merganser.merging.execution import Merging, execute
from merganser.merging.influence import Influence
from merganser.merging.inputs import Inputs, open_inputs
from merganser.merging.judging import NOTHING_JUDGED, Verdict, judge_statistics
from merganser.merging.memory import RunSettings, Schedule, available_bytes, fit
from merganser.merging.outputs import merge_reads, output_of
from merganser.merging.plan import AdapterForm, Coverage, Plan, Treatment, inputs_of
from merganser.merging.planning import plan_of
from merganser.merging.provenance import describe_inputs
from merganser.merging.recipe import Contributor, Recipe, make_recipe
from merganser.merging.running_sums import check_sums
from merganser.merging.targets.adapter import AdapterTarget, fit_adapter
from merganser.merging.targets.checkpoint import (
    CheckpointTarget,
    check_opening,
    complete,
    make_layout,
    new_output,
    output_problems,
    write_small_files,
)
from merganser.methods.auto import AUTO
from merganser.paths import described, path_text
from merganser.progress import track
from merganser.results import PathResult, html_table


@dataclass(frozen=True, eq=False)
class MergeResult(PathResult):
    """What :func:`merge` has written; can be used as the path of the folder.

    Attributes:
        path: of the folder, as it was given.
        plan: what was done.
        seconds: that it took.
        verdict: what was found of the statistics.
        advice: of a method that was left open, what to expect, and what would lead to a better one.
    """

    path: str | Path
    plan: Plan
    seconds: float
    verdict: Verdict = NOTHING_JUDGED
    advice: tuple[str, ...] = ()

    @property
    def influence(self) -> Influence | None:
        """Who decided how much, by the statistics; None where none were used, or weights stood in for them."""
        return self.verdict.influence

    @property
    def method(self) -> str:
        """The name of the method, where it was left open the one that was chosen."""
        return self.plan.recipe.method

    @property
    def choice(self) -> str | None:
        """Why that one was chosen; None where it was named."""
        return self.plan.choice

    @property
    def coverage(self) -> Coverage:
        """How much of the linear maps' weights the method that was asked for reached."""
        return self.plan.coverage

    @property
    def treatments(self) -> list[Treatment]:
        """What was treated how, and why."""
        return self.plan.treatments

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.plan.notes + self.verdict.notes

    def _repr_html_(self) -> str:
        rows = [[t.method, t.kind, t.tensors, t.reason or t.rule or ""] for t in self.treatments]
        title = f"{self.path}: {len(self.plan.recipe.contributors)} models by {self.method} in {self.seconds:.1f} s"
        title += f"; {self.coverage}"
        told = [] if self.influence is None else [f"influence: {self.influence}"]
        told += [] if self.choice is None else [f"auto chose {self.method}, because {self.choice}"]
        notes = (*told, *self.advice, *self.notes)
        return html_table(title, ["treatment", "how", "tensors", "why"], rows, notes)


def merge(
    models: Recipe | Sequence[str | Path | Contributor | Mapping[str, Any]],
    output: str | Path,
    *,
    method: str = "auto",
    base: str | Path | None = None,
    coefficients: Sequence[float] | None = None,
    statistics: Sequence[str | Path | None] | None = None,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    sums: str | Path | None = None,
    max_memory: str | int | None = None,
    device: str = "cpu",
    engine: str | Engine | None = None,
    as_adapter: int | AdapterForm | None = None,
    allow_pickle: bool = False,
    **settings: Any,
) -> MergeResult:
    """Merge checkpoints of one pre-trained model into a folder that ``from_pretrained`` opens.

    Args:
        models: the checkpoints (folders or ``org/name@revision``), contributors, or dictionaries of what a recipe has
            for one; or a whole :class:`Recipe`, which then stands alone: give no other setting with it.
        output: the folder or fsspec URL to write; written whole or not at all.
        method: ``auto`` (what was measured to be best with what is at hand, see :mod:`merganser.methods.auto`), or
            one of ``merganser.methods.METHODS``.
        base: the pre-trained model, for the methods that need it.
        coefficients: one weight a model, relative; equal by default.
        statistics: one statistics file a model, None for the one in its folder; by default those of all folders.
        options: the method's options, such as ``{"alpha": 0.9}``.
        overwrite: replace what an earlier merge has written; nothing else is ever replaced.
        threads: how many units are worked on at once; the bytes do not depend on it.
        sums: a folder that keeps the running sums of Gram matrices: a merge whose first contributors were merged
            last with this folder reads their sums instead of their Gram matrices. The bytes do not depend on it.
        max_memory: what the process may take, in bytes or as ``"2GB"``; by default what the machine has. The bytes
            do not depend on it.
        device: ``cpu``, ``cuda`` or ``auto``.
        engine: where the work is done (see :mod:`merganser.engines`): ``ray``, or an engine itself; by default in this
            process.
        as_adapter: write the nearest LoRA adapter of this rank, or of this form, instead of a full checkpoint.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only``).
        settings: the other keys of :class:`Recipe`: ``exclude``, ``keep_separate``, ``labels``, ``vocabulary``,
            ``missing_rows``, ``names``, ``config_from``, ``tokenizer_from``, ``dtype``, ``max_shard_size``,
            ``require_coverage``, ``accept_scales``.

    Returns:
        What was written; it can be used as the path of the output.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    if isinstance(models, Recipe):
        recipe = models
    else:
        contributors = contributors_of(models, coefficients, statistics)
        values = {"contributors": contributors, "method": method, "options": _plain(options), **settings}
        recipe = make_recipe(values if base is None else {**values, "base": model_reference(base)}, "merge()")
    run = RunSettings.make(threads, max_memory, device, sums, _engine(engine), allow_pickle)
    form = AdapterForm(as_adapter) if isinstance(as_adapter, int) else as_adapter
    if not isinstance(form, AdapterForm | None):
        mend = "give the rank as a number, such as 16, or an AdapterForm"
        raise RecipeError(f"{as_adapter!r} is no rank", where="as_adapter", mend=mend)
    return carry_out(prepare(recipe, output, run, overwrite=overwrite, adapter=form), output, overwrite=overwrite)


def _engine(engine: str | Engine | None) -> Engine | None:
    """Where the work is done; None for this process."""
    if not isinstance(engine, str):
        return engine
    return None if engine == "serial" else make_engine(engine)


def _plain(options: Any) -> Any:
    """Options as a recipe has them; what is no mapping is refused with the recipe."""
    return dict(options or {}) if options is None or isinstance(options, Mapping) else options


def contributors_of(
    models: Sequence[str | Path | Contributor | Mapping[str, Any]],
    coefficients: Sequence[float] | None = None,
    statistics: Sequence[str | Path | None] | None = None,
) -> list[dict[str, Any]]:
    """Contributors of a recipe from parallel lists.

    Raises:
        RecipeError: no lists, or lists of different length.
        CheckpointError: a model that is given as something else than its path or name.
    """
    models = _list(models, "models", "merge([model, model], output)")
    for name, values in (("coefficients", coefficients), ("statistics", statistics)):
        if values is not None and (given := len(_list(values, name, f"{name}=[…, …]"))) != len(models):
            what = f"{given} {name} for {len(models)} models"
            raise RecipeError(what, where=name, mend="give one for each model, in order")
    found = []
    for number, model in enumerate(models):
        if isinstance(model, Contributor):
            entry: dict[str, Any] = model.model_dump()
        else:
            entry = dict(model) if isinstance(model, Mapping) else {"model": model_reference(model)}
        if coefficients is not None:
            entry["coefficient"] = coefficients[number]
        if statistics is not None and (file := statistics[number]) is not None:
            entry["statistics"] = path_text(file, RecipeError, what="a statistics file")
        found.append(entry)
    return found


def _list(given: Any, what: str, example: str) -> list[Any]:
    """What has to be a list, as one.

    Raises:
        RecipeError: it is none, such as a single path, whose letters would be taken for paths.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        mend = f"give a list: {example}"
        if isinstance(given, str | Path) and Path(given).suffix in (".yaml", ".yml"):
            mend = f"read the recipe: make_recipe(load_recipe(Path({str(given)!r}))), both of merganser.merging"
        raise RecipeError(f"{what} are a list, and this is {described(given)}", where=what, mend=mend)
    return list(given)


@dataclass(frozen=True)
class PreparedMerge:
    """A plan with everything that it takes to carry it out.

    Attributes:
        plan: what to do.
        inputs: the open files.
        settings: how it is run.
        schedule: how it is fitted into memory.
        reads: every folder and file that the user named to be read, which no output takes the place of.
        verdict: what was found of the statistics.
        advice: of a method that was left open, what to expect, and what would lead to a better one.
    """

    plan: Plan
    inputs: Inputs
    settings: RunSettings
    schedule: Schedule
    reads: tuple[Path, ...] = ()
    verdict: Verdict = NOTHING_JUDGED
    advice: tuple[str, ...] = ()


def prepare(
    recipe: Recipe | Plan,
    output: str | Path | None,
    settings: RunSettings | None = None,
    *,
    overwrite: bool = False,
    adapter: AdapterForm | None = None,
    reads: Sequence[Path] = (),
) -> PreparedMerge:
    """The plan of a merge, everything checked: headers, statistics against weights, place and space for the result.

    Args:
        recipe: what to merge; or a plan that was made before.
        output: where to; None checks no place (for a dry run).
        settings: how it will be run; on all cores by default.
        overwrite: whether an earlier merge may be replaced.
        adapter: the LoRA adapter to write; None: a full checkpoint, or one of adapters without their base.
        reads: what else is read, such as the recipe's file: nothing is written over it.

    Raises:
        UserError: what cannot be merged, all mistakes at once.
    """
    settings, advice = settings or RunSettings.make(), tuple[str, ...]()
    if adapter is not None:
        raise_all(_adapter_problems(output, settings))
    if isinstance(recipe, Plan):
        plan, inputs = recipe, inputs_of(recipe, allow_pickle=settings.allow_pickle)
        reads = [*reads, *merge_reads(inputs)]
    else:
        inputs = open_inputs(recipe, allow_pickle=settings.allow_pickle)
        reads = [*reads, *merge_reads(inputs)]  # a base that the method makes no use of as well
        plan, advice = _planned(recipe, inputs, adapter)
    opened, inputs = inputs, inputs if plan.base else replace(inputs, base=None)
    schedule = _fit(plan, inputs, settings)
    problems = ErrorCollector()
    if plan.rank is not None:
        problems.add(*_adapter_problems(output, settings))
    looks = any(step.treatment is not None and step.treatment.needs.data for step in plan.steps)
    if settings.engine is not None and looks:
        what = "what models do on texts is looked at by this process"
        problems.add(RecipeError(what, where="--engine", mend="leave out the engine, or choose another method"))
    if (missing := schedule.peak_bytes - schedule.resident - available_bytes()) > 0:
        needed = f"{schedule.peak_bytes / 1e9:.2f} GB are needed, {missing / 1e9:.2f} GB more than are free"
        mend = "free some memory, or work in less: --max-memory SIZE, --threads 1"
        problems.add(RecipeError(f"too little memory: {needed}", where="memory", mend=mend))
    if output is not None:
        elsewhere = settings.engine is not None and local_path(output) is None
        problems.add(*output_problems(output, overwrite, reads, 0 if elsewhere else plan.bytes_written))
        if settings.sums is not None and (folder := local_path(output)) is not None:
            models = [parent.checkpoint.path for parent in inputs.parents]
            problems.add(*check_sums(settings.sums, plan.steps, models, folder))
    problems.raise_all()
    looked_up = isinstance(recipe, Recipe) and recipe.method == AUTO
    waiting = any(not s.checkpoint.is_here and (looked_up or s.view.duplicates) for s in inputs.sources)
    for source in (opened if looked_up else inputs).sources:
        source.checkpoint.fetch()
    if waiting and isinstance(recipe, Recipe):  # copies of tied tensors, and what changed, are known only now
        plan, advice = _planned(recipe, opened, adapter)
        inputs = opened if plan.base else replace(opened, base=None)
        schedule = _fit(plan, inputs, settings)
    if plan.statistics or plan.rank is not None:
        _hash(inputs, settings.threads)
        for parent in inputs.parents:
            problems.add(*(parent.statistics.check_binding(parent.checkpoint) if parent.statistics else []))
    problems.raise_all()
    verdict = judge_statistics(plan, inputs, settings.threads, schedule.budget)
    raise_all(verdict.problems)
    return PreparedMerge(plan, inputs, settings, schedule, tuple(reads), verdict, advice)


def _planned(recipe: Recipe, inputs: Inputs, adapter: AdapterForm | None) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and what is said of a method that was left open."""
    return plan_of(recipe, inputs, adapter=adapter), advice_on(recipe, inputs) if recipe.method == AUTO else ()


def _fit(plan: Plan, inputs: Inputs, settings: RunSettings) -> Schedule:
    return fit(plan.steps, settings) if plan.rank is None else fit_adapter(plan, inputs, settings)


def _adapter_problems(output: str | Path | None, settings: RunSettings) -> list[UserError]:
    """Why an adapter cannot be written in this way."""
    if settings.engine is None and (output is None or local_path(output) is not None):
        return []
    what = "an adapter is written by this process, into a folder"
    return [RecipeError(what, where="--as-adapter", mend="leave out the engine, and give a local folder")]


def _hash(inputs: Inputs, threads: int) -> None:
    """Hash all weights and statistics that belong together, several tensors and files at once."""
    bound = [(p.checkpoint, p.statistics) for p in inputs.parents if p.statistics is not None]
    work: list[Callable[[], str]] = [statistics.sha256 for _, statistics in bound]
    work += [partial(c.hash, name, s.header.hash_kind) for c, s in bound for name in c.tensors]
    with ThreadPoolExecutor(threads) as pool:
        for _ in track(pool.map(lambda one: one(), work), "hashing", "tensors", len(work)):
            pass


def carry_out(prepared: PreparedMerge, output: str | Path, *, overwrite: bool = False) -> MergeResult:
    """Do what a plan says.

    Args:
        prepared: what :func:`prepare` returned.
        output: a folder, or an fsspec URL.
        overwrite: replace what is there.

    Returns:
        What was written; it can be used as the path of the output.

    Raises:
        UserError: non-finite numbers in or out, a full disk; nothing is left behind.
    """
    plan, inputs, settings, started = prepared.plan, prepared.inputs, prepared.settings, time.monotonic()
    with (
        new_output(output, overwrite, prepared.reads) as staging,
        recorded_activations(plan.steps, inputs, settings) as seen,
    ):
        work = Merging(inputs, settings, seen=seen, products=plan.rank is not None)
        folder = staging.folder
        if plan.rank is not None:
            with AdapterTarget(plan, inputs, folder) as adapter:
                execute(prepared.schedule, work, adapter)
                plan = adapter.complete(prepared.verdict)
        else:
            layout = make_layout(plan)
            write_small_files(plan, inputs, layout, folder)
            if settings.engine is not None:
                place = output_of(staging.reference)
                records = run_on(plan, inputs, settings, settings.engine, prepared.schedule, layout, place)
                staging.others.update(layout.files)
            else:
                with CheckpointTarget(plan, layout, folder) as target:
                    execute(prepared.schedule, work, target)
                records = target.records
            if settings.engine is None or local_path(output) is not None:  # else the weights lie elsewhere by now
                raise_all(check_opening(folder, inputs.reference.checkpoint))
            people, base = describe_inputs(plan, inputs)
            complete(plan, inputs.reference, layout, folder, records, people, base, verdict=prepared.verdict)
    return MergeResult(output, plan, time.monotonic() - started, prepared.verdict, prepared.advice)
