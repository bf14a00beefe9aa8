"""The script runs at toy size, and what it holds merganser against gives the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "spectral.py"


@pytest.mark.parametrize(("threads", "name"), [("1", "spectral.json"), ("2", "spectral-2-threads.json")])
def test_all_variants_agree(tmp_path: Path, threads: str, name: str) -> None:
    command = [sys.executable, str(SCRIPT), "--layers", "2", "--hidden", "32", "--judged", "1", "--threads", threads]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    for kind in ("Gaussian", "i^-0.5", "low rank + rounding"):
        for method in ("tsv_m", "iso_c"):
            assert len(found[kind]["errors"][method]) == len(found[kind]["seconds"][method]) == 3
            assert {len(missed) for missed in found[kind]["errors"][method].values()} == {6 * int(threads)}
            assert all(max(missed) < 1e-4 for missed in found[kind]["errors"][method].values())
