"""The plan is a value: it prints as JSON, comes back the same, and is all that it takes to carry a merge out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.sources import read_source
from merganser.checkpoints.writer import TensorSpec
from merganser.engines import SerialEngine
from merganser.errors import RecipeError, UserError
from merganser.merging import (
    Plan,
    RunSettings,
    Source,
    Step,
    carry_out,
    make_plan,
    make_recipe,
    merge,
    prepare,
    reproduce,
    verify,
)
from merganser.merging.execution import Merging
from merganser.merging.plan import inputs_of
from merganser.methods import Facts, Unit

Family = Callable[..., tuple[Path, list[Path]]]
KEPT = Path(__file__).parent / "kept"
RECIPES: list[dict[str, Any]] = [
    {"method": "regmean"},
    {"method": "ties", "options": {"density": 0.5}, "dtype": "BF16"},
    {"method": "simple", "keep_separate": ["classifier*"], "max_shard_size": "8kB"},
    {"method": "fisher", "exclude": ["*.pooler.*"]},
]


def recipe_of(base: Path, models: list[Path], values: dict[str, Any]) -> merganser.Recipe:
    people = [{"model": str(m), "coefficient": n + 1.0} for n, m in enumerate(models)]
    return make_recipe({"contributors": people, "base": str(base), **values})


def weights(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("values", RECIPES, ids=lambda values: values["method"])
def test_a_plan_comes_back_from_json_and_is_carried_out(family: Family, tmp_path: Path, values: dict[str, Any]) -> None:
    base, models = family("bert", 2, fisher="expected")
    recipe = recipe_of(base, models, values)
    plan = make_plan(recipe)
    text = json.dumps(plan.to_json())
    again = Plan.from_json(json.loads(text), "here")
    assert again == plan and json.dumps(again.to_json()) == text
    carry_out(prepare(again, tmp_path / "plan"), tmp_path / "plan")
    merge(recipe, tmp_path / "recipe")
    assert weights(tmp_path / "plan") == weights(tmp_path / "recipe")
    assert (tmp_path / "plan" / "provenance.json").read_bytes() == (
        tmp_path / "recipe" / "provenance.json"
    ).read_bytes()
    assert reproduce(tmp_path / "plan") == []


def test_rows_that_differ_are_in_the_plan_as_runs(
    family: Family, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    models = []
    for seed, labels in enumerate((["sad", "glad", "angry"], ["glad", "sad", "calm"])):
        model = save_model(f"m{seed}", "bert", seed, num_labels=3)
        config = json.loads((model / "config.json").read_text())
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        (model / "config.json").write_text(json.dumps(config))
        models.append(model)
    plan = make_plan(make_recipe({"contributors": [str(m) for m in models], "method": "simple", "labels": "union"}))
    (rows,) = {step.rows for step in plan.steps if step.rows}
    assert rows.own == ((0, 1, 2, -1), (1, 0, -1, 2)) and rows.runs[0] == ((0, 3), (-1, 1))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), "here") == plan


def test_workers_get_the_plan_and_derive_none(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family("bert", 2)
    recipe = recipe_of(base, models, {"method": "regmean", "max_shard_size": "8kB"})
    prepared = prepare(recipe, tmp_path / "jobs", RunSettings.make(engine=SerialEngine()))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a plan was made again")

    for module in ("planning", "merge"):
        monkeypatch.setattr(sys.modules[f"merganser.merging.{module}"], "plan_of", never)
    carry_out(prepared, tmp_path / "jobs")
    monkeypatch.undo()
    merge(recipe, tmp_path / "here")
    assert weights(tmp_path / "jobs") == weights(tmp_path / "here")


@pytest.mark.parametrize("rows", [None, 2, 3])
def test_a_source_can_be_a_part_of_a_tensor(save_model: Callable[..., Path], rows: int | None) -> None:
    """One contributor stacks its experts and stores a map the other way round; the other has them apart."""
    one, two = save_model("one"), save_model("two")
    torch.manual_seed(0)
    stacked, apart, fused = torch.randn(3, 4, 6), torch.randn(4, 6), torch.randn(6, 9)
    save_file({"experts": stacked, "fused": fused}, one / "model.safetensors")
    save_file({"expert.1": apart, "query": torch.zeros(3, 6)}, two / "model.safetensors")
    facts = {"expert.1": (4, 6), "query": (3, 6)}
    sources = {
        "expert.1": (Source("experts", index=1), Source("expert.1")),
        "query": (Source("fused", rows=None, transposed=True), Source("query")),
    }
    stored = open_checkpoint(one)
    parts = {
        Source("experts", index=2, rows=(1, 3)): stacked[2, 1:3],
        Source("experts", rows=(1, 2)): stacked[1:2],
        Source("fused", transposed=True): fused.T,
        Source("fused", rows=(2, 5)): fused[2:5],
        Source("experts", index=0, transposed=True): stacked[0].T,
    }
    for source, wanted in parts.items():
        assert torch.equal(read_source(stored, source), wanted)
        assert torch.equal(read_source(stored, source, 1, 2), wanted[1:2])
        assert source.shape(stored) == tuple(wanted.shape)
    recipe = make_recipe({"contributors": [str(one), str(two)], "method": "simple"})
    name = "expert.1"
    step = Step(
        Unit((name,), "average", (Facts(name, facts[name]),)),
        "average",
        tuple({name: source} for source in sources[name]),
        (1.0, 3.0),
    )
    plan = Plan(recipe, (step,), (TensorSpec(name, "F32", facts[name]),))
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())), "here")
    found = [merged.tensors[name] for _, merged in Merging(inputs_of(plan)).slices(plan.steps[0], rows)]
    torch.testing.assert_close(torch.cat(found), (stacked[1] + 3 * apart) / 4)


def test_a_plan_from_a_stranger_is_data(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    plan = make_plan(recipe_of(base, models, {"method": "simple", "keep_separate": ["classifier*"]}))
    values = plan.to_json()
    for changes in (
        {"folders": {"../../evil": "../../evil/model.safetensors"}},
        {"folders": {"evil": "/evil/model.safetensors"}},
        {"outputs": values["outputs"][1:]},
        {"steps": [{}]},
        {"vocabulary_from": "all"},
        {"vocabulary_from": 2},
        {"folders": {}},
        {"recipe": {**values["recipe"], "contributors": values["recipe"]["contributors"][:1]}},
        {"steps": [{**step, "coefficients": [1.0]} for step in values["steps"]]},
    ):
        with pytest.raises(RecipeError, match="no plan"):
            Plan.from_json({**values, **changes}, "provenance.json")
    step = next(step for step in plan.steps if len(step.unit.facts[0].shape) == 2)
    (name,) = step.unit.names
    other = next(s for s in plan.steps if s.unit.facts[0].shape != step.unit.facts[0].shape).unit.names[0]
    for tensor in ("nothing", other):
        wrong = replace(step, sources=({name: Source(tensor)}, *step.sources[1:]))
        with pytest.raises(UserError, match="does not have"):
            inputs_of(replace(plan, steps=(wrong,)))


@pytest.mark.parametrize(("folder", "number"), [("format-1", 1), ("format-2", 2), ("format-2-adapter", 2)])
def test_results_of_older_versions_are_checked_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, number: int
) -> None:
    """These folders were written by the versions that wrote these formats."""
    shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")  # the adapter's configuration names its base as it was found
    old = tmp_path / "kept" / folder
    assert json.loads((old / "provenance.json").read_text())["format"] == number
    assert not verify(old).absent
    # The last bits of products depend on the processor.
    differing = reproduce(old, tmp_path / "again")
    # And a head that PEFT replaces as a whole is held as a whole now, which an adapter's configuration says.
    heads = {"adapter_config.json", "provenance.json"} if "adapter" in folder else set()
    assert all(file.endswith(".safetensors") or file in heads for file in differing)
    for file in old.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "again" / file.name)
        assert all("classifier" in name for name in before.keys() - after.keys())
        for name in before.keys() & after.keys():
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    assert verify(tmp_path / "again").parents == verify(old).parents
    weights_file = next(old.glob("*.safetensors"))
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="was changed after the merge"):
        verify(old)


def test_what_merge_returns(family: Family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    result = merge(models, tmp_path / "out", method="regmean", exclude=["*.pooler.*"])
    assert result == tmp_path / "out" and Path(result) == tmp_path / "out" and str(result) == str(tmp_path / "out")
    assert (result / "config.json").is_file() and result.method == "regmean" and result.seconds > 0
    assert merge(models, str(tmp_path / "text"), method="simple") == str(tmp_path / "text")
    shown = result._repr_html_()
    assert sum(part.tensors for part in result.treatments) == len(result.plan.outputs)
    assert any(part.reason and "*.pooler.*" in part.reason for part in result.treatments)
    assert "<td>2</td>" in verify(result)._repr_html_()
    assert "<table>" in shown and "regmean" in shown and "excluded by &#x27;*.pooler.*&#x27;" in shown


def test_the_package_shows_what_there_is() -> None:
    assert {"collect", "evaluate", "ledger", "merge", "verify"} <= set(dir(merganser))
    for name in dir(merganser):
        assert getattr(merganser, name) is not None


def test_numbers_that_cannot_be_averaged_are_copied(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of every integer type that files can hold, also where a contributor keeps them to itself."""
    kinds = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool]
    models = [save_model(f"m{seed}", "bert", seed) for seed in range(2)]
    for model in models:
        tensors = load_file(model / "model.safetensors")
        tensors |= {f"buffer.{kind}": torch.tensor([[0, 1], [1, 0]]).to(kind) for kind in kinds}
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out = merge(models, tmp_path / "out", method="simple")
    apart = merge(models, tmp_path / "apart", method="simple", keep_separate=["buffer.*"])
    found = load_file(out / "model.safetensors")
    kept = load_file(apart / "heads" / "m1" / "head.safetensors")
    for kind in kinds:
        for tensors in (found, kept):
            assert tensors[f"buffer.{kind}"].dtype == kind
            assert tensors[f"buffer.{kind}"].tolist() == [[0, 1], [1, 0]]
    assert reproduce(out) == reproduce(apart) == []


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_the_configuration_states_the_dtype_that_is_stored(
    save_model: Callable[..., Path], tmp_path: Path, dtypes: tuple[str, str]
) -> None:
    """The result is as wide as the widest contributor, and opens as wide as it is."""
    import transformers

    models = [save_model(f"m{seed}", "bert", seed) for seed in range(2)]
    for model, dtype in zip(models, dtypes, strict=True):
        tensors = {n: t.to(getattr(torch, dtype)) for n, t in load_file(model / "model.safetensors").items()}
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    out = merge(models, tmp_path / "out", method="simple")
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    apart = merge(models, tmp_path / "apart", method="simple", keep_separate=["classifier*"])
    for head in ("m0", "m1"):  # each head's folder opens with the shared weights
        opened = transformers.AutoModelForSequenceClassification.from_pretrained(apart / "heads" / head)
        assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    alike = merge([models[0]] * 2, tmp_path / "alike", method="simple")
    assert (alike / "config.json").read_bytes() == (models[0] / "config.json").read_bytes()


