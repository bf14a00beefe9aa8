"""Every kind of cell of a grid, computed again by other code: the same scores, the same merged weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import merganser
from lab import recompute
from lab.recompute import LABELS, Contributor, Emotion, Entities, Example, Glue, State
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.run import run_experiment
from merganser.lab.zoo import Zoo

HEAD = "classifier.out_proj.*"  # the multi-label head, which the paper averages row by row
PUBLISHED = {"augment_bias": False, "embeddings": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "simple": ("simple", {}),
    "fisher": ("fisher", {}),
    "as published": ("regmean", {"alpha": 0.1, **PUBLISHED}),
    "as published for GLUE": ("regmean", {"alpha": 1.0, **PUBLISHED}),
    "regmean": ("regmean", {}),
}
#: The softmax over keys does not see them: their information is 0 but for rounding.
KEY_BIASES = ("key.bias", "k_lin.bias")
LENGTH, EXAMPLES, FISHER_EXAMPLES = 24, 30, 12
COMMON: dict[str, Any] = {"statistics": {"examples": EXAMPLES, "fisher_examples": FISHER_EXAMPLES}, "seeds": 1}


def methods(*names: str) -> list[dict[str, Any]]:
    return [{"method": METHODS[name][0], "title": name, "options": METHODS[name][1]} for name in names]


def training(epochs: int, batch_size: int, rate: float = 3e-3) -> dict[str, Any]:
    return {"epochs": epochs, "batch_size": batch_size, "learning_rate": rate, "max_length": LENGTH}


class Lab:
    """A grid that has been run, and the same models seen by other code.

    Args:
        values: of the configuration.
        suite: reads the data, scores, and knows the likelihood.
        place: of results and zoo.
    """

    def __init__(self, values: dict[str, Any], suite: Any, place: Path) -> None:
        self.config, self.suite = ExperimentConfig.model_validate({**COMMON, **values}), suite
        done = run_experiment(self.config, results=place / "results", zoo=place / "zoo")
        assert not done.failures
        self.zoo, self.folder = Zoo(place / "zoo"), done.folder
        self.rows = [json.loads(path.read_text()) for path in sorted((done.folder / "cells").iterdir())]
        for name in ("network", "outputs", "contributor", "examples", "known"):  # asked for many times
            setattr(self, name, cache(getattr(self, name)))
        self._merged: dict[str, State] = {}

    def set_of(self, contributor: str) -> str:
        return self.config.set_of(contributor.split("/")[0])

    def train(self, contributor: str) -> list[Example]:
        """The training data of a contributor, perhaps a part of a data set."""
        whole = self.suite.examples(self.set_of(contributor), "train")
        if "/" not in contributor:
            return whole
        part = int(contributor.split("/")[1]) - 1
        truths, numbers = [e.truth for e in whole], self.set_of(contributor) == "stsb"
        places = recompute.non_iid(truths, self.config.partitions.total, seed=1, numbers=numbers)[part]
        return [whole[i] for i in places]

    def examples(self, name: str, domain: str) -> list[Example]:
        whole = domain == "out" and self.config.tests.out_split == "all"
        return self.suite.examples(name, *(("train", "dev", "test") if whole else ("test",)))

    def known(self, contributor: str) -> Any:
        return self.suite.known(self.set_of(contributor))

    def network(self, folder: Path) -> Any:
        return recompute.open_model(self.suite, folder)

    def outputs(self, folder: Path, name: str, domain: str) -> list[np.ndarray]:
        return recompute.predict(self.network(folder), self.examples(name, domain))

    def contributor(self, name: str, folder: Path) -> Contributor:
        network, rows = self.network(folder), self.train(name)
        return Contributor(
            {key: parameter.detach() for key, parameter in network.named_parameters()},
            recompute.moments(network, rows[:EXAMPLES]),
            recompute.fisher_information(network, rows[:FISHER_EXAMPLES], self.suite.terms),
            self.known(name),
        )

    def folders(self, row: dict[str, Any]) -> dict[str, Path]:
        """The zoo's model folder of each contributor of a row."""
        listed = row["provenance"]["contributors"]
        return {one["name"]: self.zoo.entry(one["zoo"]).path for one in listed}

    def contributors(self, row: dict[str, Any]) -> list[Contributor]:
        return [self.contributor(name, folder) for name, folder in self.folders(row).items()]

    def said(self, row: dict[str, Any], name: str, domain: str) -> list[np.ndarray]:
        """The logits that a row's score is computed from; minus infinity for labels that nobody has learnt."""
        folders = self.folders(row)
        if row["kind"] == "ensemble":
            found = self._ensemble(folders, name, domain)
        elif row["kind"] == "merge":
            found = self._of_merge(row, name, domain)
        else:
            (folder,) = folders.values()
            inside = folder / name  # where each task has a head of its own
            found = self.outputs(inside if inside.is_dir() else folder, name, domain)
        known = [self.known(contributor) for contributor in row["contributors"]]
        if known[0] is None:
            return found
        return [np.where(np.any(known, axis=0), logits, -np.inf) for logits in found]

    def _ensemble(self, folders: dict[str, Path], name: str, domain: str) -> list[np.ndarray]:
        """The mean of the logits over the models that know the label."""
        models = [self.outputs(folder, name, domain) for folder in folders.values()]
        known = [self.known(contributor) for contributor in folders]
        if known[0] is None:
            return [np.mean(logits, axis=0) for logits in zip(*models, strict=True)]
        weights = np.array(known, float) / np.maximum(np.sum(known, axis=0), 1)
        return [np.sum(weights * np.array(logits), axis=0) for logits in zip(*models, strict=True)]

    def _of_merge(self, row: dict[str, Any], name: str, domain: str) -> list[np.ndarray]:
        folders = self.folders(row)
        separate = row["heads"] == "separate"
        own = next(c for c in folders if self.set_of(c) == name) if separate else next(iter(folders))
        network = copy.deepcopy(self.network(folders[own]))
        weights = self.merged(row)
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if not (separate and is_head(key)):
                    parameter.copy_(weights[key])
        return recompute.predict(network, self.examples(name, domain))

    def excluded(self, kind: str) -> tuple[str, ...]:
        return next(method.exclude for method in self.config.methods if method.title == kind)

    def merged(self, row: dict[str, Any]) -> State:
        """The merged parameters of a row, without the heads where each contributor keeps its own."""
        if row["cell"] not in self._merged:
            method, options = METHODS[row["method"]]
            contributors = self.contributors(row)
            if row["heads"] == "separate":
                contributors = [
                    replace(one, weights=_without_head(one.weights), moments=_without_head(one.moments))
                    for one in contributors
                ]
            averaged = bool(self.excluded(row["method"]))
            self._merged[row["cell"]] = recompute.merged(contributors, method, head_averaged=averaged, **options)
        return self._merged[row["cell"]]


