"""The script for a GPU, at toy size on the processor: every row is there, and the device agrees with itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def test_the_script_runs_on_the_processor(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "toy", "--device", "cpu", "--output", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert {row["work"] for row in rows} >= {"simple", "ties", "regmean", "collect"}
    assert all(row["seconds"] > 0 and row["difference"] < 1e-6 for row in rows)
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8").count("\n| ") == len(rows) + 2
