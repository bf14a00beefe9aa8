"""What storing statistics in fewer bytes costs a merge: RegMean from each storage, scored on the contributors' tests.

    python benchmarks/storage.py --demo demo-out
    python benchmarks/storage.py --experiment experiments/small/ner-greedy.yaml --zoo ZOO --templates resources=FOLDER

``--demo`` takes the folder of a finished ``merganser demo``: the specialists are merged from copies of their
statistics and scored on the four tests. ``--experiment`` takes YAML files like ``merganser experiment``, and a zoo:
all of its contributors are merged at once, with the experiment's own code (what the zoo lacks is trained first).
Both may be given. Nothing in the folders is changed.

Each row of the table: bytes of the Gram matrices and what belongs to them (means, diagonals, scales), a contributor's
mean; the largest loading that bfloat16 needed; ‖G − G'‖/‖G‖, mean over inputs and contributors; and the scores. At the
end, for comparison, RegMean with diagonals alone, and the plain average, which needs no statistics.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merganser.evaluation import evaluate
from merganser.lab.grid.cells import Cell, expand
from merganser.lab.grid.compute import compute
from merganser.lab.grid.loading import load_config
from merganser.lab.grid.models import Models
from merganser.lab.zoo import Zoo
from merganser.merging import Contributor, merge
from merganser.statistics import FILE_NAME, Statistics, write_statistics
from merganser.statistics.comparison import distances
from merganser.statistics.storage import compress

STORAGES = "float32 bfloat16 lowrank:1 lowrank:4 lowrank:16 lowrank:64 lowrank:128"
GRAMS = ("gram.", "mean.", "covariance.", "scale.", "diagonal.", "factor.")

#: Scores (in percent, by test) of a merge with a method, from these files of statistics.
Score = Callable[[str, Sequence[Path], dict[str, object]], dict[str, float]]


@dataclass
class Suite:
    """Something to measure on: its name, the files of statistics, and how a merge from them is scored."""

    name: str
    statistics: list[Path]
    score: Score


def main() -> int:
    """Measure and print a Markdown table for each suite."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        if options.demo:
            measure(demo_suite(Path(options.demo), Path(work)), options, Path(work))
        if options.experiment:
            measure(experiment_suite(options), options, Path(work))
    return 0


def measure(suite: Suite, options: argparse.Namespace, work: Path) -> None:
    """Print the table of one suite, row by row as they come."""
    exact = [Statistics.open(path) for path in suite.statistics]
    whole = None
    for number, text in enumerate(options.storages.split()):
        copies = []
        for index, statistics in enumerate(exact):
            copy = work / f"{index}.safetensors"
            copies.append(write_statistics(copy, *compress(statistics, text)))
        opened = [Statistics.open(copy) for copy in copies]
        size = sum(gram_bytes(one) for one in opened) / len(opened)
        whole = whole or size
        scores = suite.score(options.method, copies, {})
        if number == 0:
            print(f"\n{suite.name}, {len(exact)} contributors, {options.method}\n")
            print(f"| storage | Gram matrices | of float32 | loading | distance | mean | {' | '.join(scores)} |")
            print(f"|{'---|' * (6 + len(scores))}")
        _row(
            f"`{text}`",
            f"{size / 1e6:.2f} MB",
            f"{size / whole:.1%}",
            f"{max(map(loading, opened)):.1e}" if any(map(loading, opened)) else "",
            f"{np.mean([d for pair in zip(exact, opened, strict=True) for d in gram_distances(*pair)]):.2g}",
            scores=scores,
        )
    diagonal = suite.score("regmean", suite.statistics, {"diagonal": True})
    _row("diagonals alone", "", "", "", "", scores=diagonal)
    _row("plain average", "", "", "", "", scores=suite.score("simple", suite.statistics, {}))


