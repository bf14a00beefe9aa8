"""The Ray engine on a real cluster of two nodes of this machine, one of which is killed in the middle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from merganser.engines import Job, Outcome, RayEngine
from merganser.errors import UserError
from ray_cluster import NODE, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'merganser[ray]'")
pytestmark = pytest.mark.slow

HERE = str(Path(__file__).parent)
DOUBLE = "grid_jobs:double"


def engine(cluster: Any, **settings: Any) -> RayEngine:
    return RayEngine(cluster.address, environment={"PYTHONPATH": HERE}, **settings)


def job(folder: Path, number: int, fail: str = "", **settings: Any) -> Job:
    payload = {"folder": str(folder), "id": f"job{number}", "number": number, "fail": fail}
    return Job(f"job{number}", f"number {number}", payload, cost=1, **settings)


def by_id(outcomes: Iterator[Outcome]) -> dict[str, Outcome]:
    return {outcome.job.id: outcome for outcome in outcomes}


def attempts(folder: Path, number: int) -> int:
    return len((folder / f"job{number}").read_text().splitlines())


def test_failures_stay_with_their_jobs_and_only_lost_workers_are_replaced(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, n, fail, cpus=0.5) for n, fail in enumerate(["", "user", "bug", "crash"])]
    found = by_id(engine(cluster, retries=1).run(jobs, DOUBLE))
    assert found["job0"].result == {"twice": 0, "pair": [1, 2]} and found["job0"].error is None
    assert found["job1"].error == str(UserError("no such model", where="model", mend="name another"))
    assert "ZeroDivisionError: a bug" in found["job2"].error
    assert "its worker was lost" in found["job3"].error and found["job3"].result is None
    assert [attempts(tmp_path, number) for number in range(4)] == [1, 1, 1, 2]
    assert "number 3: its worker was lost, so it runs again" in capfd.readouterr().err
    assert not ray.is_initialized()  # it has left, and the cluster goes on
    (again,) = engine(cluster).run([job(tmp_path, 7)], DOUBLE)
    assert again.result["twice"] == 14


def test_whoever_stops_looking_stops_the_jobs(cluster: Any, tmp_path: Path) -> None:
    jobs = [job(tmp_path, 0), *(job(tmp_path, number, "stay") for number in (1, 2, 3))]
    outcomes = engine(cluster).run(jobs, DOUBLE)
    assert next(outcomes).job.id == "job0"
    wait_until(lambda: len(workers(tmp_path)) > 1, "no other job starts", 200)
    outcomes.close()  # type: ignore[attr-defined]
    wait_until(lambda: not any(map(psutil.pid_exists, workers(tmp_path))), "a job runs on")
    assert len(workers(tmp_path)) < len(jobs)  # some have not even started


def workers(folder: Path) -> list[int]:
    return [int(text) for path in folder.iterdir() if (text := path.read_text())]


def test_a_job_too_large_for_every_machine_is_refused(cluster: Any, tmp_path: Path) -> None:
    for asked in ({"cpus": 1000}, {"gpus": 1000}, {"memory": 2**60}):
        with pytest.raises(UserError, match="no machine of the cluster has room for 'number 2'"):
            list(engine(cluster).run([job(tmp_path, 1), job(tmp_path, 2, **asked)], DOUBLE))
    with pytest.raises(UserError, match="takes 1 CPU, 1 licence"):
        list(engine(cluster, resources={"licence": 1}).run([job(tmp_path, 2)], DOUBLE))
    assert not any(tmp_path.iterdir())
    assert not ray.is_initialized()


def test_jobs_of_a_killed_machine_run_again_elsewhere(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=2, **NODE)
    doomed = node.node_id
    jobs = [
        Job(f"job{n}", f"job {n}", {"folder": str(tmp_path), "id": f"job{n}", "doomed": doomed}, cost=1)
        for n in range(10)
    ]

    def kill() -> None:
        wait_until(lambda: any(tmp_path.glob("blocked.*")), "no job runs on the second machine", 200)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = by_id(engine(cluster).run(jobs, "grid_jobs:short"))
    killer.join()
    assert sorted(found) == [f"job{n}" for n in range(10)]
    assert all(outcome.error is None for outcome in found.values())
    lost = {path.name.removeprefix("blocked.") for path in tmp_path.glob("blocked.*")}
    assert lost
    for name, outcome in found.items():
        ran = {path.name.split(".")[1] for path in tmp_path.glob(f"{name}.*.started")}
        if name in lost:  # once there and once here
            assert doomed in ran and len(ran) == 2 and outcome.result["node"] != doomed
        else:
            assert ran == {outcome.result["node"]}
    assert any(outcome.result["node"] == doomed for outcome in found.values())  # what had ended stays


def test_no_cluster_is_a_mistake_that_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=r"(?s)no Ray cluster answers.*ray start --head"):
            list(RayEngine(nobody).run([job(tmp_path, 1)], DOUBLE))
        monkeypatch.setenv("RAY_ADDRESS", nobody)
        with pytest.raises(UserError, match=r"(?s)no Ray cluster answers.*ray start --head"):
            list(RayEngine().run([job(tmp_path, 1)], DOUBLE))
    with pytest.raises(UserError, match="is no address"):
        list(RayEngine("nowhere").run([job(tmp_path, 1)], DOUBLE))
    assert not any(tmp_path.iterdir())
