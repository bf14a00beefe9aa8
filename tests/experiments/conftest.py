"""A real Ray cluster on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from ray_cluster import NODE, processes, wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one cpu. Whatever it starts is gone afterwards."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'merganser[ray]'")
    from ray.cluster_utils import Cluster

    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)  # sockets need a short path
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NODE})
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            wait_until(lambda: not processes(folder), "Ray processes are left over")
