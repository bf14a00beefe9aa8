"""The command line, killed with SIGKILL in the middle of the cells, goes on and ends with the same rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from click.testing import CliRunner

from merganser.cli import cli
from merganser.lab.grid.config import ExperimentConfig

Trial = Callable[..., ExperimentConfig]


def test_sigkill_and_the_same_command_again(tmp_path: Path, trial: Trial) -> None:
    config = trial(comparators=["individual", "ensemble"], seeds=[1])
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    arguments = ["experiment", str(file), "--zoo", str(tmp_path / "zoo"), "--results", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", "merganser", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    cells = tmp_path / "killed" / "trial" / "cells"
    try:
        for _ in range(2400):
            if cells.is_dir() and len(list(cells.glob("*.json"))) >= 2:
                break
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    assert len(there) >= 2
    for text in there.values():
        json.loads(text)  # every file that is there is whole
    again = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert all((cells / name).read_bytes() == text for name, text in there.items())  # none was done twice
    whole = [*arguments[:-1], str(tmp_path / "whole")]
    assert CliRunner().invoke(cli, whole, catch_exceptions=False).exit_code == 0
    first, second = _scores(cells), _scores(tmp_path / "whole" / "trial" / "cells")
    assert first == second and len(first) == 3 + 3 * 3  # individuals; for each pair an ensemble and two merges


def _scores(cells: Path) -> dict[str, object]:
    return {path.stem: json.loads(path.read_text())["scores"] for path in cells.glob("*.json")}
