"""What the fuzzer found, a test for each class of fault; the cases beside each are its cousins."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import merganser
from adapter_examples import adapt_linears
from fuzz.seals import seal
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.tokenizer_files import read_once
from merganser.cli import main
from merganser.errors import CheckpointError, DataError, RecipeError, UserError
from merganser.evaluation import evaluate
from merganser.lab.grid.config import make_config
from merganser.lab.grid.loading import load_config, number_of
from merganser.lab.zoo import Zoo, ZooError
from merganser.merging import ledger
from merganser.merging.mergekit.schema import read_configuration
from merganser.merging.recipe import make_recipe
from merganser.tasks import files
from merganser.tasks.models import blamed
from zoo_examples import KEY, make

Save = Callable[..., Path]


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


# -- rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt", "rows.conll"])
def test_a_line_without_end_is_not_read_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.truncate(20 << 30)  # zeros, which take no place on the disk
    with pytest.raises(DataError, match="a line of more than 67108864 bytes"):
        list(files.read_file(path))


def test_many_columns_take_no_longer_than_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(map(str, range(100_000))) + ",1,2\n")
    began = time.process_time()
    with pytest.raises(DataError, match="the header names '1', '2' twice"):
        list(files.read_file(path))
    assert time.process_time() - began < 2


# -- tokenizers and models


@pytest.fixture
def ready(save_ready: Save, tmp_path: Path) -> tuple[Path, Path]:
    """A classifier with its tokenizer, and data."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "the movie was good", "label": label}) + "\n" for label in (0, 1)))
    return save_ready("model", "bert", num_labels=2), data


@pytest.mark.parametrize("number", [40, 10**6])
def test_ids_beyond_the_vocabulary_are_the_tokenizer_s_fault(ready: tuple[Path, Path], number: int) -> None:
    model, data = ready

    def edit(values: dict[str, Any]) -> None:
        values["model"]["vocab"]["movie"] = number

    change(model / "tokenizer.json", edit)
    for use in (evaluate, merganser.collect):
        with pytest.raises(CheckpointError, match=f"the id {number}, but the model has 40 tokens"):
            use(model, data)


@pytest.mark.parametrize("value", ["long", [512], {"a": 1}])
def test_a_length_that_is_no_number(ready: tuple[Path, Path], value: object) -> None:
    model, data = ready
    change(model / "tokenizer_config.json", lambda values: values.update(model_max_length=value))
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded: "):
        evaluate(model, data)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "generation_config.json"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_libraries_open_only_what_lies_in_the_folder(ready: tuple[Path, Path], name: str, kind: str) -> None:
    model, data = ready
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to(data)
    for use in (evaluate, merganser.collect):
        with pytest.raises(CheckpointError, match=r"leads? out of the folder|this is a pipe"):
            use(model, data)


@pytest.mark.parametrize("kind", ["PanicException", "TypeError", "Exception"])
def test_whatever_a_library_raises_is_an_error_of_the_files(kind: str) -> None:
    error = type(kind, (BaseException if kind.startswith("Panic") else Exception,), {})
    with pytest.raises(CheckpointError, match="cannot be used: no entry"), blamed("cannot be used", "x", "mend it"):
        raise error("no entry\nin the table")
    with pytest.raises(KeyboardInterrupt), blamed("cannot be used", "x", "mend it"):
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="ours"), blamed("cannot be used", "x", "mend it"):
        raise DataError("ours")


@pytest.mark.parametrize("number", ["7", [7], None, 7.5, True])
def test_ids_that_are_no_numbers(ready: tuple[Path, Path], number: object) -> None:
    model, _ = ready
    change(model / "tokenizer.json", lambda values: values["model"]["vocab"].update(movie=number))
    assert read_once(open_checkpoint(model), {}) is None


