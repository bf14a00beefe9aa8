"""Collection on a real cluster of two nodes of this machine, one of which is killed in the middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import WORDS
from merganser.collection import collect, jobs
from merganser.engines import RayEngine
from merganser.errors import UserError
from ray_cluster import NODE, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'merganser[ray]'")
pytestmark = pytest.mark.slow

HERE = str(Path(__file__).parent)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    rows = [{"text": " ".join(WORDS[n % 7 : n % 7 + 3 + n % 9]), "label": n % 2} for n in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_killed_machine_changes_no_byte(
    cluster: Any,
    data: Path,
    save_ready: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, work = save_ready("m"), tmp_path / "work"
    work.mkdir()
    options: dict[str, Any] = {
        "shard_examples": 8, "fisher": "expected", "fisher_examples": 12, "sample_tokens": 0.5, "label": "x",
    }  # fmt: skip
    alone = collect(model, data, output=tmp_path / "alone.safetensors", **options)
    node = cluster.add_node(num_cpus=2, **NODE)
    (work / "doomed").write_text(node.node_id)
    monkeypatch.setattr(jobs, "FUNCTION", "collect_jobs:held")

    def kill() -> None:
        wait_until(lambda: any(work.glob("held.*")), "no shard runs on the second machine", seconds=200)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    engine = RayEngine(cluster.address, environment={"PYTHONPATH": HERE}, description="collecting")
    spread = collect(model, data, output=work / "spread.safetensors", engine=engine, **options)
    killer.join()
    assert spread.read_bytes() == alone.read_bytes()
    assert "its worker was lost, so it runs again" in capfd.readouterr().err
    assert not any(path.name.startswith(".") for path in work.iterdir())  # no folder of shards is left


def test_a_job_that_fails_leaves_nothing(
    cluster: Any, data: Path, save_ready: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_ready("m")
    before = sorted(path.name for path in model.iterdir())
    monkeypatch.setattr(jobs, "FUNCTION", "collect_jobs:absent")
    with pytest.raises(UserError, match="shard 1 of 1 failed"):
        collect(model, data, engine="ray", ray_address=cluster.address)
    assert sorted(path.name for path in model.iterdir()) == before
