"""Every module of a sentence-transformers model is merged; sentence-transformers itself is the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.merging import merge, reproduce, verify
from sentence_examples import (
    WORDS,
    averaged,
    embeddings,
    opened,
    save_bert,
    save_encoder,
    save_tokenizer,
    sentence_transformers,
)

modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")


def dense() -> Any:
    return modules.Dense(16, 8)


def residual() -> Any:
    return modules.Dense(16, 12, bias=False, use_residual=True)


def norm() -> Any:
    layer = modules.LayerNorm(16)
    torch.nn.init.normal_(layer.norm.weight)
    return layer


def pair(folder: Path, *behind: Callable[[], Any]) -> list[Path]:
    first = save_encoder(folder / "a", 1, *behind)
    return [first, save_encoder(folder / "b", 2, *behind, base=folder / "a-bert")]


def same(out: Path, models: list[Path], weights: list[float] | None = None) -> None:
    expected = embeddings(averaged(models, weights))
    assert expected.std() > 0.01
    assert torch.allclose(embeddings(opened(out)), expected, atol=2e-6)
    assert not torch.allclose(embeddings(opened(models[0])), expected, atol=1e-3)


def older_layout(folder: Path) -> Path:
    """The same model as versions before 2.0 wrote it: the transformer in a sub-folder of its own."""
    listing = json.loads((folder / "modules.json").read_text())
    inner = folder / "0_Transformer"
    inner.mkdir()
    kept = {"modules.json", "config_sentence_transformers.json"}
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in kept:
            path.rename(inner / path.name)
    (folder / "config.json").write_text('{"__version__": "0.2.5"}')  # not of a transformer
    listing[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listing))
    return folder


def pickled(folder: Path, module: str) -> Path:
    state = load_file(folder / module / "model.safetensors")
    torch.save(state, folder / module / "pytorch_model.bin")
    (folder / module / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("behind", [(dense,), (residual, modules.Normalize), (norm, dense, modules.Normalize)])
def test_modules_behind_the_pooling(tmp_path: Path, behind: tuple[Any, ...]) -> None:
    models = pair(tmp_path, *behind)
    out = merge(models, tmp_path / "out", method="simple", coefficients=[1, 3])
    same(out, models, [1, 3])
    assert verify(out).parents == 2 and reproduce(out) == []


def test_the_older_layout(tmp_path: Path) -> None:
    models = [older_layout(folder) for folder in pair(tmp_path, dense)]
    out = merge(models, tmp_path / "out", method="simple", max_shard_size="8KB")
    same(out, models)
    assert len(list((out / "0_Transformer").glob("model-*-of-*.safetensors"))) > 1
    assert not list(Path(out).glob("*.safetensors"))
    assert verify(out).parents == 2 and reproduce(out) == []


def test_models_of_both_layouts_meet(tmp_path: Path) -> None:
    models = pair(tmp_path, dense)
    older_layout(models[1])
    same(merge(models, tmp_path / "new", method="simple"), models)
    same(merge(models[::-1], tmp_path / "old", method="simple"), models[::-1])
    assert (tmp_path / "old" / "0_Transformer" / "config.json").is_file()


def test_the_dtype_is_stated_in_the_older_layout(tmp_path: Path) -> None:
    models = [older_layout(folder) for folder in pair(tmp_path)]
    out = merge(models, tmp_path / "out", method="simple", dtype="BF16")
    assert json.loads((out / "0_Transformer" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "config.json").read_text() == '{"__version__": "0.2.5"}'
    assert next(opened(out).parameters()).dtype == torch.bfloat16


def test_a_pickled_dense_is_refused_and_merged_with_the_flag(tmp_path: Path) -> None:
    models = pair(tmp_path, dense)
    expected = [shutil.copytree(model, tmp_path / f"safe-{model.name}") for model in models]
    for model in models:
        pickled(model, "2_Dense")
    with pytest.raises(UserError, match=r"2_Dense.*pickled") as caught:
        merge(models, tmp_path / "out", method="simple")
    assert "--allow-pickle" in str(caught.value) and not (tmp_path / "out").exists()
    out = merge(models, tmp_path / "out", method="simple", allow_pickle=True)
    same(out, expected)
    assert (out / "2_Dense" / "model.safetensors").is_file() and not list(Path(out).rglob("*.bin"))
    assert verify(out, allow_pickle=True).parents == 2 and reproduce(out, allow_pickle=True) == []


def test_word_embeddings_convolutions_and_recurrent_layers(tmp_path: Path) -> None:
    words = pytest.importorskip("sentence_transformers.sentence_transformer.modules.tokenizer")
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        vocabulary = words.WhitespaceTokenizer(["padding_token", *WORDS], stop_words=["the"])
        embedding = modules.WordEmbeddings(vocabulary, torch.randn(len(WORDS) + 1, 8))
        chain = [embedding, modules.CNN(8, 6, [1, 3]), modules.LSTM(12, 5), modules.Pooling(10)]
        model = sentence_transformers.SentenceTransformer(modules=chain, device="cpu")
        model.save(str(tmp_path / f"m{seed}"), create_model_card=False)
        models.append(tmp_path / f"m{seed}")
    same(merge(models, tmp_path / "simple", method="simple"), models)
    base = shutil.copytree(models[0], tmp_path / "base")
    out = merge(models, tmp_path / "out", method="actmat", base=base)
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert used["2_LSTM/encoder.weight_ih_l0"]["method"] == used["emb_layer.weight"]["method"] == "actmat"


def test_weighted_layer_pooling(tmp_path: Path) -> None:
    models = []
    for seed in (1, 2):
        folder = save_encoder(tmp_path / f"m{seed}", seed, base=tmp_path / "m1-bert" if seed == 2 else None)
        layer = modules.WeightedLayerPooling(16, num_hidden_layers=2, layer_start=0)
        torch.nn.init.uniform_(layer.layer_weights)
        (folder / "1_WeightedLayerPooling").mkdir()
        layer.save(str(folder / "1_WeightedLayerPooling"))
        listing = json.loads((folder / "modules.json").read_text())
        kind = "sentence_transformers.models.WeightedLayerPooling"
        listing.insert(1, {"idx": 3, "name": "w", "path": "1_WeightedLayerPooling", "type": kind})
        (folder / "modules.json").write_text(json.dumps(listing))
        models.append(folder)
    out = merge(models, tmp_path / "out", method="simple")
    found, one, two = (
        load_file(folder / "1_WeightedLayerPooling" / "model.safetensors")["layer_weights"] for folder in (out, *models)
    )
    assert not torch.equal(one, two) and torch.allclose(found, (one + two) / 2)


def test_a_router_of_two_encoders(tmp_path: Path) -> None:
    models = []
    for seed in (1, 2):
        routes = []
        for name in ("query", "document"):
            base = tmp_path / f"{name}-1" if seed == 2 else None
            bert = save_bert(tmp_path / f"{name}-{seed}", seed + 10 * (name == "query"), base=base)
            torch.manual_seed(seed)
            routes.append([modules.Transformer(str(bert)), modules.Pooling(16), modules.Dense(16, 8)])
        router = modules.Router.for_query_document(*routes)
        model = sentence_transformers.SentenceTransformer(modules=[router], device="cpu")
        model.save(str(tmp_path / f"m{seed}"), create_model_card=False)
        models.append(tmp_path / f"m{seed}")
    out = merge(models, tmp_path / "out", method="simple")
    for task in ("query", "document"):
        expected = embeddings(averaged(models), task=task)
        assert torch.allclose(embeddings(opened(out), task=task), expected, atol=2e-6)
    assert verify(out).parents == 2 and reproduce(out) == []
    out = merge(models, tmp_path / "actmat", method="actmat", base=models[0])
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    for name in ("query_0_Transformer/encoder.layer.0.output.dense.weight", "document_2_Dense/linear.weight"):
        assert used[name]["method"] == "actmat"
    half = merge(models, tmp_path / "half", method="simple", dtype="F16")
    assert {parameter.dtype for parameter in opened(half)[0].sub_modules["query"][0].parameters()} == {torch.float16}


def test_static_embeddings(tmp_path: Path) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tokenizer = save_tokenizer(tmp_path / "tokenizer")
        static = modules.StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=16)
        model = sentence_transformers.SentenceTransformer(modules=[static, modules.Dense(16, 8)], device="cpu")
        model.save(str(tmp_path / f"m{seed}"), create_model_card=False)
        models.append(tmp_path / f"m{seed}")
    same(merge(models, tmp_path / "out", method="simple"), models)
    out = merge(models, tmp_path / "actmat", method="actmat", base=models[0])
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert {entry["method"] for entry in used.values()} == {"actmat"}
    merge(models, tmp_path / "out", method="simple", overwrite=True)


def test_a_sparse_encoder(tmp_path: Path) -> None:
    sparse = pytest.importorskip("sentence_transformers.sparse_encoder")
    layers = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    models = []
    for seed in (1, 2):
        base = tmp_path / "bert-1" if seed == 2 else None
        bert = save_bert(tmp_path / f"bert-{seed}", seed, transformers.BertForMaskedLM, base=base)
        model = sparse.SparseEncoder(modules=[layers.MLMTransformer(str(bert)), layers.SpladePooling()], device="cpu")
        model.save(str(tmp_path / f"m{seed}"))
        models.append(tmp_path / f"m{seed}")
    out = merge(models, tmp_path / "out", method="simple")
    states = [transformers.BertForMaskedLM.from_pretrained(model).state_dict() for model in models]
    expected = sparse.SparseEncoder(str(models[0]), device="cpu")
    expected[0].model.load_state_dict({n: (states[0][n].double() + states[1][n].double()) / 2 for n in states[0]})
    found = sparse.SparseEncoder(str(out), device="cpu")
    assert torch.allclose(embeddings(found), embeddings(expected), atol=2e-6) and embeddings(expected).std() > 0.001


def test_a_cross_encoder(tmp_path: Path) -> None:
    models = []
    for seed in (1, 2):
        base = tmp_path / "bert-1" if seed == 2 else None
        torch.manual_seed(seed)
        if base is None:
            save_bert(tmp_path / "bert-1", seed)
            configured = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "bert-1", num_labels=1)
            configured.save_pretrained(tmp_path / "bert-1")
        else:
            save_bert(tmp_path / "bert-2", seed, transformers.BertForSequenceClassification, base=base)
        model = sentence_transformers.CrossEncoder(str(tmp_path / f"bert-{seed}"), device="cpu")
        model.save_pretrained(str(tmp_path / f"m{seed}"))
        models.append(tmp_path / f"m{seed}")
    out = merge(models, tmp_path / "out", method="simple")
    asked = [("the duck swims", "a duck on a lake"), ("dogs run", "red blue green")]
    expected = sentence_transformers.CrossEncoder(str(models[0]), device="cpu")
    states = [sentence_transformers.CrossEncoder(str(m), device="cpu").model.state_dict() for m in models]
    expected.model.load_state_dict({n: (states[0][n].double() + states[1][n].double()) / 2 for n in states[0]})
    found = sentence_transformers.CrossEncoder(str(out), device="cpu").predict(asked)
    assert abs(found - expected.predict(asked)).max() < 2e-6
    assert (out / "config_sentence_transformers.json").is_file()


def test_least_squares_treat_dense_layers(tmp_path: Path) -> None:
    models = pair(tmp_path, dense)
    base = save_encoder(tmp_path / "base", 3, dense)
    out = merge(models, tmp_path / "out", method="actmat", base=base)
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert {used[f"2_Dense/linear.{kind}"]["method"] for kind in ("weight", "bias")} == {"actmat"}
    weights, start = [load_file(m / "2_Dense" / "model.safetensors")["linear.weight"].double() for m in models], None
    start = load_file(base / "2_Dense" / "model.safetensors")["linear.weight"].double()
    grams = [(w - start).T @ (w - start) for w in weights]
    grams = [g + 0.01 * g.trace() / len(g) * torch.eye(len(g)) for g in grams]
    expected = torch.linalg.solve(sum(grams), sum(g @ w.T for g, w in zip(grams, weights, strict=True))).T
    average = sum(weights) / 2
    found = load_file(out / "2_Dense" / "model.safetensors")["linear.weight"].double()
    assert (found - expected).norm() < 0.2 * (average - expected).norm()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_module_that_only_some_have(tmp_path: Path, order: tuple[int, int]) -> None:
    with_dense = save_encoder(tmp_path / "with", 1, dense)
    without = save_encoder(tmp_path / "without", 2, base=tmp_path / "with-bert")
    models = [(with_dense, without)[i] for i in order]
    with pytest.raises(UserError, match="no module 2_Dense, whose weights with has") as caught:
        merge(models, tmp_path / "out", method="simple")
    assert "modules.json" in str(caught.value)
    copy = shutil.copytree(with_dense, tmp_path / "copy")  # what the mend says
    listing = json.loads((copy / "modules.json").read_text())
    (copy / "modules.json").write_text(json.dumps([m for m in listing if m["path"] != "2_Dense"]))
    models = [copy if model == with_dense else model for model in models]
    out = merge(models, tmp_path / "out", method="simple")
    same(out, models)
    assert not (out / "2_Dense").exists()


def test_modules_that_do_not_do_the_same(tmp_path: Path) -> None:
    models = pair(tmp_path, dense)
    pooling = models[1] / "1_Pooling" / "config.json"
    settings = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**settings, "pooling_mode": "cls"}))
    activation = models[1] / "2_Dense" / "config.json"
    other = {**json.loads(activation.read_text()), "activation_function": "torch.nn.modules.linear.Identity"}
    activation.write_text(json.dumps(other))
    with pytest.raises(UserError) as caught:
        merge(models, tmp_path / "out", method="simple")
    assert 'pooling_mode: "cls", not "mean"' in str(caught.value) and "Identity" in str(caught.value)


def test_pooling_as_older_versions_spell_it(tmp_path: Path) -> None:
    models = pair(tmp_path)
    old = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (models[1] / "1_Pooling" / "config.json").write_text(json.dumps(old))
    same(merge(models, tmp_path / "out", method="simple"), models)
    old |= {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (models[1] / "1_Pooling" / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="pooling_mode"):
        merge(models, tmp_path / "again", method="simple")


@pytest.mark.parametrize("path", ["../outside", "/etc", "1_Pooling/../../outside"])
def test_modules_outside_of_the_folder(tmp_path: Path, path: str) -> None:
    folder = save_encoder(tmp_path / "a", 1)
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": path, "type": "x.Dense"}]))
    with pytest.raises(UserError, match="lies outside of the folder"):
        open_checkpoint(folder)
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "x.Router"}]))
    (folder / "router_config.json").write_text(json.dumps({"types": {path: "x.Dense"}}))
    with pytest.raises(UserError, match="lies outside of the folder"):
        open_checkpoint(folder)


def test_a_dense_module_without_weights(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "a", 1, dense)
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="2_Dense has no weights"):
        open_checkpoint(folder)


def test_modules_cannot_be_kept_separate(tmp_path: Path) -> None:
    models = pair(tmp_path, dense)
    with pytest.raises(UserError, match="2_Dense cannot be kept separate"):
        merge(models, tmp_path / "out", method="simple", keep_separate=["2_Dense/*"])
