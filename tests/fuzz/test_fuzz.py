"""A few runs of the fuzzer over every kind of input; ``make fuzz`` runs it for an hour."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.recipes import MADE, draw_file
from merganser.merging.mergekit import read_stages
from merganser.merging.moe.config import load_config, make_config
from merganser.merging.recipe import load_recipe, make_recipe

RUNS = 180


def test_what_is_drawn_is_sound(tmp_path: Path) -> None:
    """As far as it can be told without the models; runs of the fuzzer that change nothing see to the rest."""
    reads = {
        "experts": lambda path: make_config(load_config(path)),
        "rules": lambda path: make_recipe(load_recipe(path)),
    }
    drawn = set()
    for made in MADE:
        for number in range(40):
            path = tmp_path / "drawn.yaml"
            draw_file(made, random.Random(number), path)
            assert reads.get(made, lambda path: read_stages(path, tmp_path))(path)
            drawn.add(path.read_text())
    assert len(drawn) > 100


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
