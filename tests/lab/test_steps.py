"""Resuming a job: finished steps are kept, everything from the first unfinished one on is done."""

from pathlib import Path

import pytest

from merganser.errors import DataError
from merganser.lab.steps import Journal, Step, run_steps


def job(folder: Path, log: list[str], fail: str = "") -> list[Step]:
    def work(name: str):
        def run(advance):
            advance(0.5)
            if name == fail:
                raise RuntimeError(name)
            (folder / name).write_text(name)
            log.append(name)
            return {"said": name}

        return run

    return [Step(name, 1.0, work(name), (folder / name,)) for name in ("one", "two", "three")]


def test_a_stopped_job_goes_on_where_it_was(tmp_path: Path) -> None:
    path, log = tmp_path / "journal.json", []
    with pytest.raises(RuntimeError):
        run_steps(job(tmp_path, log, fail="three"), Journal(path, {"seed": 1}), description="x")
    assert log == ["one", "two"]
    done = run_steps(job(tmp_path, log), Journal.read(path), description="x")
    assert log == ["one", "two", "three"]
    assert [step.facts["said"] for step in done.values()] == ["one", "two", "three"]
    assert [step.name for step in Journal.read(path).done] == ["one", "two", "three"]
    run_steps(job(tmp_path, log), Journal.read(path), description="x")
    assert len(log) == 3  # nothing left to do


def test_a_step_whose_product_is_gone_is_done_again_with_all_after_it(tmp_path: Path) -> None:
    path, log = tmp_path / "journal.json", []
    run_steps(job(tmp_path, log), Journal(path, {}), description="x")
    (tmp_path / "two").unlink()
    run_steps(job(tmp_path, log), Journal.read(path), description="x")
    assert log == ["one", "two", "three", "two", "three"]


def test_differences_name_the_setting(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.json", {"seed": 1, "sizes": [1, 2]})
    journal.write()
    read = Journal.read(tmp_path / "j.json")
    assert read.differences({"seed": 1, "sizes": (1, 2)}) == []
    assert read.differences({"seed": 2, "sizes": (1, 2)}) == ["seed: 1 → 2"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"configuration": {}, "steps": [1]}'])
def test_a_damaged_journal_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "j.json").write_text(text)
    with pytest.raises(DataError, match="unreadable journal"):
        Journal.read(tmp_path / "j.json")
