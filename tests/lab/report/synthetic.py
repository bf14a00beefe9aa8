"""Plausible result rows of all four layouts, from a seeded generator.

python tests/lab/report/synthetic.py FOLDER     writes FOLDER/<experiment>/cells/<id>.json
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

EMOTION = ("tec", "isear", "crowdflower", "tales-emotion", "dailydialog")
EMOTION_OUT = ("affectivetext", "electoraltweets", "emoint", "grounded_emotions", "ssec")
LABELS = ("anger", "disgust", "fear", "joy", "noemo", "sadness", "surprise")
GLUE = {"cola": "matthews", "sst2": "accuracy", "mrpc": "accuracy", "stsb": "pearson", "rte": "accuracy"}
MERGES = {"simple": "Simple", "fisher": "Fisher", "regmean": "RegMean"}
GAIN = {"simple": 0.0, "fisher": 0.012, "regmean": 0.045, "individual": 0.06, "ensemble": 0.03, "multitask": 0.07}
Row = dict[str, Any]


def sha(*parts: object) -> str:
    """A stand-in for a content's hash."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_row(
    *,
    layout: str,
    kind: str,
    method: str,
    contributors: Sequence[str],
    seed: int,
    tests: dict[str, str],
    experiment: str = "",
    model: str = "all-MiniLM-L6-v2",
    heads: str = "same",
    title: str | None = None,
    suite: str = "emotion",
    metrics: dict[str, str] | None = None,
    labels: Sequence[str] = (),
    search: bool = False,
) -> Row:
    """A row with scores that depend on all arguments; ``tests`` maps test → domain."""
    experiment = experiment or f"{suite}-{layout}"
    cell = sha(experiment, model, heads, kind, method, tuple(contributors), seed, search)[:16]
    draw = random.Random(cell)
    scores = {}
    for test, domain in tests.items():
        base = 0.3 + 0.3 * random.Random(test).random() + 0.04 * random.Random(f"{test}{seed}").random()
        lost = 0.02 * len(contributors) if kind == "merge" else 0.0
        drop = {"in": 0.0, "out": 0.06, "other": 0.15}[domain]
        drop += 0.04 if heads == "different" and kind == "merge" else 0.0
        value = base + GAIN.get(method, 0.03) - lost - drop + draw.gauss(0, 0.012)
        per_label = {label: min(0.95, max(0.02, value + draw.gauss(0, 0.15))) for label in labels}
        metric = (metrics or {}).get(test.partition("[")[0], "macro_f1")
        scores[test] = {
            "domain": domain,
            "metric": metric,
            "value": value,
            "all": {metric: value, "micro_f1": value + 0.08},
            "per_label": per_label,
            "examples": 300,
            "truncated": 0,
        }
    average = {}
    for domain in ("in", "out"):
        values = [score["value"] for score in scores.values() if score["domain"] == domain]
        if values:
            average[domain] = sum(values) / len(values)
    chosen = None
    if search:
        tried = [round(0.1 * step, 1) for step in range(1, 10)]
        candidates = [{"coefficients": [x, round(1 - x, 1)], "dev": 0.4 + draw.gauss(0, 0.02)} for x in tried]
        best = max(range(len(candidates)), key=lambda i: candidates[i]["dev"])
        chosen = {"by": "dev", "candidates": candidates, "best": best}
    return {
        "format": 1,
        "cell": cell,
        "experiment": experiment,
        "suite": suite,
        "model": model,
        "layout": layout,
        "kind": kind,
        "method": method,
        "title": title or {**MERGES, "multitask": "Multi-task"}.get(method, method.capitalize()),
        "contributors": list(contributors),
        "seed": seed,
        "heads": heads,
        "scores": scores,
        "average": average,
        "chosen": chosen,
        "provenance": {
            "base": sha(model),
            "contributors": [
                {
                    "name": name,
                    "zoo": sha("zoo", name, seed)[:16],
                    "seed": seed,
                    "weights": sha("weights", name, seed),
                    "statistics": sha("statistics", name, seed) if method == "regmean" else None,
                    "score": 0.5,
                }
                for name in contributors
            ],
            "data": {f"{test}[test]": sha(test) for test in tests},
            "tensors": {"regmean": 74, "average": 10} if method == "regmean" else {},
            "settings": {"training": {"lr": 1e-5, "epochs": 20}, "statistics": {"examples": 1000}},
            "versions": {"merganser": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "seconds": round(5 + 10 * draw.random(), 2),
            "finished": f"2026-11-23T15:{draw.randrange(60):02d}:00Z",
        },
    }


def pairs(
    names: Sequence[str] = EMOTION,
    outs: Sequence[str] = EMOTION_OUT,
    seeds: Iterable[int] = (1, 2, 3, 4, 5),
    heads: Sequence[str] = ("same", "different"),
    **more: Any,
) -> list[Row]:
    """Every pair, with individual models and an ensemble."""
    rows = []
    for head, seed in itertools.product(heads, seeds):
        common = {"layout": "pairs", "seed": seed, "heads": head, "labels": LABELS, **more}
        out = dict.fromkeys(outs, "out")
        for name in names:
            rows.append(
                make_row(
                    kind="individual", method="individual", contributors=[name], tests={name: "in", **out}, **common
                )
            )
        for pair in itertools.combinations(names, 2):
            tests = {**dict.fromkeys(pair, "in"), **out}
            rows.append(make_row(kind="ensemble", method="ensemble", contributors=pair, tests=tests, **common))
            rows += [make_row(kind="merge", method=m, contributors=pair, tests=tests, **common) for m in MERGES]
    return rows


def greedy(seeds: Iterable[int] = (1, 2, 3)) -> list[Row]:
    """2 … all models; multi-task learning on all only."""
    rows = []
    for seed in seeds:
        common: dict[str, Any] = {"layout": "greedy", "seed": seed, "labels": LABELS}
        for name in EMOTION:
            tests = own_tests(name)
            rows.append(make_row(kind="individual", method="individual", contributors=[name], tests=tests, **common))
        for size in range(2, len(EMOTION) + 1):
            first = EMOTION[:size]
            tests = {**dict.fromkeys(first, "in"), **dict.fromkeys(EMOTION_OUT, "out")}
            for kind, method in (("ensemble", "ensemble"), *(("merge", m) for m in MERGES)):
                rows.append(make_row(kind=kind, method=method, contributors=first, tests=tests, **common))
        rows.append(make_row(kind="multitask", method="multitask", contributors=EMOTION, tests=tests, **common))
    return rows


def own_tests(name: str) -> dict[str, str]:
    """What an individual model of a greedy experiment is scored on."""
    inside = {test: "in" if test == name else "other" for test in EMOTION}
    return {**inside, **dict.fromkeys(EMOTION_OUT, "out")}


def partitions(seeds: Iterable[int] = (1, 2, 3)) -> list[Row]:
    """Two partitions of each task, heads merged too."""
    rows = []
    for seed, task in itertools.product(seeds, GLUE):
        parts = [f"{task}/1", f"{task}/2"]
        common: dict[str, Any] = {
            "layout": "partitions",
            "seed": seed,
            "tests": {task: "in"},
            "suite": "glue",
            "metrics": GLUE,
            "model": "distilbert-base-uncased",
        }
        for part in parts:
            rows.append(make_row(kind="individual", method="individual", contributors=[part], **common))
        rows += [make_row(kind="merge", method=m, contributors=parts, **common) for m in MERGES]
    return rows


def glue_pairs(seeds: Iterable[int] = (1, 2, 3)) -> list[Row]:
    """Pairs of different tasks: separate heads, no out-of-domain tests, RegMean with and without a search."""
    rows = pairs(tuple(GLUE), (), seeds, ("separate",), suite="glue", metrics=GLUE, model="distilbert-base-uncased")
    for row in rows:
        for score in row["scores"].values():
            score["per_label"] = {}
    for seed, pair in itertools.product(seeds, itertools.combinations(GLUE, 2)):
        tests = dict.fromkeys(pair, "in")
        rows.append(
            make_row(
                layout="pairs",
                kind="merge",
                method="regmean",
                contributors=pair,
                seed=seed,
                tests=tests,
                heads="separate",
                suite="glue",
                metrics=GLUE,
                model="distilbert-base-uncased",
                search=True,
            )
        )
    return rows


def all_at_once(seeds: Iterable[int] = (1,)) -> list[Row]:
    """All models at once, a single seed."""
    whole = {**dict.fromkeys(EMOTION, "in"), **dict.fromkeys(EMOTION_OUT, "out")}
    rows = []
    for seed in seeds:
        common: dict[str, Any] = {"layout": "all", "seed": seed}
        for name in EMOTION:
            tests = own_tests(name)
            rows.append(make_row(kind="individual", method="individual", contributors=[name], tests=tests, **common))
        rows.append(make_row(kind="ensemble", method="ensemble", contributors=EMOTION, tests=whole, **common))
        rows += [make_row(kind="merge", method=m, contributors=EMOTION, tests=whole, **common) for m in MERGES]
    return rows


def write_rows(folder: Path, rows: Iterable[Row]) -> Path:
    """Write rows as an experiment does; returns the folder."""
    for row in rows:
        cells = folder / row["experiment"] / "cells"
        cells.mkdir(parents=True, exist_ok=True)
        (cells / f"{row['cell']}.json").write_text(json.dumps(row), encoding="utf-8")
    return folder


if __name__ == "__main__":
    incomplete = greedy()
    incomplete = [row for row in incomplete if not (row["method"] == "fisher" and row["seed"] == 3)]
    write_rows(Path(sys.argv[1]), [*pairs(), *incomplete, *partitions(), *glue_pairs(), *all_at_once()])
