"""Multi-task learning: shuffled batches of one task each, in proportion; one encoder, every head learns."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset

from merganser.errors import CheckpointError, FileError, UserError
from merganser.tasks import TASKS, Columns, Rows
from merganser.tasks.batches import Feature
from merganser.tasks.models import load_model, load_tokenizer, open_model
from merganser.tasks.predict import predict
from merganser.training import TrainingPart, TrainingSettings, train, train_multitask
from merganser.training.loop import FeatureData, MixedBatches
from merganser.training.outputs import MARK

QUICK = TrainingSettings(learning_rate=5e-3, epochs=20, batch_size=4)
TAGS = ("O", "B-LOC")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def score(folder: Path, part: TrainingPart) -> dict[str, float]:
    opened = open_model(folder)
    columns, space = part.task.columns(part.rows, Columns()), part.task.space(opened.config)
    model = load_model(opened, part.task.auto_class)
    found = predict(model, load_tokenizer(opened), opened.config, part.task, part.rows, columns)
    return part.task.score(part.task.judge(found.aligned, part.task.references(part.rows, columns, space), space))


@pytest.fixture
def parts(sentiment: Rows, make_rows) -> list[TrainingPart]:
    """A classifier, a multi-label classifier and a tagger."""
    moods = [
        {"text": "the movie was good", "labels": [1, 0]},
        {"text": "bad food", "labels": [0, 1]},
        {"text": "very good food", "labels": [1, None]},
        {"text": "not good", "labels": [None, 1]},
    ]
    places = [
        {"tokens": ["Anna", "in", "Paris"], "tags": ["O", "O", "B-LOC"]},
        {"tokens": ["Paris", "was", "good"], "tags": ["B-LOC", "O", "O"]},
    ]
    return [
        TrainingPart(
            "class", TASKS["text-classification"], sentiment, ("good", "bad"), dev=sentiment, metric="accuracy"
        ),
        TrainingPart("mood", TASKS["multi-label"], make_rows(moods), ("joy", "anger"), dev=make_rows(moods)),
        TrainingPart("tags", TASKS["token-classification"], make_rows(places), TAGS),
    ]


def test_batches_are_of_one_task_proportional_and_shuffled() -> None:
    sizes = (160, 40, 20)
    data: ConcatDataset[Any] = ConcatDataset(
        [FeatureData([Feature([place])] * size, place) for place, size in enumerate(sizes)]
    )
    sampler = MixedBatches(sizes, 4, seed=1)
    epochs = [list(sampler), list(sampler)]
    for batches in epochs:
        assert len(batches) == len(sampler) == 55
        assert sorted(place for batch in batches for place in batch) == list(range(220))  # each example once
        owners = [{data[place]["part"] for place in batch} for batch in batches]
        assert all(len(owner) == 1 for owner in owners)
        order = [owner.pop() for owner in owners]
        assert Counter(order) == {0: 40, 1: 10, 2: 5}
        runs = 1 + sum(a != b for a, b in pairwise(order))
        assert runs > 10  # one after the other there would be three
        firsts = [order.index(part) for part in range(3)]
        assert max(firsts) < 40  # no task waits for another to end
    assert epochs[0] != epochs[1]
    again = MixedBatches(sizes, 4, seed=1)
    assert [list(again), list(again)] == epochs
    assert list(MixedBatches(sizes, 4, seed=2)) != epochs[0]
    inside = [place for batch in epochs[0] for place in batch if place < 160]
    assert inside != sorted(inside)


def test_a_head_for_each_part_and_one_encoder(parts: list[TrainingPart], save_ready, tmp_path: Path) -> None:
    base = save_ready("base", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    done: list[int] = []
    trained = train_multitask(
        base, parts, shared=False, output=tmp_path / "out", settings=QUICK, on_step=lambda at, _: done.append(at)
    )
    assert len(done) == 20 * (2 + 1 + 1)
    assert list(trained.paths) == ["class", "mood", "tags"]
    found = {part.name: weights(trained.paths[part.name]) for part in parts}
    for name, tensor in found["class"].items():
        if name.startswith("bert.") and name in found["tags"]:
            assert torch.equal(tensor, found["mood"][name]) and torch.equal(tensor, found["tags"][name])
            assert name.endswith("position_ids") or not torch.equal(tensor, weights(base)[name])
    for part, key in zip(parts, ("accuracy", "accuracy", "f1"), strict=True):
        assert score(trained.paths[part.name], part)[key] == 1, part.name
    assert len(trained.dev_scores) == 20 and trained.dev_scores[-1] == 1 and trained.best_epoch is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["class", MARK, "mood", "tags"]
    assert sorted(path.name for path in trained.paths["mood"].iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_same_seed_same_bytes_and_the_best_epoch_is_kept(parts: list[TrainingPart], save_ready, tmp_path: Path) -> None:
    base = save_ready("base", "bert")
    settings = QUICK.model_copy(update={"epochs": 4, "best_epoch": True})
    runs = [
        train_multitask(base, parts[:2], shared=False, output=tmp_path / name, settings=settings, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, again, other = runs
    assert first.best_epoch is not None
    assert first.dev_scores.index(max(first.dev_scores)) == first.best_epoch - 1
    for name, path in first.paths.items():
        for file in path.iterdir():
            assert file.read_bytes() == (again.paths[name] / file.name).read_bytes()
        assert not torch.equal(weights(path)["classifier.weight"], weights(other.paths[name])["classifier.weight"])
    rated = [score(first.paths[part.name], part) for part in parts[:2]]
    assert (rated[0]["accuracy"] + rated[1]["macro_f1"]) / 2 == pytest.approx(max(first.dev_scores))


def test_everything_shared_is_one_model(sentiment: Rows, make_rows, save_ready, tmp_path: Path) -> None:
    base = save_ready("base", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = make_rows([{"sentence": "the food was bad", "label": "bad"}, {"sentence": "yes", "label": "good"}])
    task, labels = TASKS["text-classification"], ("good", "bad")
    both = [
        TrainingPart("one", task, sentiment, labels, dev=sentiment),
        TrainingPart("two", task, other, labels, dev=other),
    ]
    trained = train_multitask(base, both, shared=True, output=tmp_path / "out", settings=QUICK)
    assert set(trained.paths.values()) == {tmp_path / "out"}
    assert all(score(tmp_path / "out", part)["accuracy"] == 1 for part in both)
    turned = [both[0], TrainingPart("two", task, other, ("bad", "good"))]
    with pytest.raises(UserError, match="another task or other labels"):
        train_multitask(base, turned, shared=True, output=tmp_path / "no", settings=QUICK)


def test_tuning_after_a_merge_keeps_the_heads(parts: list[TrainingPart], save_ready, tmp_path: Path) -> None:
    base, still = save_ready("base", "bert"), TrainingSettings(learning_rate=1e-12, max_steps=1, batch_size=2)
    before = train_multitask(
        base, parts, shared=False, output=tmp_path / "a", settings=QUICK.model_copy(update={"epochs": 2})
    )
    after = train_multitask(
        base, parts, shared=False, output=tmp_path / "b", settings=still, starts=before.paths, head_seed=9
    )
    for name, path in before.paths.items():
        expected, found = weights(path), weights(after.paths[name])
        assert expected.keys() == found.keys()
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-8)
    swapped = train(base, parts[1].task, parts[1].rows, labels=parts[1].labels, output=tmp_path / "own", settings=still)
    with pytest.raises(CheckpointError, match="the encoder of 'mood' differs"):
        train_multitask(
            base, parts[:2], shared=False, output=tmp_path / "c", settings=still,
            starts={"class": before.paths["class"], "mood": swapped.path},
        )  # fmt: skip
    relabelled = TrainingPart("mood", parts[1].task, parts[1].rows, ("anger", "joy"))
    with pytest.raises(UserError, match="other labels"):
        train_multitask(
            base, [relabelled], shared=False, output=tmp_path / "c", settings=still,
            starts={"mood": before.paths["mood"]},
        )  # fmt: skip
    assert not (tmp_path / "c").exists()


def test_refusals(parts: list[TrainingPart], sentiment: Rows, save_ready, tmp_path: Path) -> None:
    base = save_ready("base", "bert")

    def refuse(words: str, given: list[TrainingPart], **options: Any) -> None:
        chosen: dict[str, Any] = {"shared": False, "settings": QUICK, **options}
        with pytest.raises(UserError, match=words):
            train_multitask(base, given, output=tmp_path / "out", **chosen)
        assert not (tmp_path / "out").exists()

    refuse("nothing to train on", [])
    refuse("same name", [parts[0], parts[0]])
    refuse("cannot name a folder", [TrainingPart("../up", parts[0].task, sentiment, ("good", "bad"))])
    refuse("there are none", [parts[2]], settings=QUICK.model_copy(update={"best_epoch": True}))
    refuse("no head of its own", [TrainingPart("lm", TASKS["causal-lm"], sentiment)])
    refuse("starts are given for class", parts[:2], starts={"class": base})
    refuse("one shared model", parts[:1], shared=True, starts={"class": base})
    folder = tmp_path / "old"
    train_multitask(base, parts[:1], shared=False, output=folder, settings=QUICK.model_copy(update={"max_steps": 1}))
    with pytest.raises(FileError, match="exists"):
        train_multitask(base, parts[:1], shared=False, output=folder, settings=QUICK)
    train_multitask(
        base, parts[1:2], shared=False, output=folder, settings=QUICK.model_copy(update={"max_steps": 1}),
        overwrite=True,
    )  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == [MARK, "mood"]
    (folder / "mood" / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match=r"no part of the training as it was written: mood/thesis.txt"):
        train_multitask(base, parts[:1], shared=False, output=folder, settings=QUICK, overwrite=True)
