"""The engine of processes: all outcomes, failures that stay with their job, lost processes, an iteration that stops."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from merganser.engines import ENGINES, Job, ProcessEngine, make_engine
from merganser.errors import UserError

DOUBLE = "grid_jobs:double"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # which new processes are told


@pytest.fixture
def engine() -> Iterator[ProcessEngine]:
    made = ProcessEngine(2)
    yield made
    made.close(stop=True)


def job(folder: Path, number: int, fail: str = "") -> Job:
    payload = {"folder": str(folder), "id": f"job{number}", "number": number, "fail": fail}
    return Job(f"job{number}", f"number {number}", payload, cost=0.1)


def test_outcomes_are_those_of_the_jobs_and_a_failure_stays_with_its_job(tmp_path: Path, engine, capfd) -> None:
    jobs = [job(tmp_path, number, fail) for number, fail in enumerate(["", "user", "bug", "", "text"])]
    found = {outcome.job.id: outcome for outcome in engine.run(jobs, DOUBLE)}
    assert set(found) == {one.id for one in jobs}
    assert [found[f"job{n}"].result["twice"] for n in (0, 3)] == [0, 6]
    assert found["job1"].error == str(UserError("no such model", where="model", mend="name another"))
    assert "ZeroDivisionError: a bug" in found["job2"].error
    assert "returned str, not a mapping" in found["job4"].error
    assert [outcome.result["twice"] for outcome in engine.run([job(tmp_path, 9)], DOUBLE)] == [18]  # in the same ones
    assert capfd.readouterr() == ("", "")


def test_a_lost_process_fails_what_ran_and_the_rest_goes_on(tmp_path: Path, engine) -> None:
    jobs = [job(tmp_path, 0, "crash"), *(job(tmp_path, number) for number in range(1, 6))]
    found = {outcome.job.id: outcome for outcome in engine.run(jobs, DOUBLE)}
    assert len(found) == len(jobs) and "was lost" in found["job0"].error
    lost = [outcome for outcome in found.values() if outcome.error is not None]
    assert all("was lost" in outcome.error for outcome in lost) and len(lost) <= 2  # what ran beside it
    assert found["job5"].result["twice"] == 10


def test_stopping_the_iteration_ends_the_processes(tmp_path: Path, engine) -> None:
    outcomes = engine.run([job(tmp_path, number) for number in range(4)], DOUBLE)
    next(outcomes)
    processes = list(engine._pool._processes.values())
    outcomes.close()
    for process in processes:
        process.join(20)
        assert not process.is_alive()


def test_engines_by_name_and_impossible_numbers() -> None:
    assert ENGINES["processes"] is ProcessEngine and make_engine("processes", workers=3).workers == 3
    with pytest.raises(UserError, match="0 workers"):
        ProcessEngine(0)
