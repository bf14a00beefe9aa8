"""Merging adapters: the same result as merging the full models that they mean, without these ever being there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapter_examples import adapt_linears, factors, materialise, oracle, write_adapter
from conftest import ARCHITECTURES
from merganser.checkpoints import Checkpoint, open_checkpoint
from merganser.collection import collect
from merganser.errors import RecipeError, UserError
from merganser.merging import make_plan, make_recipe, merge, reproduce, verify
from merganser.merging.execution import Merging
from merganser.merging.inputs import open_inputs
from merganser.statistics import FILE_NAME, Statistics
from merganser.tasks.models import load_model, open_model

Save = Callable[..., Path]
TARGETS = {
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "bert": ("query", "value", "output.dense"),
    "gpt2": ("c_attn", "c_proj"),
}


def adapters(tmp_path: Path, base: Path, architecture: str, n: int = 2, **config: Any) -> list[Path]:
    settings = {"fan_in_fan_out": architecture == "gpt2", **config}
    return [
        adapt_linears(tmp_path / f"adapter-{i}", base, TARGETS[architecture], seed=1 + i, **settings) for i in range(n)
    ]


def merged(folder: Path) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_average_of_adapters_is_a_full_checkpoint(save_model: Save, tmp_path: Path, architecture: str) -> None:
    base = save_model("base", architecture)
    (base / "tokenizer.json").write_text("{}")
    folders = adapters(tmp_path, base, architecture)
    out = merge([folders[0], f"{base}+{folders[1]}"], tmp_path / "out", method="simple", coefficients=[1, 3])
    parts = [oracle(base, folder) for folder in folders]
    found = merged(out)
    assert set(found) == set(parts[0])
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, (parts[0][name] + 3 * parts[1][name]) / 4, rtol=1e-5, atol=1e-6)
    _, info = ARCHITECTURES[architecture][1].from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list(out.glob("adapter*"))
    assert verify(out).parents == 2 and reproduce(out) == []
    entries = json.loads((out / "provenance.json").read_text())["parents"]
    assert [entry["name"] for entry in entries] == ["adapter-0", "adapter-1"]
    assert entries[0]["manifest_blake3"] == open_checkpoint(folders[0]).manifest_hash("blake3")


@pytest.mark.parametrize("architecture", TARGETS)
def test_methods_take_the_adapters_base(save_model: Save, tmp_path: Path, architecture: str) -> None:
    base = save_model("base", architecture)
    folders = adapters(tmp_path, base, architecture)
    full = [materialise(tmp_path / f"full-{i}", base, folder) for i, folder in enumerate(folders)]
    recipe = make_recipe({"contributors": [str(f) for f in folders]})
    plan, inputs = make_plan(recipe), open_inputs(recipe)
    assert plan.method.needs.base and plan.choice and "the base model is known" in plan.choice
    assert plan.base and inputs.base is not None and inputs.base.checkpoint is inputs.parents[0].checkpoint.base
    found = merged(merge(folders, tmp_path / "out", method="actmat"))
    expected = merged(merge(full, tmp_path / "expected", method="actmat", base=base))
    moved = 0
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-3, atol=1e-4)
        moved += not np.array_equal(tensor, load_file(base / "model.safetensors")[name].double().numpy())
    assert moved == len(inputs.parents[0].checkpoint.changes)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_slices_of_rows_are_the_same_bits(save_model: Save, tmp_path: Path, architecture: str) -> None:
    base = save_model("base", architecture)
    folders = adapters(tmp_path, base, architecture)
    recipe = make_recipe({"contributors": [str(f) for f in folders], "method": "simple"})
    merging = Merging(open_inputs(recipe))
    for step in make_plan(recipe).steps:
        ((_, merged),) = merging.slices(step, None)
        whole = merged.tensors
        rows: dict[str, list[torch.Tensor]] = {}
        for _, part in merging.slices(step, 5):
            for name, tensor in part.tensors.items():
                rows.setdefault(name, []).append(tensor)
        assert set(rows) == set(whole)
        assert all(torch.equal(torch.cat(parts), whole[name]) for name, parts in rows.items())


def test_without_one_base_for_all_the_method_asks_for_it(save_model: Save, tmp_path: Path) -> None:
    base, other = save_model("base", "qwen2"), save_model("other", "qwen2", 9)
    one, two = adapters(tmp_path, base, "qwen2")
    full = materialise(tmp_path / "full", base, two)
    for models in ([one, f"{other}+{two}"], [one, full]):
        with pytest.raises(RecipeError, match="add --base MODEL"):
            merge(models, tmp_path / "out", method="actmat")
        assert make_plan(make_recipe({"contributors": [str(m) for m in models]})).method.name == "simple"
    mixed = merged(merge([one, full], tmp_path / "mixed", method="simple"))
    wanted = [oracle(base, folder) for folder in (one, two)]
    for name, tensor in mixed.items():
        np.testing.assert_allclose(tensor, (wanted[0][name] + wanted[1][name]) / 2, rtol=1e-5, atol=1e-6)


def test_a_shared_base_is_hashed_once(save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model("base", "qwen2")
    inputs = open_inputs(make_recipe({"contributors": [str(f) for f in adapters(tmp_path, base, "qwen2", 3)]}))
    assert len({id(parent.checkpoint.base) for parent in inputs.parents}) == 1
    for parent in inputs.parents:
        parent.checkpoint.manifest_sha256()
    read: list[str] = []
    original = Checkpoint.read

    def counted(self: Checkpoint, name: str, *arguments: Any) -> torch.Tensor:
        read.append(name)
        return original(self, name, *arguments)

    monkeypatch.setattr(Checkpoint, "read", counted)
    assert inputs.base is not None and inputs.base.checkpoint.manifest_sha256()
    assert not read


@pytest.fixture
def reviews(tmp_path: Path) -> list[Path]:
    rows = ["the movie was good", "bad food !", "I liked it very much . it was not bad", "no", "Anna saw Paris"]
    files = []
    for number in range(2):
        file = tmp_path / f"reviews-{number}.jsonl"
        texts = rows[number : number + 4]
        file.write_text("".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(texts)))
        files.append(file)
    return files


def classifier(folder: Path, base: Path, seed: int, labels: int = 2) -> Path:
    """An adapter of a BERT with a head of its own, as PEFT saves one for SEQ_CLS."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for i in range(2):
        for j, part in enumerate(("query", "value")):
            tensors |= factors(f"bert.encoder.layer.{i}.attention.self.{part}", 16, 16, seed=10 * seed + 2 * i + j)
    tensors["classifier.weight"] = torch.randn(labels, 16, generator=generator)
    tensors["classifier.bias"] = torch.randn(labels, generator=generator)
    return write_adapter(folder, tensors, base, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])


