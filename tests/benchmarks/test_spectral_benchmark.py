"""The script runs at toy size, and what it holds merganser against gives the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "spectral.py"


def test_all_variants_agree(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--layers", "1", "--hidden", "32"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "spectral.json").read_text(encoding="utf-8"))
    for kind in ("Gaussian", "i^-0.5", "low rank + rounding"):
        for method in ("tsv_m", "iso_c"):
            assert len(found[kind]["errors"][method]) == len(found[kind]["seconds"][method]) == 3
            assert all(max(missed) < 1e-4 for missed in found[kind]["errors"][method].values())
