"""From a cell to its result row: merge, predict, score."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.evaluation.bootstrap import resample, standard_error
from merganser.lab.grid.cells import Cell, ModelSpec, title_of
from merganser.lab.grid.config import ExperimentConfig, MethodConfig
from merganser.lab.grid.models import Models, folder_name
from merganser.lab.grid.search import candidates
from merganser.lab.suites.base import DEV, TEST
from merganser.lab.zoo import Entry
from merganser.merging import Contributor, merge
from merganser.merging.provenance import library_versions, read_provenance
from merganser.methods import METHODS
from merganser.statistics import Statistics
from merganser.tasks.columns import Columns
from merganser.tasks.data import sample
from merganser.tasks.predict import Prediction
from merganser.training.multitask import train_multitask

FORMAT = 1  # of result rows
IN, OUT, OTHER = "in", "out", "other"

#: (data set, split, domain)
Test = tuple[str, str, str]


def compute(models: Models, cell: Cell, cell_id: str, sums: Path | None = None) -> dict[str, Any]:
    """Work on a cell and return its result row (see the reporting package for its fields).

    Args:
        models: of the experiment.
        cell: what to score.
        cell_id: its name.
        sums: where a greedy sequence keeps its running sums.

    Raises:
        UserError: anything that training, merging or evaluating raises.
    """
    start = time.perf_counter()
    tests, bootstrap = scored_on(models.config, cell), models.config.bootstrap
    entries = [models.model(spec) for spec in cell.contributors] if cell.kind != "multitask" else []
    chosen: dict[str, Any] | None = None
    tensors: dict[str, int] = {}
    used = ""
    if cell.kind == "individual":
        found = [models.prediction(entries[0], name, split) for name, split, _ in tests]
    elif cell.kind == "ensemble":
        found = [_ensemble(models, cell, entries, name, split) for name, split, _ in tests]
    elif cell.kind == "multitask":
        entries = [models.multitask(cell)]
        found = [models.prediction(entries[0], *test[:2], _head_of(cell, test[0])) for test in tests]
    else:
        method = models.config.method(cell.method)
        used = statistics_of(models.config, cell)
        found, chosen, tensors = _merged(models, cell, method, tests, sums)
    scores = {
        name: {"domain": domain, **score(models, name, split, prediction, cell.contributors, bootstrap)}
        for (name, split, domain), prediction in zip(tests, found, strict=True)
    }
    average = {
        domain: float(np.mean([s["value"] for s in scores.values() if s["domain"] == domain]))
        for domain in (IN, OUT)
        if any(s["domain"] == domain for s in scores.values())
    }
    return {
        "format": FORMAT,
        "cell": cell_id,
        "experiment": models.config.name,
        "suite": models.config.suite.name,
        "model": models.config.pretrained.title,
        "layout": models.config.layout,
        "kind": cell.kind,
        "method": cell.method,
        "title": title_of(models.config, cell),
        "contributors": [spec.name for spec in cell.contributors],
        "sets": [spec.set for spec in cell.contributors],
        "seed": cell.seed,
        "heads": cell.heads,
        "scores": scores,
        "average": average,
        "chosen": chosen,
        "provenance": {
            "base": models.base if cell.kind == "multitask" or _trained(models, cell) else None,
            "contributors": _provenance(models, cell, entries, used),
            "data": {f"{name}[{split}]": models.data.digest(name, split) for name, split, _ in tests},
            "tensors": tensors,
            "settings": {
                "training": models.settings().model_dump(mode="json"),
                "statistics": models.config.statistics.model_dump(mode="json"),
                "limits": models.config.suite.limits.model_dump(mode="json"),
            },
            "versions": library_versions(),
            "seconds": round(time.perf_counter() - start, 2),
            "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }


def statistics_of(config: ExperimentConfig, cell: Cell) -> str:
    """The kind of statistics that a cell wants of each contributor; empty for none."""
    if cell.kind != "merge":
        return ""
    return METHODS[config.method(cell.method).method].needs.statistics or ""


def scored_on(config: ExperimentConfig, cell: Cell) -> list[Test]:
    """What a cell is scored on: its contributors' tests, the out-of-domain sets, and for a single model also
    the other contributors' tests where it has their labels."""
    own = list(dict.fromkeys(spec.set for spec in cell.contributors))
    tests: list[Test] = [(name, TEST, IN) for name in own]
    tests += [(name, config.tests.out_split, OUT) for name in config.tests.out_of_domain if name not in own]
    if cell.kind == "individual" and config.layout in ("greedy", "all") and cell.heads != "separate":
        others = dict.fromkeys(config.set_of(name) for name in config.contributors)
        tests += [(name, TEST, OTHER) for name in others if name not in own]
    return tests


