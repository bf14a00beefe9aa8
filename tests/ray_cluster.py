"""Starting and watching a Ray cluster on this machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


def processes(folder: str) -> list[psutil.Process]:
    """What runs with this folder on its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(folder in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone in the meantime
            continue
    return found


def wait_until(happened: Any, complaint: str, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, complaint
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one cpu. Whatever it starts is gone afterwards."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'merganser[ray]'")
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
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
