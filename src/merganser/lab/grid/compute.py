"""From a cell to the name of its result row, and to the row: merge, predict, score."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import load_config
from merganser.errors import UserError
from merganser.evaluation.bootstrap import resample, standard_error
from merganser.files import scratch_folder
from merganser.lab.grid.cells import Cell, ModelSpec, title_of
from merganser.lab.grid.config import ExperimentConfig, Finetune, Search
from merganser.lab.grid.models import Models, folder_name
from merganser.lab.suites.base import DEV, TEST
from merganser.lab.zoo import Entry, id_of
from merganser.merging import Contributor, MergeResult, merge
from merganser.merging.provenance import library_versions, read_provenance
from merganser.methods import METHODS
from merganser.statistics import Statistics
from merganser.tasks.data import sample
from merganser.tasks.predict import Prediction
from merganser.training.multitask import train_multitask

FORMAT = 1  # of result rows
IN, OUT, OTHER = "in", "out", "other"

#: (data set, split, domain)
Test = tuple[str, str, str]


def compute(models: Models, cell: Cell, identity: str, sums: Path | None = None) -> dict[str, Any]:
    """Work on a cell and return its result row (see the reporting package for its fields).

    Args:
        models: of the experiment.
        cell: what to score.
        identity: the :func:`cell_id`.
        sums: where a greedy sequence keeps its running sums.

    Raises:
        UserError: anything that training, merging or evaluating raises.
    """
    start = time.perf_counter()
    tests, bootstrap = scored_on(models.config, cell), models.config.bootstrap
    used = statistics_of(models.config, cell)
    chosen: dict[str, Any] | None = None
    tensors: dict[str, int] = {}
    merged: dict[str, Any] | None = None
    if cell.kind == "multitask":
        entries = [models.multitask(cell)]
        found = [models.prediction(entries[0], *test[:2], _head_of(cell, test[0])) for test in tests]
    else:
        entries = [models.model(spec) for spec in cell.contributors]
        if cell.kind == "individual":
            found = [models.prediction(entries[0], name, split) for name, split, _ in tests]
        elif cell.kind == "ensemble":
            found = [_ensemble(models, cell, entries, name, split) for name, split, _ in tests]
        else:
            found, chosen, tensors, merged = _merged(models, cell, tests, sums)
    scores = {
        name: {"domain": domain, **score(models, name, split, prediction, cell.contributors, bootstrap)}
        for (name, split, domain), prediction in zip(tests, found, strict=True)
    }
    values: dict[str, list[float]] = {IN: [], OUT: [], OTHER: []}
    for one in scores.values():
        values[one["domain"]].append(one["value"])
    average = {domain: float(np.mean(values[domain])) for domain in (IN, OUT) if values[domain]}
    given = [models.args(spec).checkpoint is not None for spec in cell.contributors]
    trained = cell.kind == "multitask" or not all(given)  # made from the pretrained model
    return {
        "format": FORMAT,
        "cell": identity,
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
        "split": models.config.tests.split,
        "scores": scores,
        "average": average,
        "chosen": chosen,
        **({"merged": merged} if merged else {}),
        "provenance": {
            "base": models.base if trained else None,
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


def cell_id(models: Models, cell: Cell) -> str:
    """The name of a cell, by which its row is found: 16 hexadecimal digits of the hash of its models, method,
    statistics, tests and way of scoring."""
    config, kind = models.config, statistics_of(models.config, cell)
    if cell.kind == "multitask":
        made = [id_of(models.multitask_key(cell))]
    else:
        made = [models.address(spec) for spec in cell.contributors]
    content = {
        "format": FORMAT,
        "experiment": config.name,
        "layout": config.layout,
        "cell": cell.to_json(),
        "models": made,
        "method": config.method(cell.method).model_dump(mode="json") if cell.kind == "merge" else None,
        "statistics": [models.statistics_key(spec, kind) for spec in cell.contributors] if kind else None,
        "scoring": config.suite.options,
        "max_length": models.settings().max_length,
        **({"bootstrap": config.bootstrap} if config.bootstrap else {}),
        **({"separate": config.separate} if cell.kind == "merge" and config.separate else {}),
        "tests": [(*test, models.data.digest(*test[:2])) for test in scored_on(config, cell)],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def statistics_of(config: ExperimentConfig, cell: Cell) -> str:
    """The kind of statistics that a cell wants of each contributor; empty for none."""
    if cell.kind != "merge":
        return ""
    return config.method(cell.method).needs.statistics or ""


def scored_on(config: ExperimentConfig, cell: Cell) -> list[Test]:
    """What a cell is scored on: its contributors' tests, the out-of-domain sets, and for a single model also
    the other contributors' tests where it has their labels."""
    own = list(dict.fromkeys(spec.set for spec in cell.contributors))
    if config.tests.split == "dev":
        return [(name, DEV, IN) for name in own]
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
    data, task = models.data, models.data.suite.task(set_name)
    space, references = data.space(set_name), data.truth(set_name, split)
    aligned = masked(models, prediction.aligned, specs)
    judgements = task.judge(aligned, references, space)
    values, metric = task.score(judgements), data.suite.metric(set_name)
    samples = resample(judgements, task.metrics[metric], bootstrap)
    return {
        "metric": metric,
        "value": values[metric],
        "all": values,
        "per_label": task.by_label(aligned, references, space),
        "examples": len(data.rows(set_name, split)),
        "truncated": prediction.truncated,
        **({"standard_error": standard_error(samples)} if bootstrap else {}),
    }