def _without_head(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not is_head(name)}


def is_head(name: str) -> bool:
    return name.startswith(("classifier", "pre_classifier"))


@pytest.fixture(scope="module")
def emotion(pretrained: Callable[..., Path], tiny_resources: Path, tmp_path_factory: Any) -> Lab:
    base, root = pretrained("roberta"), tiny_resources / "emotion_splits"
    values = {
        "name": "emotion",
        "training": training(epochs=9, batch_size=3, rate=5e-3),
        "suite": {"name": "emotion", "root": str(root), "options": {"threshold": 0.4}},
        "pretrained": {"model": str(base), "title": "tiny RoBERTa"},
        "contributors": {"model0": {"set": "dailydialog"}, "model1": {"set": "tec"}, "model2": {"set": "isear"}},
        "layout": "greedy",
        "methods": [
            {**method, "exclude": [HEAD] if method["title"] == "as published" else []}
            for method in methods("simple", "fisher", "as published", "regmean")
        ],
        "comparators": ["individual", "ensemble", "multitask"],
        "tests": {"out_of_domain": ["emoint", "ssec", "affectivetext"], "out_split": "all"},
    }
    suite = Emotion(root, recompute.open_plain_tokenizer(base), LENGTH, threshold=0.4)
    return Lab(values, suite, tmp_path_factory.mktemp("emotion"))