@pytest.mark.parametrize(
    "key, value",
    [("hidden_dropout_prob", 1.1), ("attention_probs_dropout_prob", "x"), ("initializer_range", [1]),
     ("num_attention_heads", 3), ("hidden_act", "none")],
)  # fmt: skip
def test_what_would_not_open_is_not_written(save_ready: Save, tmp_path: Path, key: str, value: object) -> None:
    one, two = save_ready("one", "bert", 1), save_ready("two", "bert", 2)
    change(two / "config.json", lambda values: values.update({key: value}))
    for options in ({"config_from": "two"}, {"config_from": "two", "method": "ties", "base": one}):
        with pytest.raises(UserError, match=r"cannot make a model|compute different|does not take"):
            merganser.merge([one, two], tmp_path / "out", **{"method": "simple", **options})
    with pytest.raises(UserError, match=r"cannot make a model|does not take"):
        ledger.init(tmp_path / "sums", two, method="simple")
    assert not (tmp_path / "out").exists() and not (tmp_path / "sums").exists()


@pytest.mark.parametrize("more", [b"x", bytes(4096)])
def test_nothing_lies_behind_the_last_tensor(save_ready: Save, more: bytes) -> None:
    model = save_ready("model")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(CheckpointError, match=f"{len(more)} bytes of the file belong to no tensor"):
        open_checkpoint(model)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [10**9, [1], "x", {"a": "b"}, True])
def test_patterns_of_an_adapter_that_are_none(save_ready: Save, tmp_path: Path, key: str, value: object) -> None:
    adapter = adapt_linears(tmp_path / "adapter", save_ready("base"), ("query",))
    change(adapter / "adapter_config.json", lambda values: values.update({key: value}))
    with pytest.raises(UserError, match=key):
        open_checkpoint(adapter)


# -- recipes


@pytest.mark.parametrize("rows", [2**16 + 1, 8 * 10**9, 2**80, 0, -8])
def test_rows_of_padding_that_nobody_can_mean(save_ready: Save, tmp_path: Path, rows: int) -> None:
    with pytest.raises(RecipeError, match="pad_to_multiple_of: "):
        merganser.merge([save_ready("a"), save_ready("b")], tmp_path / "out", method="simple", pad_to_multiple_of=rows)
    model = [{"model": str(tmp_path / "a")}]
    values = {"merge_method": "karcher", "models": model, "tokenizer": {"pad_to_multiple_of": rows}}
    with pytest.raises(RecipeError, match=r"tokenizer.pad_to_multiple_of: "):
        read_configuration(values, "here")


