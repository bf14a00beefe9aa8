"""One's own files: labels of all data sets together, votes, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from merganser.errors import DataError, UserError
from merganser.lab.suites.own_files import OwnFiles
from merganser.tasks.columns import Columns
from merganser.tasks.labels import LabelSpace


def write(root: Path, name: str, labels: list[object]) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text(mark.join(("text", "label")) + "\n" + "".join(f"{r['text']}{mark}{r['label']}\n" for r in rows))
    return path


def places(suite: OwnFiles, set_name: str, split: str) -> list[int]:
    rows = suite.read(set_name, split)
    columns = suite.task(set_name).columns(rows, Columns())
    space = LabelSpace(suite.labels(set_name))
    return list(suite.task(set_name).references(rows, columns, space).tolist())


def test_every_kind_of_file(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", "b/train.csv", "c/train.tsv", "d/train.parquet"):
        path = write(tmp_path, name, ["no", "yes"])
        rows = OwnFiles(tmp_path).read(path.parent.name, "train")
        assert [(row["text"], row["label"]) for row in rows] == [("text 0", "no"), ("text 1", "yes")]
        assert rows.source == f"{path.parent.name}[train]"
        assert rows.where(0).startswith(str(path))
    assert OwnFiles(tmp_path).sets() == ("a", "b", "c", "d")


def test_labels_are_those_of_all_train_files(tmp_path: Path) -> None:
    write(tmp_path, "a/train.jsonl", ["joy", "anger", "joy"])
    write(tmp_path, "a/test.jsonl", ["unseen"])
    write(tmp_path, "b/train.csv", ["fear", "anger"])
    write(tmp_path, "c/train.csv", ["fear", "joy", "anger"])
    write(tmp_path, "d/test.csv", ["joy"])  # only tested on
    suite = OwnFiles(tmp_path)
    for name in suite.sets():
        assert suite.labels(name) == ("anger", "fear", "joy")
    assert suite.votes("a") == ("anger", "joy")
    assert suite.votes("b") == ("anger", "fear")
    assert suite.votes("c") is None
    with pytest.raises(DataError, match="'d' has no train file"):
        suite.votes("d")
    assert places(suite, "a", "train") == [2, 0, 2]
    with pytest.raises(DataError, match=r"test\.jsonl:1: label 'unseen' is outside"):
        places(suite, "a", "test")


def test_numbers_are_sorted_by_number_and_mean_themselves(tmp_path: Path) -> None:
    write(tmp_path, "a/train.jsonl", [10, 9, 1])
    write(tmp_path, "b/train.csv", [2, 10])
    write(tmp_path, "c/train.parquet", [2.0, None, 1.0][::2])
    suite = OwnFiles(tmp_path)
    assert suite.labels("a") == ("1", "2", "9", "10")
    assert suite.votes("b") == ("2", "10")
    assert suite.votes("c") == ("1", "2")
    assert places(suite, "a", "train") == [3, 2, 0]
    assert places(suite, "b", "train") == [1, 3]


def test_labels_by_option(tmp_path: Path) -> None:
    write(tmp_path, "a/train.jsonl", ["yes", "no"])
    write(tmp_path, "b/train.jsonl", [0, 2])
    suite = OwnFiles(tmp_path, label_names=["no", "maybe", "yes"])  # type: ignore[arg-type]
    assert suite.labels("a") == ("no", "maybe", "yes")
    assert suite.votes("a") == suite.votes("b") == ("no", "yes")
    assert places(suite, "b", "train") == [0, 2]
    with pytest.raises(DataError, match=r"a/train\.jsonl:1: label 'yes' is outside"):
        OwnFiles(tmp_path, label_names=("no", "maybe")).votes("a")


@pytest.mark.parametrize(
    ("labels", "line", "says"),
    [
        (["a", None], 2, "the row has no 'label'"),
        (["a", "b", ""], 3, "label '' is neither text nor a whole number"),
        (["a", ["b"]], 2, "label ['b'] is neither text nor a whole number"),
        ([0, 1, -1], 3, "label -1 is neither text nor a whole number from 0"),
        ([0.5, 1], 1, "label 0.5 is neither"),
        ([True, False], 1, "label True is neither"),
        (["a", "b", 1], 3, "label 1 is a number, but other labels are names: 1, a, b"),
    ],
)
def test_malformed_labels(tmp_path: Path, labels: list[object], line: int, says: str) -> None:
    path = write(tmp_path, "a/train.jsonl", labels)
    with pytest.raises(DataError) as caught:
        OwnFiles(tmp_path).labels("a")
    assert str(caught.value).startswith(f"{path}:{line}: {says}")


def test_one_label_is_none(tmp_path: Path) -> None:
    write(tmp_path, "a/train.jsonl", ["a", "a"])
    with pytest.raises(DataError, match="fewer than two labels in all train files: a"):
        OwnFiles(tmp_path).labels("a")


def test_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, "a/train.jsonl", ["a", "b"])
    write(tmp_path, "a/test.jsonl", ["a", "b"])
    (tmp_path / "empty").mkdir()
    suite = OwnFiles(tmp_path)
    assert suite.sets() == ("a",)
    with pytest.raises(DataError, match=r"'a' has no dev file(.|\n)*put dev\.jsonl there"):
        suite.read("a", "dev")
    with pytest.raises(DataError, match="'a' has no dev file"):
        suite.read("a", "all")
    with pytest.raises(DataError, match="there is no split 'eval'"):
        suite.read("a", "eval")
    for call in (lambda: suite.read("b", "train"), lambda: suite.votes("b")):
        with pytest.raises(DataError, match=r"no data set 'b' of the suite text-classification \(found: a\)"):
            call()
    write(tmp_path, "a/dev.jsonl", ["b"])
    assert [row["label"] for row in suite.read("a", "all")] == ["a", "b", "b", "a", "b"]
    write(tmp_path, "a/dev.csv", ["a"])
    with pytest.raises(DataError, match=r"several dev files: dev\.jsonl, dev\.csv"):
        suite.read("a", "dev")


def test_pairs_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.csv").write_text("premise,hypothesis,class\nx,y,in\nx,z,out\n")
    suite = OwnFiles(tmp_path)
    assert suite.labels("a") == ("in", "out")
    columns = suite.task("a").columns(suite.read("a", "train"), Columns())
    assert (columns.text, columns.text_pair, columns.label) == ("premise", "hypothesis", "class")


def test_options(tmp_path: Path) -> None:
    assert OwnFiles(tmp_path).metric("a") == "macro_f1"
    assert OwnFiles(tmp_path, key="accuracy").metric("a") == "accuracy"
    with pytest.raises(UserError, match="no metric 'f1'"):
        OwnFiles(tmp_path, key="f1")
    for names in (("a",), ("a", "b", "a")):
        with pytest.raises(UserError, match="not at least two labels, each once"):
            OwnFiles(tmp_path, label_names=names)
    with pytest.raises(UserError, match="give a list"):
        OwnFiles(tmp_path, label_names="ab")  # type: ignore[arg-type]