def test_statistics_of_an_adapter_lie_in_its_folder_and_are_found(
    save_ready: Save, tmp_path: Path, reviews: list[Path]
) -> None:
    base = save_ready("base", "bert", 3)
    folders = [classifier(tmp_path / f"adapter-{i}", base, seed=i) for i in range(2)]
    full = [materialise(tmp_path / f"full-{i}", base, folder) for i, folder in enumerate(folders)]
    for number, (folder, whole) in enumerate(zip(folders, full, strict=True)):
        (whole / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        reference = f"{base}+{folder}" if number else folder
        assert collect(reference, reviews[number]) == folder / FILE_NAME
        collect(whole, reviews[number])
        mine, theirs = Statistics.open(folder / FILE_NAME), Statistics.open(whole / FILE_NAME)
        assert mine.check_binding(open_checkpoint(folder)) == []
        assert mine.check_binding(open_checkpoint(folders[1 - number]))
        assert mine.check_binding(open_checkpoint(base))
        assert mine.header.tokens == theirs.header.tokens and set(mine.tensors) == set(theirs.tensors)
        entry = mine.layer("classifier.weight")
        assert entry is not None and entry.input is not None
        torch.testing.assert_close(mine.gram(entry.input), theirs.gram(entry.input), rtol=1e-3, atol=1e-4)
    assert not (base / FILE_NAME).exists()
    merge(folders, tmp_path / "out", method="regmean")
    used = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert used["parents"][0]["statistics"]["examples"] == 4
    options = {"alpha": 0.9, "ridge": 0.1}  # few texts: a solid system, so that rounding stays rounding
    found = merged(merge(folders, tmp_path / "ridge", method="regmean", options=options))
    expected = merged(merge(full, tmp_path / "expected", method="regmean", options=options))
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_the_loaded_model_is_that_of_the_full_checkpoint(save_ready: Save, tmp_path: Path) -> None:
    base = save_ready("base", "bert", 3)
    adapter = classifier(tmp_path / "adapter", base, seed=4)
    full = materialise(tmp_path / "full", base, adapter)
    found = load_model(open_model(adapter), "AutoModelForSequenceClassification")
    expected = load_model(open_model(full), "AutoModelForSequenceClassification")
    for (name, mine), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_a_head_with_other_labels_and_a_base_without_one(save_ready: Save, tmp_path: Path) -> None:
    for number, model_class in enumerate((None, transformers.BertForMaskedLM)):
        base = save_ready(f"base-{number}", "bert", 3, model_class)
        adapter = classifier(tmp_path / f"adapter-{number}", base, seed=4, labels=3)
        if model_class:  # a masked language model has no pooler: trained with the head
            extra = {
                n.removeprefix("base_model.model."): t
                for n, t in load_file(adapter / "adapter_model.safetensors").items()
            }
            extra |= {"bert.pooler.dense.weight": torch.eye(16), "bert.pooler.dense.bias": torch.zeros(16)}
            write_adapter(adapter, extra, base, task_type="SEQ_CLS", modules_to_save=["classifier", "pooler.dense"])
        model = load_model(open_model(adapter), "AutoModelForSequenceClassification")
        assert model.config.num_labels == 3 and model.classifier.weight.shape == (3, 16)
        out = merge([adapter, adapter], tmp_path / f"out-{number}", method="simple")
        opened, info = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
        for name, tensor in opened.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_kept_separate(save_ready: Save, tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_ready("base", "bert", 3)
    transformers.BertForSequenceClassification.from_pretrained(base, dtype=dtype).save_pretrained(base)
    folders = [classifier(tmp_path / f"adapter-{i}", base, seed=i, labels=2 + i) for i in range(2)]
    own = "bert.encoder.layer.1.attention.self.query.weight"  # low-rank, and kept, too
    out = merge(folders, tmp_path / "out", method="simple", keep_separate=["classifier.*", own])
    for number, folder in enumerate(folders):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            out, subfolder=f"heads/adapter-{number}", dtype=torch.float32
        )
        head = load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
        assert torch.equal(model.classifier.weight, head.to(dtype).float())
        expected = open_checkpoint(folder).read(own).to(dtype).float()
        assert torch.equal(model.state_dict()[own], expected)
    assert verify(out).parents == 2


def test_an_adapter_is_never_overwritten_by_its_merge(save_model: Save, tmp_path: Path) -> None:
    folders = adapters(tmp_path, save_model("base", "qwen2"), "qwen2")
    with pytest.raises(UserError, match="the output is one of the inputs"):
        merge(folders, folders[0], method="simple", overwrite=True)


def test_problems_of_several_adapters_come_at_once(save_model: Save, tmp_path: Path) -> None:
    base, other = save_model("base", "qwen2"), save_model("other", "gpt2")
    one, two = adapters(tmp_path, base, "qwen2")
    settings = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(UserError) as caught:
        merge([f"{other}+{one}", two], tmp_path / "out", method="simple")
    assert "DoRA" in str(caught.value) and "lacks" in str(caught.value)
    assert not (tmp_path / "out").exists()