def score(
    models: Models, set_name: str, split: str, prediction: Prediction, specs: Sequence[ModelSpec], bootstrap: int = 0
) -> dict[str, Any]:
    """Score a prediction; labels that none of ``specs`` was trained on are never predicted.

    With ``bootstrap`` samples of the examples the standard error of the key score is there, too.
    """
    task, rows = models.data.suite.task(set_name), models.data.rows(set_name, split)
    space = models.space(set_name, task)
    references = task.references(rows, task.columns(rows, Columns()), space)
    aligned = masked(models, prediction.aligned, specs)
    judgements = task.judge(aligned, references, space)
    values, metric = task.score(judgements), models.data.suite.metric(set_name)
    samples = resample(judgements, task.metrics[metric], bootstrap)
    return {
        "metric": metric,
        "value": values[metric],
        "all": values,
        "per_label": task.by_label(aligned, references, space),
        "examples": len(rows),
        "truncated": prediction.truncated,
        **({"standard_error": standard_error(samples)} if bootstrap else {}),
    }


def masked(models: Models, aligned: Any, specs: Sequence[ModelSpec]) -> Any:
    """Scores (examples, labels) with NaN for the labels that none of the models was trained on."""
    voted = [models.data.votes(spec.set) for spec in specs]
    if any(votes is None for votes in voted) or not isinstance(aligned, np.ndarray) or aligned.ndim != 2:
        return aligned
    labels = models.data.suite.labels(specs[0].set)
    trained = {label for votes in voted for label in votes or ()}
    unknown = np.array([label not in trained for label in labels])
    return np.where(unknown[None, :], np.nan, aligned)


def _ensemble(models: Models, cell: Cell, entries: Sequence[Entry], set_name: str, split: str) -> Prediction:
    parts = [models.prediction(entry, set_name, split) for entry in entries]
    aligned = [masked(models, part.aligned, [spec]) for part, spec in zip(parts, cell.contributors, strict=True)]
    joint = models.data.suite.task(set_name).combine(aligned)
    return Prediction(joint, max(p.truncated for p in parts), min(p.max_length for p in parts))


def _trained(models: Models, cell: Cell) -> bool:
    """Whether any contributor of a cell was made from the pretrained model rather than given."""
    return any(models.args(spec).checkpoint is None for spec in cell.contributors)


def _head_of(cell: Cell, set_name: str) -> str:
    """The sub-folder of a multi-task model that answers for a data set."""
    if cell.heads != "separate":
        return ""
    return folder_name(next(spec.name for spec in cell.contributors if spec.set == set_name))