@pytest.fixture(scope="module")
def ner(pretrained: Callable[..., Path], tiny_resources: Path, tmp_path_factory: Any) -> Lab:
    base, root = pretrained("roberta"), tiny_resources / "ner"
    values = {
        "name": "ner",
        "training": training(epochs=8, batch_size=4, rate=5e-3),
        "suite": {"name": "ner", "root": str(root)},
        "pretrained": {"model": str(base), "title": "tiny RoBERTa"},
        "contributors": ["onto-bc", "onto-nw", "onto-wb"],
        "statistics": {**COMMON["statistics"], "fisher": "empirical"},
        "layout": "greedy",
        "methods": methods("simple", "fisher", "as published", "regmean"),
        "comparators": ["individual", "ensemble", "multitask"],
        "tests": {"out_of_domain": ["conll2003", "twitter"]},
    }
    suite = Entities(root, recompute.open_tokenizer(base), LENGTH)
    return Lab(values, suite, tmp_path_factory.mktemp("ner"))


def glue_values(base: Path, root: Path, epochs: int) -> dict[str, Any]:
    return {
        "name": "glue",
        "training": training(epochs, batch_size=8),
        "suite": {"name": "glue", "root": str(root)},
        "pretrained": {"model": str(base), "title": "tiny DistilBERT"},
    }


