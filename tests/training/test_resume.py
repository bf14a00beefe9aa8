"""A killed training goes on from its last epoch, to the very weights of one that was not killed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merganser.errors import UserError
from merganser.tasks import TASKS, Rows
from merganser.training import TrainingPart, TrainingSettings, train, train_multitask
from merganser.training.resume import clear, last_checkpoint


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def on_step(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return on_step


SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=4, batch_size=2, schedule="polynomial", warmup=0.1)


def run(base: Path, rows: Rows, output: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"labels": ("good", "bad"), "settings": SETTINGS, "dev": rows, "seed": 5, **options}
    return train(base, TASKS["text-classification"], rows, output=output, **given)


@pytest.mark.parametrize("change", [{}, {"best_epoch": True, "batching": "by-length"}], ids=["last", "best"])
def test_resumed_equals_uninterrupted(change: dict, sentiment: Rows, save_ready, tmp_path: Path) -> None:
    base, settings = save_ready("base", "bert"), SETTINGS.model_copy(update=change)
    whole = run(base, sentiment, tmp_path / "whole", settings=settings)
    work = tmp_path / "work"
    with pytest.raises(Killed):  # six examples are three steps an epoch: in the middle of the second
        run(base, sentiment, tmp_path / "out", settings=settings, work=work, on_step=kill_at(5))
    assert not (tmp_path / "out").exists() and (work / "checkpoint-3").is_dir()
    (work / "checkpoint-9").mkdir()  # killed while it was written
    steps: list[int] = []
    resumed = run(
        base, sentiment, tmp_path / "out", settings=settings, work=work, on_step=lambda done, _: steps.append(done)
    )
    assert steps == list(range(4, 13))
    expected, found = (load_file(whole.path / "model.safetensors"), load_file(resumed.path / "model.safetensors"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert (whole.path / "config.json").read_bytes() == (resumed.path / "config.json").read_bytes()
    assert resumed.dev_scores == whole.dev_scores and resumed.best_epoch == whole.best_epoch
    assert resumed.loss == pytest.approx(whole.loss, rel=1e-6)
    assert not work.exists()


def test_work_of_another_training_is_not_taken_up(sentiment: Rows, save_ready, tmp_path: Path) -> None:
    base, work = save_ready("base", "bert"), tmp_path / "work"
    for number, change in enumerate(({"seed": 6}, {"settings": SETTINGS.model_copy(update={"epochs": 3})}), 1):
        with pytest.raises(Killed):
            run(base, sentiment, tmp_path / "out", work=work, on_step=kill_at(4))
        steps: list[int] = []
        run(
            base, sentiment, tmp_path / f"out{number}", work=work,
            on_step=lambda done, _, steps=steps: steps.append(done), **change,
        )  # fmt: skip
        assert steps[0] == 1 and not work.exists()


def test_a_folder_of_something_else_is_left_alone(sentiment: Rows, save_ready, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="left alone"):
        run(save_ready("base", "bert"), sentiment, tmp_path / "out", work=work)
    assert [path.name for path in work.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("best", [False, True])
def test_killed_after_the_last_step(
    best: bool, sentiment: Rows, save_ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained any more, not even where the last epoch is not a whole one."""
    base = save_ready("base", "bert")
    settings = SETTINGS.model_copy(update={"max_steps": 5, "best_epoch": best})
    whole = run(base, sentiment, tmp_path / "whole", settings=settings)

    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(sys.modules["merganser.training.multitask"], "_keep", stop)
        run(base, sentiment, tmp_path / "out", settings=settings, work=tmp_path / "work")
    steps: list[int] = []
    resumed = run(
        base, sentiment, tmp_path / "out", settings=settings, work=tmp_path / "work",
        on_step=lambda done, _: steps.append(done),
    )  # fmt: skip
    assert steps == [] and resumed.dev_scores == whole.dev_scores and len(whole.dev_scores) == 2
    expected, found = (load_file(whole.path / "model.safetensors"), load_file(resumed.path / "model.safetensors"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "heads"])
def test_multi_task_resumed_equals_uninterrupted(shared: bool, sentiment: Rows, save_ready, tmp_path: Path) -> None:
    base, work = save_ready("base", "bert"), tmp_path / "work"
    task = TASKS["text-classification"]
    parts = [TrainingPart(name, task, sentiment, ("good", "bad"), dev=sentiment) for name in ("one", "two")]

    def learn(output: str, **options: Any) -> Any:
        return train_multitask(
            base, parts, shared=shared, output=tmp_path / output, settings=SETTINGS, seed=5, **options
        )

    whole = learn("whole")
    with pytest.raises(Killed):  # twice six examples are six steps an epoch: in the middle of the third
        learn("out", work=work, on_step=kill_at(15))
    assert (work / "checkpoint-12").is_dir()
    steps: list[int] = []
    resumed = learn("out", work=work, on_step=lambda done, _: steps.append(done))
    assert steps == list(range(13, 25))
    for name in ("one", "two"):
        expected = load_file(whole.paths[name] / "model.safetensors")
        found = load_file(resumed.paths[name] / "model.safetensors")
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert resumed.dev_scores == whole.dev_scores
    assert not work.exists()


def test_what_was_removed_in_part_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    def killed(folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        clear(tmp_path)
    assert last_checkpoint(tmp_path) is None
