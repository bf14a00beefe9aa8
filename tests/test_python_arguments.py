"""What functions of Python take for data, models and paths: any kind of path, data in memory, else a clear error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import merganser
from conftest import save_tokenizer
from merganser.errors import UserError
from merganser.merging import load_recipe, make_recipe, merge
from merganser.merging.moe import build_moe
from merganser.sequential import merge_regmean_pp
from merganser.statistics import FILE_NAME
from merganser.tasks.data import read_rows
from merging.test_bytes import write_family

TEXTS = ["the movie was good", "bad food !", "I liked it very much . it was not bad", "no"]
ROWS = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
IN_MEMORY: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "iterator": lambda: iter(TEXTS),
    "dictionaries": lambda: [{"text": text} for text in TEXTS],
    "rows": lambda: read_rows(TEXTS),
    "Dataset": lambda: datasets.Dataset.from_dict({"text": TEXTS}),
    "DatasetDict": lambda: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS}), test=datasets.Dataset.from_dict({"text": ["no"]})
    ),
    "IterableDataset": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A tiny base and three fine-tunes, with tokenizers."""
    base, models = write_family(tmp_path_factory.mktemp("family"), "bert", "F32")
    for folder in (base, *models):
        save_tokenizer(folder, "bert")
    return base, models


def texts_file(folder: Path) -> Path:
    file = folder / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_data_in_memory_are_collected_from_as_a_file_of_them(
    kind: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model = family[1][0]
    first = merganser.collect(model, texts_file(tmp_path), output=tmp_path / "file.safetensors")
    second = merganser.collect(model, IN_MEMORY[kind](), output=tmp_path / "memory.safetensors")
    assert Path(first).read_bytes() == Path(second).read_bytes() and second.header.examples == len(TEXTS)


def test_each_model_of_regmean_pp_has_data_in_memory(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    models, file = family[1][:2], texts_file(tmp_path)
    one = Path(merge_regmean_pp(models, [str(file), file], tmp_path / "files"))
    two = Path(merge_regmean_pp(models, [TEXTS, ROWS], tmp_path / "memory"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_rows_in_memory_are_evaluated_on(save_ready: Callable[..., Path], tmp_path: Path) -> None:
    model = save_ready("m", seed=3)
    found = merganser.evaluate(model, ROWS)
    both = merganser.evaluate(model, [datasets.Dataset.from_list(ROWS), ROWS])
    assert found.score(str(model), "data").examples == len(ROWS)
    for name in ("data 1", "data 2"):
        assert both.score(str(model), name).scores == found.score(str(model), "data").scores


def test_models_are_paths_results_contributors_or_dictionaries(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """With statistics for some of them; one None means the model's own folder."""
    a, b = family[1][:2]
    copied = Path(shutil.copy(a / FILE_NAME, tmp_path / "a.safetensors"))
    expected = (merge([str(a), str(b)], tmp_path / "paths", method="regmean") / "model.safetensors").read_bytes()
    given: dict[str, Any] = {
        "paths": [a, b],
        "contributors": (merganser.Contributor(model=a), b),  # type: ignore[arg-type]
        "dictionaries": iter([{"model": a, "statistics": copied}, {"model": str(b), "coefficient": 1}]),
    }
    for name, models in given.items():
        out = merge(models, tmp_path / f"of {name}", method="regmean")
        assert (out / "model.safetensors").read_bytes() == expected
    out = merge([a, b], tmp_path / "own", method="regmean", statistics=[copied, None])
    assert (out / "model.safetensors").read_bytes() == expected
    assert (merge([out], tmp_path / "result") / "model.safetensors").read_bytes() == expected


def test_the_texts_of_a_method_may_be_named_by_a_path(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    file = texts_file(tmp_path)
    found = [
        merge(family[1][:2], tmp_path / type(name).__name__, method="activations", options={"data": name})
        for name in (file, str(file))
    ]
    assert found[0].plan.to_json() == found[1].plan.to_json()


def test_a_recipe_s_file_is_read_as_the_error_says(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"contributors: [{family[1][0]}, {family[1][1]}]\nmethod: simple\n")
    with pytest.raises(UserError) as caught:
        merge(str(file), tmp_path / "out")
    assert f"make_recipe(load_recipe(Path({str(file)!r})))" in str(caught.value.mend)
    assert merge(make_recipe(load_recipe(file)), tmp_path / "out").plan.recipe.method == "simple"


NO_PATHS: dict[str, Callable[[Path], Any]] = {
    "None": lambda _: None,
    "number": lambda _: 3,
    "bytes": lambda _: b"abc",
    "mapping": lambda folder: {"model": str(folder)},
    "model": transformers.AutoModel.from_pretrained,
    "long": lambda _: "the movie was good " * 300,
    "NUL": lambda _: "a\0b",
}


def calls(model: Path, given: Any, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every place of a path or data in the functions, with something else in it."""
    out = folder / "out"
    yield "collect, model", lambda: merganser.collect(given, TEXTS, output=folder / "s.safetensors")
    yield "collect, data", lambda: merganser.collect(model, given, output=folder / "s.safetensors")
    yield "evaluate, model", lambda: merganser.evaluate(given, ROWS)
    yield "evaluate, models", lambda: merganser.evaluate([model, given], ROWS)
    yield "evaluate, data", lambda: merganser.evaluate(model, given)
    yield "merge, model", lambda: merge([model, given], out) if not isinstance(given, Mapping) else merge(given, out)
    yield "merge, models", lambda: merge(given, out)
    yield "merge, contributor", lambda: merge([{"model": given}], out)
    yield "merge, data", lambda: merge([model], out, method="activations", options={"data": given})
    yield "extract, model", lambda: merganser.extract(given, out, base=model)
    yield "extract, base", lambda: merganser.extract(model, out, base=given)
    yield "regmean++, data", lambda: merge_regmean_pp([model], [given], out)
    yield "regmean++, all data", lambda: merge_regmean_pp([model], given, out)
    yield "moe", lambda: build_moe(given, out)
    if given is not None:  # which means the default elsewhere
        yield "merge, base", lambda: merge([model], out, base=given)
    if not isinstance(given, str):  # a strange name of a place is the file system's to refuse
        yield "merge, output", lambda: merge([model], given)
        yield "extract, output", lambda: merganser.extract(model, given, base=model)
        yield "verify", lambda: merganser.verify(given)
        yield "reproduce", lambda: merganser.reproduce(given)
        yield "ledger", lambda: merganser.ledger.show(given)


@pytest.mark.parametrize("kind", NO_PATHS)
def test_what_is_no_path_is_said(kind: str, family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    model = family[1][0]
    for place, call in calls(model, NO_PATHS[kind](model), tmp_path):
        with pytest.raises(UserError) as caught:
            call()
        problems = getattr(caught.value, "problems", [caught.value])
        assert all(problem.mend for problem in problems), (place, str(caught.value))
        assert len(str(caught.value)) < 4000 and "object at 0x" not in str(caught.value), place
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"input_ids": [1, 2, 3]}], r"columns are input_ids\n.*give the texts"),
        ([("a text", 1)], r"data, row 1: a text or a dictionary by column is expected, and this is of the type tuple"),
        (["a text", None], r"data, row 2: .* this is None"),
        ([{1: "a"}], "row 1"),
        ([{"text": "a text"}, {"text": 5}], r"data, row 2: 'text' is int '5', not text"),
        ({"text": ["a text"]}, "of the type dict"),
        ({"a text", "another"}, "of the type set"),
        (torch.zeros(3), "row 1: .*Tensor"),
        ([], "no data"),
        ([__file__], "no texts but names of files"),
    ],
)
def test_rows_that_are_none_are_said_with_their_place(
    data: Any, words: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        merganser.collect(family[1][0], data, output=tmp_path / "s.safetensors")


def test_other_arguments_of_merge_that_are_no_lists(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    given: list[tuple[dict[str, Any], str]] = [
        ({"coefficients": 1}, "coefficients are a list"),
        ({"statistics": "a.safetensors"}, "statistics are a list"),
        ({"statistics": [3, None]}, "a statistics file is expected"),
        ({"options": ["alpha"]}, "dictionary"),
        ({"as_adapter": "4"}, "'4' is no rank"),
        ({"engine": "rays"}, "did you mean 'ray'"),
    ]
    for arguments, words in given:
        with pytest.raises(UserError, match=words):
            merge(family[1][:2], tmp_path / "out", **arguments)
    with pytest.raises(UserError, match="by their roles"):
        merganser.collect(family[1][0], TEXTS, columns="text", output=tmp_path / "s.safetensors")  # type: ignore[arg-type]


def test_a_recipe_s_file_may_be_text_and_what_is_no_recipe_is_said(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("contributors: [{model: a}, {model: b}]\n", encoding="utf-8")
    assert load_recipe(str(file)) == load_recipe(file)
    for wrong in (None, 3, ["a"]):
        with pytest.raises(UserError):
            load_recipe(wrong)  # type: ignore[arg-type]
        with pytest.raises(UserError):
            make_recipe(wrong)  # type: ignore[arg-type]
