"""Units that do the same on the same texts are paired: permutations come undone, whatever became of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from adapter_examples import adapt_linears, materialise
from conftest import save_tokenizer
from merganser.cli import main
from merganser.engines import SerialEngine
from merganser.errors import UserError
from merganser.merging import make_recipe, merge, reproduce, verify
from merganser.methods import METHODS
from merganser.methods.alignment.activations import standardised
from permutation_examples import LAYOUTS, make, outputs, save_pair

TEXTS = ["the movie was good , I liked it", "Anna saw Paris .", "yes ! bad food", "no - not very good movie ?"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in TEXTS * 5))
    return file


def save(folder: Path, name: str, state: dict[str, Tensor]) -> Path:
    model = make(name)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    save_tokenizer(folder, name.removesuffix("-mha"))
    return folder


def pair(tmp_path: Path, name: str) -> tuple[Path, Path, Tensor]:
    one, two, expected = save_pair(tmp_path, name)
    for folder in (one, two):
        save_tokenizer(folder, name.removesuffix("-mha"))
    return one, two, expected


@pytest.mark.parametrize("similarity", ["correlation", "product"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2", "mpnet", "gpt2", "llama", "llama-mha"])
def test_a_model_and_its_permuted_copy_merge_to_the_model(
    tmp_path: Path, texts: Path, name: str, similarity: str
) -> None:
    one, two, expected = pair(tmp_path, name)
    options = {"data": str(texts), "similarity": similarity}
    out = merge([one, two], tmp_path / "out", method="activations", options=options)
    original, merged = load_file(one / "model.safetensors"), load_file(out / "model.safetensors")
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, original[key], rtol=0, atol=1e-6, msg=key)
    assert torch.allclose(outputs(type(make(name)).from_pretrained(out).eval()), expected, atol=1e-4)
    moving = {p + end for prefixes, ends, _ in LAYOUTS[name] for p in prefixes for end in ends}
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert {key for key, entry in used.items() if entry["method"] == "activations"} == moving


def test_units_that_do_the_same_are_paired_where_weights_would_mislead(tmp_path: Path, texts: Path) -> None:
    """What comes out of a norm is the same in one direction for all inputs: what units have there says nothing."""
    state = {key: tensor.double() for key, tensor in make("bert").state_dict().items()}
    rng, states, planted = np.random.default_rng(0), [dict(state), dict(state)], []
    for layer in range(2):
        place, order = f"bert.encoder.layer.{layer}.", torch.from_numpy(rng.permutation(24))
        norm, inner = f"{place}attention.output.LayerNorm.", f"{place}intermediate.dense."
        direction = 1 / state[f"{norm}weight"]
        direction /= direction.norm()
        constant = direction @ state[f"{norm}bias"]
        misleading = torch.from_numpy(10 * rng.normal(size=24))  # in the same order in both
        for number, units in enumerate((torch.arange(24), order)):
            own = states[number]
            own[f"{inner}weight"] = state[f"{inner}weight"][units] + misleading[:, None] * direction
            own[f"{inner}bias"] = state[f"{inner}bias"][units] - misleading * constant
            own[f"{place}output.dense.weight"] = state[f"{place}output.dense.weight"][:, units]
        planted.append(order)
    folders = [save(tmp_path / str(n), "bert", {k: v.float() for k, v in own.items()}) for n, own in enumerate(states)]
    expected = outputs(type(make("bert")).from_pretrained(folders[0]).eval())
    assert torch.allclose(outputs(type(make("bert")).from_pretrained(folders[1]).eval()), expected, atol=1e-4)
    distance = {}
    for method, options in (("activations", {"data": str(texts)}), ("rebasin", {}), ("simple", {})):
        out = merge(folders, tmp_path / method, method=method, options=options)
        distance[method] = float((outputs(type(make("bert")).from_pretrained(out).eval()) - expected).norm())
        if method == "activations":
            found = load_file(out / "model.safetensors")
            for layer, order in enumerate(planted):
                key = f"bert.encoder.layer.{layer}.output.dense.weight"
                torch.testing.assert_close(found[key].double(), states[0][key], rtol=0, atol=1e-6)
                assert not torch.equal(order, torch.arange(24))
    assert distance["activations"] < 0.3 * distance["rebasin"] and distance["activations"] < 0.3 * distance["simple"]


def test_the_order_is_that_of_correlations_computed_by_hand(tmp_path: Path, texts: Path) -> None:
    """Two models trained apart: numpy's correlations over all real tokens, text by text, and the best assignment."""
    one, two = (save(tmp_path / str(n), "llama", make("llama", seed=n).state_dict()) for n in (0, 1))

    def activations(folder: Path) -> list[np.ndarray]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        seen: list[list[np.ndarray]] = [[], []]
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, number=number: seen[number].append(args[0][0].double().numpy())
            )
        with torch.no_grad():
            for text in TEXTS * 5:
                model(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"})
        return [np.concatenate(layer) for layer in seen]

    acts = [activations(folder) for folder in (one, two)]
    out = merge([one, two], tmp_path / "out", method="activations", coefficients=[1, 2], options={"data": str(texts)})
    found, first, second = (load_file(folder / "model.safetensors") for folder in (out, one, two))
    for layer in range(2):
        width = acts[0][layer].shape[1]
        cross = np.corrcoef(acts[0][layer], acts[1][layer], rowvar=False)[:width, width:]
        order = linear_sum_assignment(-cross)[1]
        assert (order != np.arange(width)).any()
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            expected = (first[key] + 2 * second[key].index_select(axis, torch.from_numpy(order))) / 3
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6, msg=key)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_products_of_standardised_columns_are_correlations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=(2, 30, 4)) * 10.0 ** rng.uniform(-6, 6, (2, 1, 4)) + rng.normal(size=(2, 1, 4))
    one[:, 1], two[:, 2] = 3.7, 0.0
    ours = standardised(torch.from_numpy(one)).T @ standardised(torch.from_numpy(two)) / 30
    with np.errstate(all="ignore"):
        theirs = np.corrcoef(one, two, rowvar=False)[:4, 4:]
    still = np.zeros((4, 4), bool)
    still[1, :] = still[:, 2] = True
    assert (ours.numpy()[still] == 0).all()
    quiet = [np.abs(x).max(0) * 1e-5 > x.std(0) for x in (one, two)]  # may count as still
    heard = ~still & ~quiet[0][:, None] & ~quiet[1][None]
    np.testing.assert_allclose(ours.numpy()[heard], theirs[heard], atol=1e-9)