def masked(models: Models, aligned: Any, specs: Sequence[ModelSpec]) -> Any:
    """Scores (examples, labels) with NaN for the labels that none of the models was trained on."""
    voted = [models.data.suite.votes(spec.set) for spec in specs]
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


def _head_of(cell: Cell, set_name: str) -> str:
    """The sub-folder of a model with several heads that answers for a data set; empty where all share one head."""
    if cell.heads != "separate":
        return ""
    return folder_name(next(spec.name for spec in cell.contributors if spec.set == set_name))


def _merged(
    models: Models, cell: Cell, tests: Sequence[Test], sums: Path | None
) -> tuple[list[Prediction], dict[str, Any] | None, dict[str, int], dict[str, Any]]:
    """Merge, predict the tests; what the search chose; how many tensors each method treated; what the merge cost."""
    method = models.config.method(cell.method)
    chosen = None
    coefficients = [1.0] * len(cell.contributors)
    with scratch_folder() as folder:
        if method.search is not None:
            chosen = _search(models, cell, method.search, folder)
            coefficients = chosen["candidates"][chosen["best"]]["coefficients"]
        result = merge_cell(models, cell, coefficients, folder / "merged", sums)
        costs, output = _costs(models, cell, result), Path(result)
        tensors = Counter(outcome["method"] for outcome in read_provenance(output)["tensors"].values())
        if method.finetune is not None:
            output = _finetuned(models, cell, method.finetune, output, folder / "finetuned")
        wanted = [(name, split) for name, split, _ in tests]
        if cell.heads != "separate":
            found = models.predict_all(output, wanted)
        else:  # each test by the head of its data set
            place = f"{output}/" if method.finetune else f"{output}::heads/"
            found = [models.predict_all(place + _head_of(cell, test[0]), [test])[0] for test in wanted]
    return found, chosen, dict(sorted(tensors.items())), costs


def _costs(models: Models, cell: Cell, result: MergeResult) -> dict[str, Any]:
    """The method with all its options, and what a merge by it costs.

    These are the seconds of the last merge alone, reading and writing included, what each contributor publishes beyond
    its weights, and whether the pretrained model is needed.
    """
    method, kind = models.config.method(cell.method), statistics_of(models.config, cell)
    known = METHODS[method.method]
    files = [models.statistics(spec, kind) for spec in cell.contributors] if kind else []
    return {
        "method": result.method,
        "options": known.options_type(**method.options).model_dump(mode="json"),
        "seconds": round(result.seconds, 3),
        "statistics": kind or None,
        "statistics_bytes": [path.stat().st_size for path in files] or [0] * len(cell.contributors),
        "base": method.needs.base,
    }


def merge_cell(
    models: Models, cell: Cell, coefficients: Sequence[float], output: Path, sums: Path | None = None
) -> MergeResult:
    """Merge a cell's contributors into ``output``."""
    method, wanted = models.config.method(cell.method), statistics_of(models.config, cell)
    people = [
        Contributor(
            model=models.reference(models.model(spec)),
            coefficient=coefficient,
            statistics=str(models.statistics(spec, wanted)) if wanted else None,
            labels=models.data.suite.votes(spec.set),
            name=folder_name(spec.name),
        )
        for spec, coefficient in zip(cell.contributors, coefficients, strict=True)
    ]
    separate: dict[str, Any] = {}
    if cell.heads == "separate":
        first = models.reference(models.model(cell.contributors[0]))
        separate["keep_separate"] = [*head_patterns(first), *models.config.separate]
    return merge(
        people,
        output,
        method=method.method,
        base=models.config.pretrained.model if method.needs.base else None,
        options=method.options,
        exclude=method.exclude,
        overwrite=True,
        sums=sums if method.needs.statistics == "gram" and method.search is None else None,
        device=models.merge_device(method.method),
        allow_pickle=models.allow_pickle,
        **separate,
    )