def _merged(
    models: Models, cell: Cell, method: MethodConfig, tests: Sequence[Test], sums: Path | None
) -> tuple[list[Prediction], dict[str, Any] | None, dict[str, int]]:
    """Merge, predict the tests; what the search chose; how many tensors each method treated."""
    chosen = None
    coefficients = [1.0] * len(cell.contributors)
    with tempfile.TemporaryDirectory(prefix="merganser-cell-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        if method.search is not None:
            chosen = _search(models, cell, method, folder)
            coefficients = chosen["candidates"][chosen["best"]]["coefficients"]
        output = merge_cell(models, cell, method, coefficients, folder / "merged", sums)
        tensors = _counts(output)
        references = {spec.set: reference(models, cell, output, spec.set) for spec in cell.contributors}
        if method.finetune is not None:
            references = _finetuned(models, cell, method, references, folder)
        found: dict[Test, Prediction] = {}
        by_folder: dict[str, list[Test]] = {}
        for test in tests:
            place = references.get(test[0]) or reference(models, cell, output, cell.contributors[0].set)
            by_folder.setdefault(str(place), []).append(test)
        for place, group in by_folder.items():
            predictions = models.predict_all(place, [(name, split) for name, split, _ in group])
            found.update(zip(group, predictions, strict=True))
    return [found[test] for test in tests], chosen, tensors


def merge_cell(
    models: Models,
    cell: Cell,
    method: MethodConfig,
    coefficients: Sequence[float],
    output: Path,
    sums: Path | None = None,
) -> Path:
    """Merge a cell's contributors into ``output``."""
    wanted = statistics_of(models.config, cell)
    people = [
        Contributor(
            model=str(models.model(spec).path),
            coefficient=coefficient,
            statistics=str(models.statistics(spec, wanted)) if wanted else None,
            labels=models.data.votes(spec.set),
            name=folder_name(spec.name),
        )
        for spec, coefficient in zip(cell.contributors, coefficients, strict=True)
    ]
    separate: dict[str, Any] = {}
    if cell.heads == "separate":
        separate["keep_separate"] = head_patterns(models.model(cell.contributors[0]).path)
    needs_base = METHODS[method.method].needs.base
    merge(
        people,
        output,
        method=method.method,
        base=models.config.pretrained.model if needs_base else None,
        options=method.options,
        exclude=method.exclude,
        overwrite=True,
        sums=sums if METHODS[method.method].needs.statistics == "gram" and method.search is None else None,
        device=models.device,
        allow_pickle=models.allow_pickle,
        **separate,
    )
    return output


def reference(models: Models, cell: Cell, output: Path, set_name: str) -> str:
    """Where the model for a data set lies in a merged folder."""
    if cell.heads != "separate":
        return str(output)
    spec = next(spec for spec in cell.contributors if spec.set == set_name)
    return f"{output}::heads/{folder_name(spec.name)}"


def head_patterns(folder: Path) -> list[str]:
    """Patterns of all tensors outside the pretrained encoder: what fine-tuning for another task adds.

    Raises:
        UserError: there is nothing outside.
    """
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    prefix = transformers.AutoModel._model_mapping[type(config)].base_model_prefix
    names = [name for name in open_checkpoint(folder).tensors if not name.startswith(f"{prefix}.")]
    if not names:
        raise UserError("the model has no head to keep separate", where=folder, mend="set heads: same")
    return sorted({name.split(".")[0] + ".*" for name in names})


def _search(models: Models, cell: Cell, method: MethodConfig, folder: Path) -> dict[str, Any]:
    """Coefficients by their mean key score on the contributors' development data; never on a reported test."""
    assert method.search is not None
    tried = []
    plain = method.model_copy(update={"finetune": None})
    for coefficients in candidates(method.search, len(cell.contributors), cell.seed):
        output = merge_cell(models, cell, plain, coefficients, folder / "candidate")
        values = []
        for spec in dict.fromkeys(cell.contributors):
            (prediction,) = models.predict_all(reference(models, cell, output, spec.set), [(spec.set, DEV)])
            values.append(score(models, spec.set, DEV, prediction, cell.contributors)["value"])
        tried.append({"coefficients": list(coefficients), "dev": float(np.mean(values))})
    best = max(range(len(tried)), key=lambda i: (tried[i]["dev"], -i))
    return {"by": DEV, "candidates": tried, "best": best}


def _finetuned(
    models: Models, cell: Cell, method: MethodConfig, references: Mapping[str, str], folder: Path
) -> dict[str, str]:
    """Train the merged model a little on a sample of every contributor's training data."""
    assert method.finetune is not None
    shared = cell.heads != "separate"
    parts = [
        models.part(spec, sample(models.rows(spec), method.finetune.examples, cell.seed)) for spec in cell.contributors
    ]
    starts = {folder_name(spec.name): _as_folder(references[spec.set]) for spec in cell.contributors}
    output = folder / "finetuned"
    train_multitask(
        starts[parts[0].name],
        parts,
        shared=shared,
        output=output,
        settings=models.tuned(method.finetune),
        seed=cell.seed,
        starts=None if shared else starts,
        device=models.config.resources.device,
    )
    if shared:
        return {spec.set: str(output) for spec in cell.contributors}
    return {spec.set: str(output / folder_name(spec.name)) for spec in cell.contributors}


def _as_folder(place: str) -> Path:
    root, _, inside = place.partition("::")
    return Path(root) / inside


def _counts(output: Path) -> dict[str, int]:
    """How many tensors each method really treated."""
    counts: dict[str, int] = {}
    for outcome in read_provenance(output)["tensors"].values():
        counts[outcome["method"]] = counts.get(outcome["method"], 0) + 1
    return dict(sorted(counts.items()))


def _provenance(models: Models, cell: Cell, entries: Sequence[Entry], used: str) -> list[dict[str, Any]]:
    """The zoo's entry of each contributor, with the hashes of its weights and of the statistics used."""
    if cell.kind == "multitask":
        entry = entries[0]
        named = "+".join(spec.name for spec in cell.contributors)
        examples = sum(len(models.rows(spec)) for spec in cell.contributors)
        return [_facts_of(entry, named, cell.seed, None, examples)]
    return [
        _facts_of(
            entry,
            spec.name,
            spec.seed,
            Statistics.open(models.statistics(spec, used)).sha256() if used else None,
            len(models.rows(spec)),
        )
        for spec, entry in zip(cell.contributors, entries, strict=True)
    ]


def _facts_of(entry: Entry, name: str, seed: int, statistics: str | None, examples: int) -> dict[str, Any]:
    return {
        "name": name,
        "zoo": entry.id,
        "seed": seed,
        "weights": entry.facts.get("weights"),
        "statistics": statistics,
        "score": entry.facts.get("score"),
        "examples": examples,
    }