def test_the_bytes_depend_on_neither_threads_nor_padding_and_a_sample_is_enough(tmp_path: Path, texts: Path) -> None:
    one, two, _ = pair(tmp_path, "bert")
    three = save(tmp_path / "three", "bert", make("bert", seed=4).state_dict())
    written = []
    for number, threads in enumerate((1, 3)):
        run = {"threads": threads, "options": {"data": str(texts), "tokens": 50, "seed": 2}}
        out = merge([one, two, three], tmp_path / f"out-{number}", method="activations", **run)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert reproduce(tmp_path / "out-0") == []
    assert verify(tmp_path / "out-0", deep="all").tensors > 30
    assert not [p.name for p in tmp_path.iterdir() if "activations" in p.name or p.name.startswith(".")]


def test_other_texts_than_were_read_are_found(tmp_path: Path, texts: Path) -> None:
    one, two, _ = pair(tmp_path, "llama")
    out = merge([one, two], tmp_path / "out", method="activations", options={"data": str(texts)})
    assert "sha256" in " ".join(out.notes) and TEXTS[0] not in (out / "provenance.json").read_text()
    texts.write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    with pytest.raises(UserError, match="notes"):
        verify(out)


def test_degenerate_texts_and_models_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("yes\n")
    one, two, _ = pair(tmp_path, "llama")
    state = {k: torch.zeros_like(v) if "mlp" in k else v for k, v in make("llama").state_dict().items()}
    dead = [save(tmp_path / f"dead-{n}", "llama", state) for n in (1, 2)]
    run: dict[str, Any] = {"method": "activations", "options": {"data": str(tmp_path / "one.txt")}}
    for models in ([one, one], dead, [one]):
        out = merge(models, tmp_path / "out", overwrite=True, **run)
        for key, tensor in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(tensor, load_file(models[0] / "model.safetensors")[key], rtol=0, atol=1e-7)
    found = merge([one, two], tmp_path / "pair", **run)
    assert all(torch.isfinite(t).all() for t in load_file(found / "model.safetensors").values())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no data", "add --data FILE"),
        ("no file", "nowhere"),
        ("no tokenizer", "tokenizer"),
        ("other tokens", "as other tokens than"),
        ("few tokens", "greater than or equal to 2"),
        ("seq2seq", "encoders and in decoders alone"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(tmp_path: Path, texts: Path, case: str, message: str) -> None:
    name = "t5" if case == "seq2seq" else "bert"
    one, two, _ = pair(tmp_path, name)
    options: dict[str, Any] = {"data": str(texts)}
    if case == "no data":
        options = {}
    elif case == "no file":
        options = {"data": str(tmp_path / "nowhere.jsonl")}
    elif case == "no tokenizer":
        for file in two.glob("tokenizer*"):
            file.unlink()
    elif case == "other tokens":
        file = two / "tokenizer.json"
        file.write_text(file.read_text().replace('"single": [', '"single": [ ').replace('"movie": ', '"Movie": '))
    elif case == "few tokens":
        options["tokens"] = 1
    with pytest.raises(UserError, match=message):
        merge([one, two], tmp_path / "out", method="activations", options=options, vocabulary="largest")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, _ = pair(tmp_path, "llama")
    arguments = ["merge", str(one), str(two), "--method", "activations", "-o", str(tmp_path / "out")]
    for more, status in (([], 2), (["--data", str(texts)], 0)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *more])
        assert (stop.value.code or 0) == status
    assert "whose tokens have the sha256" in capsys.readouterr().err
    assert METHODS["activations"].needs.data


