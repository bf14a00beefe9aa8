"""Reading: every shape of RESULTS, and every mistake named with its file."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from merganser.errors import DataError, FileError, Problems
from merganser.lab.report import write_report
from merganser.lab.report.rows import read_rows


def test_every_shape_of_results_gives_the_same_rows(tmp_path: Path, examples: ModuleType) -> None:
    rows = examples.partitions(seeds=(1,))
    folder = examples.write_rows(tmp_path / "results", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (folder / "glue-partitions" / "experiment.json").write_text("{}")
    (folder / "glue-partitions" / "cells" / ".half-written.json").write_text("{")
    read = read_rows(folder)
    assert len(read) == len(rows)
    assert [row.cell for row in read] == sorted(row["cell"] for row in rows)
    for path in (
        folder / "glue-partitions",
        folder / "glue-partitions" / "cells",
        tmp_path / "rows.json",
        tmp_path / "rows.jsonl",
    ):
        assert read_rows(path) == read


def test_published_rows_are_the_rows(tmp_path: Path, examples: ModuleType) -> None:
    folder = examples.write_rows(tmp_path / "results", examples.partitions(seeds=(1,)))
    published = tmp_path / "published" / "glue-partitions" / "rows.jsonl"
    write_report(folder, {"rows": published})
    assert read_rows(tmp_path / "published") == read_rows(published.parent) == read_rows(folder)
    first = published.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(FileError, match="one of the inputs"):
            write_report(tmp_path / "published", {"rows": published}, overwrite=overwrite)
    again = tmp_path / "again.jsonl"
    write_report(tmp_path / "published", {"rows": again})
    assert again.read_bytes() == published.read_bytes() == first


def test_scores_that_are_no_number_are_missing(tmp_path: Path, examples: ModuleType) -> None:
    row = examples.partitions(seeds=(1,))[0]
    (test,) = row["scores"]
    row["scores"][test]["value"] = float("nan")
    row["average"] = {}
    (tmp_path / "row.json").write_text(json.dumps(row))
    (read,) = read_rows(tmp_path / "row.json")
    assert read.scores[test].value is None
    assert read.domain_average("in") is None


def test_averages_come_from_the_scores_where_the_row_has_none(tmp_path: Path, examples: ModuleType) -> None:
    row = examples.greedy(seeds=(1,))[-1]
    del row["average"]["out"]
    row["average"]["in"] = 0.123
    (tmp_path / "row.json").write_text(json.dumps(row))
    (read,) = read_rows(tmp_path / "row.json")
    outs = [score["value"] for score in row["scores"].values() if score["domain"] == "out"]
    assert read.domain_average("out") == pytest.approx(sum(outs) / len(outs))
    assert read.domain_average("in") == 0.123


def test_another_format_names_file_writer_and_mend(tmp_path: Path, examples: ModuleType) -> None:
    row = examples.partitions(seeds=(1,))[0]
    row["format"] = 7
    row["provenance"]["versions"]["merganser"] = "9.9"
    folder = examples.write_rows(tmp_path, [row])
    with pytest.raises(DataError, match=rf"{row['cell']}\.json.*format 7.*merganser 9\.9.*format 1") as error:
        read_rows(folder)
    assert "run the experiment again" in str(error.value)


def test_broken_files_are_all_named(tmp_path: Path, examples: ModuleType) -> None:
    folder = examples.write_rows(tmp_path, examples.partitions(seeds=(1,)))
    cells = folder / "glue-partitions" / "cells"
    (cells / "broken.json").write_text('{"format": 1, ')
    (cells / "list.json").write_text("[1]")
    (cells / "short.json").write_text('{"format": 1, "cell": "a"}')
    with pytest.raises(Problems) as error:
        read_rows(folder)
    for told in ("broken.json: unreadable JSON", "list.json[0]: not a result row", "short.json: not a result row: exp"):
        assert told in str(error.value)
    assert len(error.value.problems) == 3


def test_many_broken_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n" * 40)
    with pytest.raises(Problems, match="and 30 more"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_jsonl_mistake_names_its_line(tmp_path: Path, examples: ModuleType) -> None:
    row = json.dumps(examples.partitions(seeds=(1,))[0])
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row[:-3]}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: unreadable JSON"):
        read_rows(tmp_path / "rows.jsonl")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result rows"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "absent")


def test_a_row_with_an_id_that_is_taken_is_refused_and_a_copy_is_not(tmp_path: Path, examples: ModuleType) -> None:
    row = examples.partitions(seeds=(1,))[0]
    (tmp_path / "copies.json").write_text(json.dumps([row, row]))
    assert len(read_rows(tmp_path / "copies.json")) == 1
    (tmp_path / "two.json").write_text(json.dumps([row, {**row, "seed": 9}]))
    with pytest.raises(DataError, match="another row has the cell id"):
        read_rows(tmp_path / "two.json")


def test_a_best_candidate_that_is_not_there(tmp_path: Path, examples: ModuleType) -> None:
    row = next(row for row in examples.glue_pairs(seeds=(1,)) if row["chosen"])
    row["chosen"]["best"] = 99
    (tmp_path / "row.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match="99"):
        read_rows(tmp_path / "row.json")