@pytest.mark.parametrize("place", ["take", "contributors", "block", "source", "token", "rows", "config"])
def test_nobody_is_called_nothing(save_ready: Save, tmp_path: Path, place: str) -> None:
    both = [{"contributor": name, "range": [0, 1]} for name in ("a", "")]
    asked: dict[str, dict[str, Any]] = {
        "take": {"rules": [{"take": ""}]},
        "contributors": {"rules": [{"contributors": {"": {"coefficient": 2}}}]},
        "block": {"layers": [{"sources": both[:1], "rules": [{"take": ""}]}]},
        "source": {"layers": [{"sources": both}]},
        "token": {"tokens": {"movie": {"take": "", "force": True}}},
        "rows": {"vocabulary": "union", "missing_rows": ""},
        "config": {"config_from": ""},
    }
    people = [{"model": str(save_ready(name))} for name in ("a", "b")]
    with pytest.raises(UserError, match=r"''"):
        merganser.merge(make_recipe({"contributors": people, "method": "simple", **asked[place]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- experiments


def write(folder: Path, **values: Any) -> Path:
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("value", ["text", 7, ["a"], {1: "a"}, True])
def test_templates_are_names_and_values(tmp_path: Path, value: object) -> None:
    with pytest.raises(RecipeError, match="is no mapping of names to values"):
        load_config([write(tmp_path, templates=value)])


@pytest.mark.parametrize("values", [{"a": "{b}" * 3000, "b": "x" * 3000}, {"a": "x" * 90_000, "b": ["y"] * 25_000}])
def test_templates_do_not_multiply(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write(tmp_path, templates=values, description="{a}" * 200, methods=["{b}"] * 200)
    with pytest.raises(RecipeError, match="filled in, its templates make"):
        load_config([path])


def test_texts_that_look_like_numbers_and_are_none() -> None:
    assert number_of("12") == 12 and number_of("-1e3") == -1000.0
    for text in ("9" * 5000, "nan", "inf", "-Infinity", "1e999"):
        assert number_of(text) == text


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": [{"method": "simple", "search": {"grid": 10**9}}]},
        {"methods": [{"method": "simple", "search": {"samples": 10**9}}]},
        {"layout": "partitions", "partitions": {"parts": 10**9}},
        {"bootstrap": 10**12},
        {"seeds": [*range(100_000)]},
        {"seeds": [-1]},
        {"seeds": [2**32]},
        {"suite": {"name": "emotion", "sample_seed": -1}},
        {"contributors": [f"c{number}" for number in range(1000)]},
        {"order": ["a", "b", "a"]},
    ],
)
def test_grids_that_nobody_can_mean(changes: dict[str, Any]) -> None:
    sound = {
        "name": "trial", "suite": {"name": "emotion"}, "pretrained": {"model": "m", "title": "t"},
        "contributors": ["a", "b"], "layout": "pairs", "methods": ["simple"],
    }  # fmt: skip
    make_config(sound, "here")
    began = time.process_time()
    with pytest.raises(UserError):
        make_config({**sound, **changes}, "here")
    assert time.process_time() - began < 2


# -- ledgers and zoos


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values.update(file=None),
        lambda values: values.update(format=-2),
        lambda values: values["parts"][0].update(shapes=[]),
        lambda values: values["parts"][0].update(shapes=[[-1]]),
        lambda values: values["parts"].append(values["parts"][0]),
        lambda values: values.update(generation=-1),
    ],
)
def test_a_ledger_that_does_not_hold_together(
    save_ready: Save, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    ledger.init(tmp_path / "sums", save_ready("base"), method="simple")
    ledger.add(tmp_path / "sums", save_ready("one", "bert", 1))
    assert len(ledger.show(tmp_path / "sums").contributors) == 1
    path = tmp_path / "sums" / "ledger.json"
    change(path, edit)
    seal("ledger", path)
    with pytest.raises(UserError, match="damaged or was edited"):
        ledger.show(tmp_path / "sums")


def test_sums_outside_of_the_ledger(save_ready: Save, tmp_path: Path) -> None:
    ledger.init(tmp_path / "sums", save_ready("base"), method="simple")
    ledger.add(tmp_path / "sums", save_ready("one", "bert", 1))
    sums = tmp_path / "sums" / "sums-000001.safetensors"
    sums.rename(tmp_path / "elsewhere")
    sums.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the folder"):
        ledger.solve(tmp_path / "sums", tmp_path / "out")


@pytest.mark.parametrize("place", ["entry.json", "model/config.json", "model/heads", "note.txt.record.json"])
def test_a_zoo_reads_nothing_that_is_not_its_own(tmp_path: Path, place: str) -> None:
    zoo = Zoo(tmp_path / "zoo")
    entry = zoo.build(KEY, make)
    zoo.attach(entry, "note.txt", lambda path: bool(path.write_text("x")))
    path = zoo.root / entry.id / place
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ZooError, match="leads out of the folder"):
        zoo.get(KEY)
        zoo.attach(entry, "note.txt", lambda path: None)


def test_a_zoo_waits_for_no_pipe(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    entry = zoo.build(KEY, make)
    os.mkfifo(zoo.root / entry.id / "note.txt.record.json")
    with pytest.raises(ZooError, match="this is a pipe"):
        zoo.attach(entry, "note.txt", lambda path: None)


def test_a_file_that_an_entry_does_not_list(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    entry = zoo.build(KEY, make)
    assert zoo.verify(entry) == 2
    (entry.path / "modeling.py").write_text("import os")
    with pytest.raises(ZooError, match=r"modeling\.py: a file that the entry does not list"):
        zoo.verify(entry)


@pytest.mark.parametrize("name", ["y" * 300, "~nobody-here/x", "x/" * 3000])
@pytest.mark.parametrize("command", ["inspect {}", "merge {} {} -o o", "evaluate {} --data x.csv", "zoo ls --zoo {}"])
def test_names_that_no_file_can_have(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(command.replace("{}", name).split())
    told = capsys.readouterr().err
    assert left.value.code == 2 or "no models" in told
    assert len(told) < 3000 and not [*tmp_path.iterdir()]


def test_a_tokenizer_of_gigabytes_is_not_read_whole(save_ready: Save) -> None:
    model = save_ready("model")
    with (model / "tokenizer.json").open("r+b") as stream:
        stream.truncate(20 << 30)
    assert read_once(open_checkpoint(model), {}) is None