def test_adapters_on_a_base_and_canonical_names(tmp_path: Path, texts: Path) -> None:
    base = save(tmp_path / "base", "bert", make("bert").state_dict())
    adapters = [adapt_linears(tmp_path / f"a{n}", base, ("query", "intermediate.dense"), seed=n) for n in (1, 2)]
    full = []
    for number, adapter in enumerate(adapters):
        full.append(materialise(tmp_path / f"full-{number}", base, adapter))
        save_tokenizer(full[-1], "bert")
    run: dict[str, Any] = {"method": "activations", "options": {"data": str(texts)}}
    by_adapter = merge([f"{base}+{adapter}" for adapter in adapters], tmp_path / "by-adapter", **run)
    by_full = merge(full, tmp_path / "by-full", names="canonical", **run)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (by_adapter, by_full))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-5, msg=key)


def test_a_cluster_is_refused(tmp_path: Path, texts: Path) -> None:
    one, two, _ = pair(tmp_path, "llama")
    with pytest.raises(UserError, match="leave out the engine"):
        merge([one, two], tmp_path / "out", method="activations", options={"data": str(texts)}, engine=SerialEngine())


def test_by_rules_and_over_layers_that_are_repeated(tmp_path: Path, texts: Path) -> None:
    one, two, _ = pair(tmp_path, "llama-mha")
    original, seen = load_file(one / "model.safetensors"), {"data": str(texts)}
    rules = [
        {"tensors": ["*.mlp.*"], "method": "activations", "options": seen},
        {"tensors": ["*.self_attn.*"], "method": "rebasin"},
    ]
    recipe = {"contributors": [str(one), str(two)], "method": "simple", "rules": rules}
    out = merge(make_recipe(recipe), tmp_path / "rules")
    for key, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[key], rtol=0, atol=1e-6, msg=key)
    layers = [
        {"sources": [{"contributor": name, "range": which} for name in ("one", "two")], "method": "activations"}
        for which in ([0, 2], [1, 2])
    ]
    recipe = {"contributors": [str(one), str(two)], "method": "activations", "options": seen, "layers": layers}
    deep = load_file(merge(make_recipe(recipe), tmp_path / "deep") / "model.safetensors")
    assert len(deep) == len(original) + 9
    for key, tensor in deep.items():
        expected = original[key.replace("layers.2.", "layers.1.")]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=key)
