"""A few runs of the fuzzer over every kind of input; ``make fuzz`` runs it for an hour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = 180


@pytest.mark.slow
def test_changed_inputs_are_refused_or_used_in_peace(tmp_path: Path) -> None:
    """In a process of its own, which forks before it has threads."""
    command = [
        sys.executable,
        "-m",
        "fuzz",
        "--runs",
        str(RUNS),
        "--minutes",
        "10",
        "--seed",
        "0",
        "--log",
        str(tmp_path),
    ]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
