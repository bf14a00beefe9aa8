"""Reading rows: every format, every place, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from glue_cache import save_glue_cache
from merganser.errors import DataError, UserError
from merganser.tasks.data import read_rows


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def message(source: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, **options)  # type: ignore[arg-type]
    return str(caught.value)


ROWS = [{"text": "a, b", "label": 1}, {"text": 'say "c"\n', "label": 0}, {"text": "d", "label": 1}]


def test_every_format_reads_the_same_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "lines.json", "\n\n".join(json.dumps(row) for row in ROWS))
    write(tmp_path / "a.csv", 'text,label\r\n"a, b",1\r\n"say ""c""\n",0\r\nd,1\r\n')
    write(tmp_path / "a.tsv", 'text\tlabel\na, b\t1\n"say ""c""\n"\t0\nd\t1\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "lines.json", "a.csv", "a.tsv", "a.parquet"):
        rows = read_rows(tmp_path / name)
        assert [row["text"] for row in rows] == [row["text"] for row in ROWS], name
        assert [int(row["label"]) for row in rows] == [1, 0, 1], name
        assert rows.columns == ("text", "label")


def test_rows_know_their_lines(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '\n{"text": "a"}\n\n\n{"text": "b"}\n')
    assert [read_rows(lines).where(i) for i in range(2)] == [f"{lines}:2", f"{lines}:5"]
    listed = write(tmp_path / "a.json", '[\n {"text":\n  "a"},\n\n {"text": "b"}]')
    assert [read_rows(listed).where(i) for i in range(2)] == [f"{listed}:2", f"{listed}:5"]
    quoted = write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\nb,0\n')
    assert [read_rows(quoted).where(i) for i in range(2)] == [f"{quoted}:2", f"{quoted}:4"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet").where(2) == f"{tmp_path / 'a.parquet'}, row 3"


def test_line_separators_inside_json_do_not_split_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028still one\x0c"}\n{"text": "two"}\n'.replace("\x0c", ""))
    assert [row["text"] for row in read_rows(path)] == ["one\u2028still one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.csv", "\ufefftext\nhello\n")).columns == ("text",)


def test_raw_tsv_with_stray_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"stray\t1\nplain\t0\nin"side\t1\n')
    assert [row["text"] for row in read_rows(path)] == ['"stray', "plain", 'in"side']


@pytest.mark.parametrize(
    ("name", "text", "line", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": oops}\n', 2, "unreadable JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n\n["a"]\n', 3, 'not an object but ["a"]'),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", 2, "unreadable JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}\n", 1, "unreadable JSON"),
        ("a.json", '[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]', 3, "expected ',' or ']'"),
        ("a.json", '[{"text": "a"},\n 7]', 2, "not an object but 7"),
        ("a.json", '[{"text": "a"}]\n more', 2, "after the end of the list"),
        ("a.json", '[{"text": "a"},', 1, "unreadable JSON"),
        ("a.csv", "text,label\na,1\nb,0,9\n", 3, "3 fields, but the header has 2: text, label"),
        ("a.csv", "text,label\na,1\nb\n", 3, "1 fields, but the header has 2"),
        ("a.csv", 'text,label\na,1\n"b" c,0\n', 3, "unreadable row"),
        ("a.csv", 'text,label\na,1\n"never closed,0\n', 3, "unreadable row"),
        ("a.csv", "text,text\na,1\n", 1, "'text' twice"),
        ("a.tsv", "text\tlabel\na\t1\tb\n", 2, "3 fields, but the header has 2"),
    ],
)
def test_unreadable_rows_name_file_and_line(tmp_path: Path, name: str, text: str, line: int, says: str) -> None:
    path = write(tmp_path / name, text)
    found = message(path)
    assert found.startswith(f"{path}:{line}: ")
    assert says in found and "to mend:" in found


def test_text_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert message(path).startswith(f"{path}:2: not UTF-8 text")
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\na\ncaf\xe9\n")
    assert message(path).startswith(f"{path}:3: not UTF-8 text")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_empty_data(tmp_path: Path, name: str) -> None:
    content = {"a.json": "[]", "a.csv": "text,label\n", "a.tsv": "text\tlabel\n"}.get(name, "\n\n")
    path = write(tmp_path / name, content)
    assert message(path).startswith(f"{path}: no data: not a single row")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "PAR1 but not really")
    assert message(path).startswith(f"{path}: unreadable Parquet file")


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert [row["text"] for row in read_rows(path, limit=2)] == ["a", "b"]
    with pytest.raises(UserError, match="limit is 0"):
        read_rows(path, limit=0)


def test_missing_files_and_unknown_endings(tmp_path: Path) -> None:
    assert "no such file or folder" in message(tmp_path / "none.jsonl")
    assert "no such file or folder" in message("./nothing-here")
    found = message(write(tmp_path / "a.xlsx", "x"))
    assert "'.xlsx' cannot be read" in found and ".jsonl" in found


def test_folder_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "glue" / "sst2" / "train.jsonl", '{"sentence": "a"}\n')
    write(tmp_path / "glue" / "sst2" / "validation.jsonl", '{"sentence": "b"}\n')
    folder = tmp_path / "glue" / "sst2"
    assert read_rows(folder, split="validation")[0] == {"sentence": "b"}
    assert read_rows(f"{folder}[validation]").source == f"{folder}[validation]"
    assert read_rows(f"{tmp_path / 'glue'}:sst2", split="train")[0] == {"sentence": "a"}
    assert read_rows(folder, prefer=("train",))[0] == {"sentence": "a"}
    assert "several splits: train, validation" in message(folder)
    wrong = message(folder, split="valdation")
    assert "no split 'valdation'" in wrong and "did you mean 'validation'" in wrong
    assert "a file has no splits" in message(folder / "train.jsonl", split="train")
    (tmp_path / "empty").mkdir()
    assert "no data files in this folder" in message(tmp_path / "empty")


def test_shards_of_a_split_are_one(tmp_path: Path) -> None:
    for number in range(2):
        table = pyarrow.Table.from_pylist([{"text": f"{number}"}])
        pyarrow.parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
    assert [row["text"] for row in read_rows(tmp_path)] == ["0", "1"]


def test_folders_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    loaded = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict(train=loaded, test=loaded.select([1])).save_to_disk(tmp_path / "both")
    loaded.save_to_disk(tmp_path / "one")
    rows = read_rows(tmp_path / "both", split="train")
    assert list(rows) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert rows.class_names == {"label": ("neg", "pos")}
    assert rows.where(1) == f"{tmp_path / 'both'}[train], row 2"
    assert len(read_rows(tmp_path / "one", limit=1)) == 1
    assert "several splits: train, test" in message(tmp_path / "both")
    assert "has no splits" in message(tmp_path / "one", split="dev")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"rubbish")
    assert "cannot be loaded" in message(tmp_path / "one")


@pytest.fixture
def datasets_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the datasets library, which is offline."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_data_set_that_is_not_here_while_offline(datasets_cache: Path) -> None:
    found = message("glue:sst2")
    assert found.startswith("glue:sst2: no such file or folder, and data set 'glue:sst2' is not on this machine")
    assert "offline mode is set" in found
    assert "datasets.load_dataset('glue', 'sst2').save_to_disk('glue-sst2')" in found
    assert str(datasets_cache) in found


def test_a_data_set_of_the_cache_while_offline(datasets_cache: Path) -> None:
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]
    save_glue_cache(datasets_cache, "sst2", {"train": rows[:1], "validation": rows})
    assert list(read_rows("glue:sst2", split="validation")) == rows
    assert "'cola'" in message("glue:cola")


def test_real_corpora_are_readable(resources: Path) -> None:
    rows = read_rows(resources / "glue" / "sst2", split="validation")
    assert len(rows) == 872 and rows.columns[:2] == ("sentence", "label")
    assert len(read_rows(resources / "ner" / "twitter" / "dev.json", limit=5)) == 5