def _row(*cells: str, scores: dict[str, float]) -> None:
    values = [float(np.mean(list(scores.values()))), *scores.values()]
    print(f"| {' | '.join(cells)} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)


def gram_bytes(statistics: Statistics) -> int:
    """Bytes of the Gram matrices and what belongs to them."""
    return sum(info.nbytes for name, info in statistics.tensors.items() if name.startswith(GRAMS))


def loading(statistics: Statistics) -> float:
    """The largest τ that kept a rounded Gram matrix positive semi-definite."""
    names = [name for name in statistics.tensors if name.startswith("scale.")]
    return max((1 / float(statistics.packed(name)) - 1 for name in names), default=0.0)


def gram_distances(exact: Statistics, other: Statistics) -> list[float]:
    """Relative Frobenius distance of every Gram matrix."""
    return [d.relative or 0.0 for d in distances(exact, other) if d.kind == "gram"]


def demo_suite(folder: Path, work: Path) -> Suite:
    """The specialists of a demo, scored by macro-F1 on their domains' tests."""
    models = sorted(path.parent for path in folder.glob(f"models/*/{FILE_NAME}"))
    if not models:
        sys.exit(f"{folder} holds no finished demo")

    def score(method: str, statistics: Sequence[Path], options: dict[str, object]) -> dict[str, float]:
        contributors = [
            Contributor(model=str(model), statistics=None if method == "simple" else str(file))
            for model, file in zip(models, statistics, strict=True)
        ]
        merged = merge(contributors, work / "merged", method=method, options=options, overwrite=True)
        tests = {str(folder / "data" / model.name / "test.jsonl"): model.name for model in models}
        found = evaluate([merged], list(tests), max_length=128, bootstrap=0)
        return {tests[row.data]: 100 * row.scores["macro_f1"] for row in found.rows}

    return Suite("demo: macro-F1 on the domains' tests", [model / FILE_NAME for model in models], score)


class _Substituted(Models):
    """The models of an experiment, with other files of statistics by contributor."""

    substitutes: dict[str, Path]

    def statistics(self, spec, kind: str) -> Path:  # type: ignore[no-untyped-def]
        return self.substitutes.get(spec.name) or super().statistics(spec, kind)


def experiment_suite(options: argparse.Namespace) -> Suite:
    """All contributors of an experiment, scored by its key metric on their own and on the other tests."""
    templates = dict(pair.split("=", 1) for pair in options.templates)
    config = load_config(options.experiment, templates=templates, keep=options.filter_model)
    config = config.model_copy(update={"layout": "all"})
    models = _Substituted(config, Zoo(options.zoo))
    models.substitutes = {}
    largest = max((cell for cell in expand(config) if cell.kind == "merge"), key=lambda cell: len(cell.contributors))
    specs = largest.contributors
    files = [models.statistics(spec, "fisher" if options.method == "fisher" else "gram") for spec in specs]

    def score(method: str, statistics: Sequence[Path], changes: dict[str, object]) -> dict[str, float]:
        models.substitutes = dict(zip((spec.name for spec in specs), statistics, strict=True))
        wanted = config.methods[0].model_copy(update={"method": method, "options": changes, "title": "measured"})
        models.config = config.model_copy(update={"methods": (wanted,)})
        cell = Cell(**{**largest.__dict__, "method": wanted.key})
        return {name: 100 * score["value"] for name, score in compute(models, cell, "measured")["scores"].items()}

    return Suite(f"{config.name} (seed {largest.seed})", files, score)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", help="folder of a finished demo")
    parser.add_argument("--experiment", nargs="+", help="YAML files of an experiment")
    parser.add_argument("--templates", nargs="*", default=[], metavar="NAME=VALUE", help="of the experiment")
    parser.add_argument("--filter-model", nargs="*", default=[], help="keep these contributors only")
    parser.add_argument("--zoo", help="folder of the experiment's models")
    parser.add_argument("--method", default="regmean", choices=["regmean", "fisher"])
    parser.add_argument("--storages", default=STORAGES, help="separated by blanks")
    parser.add_argument("--work", help="folder for copies, as large as the statistics")
    options = parser.parse_args()
    if not options.demo and not options.experiment:
        parser.error("give --demo, --experiment or both")
    if options.experiment and not options.zoo:
        parser.error("--experiment needs --zoo")
    return options


if __name__ == "__main__":
    sys.exit(main())
