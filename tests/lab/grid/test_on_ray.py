"""A grid on a real Ray cluster of two nodes, one of which is killed: the same rows as in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from merganser.engines import Job, Outcome, RayEngine
from merganser.lab.grid.cells import expand
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.run import run_experiment
from ray_cluster import NODE

pytest.importorskip("ray", reason="Ray is not installed: pip install 'merganser[ray]'")
pytestmark = pytest.mark.slow


def test_a_grid_survives_the_loss_of_a_node(
    tmp_path: Path, trial: Callable[..., ExperimentConfig], cluster: Any
) -> None:
    config = trial(seeds=[1], contributors=["one", "two"], methods=["simple", "regmean"])
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"memory": "100MB"})})
    second = cluster.add_node(num_cpus=1, **NODE)

    class Losing(RayEngine):
        """Loses the second node when the first job has ended."""

        nodes = [second]  # noqa: RUF012

        def run(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
            for outcome in super().run(jobs, function):
                if self.nodes:
                    cluster.remove_node(self.nodes.pop(), allow_graceful=False)
                yield outcome

    here = run_experiment(config, results=tmp_path / "serial", zoo=tmp_path / "zoo-serial")
    there = run_experiment(config, results=tmp_path / "ray", zoo=tmp_path / "zoo-ray", engine=Losing(cluster.address))
    assert here.failures == there.failures == ()
    assert Losing.nodes == [] and there.cells == len(expand(config))
    assert _scores(there.folder) == _scores(here.folder)


def _scores(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text())["scores"] for path in (folder / "cells").glob("*.json")}