@pytest.fixture(scope="module")
def pairs(pretrained: Callable[..., Path], tiny_resources: Path, tmp_path_factory: Any) -> Lab:
    base, root = pretrained("distilbert"), tiny_resources / "glue"
    values = {
        **glue_values(base, root, epochs=6),
        "contributors": ["cola", "stsb", "mnli"],
        "layout": "pairs",
        "methods": methods("simple", "fisher", "as published for GLUE", "regmean"),
        "heads": "separate",
        "comparators": ["individual", "multitask"],
    }
    suite = Glue(root, recompute.open_plain_tokenizer(base), LENGTH)
    return Lab(values, suite, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def parts(pretrained: Callable[..., Path], tiny_resources: Path, tmp_path_factory: Any) -> Lab:
    base, root = pretrained("distilbert"), tiny_resources / "glue"
    values = {
        **glue_values(base, root, epochs=10),
        "contributors": ["mnli", "stsb"],
        "layout": "partitions",
        "methods": methods("simple", "fisher", "as published", "regmean"),
        "partitions": {"parts": 2, "total": 60},
        "comparators": ["individual", "ensemble"],
    }
    suite = Glue(root, recompute.open_plain_tokenizer(base), LENGTH)
    return Lab(values, suite, tmp_path_factory.mktemp("parts"))


LABS = ("emotion", "ner", "pairs", "parts")
MERGES = [
    (lab, kind)
    for lab in LABS
    for kind in METHODS
    if kind != ("as published" if lab == "pairs" else "as published for GLUE")
]
COMPARED = [
    (lab, kind)
    for lab in LABS
    for kind in ("individual", "ensemble", "multitask")
    if (lab, kind) not in (("pairs", "ensemble"), ("parts", "multitask"))
]


@pytest.fixture
def grid(lab: str, request: pytest.FixtureRequest) -> Lab:
    found: Lab = request.getfixturevalue(lab)
    return found


@pytest.mark.parametrize(("lab", "kind"), COMPARED + MERGES)
def test_scores(grid: Lab, kind: str) -> None:
    rows = [row for row in grid.rows if row["method"] == kind]
    assert rows
    for row in rows:
        means: dict[str, list[float]] = {}
        for name, found in row["scores"].items():
            examples = grid.examples(name, found["domain"])
            said = grid.said(row, name, found["domain"])
            expected = grid.suite.score(name, said, examples)
            rounding = 1e-4 if found["metric"] == "pearson" else 1e-6  # of numbers that are nearly the same
            assert found["value"] == pytest.approx(expected, abs=rounding), (row["contributors"], name)
            assert (found["examples"], found["truncated"]) == (len(examples), sum(e.cut for e in examples))
            if isinstance(grid.suite, Emotion):
                assert found["per_label"] == pytest.approx(grid.suite.by_label(said, examples), abs=1e-6)
            means.setdefault(found["domain"], []).append(found["value"])
        assert row["average"] == pytest.approx({d: np.mean(v) for d, v in means.items() if d != "other"})


@pytest.mark.parametrize("lab", LABS)
def test_the_methods_can_be_told_apart(grid: Lab) -> None:
    """Or else a method that runs in the place of another one would pass the tests above."""
    by_method: dict[str, list[tuple[Any, float]]] = {}
    for row in grid.rows:
        if row["kind"] in ("merge", "ensemble"):
            values = [(row["contributors"], name, one["value"]) for name, one in row["scores"].items()]
            by_method.setdefault(row["method"], []).extend(values)
    different = {json.dumps(sorted(values)) for values in by_method.values()}
    assert len(different) == len(by_method) >= 4


@pytest.mark.parametrize(("lab", "kind"), MERGES)
def test_merged_weights(grid: Lab, kind: str, tmp_path: Path) -> None:
    row = max((row for row in grid.rows if row["method"] == kind), key=lambda row: len(row["contributors"]))
    method, options = METHODS[kind]
    contributors = []
    for name, folder in grid.folders(row).items():
        known, kind_of = grid.known(name), {"fisher": "fisher", "regmean": "gram"}.get(method)
        labels = None if known is None else [label for label, k in zip(LABELS, known, strict=True) if k]
        statistics = None
        if kind_of:
            (statistics,) = map(str, folder.parent.glob(f"statistics/{kind_of}-*.safetensors"))
        contributors.append(merganser.Contributor(model=str(folder), statistics=statistics, labels=labels))
    separate = {"keep_separate": ["classifier.*", "pre_classifier.*"]} if row["heads"] == "separate" else {}
    exclude = grid.excluded(kind)
    merganser.merge(contributors, tmp_path / "merged", method=method, options=options, exclude=exclude, **separate)
    (file,) = (tmp_path / "merged").glob("model*.safetensors")
    found, expected = load_file(file), grid.merged(row)
    assert set(found) == set(expected)
    everyone = grid.contributors(row)
    for name, tensor in expected.items():
        if method == "fisher" and name.endswith(KEY_BIASES):
            continue
        seen = [one.moments[name.removesuffix(".weight")].gram for one in everyone] if is_linear(name, everyone) else []
        wrong = distance(found[name].double() - tensor, seen)
        assert wrong < 1e-6 + 1e-3 * max(distance(one.weights[name] - tensor, seen) for one in everyone), name


def is_linear(name: str, contributors: Sequence[Contributor]) -> bool:
    known = contributors[0].moments.get(name.removesuffix(".weight"))
    return known is not None and name.endswith(".weight") and not isinstance(known.gram, float)


def distance(difference: torch.Tensor, grams: Sequence[torch.Tensor]) -> float:
    """Of two linear maps that of their outputs on what they are given, which alone is determined; else the largest."""
    if not grams:
        return float(difference.abs().max())
    return float(torch.stack([(difference @ gram * difference).sum() for gram in grams]).sum().clamp_min(0).sqrt())


@pytest.mark.parametrize("lab", ["emotion", "ner"])
def test_greedy_order_is_that_of_the_development_data(grid: Lab) -> None:
    """The individual models' mean score on the other contributors' development data, the best first."""
    means = {}
    for row in grid.rows:
        if row["kind"] == "individual":
            (name,) = row["contributors"]
            values = []
            for other in grid.config.contributors:
                if other != name:
                    examples = grid.suite.examples(grid.set_of(other), "dev")
                    outputs = recompute.predict(grid.network(grid.folders(row)[name]), examples)
                    if grid.known(name) is not None:
                        outputs = [np.where(grid.known(name), logits, -np.inf) for logits in outputs]
                    values.append(grid.suite.score(grid.set_of(other), outputs, examples))
            means[name] = np.mean(values)
    order = sorted(means, key=lambda name: -means[name])
    assert len(set(means.values())) == len(order) == 3
    groups = {tuple(row["contributors"]) for row in grid.rows if row["kind"] == "merge"}
    assert groups == {tuple(order[:2]), tuple(order)}


@pytest.mark.parametrize("lab", LABS)
def test_every_model_has_seen_its_own_training_data_and_nothing_else(grid: Lab) -> None:
    """The optimiser moves those rows of the embedding alone whose tokens occurred, and without decay no other."""
    base = load_file(Path(grid.config.pretrained.model) / "model.safetensors")
    (key,) = (name for name in base if name.endswith("word_embeddings.weight"))
    seen_by = {}
    for row in grid.rows:
        if row["kind"] not in ("individual", "multitask"):
            continue
        (folder,) = grid.folders(row).values()
        inside = [folder / name for name in row["contributors"] if (folder / name).is_dir()]
        tokens = {
            int(token)
            for contributor in row["contributors"]
            for example in grid.train(contributor)
            for token in example.inputs["input_ids"][0]
        }
        for place in inside or [folder]:
            moved = (load_file(place / "model.safetensors")[key] != base[key]).any(dim=1)
            assert set(moved.nonzero().flatten().tolist()) == tokens
        seen_by[row["kind"], *row["contributors"]] = frozenset(tokens)
    assert len(set(seen_by.values())) > 1  # they have tokens of their own


@pytest.mark.parametrize("lab", ["emotion", "ner"])
def test_the_best_epoch_on_development_data_is_kept(grid: Lab) -> None:
    """Of a multi-task model by the mean over the parts; a threshold of one's own does not change what is chosen."""
    suite = replace(grid.suite, threshold=0.5) if isinstance(grid.suite, Emotion) else grid.suite
    for row in grid.rows:
        if row["kind"] in ("individual", "multitask"):
            entry = grid.zoo.entry(row["provenance"]["contributors"][0]["zoo"])
            values = []
            for contributor in row["contributors"]:
                name = grid.set_of(contributor)
                examples = grid.suite.examples(name, "dev")
                outputs = recompute.predict(grid.network(entry.path), examples)
                values.append(suite.score(name, outputs, examples))
            scores = entry.facts["dev_scores"]
            assert max(scores) == scores[entry.facts["best_epoch"] - 1] == pytest.approx(np.mean(values), abs=2e-6)


def test_expected_fisher_information_of_tags(ner: Lab, tmp_path: Path) -> None:
    """The tags are drawn, so that the head's information is near its expectation, Σ p (1 − p) over the words."""
    zoo = Path(shutil.copytree(ner.zoo.url, tmp_path / "zoo"))
    for file in zoo.glob("*/statistics/*"):
        file.unlink()
    changes = {"methods": ["fisher"], "statistics": {"fisher": "expected", "fisher_examples": 40}}
    config = ExperimentConfig.model_validate({**ner.config.model_dump(mode="json"), **changes})
    assert not run_experiment(config, results=tmp_path / "results", zoo=zoo).failures
    row = max(ner.rows, key=lambda row: len(row["provenance"]["contributors"]))
    for name, folder in ner.folders(row).items():
        (file,) = zoo.glob(f"{folder.parent.name}/statistics/fisher-*.safetensors")
        examples, total = ner.train(name), 0.0
        for logits, example in zip(recompute.predict(ner.network(folder), examples), examples, strict=True):
            odds = np.exp(logits[np.array(example.firsts) >= 0])
            p = odds / odds.sum(axis=1, keepdims=True)
            total += float((p * (1 - p)).sum()) / len(examples)
        assert float(load_file(file)["fisher.classifier.bias"].sum()) == pytest.approx(total, rel=0.25)
