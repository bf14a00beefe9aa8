"""GLUE: splits, labels and metrics; nothing is chosen on what is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import merganser
from merganser.errors import DataError, UserError
from merganser.lab.suites.base import with_options
from merganser.lab.suites.glue import LABELS, Glue
from merganser.tasks.columns import Columns
from merganser.tasks.labels import LabelSpace

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


def write(folder: Path, split: str, size: int, label: object = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    rows = [{"sentence": f"{split} {i}", "label": label, "idx": i} for i in range(size)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(suite: Glue, split: str, name: str = "cola") -> list[str]:
    return [row["sentence"] for row in suite.read(name, split)]


def test_test_is_validation_and_dev_is_held_out_of_train(tmp_path: Path) -> None:
    path = write(tmp_path / "cola", "train", 205)
    write(tmp_path / "cola", "validation", 30)
    suite = Glue(tmp_path)
    train, dev, test = (texts(suite, split) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (185, 20, 30)  # a tenth at most, rounded down
    assert set(train) | set(dev) == {f"train {i}" for i in range(205)}
    assert not set(train) & set(dev)
    assert test == [f"validation {i}" for i in range(30)]
    for part in (train, dev):  # in the order of the file, and each row knows its line there
        assert part == sorted(part, key=lambda text: int(text.split()[1]))
    assert suite.read("cola", "dev").where(3) == f"{path}:{int(dev[3].split()[1]) + 1}"
    assert dev != [f"train {i}" for i in range(20)]
    assert texts(suite, "all") == [*train, *dev, *test]
    assert [suite.read("cola", s).source for s in ("dev", "all")] == ["cola[dev]", "cola[all]"]


def test_the_draw_is_seeded(tmp_path: Path) -> None:
    write(tmp_path / "cola", "train", 100)
    dev = texts(Glue(tmp_path), "dev")
    assert dev == texts(Glue(tmp_path), "dev")
    assert dev != texts(Glue(tmp_path, dev_seed=1), "dev")
    fewer = Glue(tmp_path, dev_examples=4)
    assert (len(texts(fewer, "dev")), len(texts(fewer, "train"))) == (4, 96)


def test_mnli_is_scored_on_the_matched_file(tmp_path: Path) -> None:
    write(tmp_path / "mnli", "validation_matched", 3)
    write(tmp_path / "mnli", "validation_mismatched", 3)
    assert texts(Glue(tmp_path), "test", "mnli")[0] == "validation_matched 0"


def test_tasks_metrics_and_labels() -> None:
    suite = Glue()
    assert suite.sets() == TASKS == tuple(sorted(LABELS))
    assert {name: suite.metric(name) for name in TASKS} == {
        **dict.fromkeys(TASKS, "accuracy"),
        "cola": "matthews",
        "stsb": "pearson",
    }
    for name in TASKS:
        assert suite.task(name).name == ("regression" if name == "stsb" else "text-classification")
        assert suite.metric(name) in suite.task(name).metrics
        assert suite.votes(name) is None
    assert suite.labels("cola") == ("unacceptable", "acceptable")
    assert suite.labels("wnli") == suite.labels("rte")[::-1] == ("not_entailment", "entailment")
    assert [len(suite.labels(name)) for name in TASKS] == [2, 3, 2, 2, 2, 2, 2, 1, 2]


def test_other_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "validation.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tnot_entailment\n")
    suite = Glue(tmp_path)
    assert suite.sets() == ("rte",)
    rows = suite.read("rte", "test")
    columns = suite.task("rte").columns(rows, Columns())
    assert (columns.text, columns.text_pair, columns.label) == ("sentence1", "sentence2", "label")
    assert suite.task("rte").references(rows, columns, LabelSpace(suite.labels("rte"))).tolist() == [1]


def test_integers_are_named_as_in_the_release(tmp_path: Path) -> None:
    write(tmp_path / "mnli", "validation_matched", 1, label=2)
    suite = Glue(tmp_path)
    rows = suite.read("mnli", "test")
    other = LabelSpace(("contradiction", "entailment", "neutral"))  # as some models on the Hub have them
    for space, place in ((LabelSpace(LABELS["mnli"]), 2), (other, 0)):
        assert suite.task("mnli").references(rows, Columns(label="label"), space).tolist() == [place]


def test_hidden_labels_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "cola", "validation", 2, label=-1)
    suite = Glue(tmp_path)
    with pytest.raises(DataError, match=r"label -1 is outside(.|\n)*a split without labels") as caught:
        suite.task("cola").references(
            suite.read("cola", "test"), Columns(label="label"), LabelSpace(suite.labels("cola"))
        )
    assert str(caught.value).startswith(f"{path}:1: ")


def test_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "cola", "train", 9)
    suite = Glue(tmp_path)
    with pytest.raises(DataError, match=r"'colo' is no task of GLUE(.|\n)*did you mean 'cola'"):
        suite.read("colo", "train")
    for method in (suite.task, suite.labels):
        with pytest.raises(DataError, match="'colo' is no task of GLUE"):
            method("colo")
    with pytest.raises(DataError, match=r"no data set 'rte' of the suite glue \(found: cola\)(.|\n)*rte/validation"):
        suite.read("rte", "train")
    with pytest.raises(DataError, match="there is no split 'validation'"):
        suite.read("cola", "test")
    with pytest.raises(DataError, match="there is no split 'matched'"):
        suite.read("cola", "matched")
    for split in ("train", "dev"):
        with pytest.raises(DataError, match="9 examples are too few to hold out"):
            suite.read("cola", split)


def test_without_a_folder_and_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError) as caught:
        Glue().read("cola", "train")
    assert str(caught.value).startswith("glue:cola: ")
    assert "not on this machine and cannot be had (offline mode is set)" in str(caught.value)
    assert "load_dataset('glue', 'cola').save_to_disk('glue/cola')" in str(caught.value)


def test_a_saved_copy_is_read_as_the_message_says(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS["cola"]))}
    )
    table = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "glue" / "cola"))
    rows = Glue(tmp_path / "glue").read("cola", "test")
    assert [row["label"] for row in rows] == [1, 0]
    assert rows.where(1).endswith("cola[validation], row 2")


@pytest.mark.parametrize("options", [{"dev_examples": 0}, {"dev_seed": -1}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} is"):
        with_options(Glue, None, options)


def test_a_key_metric_of_ones_own(save_ready: Callable[..., Path], tmp_path: Path) -> None:
    from merganser.tasks import task_for
    from merganser.tasks.classification import TextClassification

    assert TextClassification().key_metric == "macro_f1"
    assert TextClassification(key="matthews").key_metric == "matthews"
    assert task_for("text-classification", {}, key="accuracy").key_metric == "accuracy"
    with pytest.raises(UserError, match=r"no metric 'acuracy'(.|\n)*did you mean 'accuracy'"):
        TextClassification(key="acuracy")
    path = write(tmp_path / "cola", "validation", 4)
    result = merganser.evaluate(save_ready("model"), path, task=TextClassification(key="accuracy"))
    assert result.rows[0].key_metric == "accuracy"


def test_real_corpora(resources: Path) -> None:
    suite = Glue(resources / "glue")
    sizes = {"cola": (8551, 1043), "mrpc": (3667, 408), "rte": (2490, 277), "stsb": (5749, 1500), "wnli": (635, 71)}
    assert {*sizes, "sst2"} <= set(suite.sets())
    for name, (train, test) in sizes.items():
        parts = {split: suite.read(name, split) for split in ("train", "dev", "test")}
        held = min(1000, train // 10)
        assert [len(rows) for rows in parts.values()] == [train - held, held, test]
        space = LabelSpace(suite.labels(name))
        for rows in parts.values():
            columns = suite.task(name).columns(rows, Columns())
            assert (columns.text_pair is None) == (name == "cola")
            found = suite.task(name).references(rows, columns, space)
            assert (found.min() >= 0 and found.max() <= 5) if name == "stsb" else set(found.tolist()) == {0, 1}