def test_labels_of_one_name_are_refused_where_they_have_to_be_told_apart(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    models = []
    for seed, labels in enumerate((["x", "y", "y"], ["y", "x", "y"])):
        model = save_model(f"m{seed}", "bert", seed, num_labels=3)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "id2label": dict(enumerate(labels))}))
        models.append(model)
    for labels in ("same", "union"):
        with pytest.raises(UserError, match=r"(?s)2 problems.*m0.*two labels of its head one name.*m1"):
            merge(models, tmp_path / "out", method="simple", labels=labels)
    alike = merge([models[0], models[0]], tmp_path / "alike", method="simple")  # nothing has to be told apart
    assert load_file(alike / "model.safetensors")["classifier.weight"].shape[0] == 3


def test_data_and_logs_of_a_contributor_are_not_carried_over(save_model: Callable[..., Path], tmp_path: Path) -> None:
    model = save_model("m")
    for name in ("train.jsonl", "dev.csv", "run.log", "rows.parquet", "events.out.tfevents.1", "predictions.npy"):
        (model / name).write_text("private")
    for name in ("vocab.txt", "merges.txt", "generation_config.json"):
        (model / name).write_text("{}")
    out = merge([model, model], tmp_path / "out", method="simple")
    assert {path.name for path in Path(out).iterdir()} == {
        "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors", "provenance.json",
        "vocab.txt",
    }  # fmt: skip