def head_patterns(reference: str) -> list[str]:
    """Patterns of all tensors outside the pretrained encoder: what fine-tuning for another task adds.

    Raises:
        UserError: there is nothing outside.
    """
    opened = open_checkpoint(reference)
    prefix = transformers.AutoModel._model_mapping[type(load_config(opened))].base_model_prefix
    names = [name for name in opened.tensors if not name.startswith(f"{prefix}.")]
    if not names:
        raise UserError("the model has no head to keep separate", where=reference, mend="set heads: same")
    return sorted({name.split(".")[0] + ".*" for name in names})


def candidates(search: Search, contributors: int, seed: int) -> list[tuple[float, ...]]:
    """Coefficients to try: a grid for two contributors, Dirichlet samples for more.

    They sum to 1, the uniform ones come first, and none is 0: the ends of the grid are at 0.001, since a contributor
    may be the only one that votes on a label.

    Args:
        search: how many.
        contributors: how many models are merged.
        seed: of the samples.
    """
    uniform = (1 / contributors,) * contributors
    if contributors == 2:
        steps = np.linspace(0, 1, search.grid).clip(0.001, 0.999)
        found: list[tuple[float, ...]] = [(float(1 - step), float(step)) for step in steps]
    else:
        drawn = np.random.default_rng(seed).dirichlet(np.ones(contributors), search.samples)
        found = [tuple(float(value) for value in row) for row in drawn]
    return [uniform, *(one for one in found if not np.allclose(one, uniform))]


def _search(models: Models, cell: Cell, search: Search, folder: Path) -> dict[str, Any]:
    """Coefficients by their mean key score on the contributors' development data; never on a reported test."""
    tried = []
    for coefficients in candidates(search, len(cell.contributors), cell.seed):
        output = merge_cell(models, cell, coefficients, folder / "candidate")
        values = []
        for spec in cell.contributors:
            head = _head_of(cell, spec.set)
            place = f"{output}::heads/{head}" if head else Path(output)
            (prediction,) = models.predict_all(place, [(spec.set, DEV)])
            values.append(score(models, spec.set, DEV, prediction, cell.contributors)["value"])
        tried.append({"coefficients": list(coefficients), "dev": float(np.mean(values))})
    best = max(range(len(tried)), key=lambda i: (tried[i]["dev"], -i))
    return {"by": DEV, "candidates": tried, "best": best}


def _finetuned(models: Models, cell: Cell, finetune: Finetune, merged: Path, output: Path) -> Path:
    """Train the merged model a little on a sample of every contributor's training data."""
    shared = cell.heads != "separate"
    parts = [models.part(spec, sample(models.rows(spec), finetune.examples, cell.seed)) for spec in cell.contributors]
    starts = {part.name: merged if shared else merged / "heads" / part.name for part in parts}
    train_multitask(
        starts[parts[0].name],
        parts,
        shared=shared,
        output=output,
        settings=models.tuned(finetune),
        seed=cell.seed,
        starts=None if shared else starts,
        separate=() if shared else models.config.separate,
        device=models.config.resources.device,
    )
    return output


def _provenance(models: Models, cell: Cell, entries: Sequence[Entry], used: str) -> list[dict[str, Any]]:
    """The zoo's entry of each contributor, with the hashes of its weights and of the statistics used."""
    made: list[tuple[str, int, str | None, int]] = []
    for spec in cell.contributors:
        sha256 = Statistics.open(models.statistics(spec, used)).sha256() if used else None
        made.append((spec.name, spec.seed, sha256, len(models.rows(spec))))
    if cell.kind == "multitask":
        names, _, _, counts = zip(*made, strict=True)
        made = [("+".join(names), cell.seed, None, sum(counts))]
    return [
        {
            "name": name,
            "zoo": entry.id,
            "seed": seed,
            "weights": entry.facts.get("weights"),
            "statistics": sha256,
            "score": entry.facts.get("score"),
            "examples": count,
        }
        for entry, (name, seed, sha256, count) in zip(entries, made, strict=True)
    ]
