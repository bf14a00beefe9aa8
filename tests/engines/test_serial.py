"""The serial engine: order, failures that stay with their job, JSON in and out, silence."""

from pathlib import Path

import pytest

from merganser.engines import ENGINES, Job, SerialEngine, make_engine
from merganser.errors import UserError

DOUBLE = "grid_jobs:double"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def job(folder: Path, number: int, fail: str = "") -> Job:
    payload = {"folder": str(folder), "id": f"job{number}", "number": number, "fail": fail}
    return Job(f"job{number}", f"number {number}", payload, cost=0.1)


def test_jobs_run_in_order_one_at_a_time_and_silently(tmp_path: Path, capfd) -> None:
    outcomes = SerialEngine().run([job(tmp_path, number) for number in (3, 1, 2)], DOUBLE)
    assert not any(tmp_path.iterdir())
    assert next(outcomes).result == {"twice": 6, "pair": [1, 2]}  # as it would come back from elsewhere
    assert [path.name for path in tmp_path.iterdir()] == ["job3"]
    rest = list(outcomes)
    assert [outcome.result["twice"] for outcome in rest] == [2, 4]
    assert all(outcome.error is None and outcome.seconds >= 0 for outcome in rest)
    assert capfd.readouterr() == ("", "")


def test_a_failure_stays_with_its_job(tmp_path: Path) -> None:
    jobs = [job(tmp_path, n, fail) for n, fail in enumerate(["user", "bug", "text", "object", ""])]
    user, bug, text, thing, good = SerialEngine().run(jobs, DOUBLE)
    assert user.error == str(UserError("no such model", where="model", mend="name another"))
    assert "ZeroDivisionError: a bug" in bug.error and "grid_jobs.py" in bug.error
    assert "returned str, not a mapping" in text.error
    assert "not JSON serializable" in thing.error
    assert all(outcome.result is None for outcome in (user, bug, text, thing))
    assert good.error is None and good.result["twice"] == 8 and good.job is jobs[4]


def test_a_function_that_is_not_there_fails_every_job(tmp_path: Path) -> None:
    outcomes = list(SerialEngine().run([job(tmp_path, n) for n in range(2)], "grid_jobs:triple"))
    assert len(outcomes) == 2
    assert all("triple" in outcome.error for outcome in outcomes)


def test_an_interrupt_ends_the_run(tmp_path: Path) -> None:
    outcomes = SerialEngine().run([job(tmp_path, 0), job(tmp_path, 1, "interrupt"), job(tmp_path, 2)], DOUBLE)
    assert next(outcomes).error is None
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job0", "job1"]
    assert list(outcomes) == []


def test_mistakes_are_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two jobs have one id"):
        SerialEngine().run([job(tmp_path, 1), job(tmp_path, 1)], DOUBLE)
    for name in ("grid_jobs.double", "grid_jobs:", ":double", "os:system('x')"):
        with pytest.raises(UserError, match="names no function"):
            SerialEngine().run([job(tmp_path, 1)], name)
    assert not any(tmp_path.iterdir())


def test_engines_have_names() -> None:
    assert {name: engine.name for name, engine in ENGINES.items()} == {
        name: name for name in ("serial", "processes", "ray")
    }
    assert isinstance(make_engine("serial", description="x"), SerialEngine)
    with pytest.raises(UserError, match="unknown engine 'spark'"):
        make_engine("spark")
