"""Scores of embeddings: sentence-transformers encodes, scipy and plain loops are the oracles."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser.errors import UserError
from merganser.evaluation import evaluate
from merganser.merging import merge
from sentence_examples import TEXTS, averaged, opened, save_bert, save_encoder, sentence_transformers

scipy_stats = pytest.importorskip("scipy.stats")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
PROMPTS = {"query": "find the ", "document": "a ", "sts": "while "}
PAIRS = [(TEXTS[i], TEXTS[j], (i * 7 + j * 3) % 11 / 2) for i in range(len(TEXTS)) for j in range(i)]


def dense() -> object:
    return modules.Dense(16, 8)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    return write(tmp_path / "sts.jsonl", [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in PAIRS])


def correlations(model: object, pairs: list[tuple[str, str, float]] = PAIRS) -> tuple[float, float]:
    first, second = (model.encode([pair[n] for pair in pairs], convert_to_tensor=True).double() for n in (0, 1))
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(first, second, strict=True)]
    scores = [pair[2] for pair in pairs]
    return scipy_stats.spearmanr(cosines, scores).statistic, scipy_stats.pearsonr(cosines, scores).statistic


def test_sts_of_a_merged_model_with_its_modules_and_prompts(tmp_path: Path, sts: Path) -> None:
    options = {"prompts": PROMPTS, "default_prompt_name": "sts"}
    models = [save_encoder(tmp_path / "a", 1, dense, modules.Normalize, **options)]
    models.append(save_encoder(tmp_path / "b", 2, dense, modules.Normalize, base=tmp_path / "a-bert", **options))
    out = merge(models, tmp_path / "out", method="simple")
    found = evaluate([str(out), *models], sts, task="sts", device="cpu")
    for row, model in zip(found.rows, [out, *models], strict=True):
        spearman, pearson = correlations(opened(Path(model)))
        assert row.key_metric == "spearman" and row.key == pytest.approx(spearman, abs=1e-4)
        assert row.scores["pearson"] == pytest.approx(pearson, abs=1e-4)
        assert row.examples == len(PAIRS) and row.standard_error
    without = opened(Path(models[0]))
    without.default_prompt_name = None
    assert abs(correlations(without)[1] - found.rows[1].scores["pearson"]) > 1e-3  # the prompts do count
    assert json.loads(found.to_json())["rows"][0]["task"] == "sts" and "spearman" in found.table()


def test_sts_cuts_texts_as_the_model_says_and_no_later(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "a", 1)
    long = [(" ".join(TEXTS[i:] + TEXTS[:i]), " ".join(TEXTS[: i + 1]), float(i % 4)) for i in range(6)]
    data = write(tmp_path / "long.jsonl", [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in long])
    settings = model / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 12}))
    found = evaluate(model, data, task="sts", device="cpu").rows[0]
    assert found.max_length == 12 and found.truncated == 6
    assert found.key == pytest.approx(correlations(opened(model), long)[0], abs=1e-4)
    shorter = evaluate(model, data, task="sts", max_length=5, device="cpu").rows[0]
    cut = opened(model)
    cut.max_seq_length = 5
    assert shorter.max_length == 5 and shorter.scores["pearson"] == pytest.approx(correlations(cut, long)[1], abs=1e-4)
    assert evaluate(model, data, task="sts", max_length=99, device="cpu").rows[0].max_length == 12


def test_retrieval(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "a", 1, dense, prompts=PROMPTS)
    queries = ["duck", "dogs", "sun", "blue", "lake", "fast"]
    rows = [(q, f"{TEXTS[(n * 3) % 8]} {TEXTS[n]}") for n, q in enumerate(queries)]
    rows += [(q, f"{TEXTS[(n * 5) % 8]} {q} big") for n, q in enumerate(queries[:3])] + [rows[0]]
    rows += [(f"warm {text}", f"{text} small") for text in TEXTS]
    data = write(tmp_path / "pairs.jsonl", [{"query": q, "positive": d} for q, d in rows])
    encoder = opened(model)
    asked, answers = list(dict.fromkeys(q for q, _ in rows)), list(dict.fromkeys(d for _, d in rows))
    one = encoder.encode([PROMPTS["query"] + q for q in asked], convert_to_tensor=True).double()
    two = encoder.encode([PROMPTS["document"] + d for d in answers], convert_to_tensor=True).double()
    expected: dict[str, list[float]] = {"ndcg@10": [], "mrr@10": [], "recall@1": [], "recall@5": [], "recall@10": []}
    for query, vector in zip(asked, one, strict=True):
        cosines = [float(vector @ other / vector.norm() / other.norm()) for other in two]
        order = [answers[i] for i in sorted(range(len(answers)), key=lambda i: -cosines[i])]
        wanted = {d for q, d in rows if q == query}
        ranks = sorted(order.index(d) + 1 for d in wanted)
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, len(wanted) + 1))
        expected["ndcg@10"].append(sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / ideal)
        expected["mrr@10"].append(1 / ranks[0] if ranks[0] <= 10 else 0)
        for place in (1, 5, 10):
            expected[f"recall@{place}"].append(sum(rank <= place for rank in ranks) / len(wanted))
    found = evaluate(model, data, task="retrieval", device="cpu").rows[0]
    assert found.key_metric == "ndcg@10"
    for name, values in expected.items():
        assert found.scores[name] == pytest.approx(float(np.mean(values)), abs=1e-9), name
    assert 0 < found.scores["recall@5"] < found.scores["recall@10"] < 1


def test_an_adapter_is_scored_as_peft_opens_it(tmp_path: Path, sts: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_encoder(tmp_path / "base", 1, dense)
    torch.manual_seed(3)
    tuned = peft.get_peft_model(
        transformers.BertModel.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["query", "dense"])
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    whole = opened(base)
    whole[0].model.load_state_dict(tuned.merge_and_unload().state_dict())
    found = evaluate([f"{base}+{tmp_path / 'adapter'}", str(base)], sts, task="sts", device="cpu")
    assert found.rows[0].scores["pearson"] == pytest.approx(correlations(whole)[1], abs=1e-4)
    assert abs(found.rows[0].scores["pearson"] - found.rows[1].scores["pearson"]) > 1e-3


def test_what_a_contributor_keeps_to_itself(tmp_path: Path, sts: Path) -> None:
    models = [save_encoder(tmp_path / "a", 1, dense), save_encoder(tmp_path / "b", 2, dense, base=tmp_path / "a-bert")]
    out = merge(models, tmp_path / "out", method="simple", keep_separate=["embeddings.word_embeddings.weight"])
    found = evaluate([str(out), f"{out}::heads/b"], sts, task="sts", device="cpu").rows
    expected = averaged(models)
    for row, model in zip(found, models, strict=True):
        words = load_file(model / "model.safetensors")["embeddings.word_embeddings.weight"]
        expected[0].model.embeddings.word_embeddings.weight.data = words
        assert row.scores["pearson"] == pytest.approx(correlations(expected)[1], abs=1e-4)
    assert abs(found[0].scores["pearson"] - found[1].scores["pearson"]) > 1e-3


def test_adapters_that_sentence_transformers_saved_with_modules(tmp_path: Path, sts: Path) -> None:
    peft = pytest.importorskip("peft")
    bert = save_bert(tmp_path / "bert", 1)  # knows of no modules
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        chain = [modules.Transformer(str(bert)), modules.Pooling(16, pooling_mode="cls"), modules.Dense(16, 8)]
        encoder = sentence_transformers.SentenceTransformer(modules=chain, device="cpu")
        encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        encoder.save(str(tmp_path / f"adapter-{seed}"), create_model_card=False)
        adapters.append(tmp_path / f"adapter-{seed}")
    named = [f"{bert}+{adapter}" for adapter in adapters]  # their base is a path of this machine
    found = evaluate(named, sts, task="sts", device="cpu")
    for row, adapter in zip(found.rows, adapters, strict=True):
        assert row.scores["pearson"] == pytest.approx(correlations(opened(adapter))[1], abs=1e-4)
    alone = merge(named[:1], tmp_path / "alone", method="simple")
    assert correlations(opened(Path(alone)))[1] == pytest.approx(found.rows[0].scores["pearson"], abs=1e-4)
    both = merge(named, tmp_path / "both", method="simple")
    weights = [load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"] for folder in (both, *adapters)]
    assert torch.allclose(weights[0], (weights[1] + weights[2]) / 2) and opened(Path(both))[1].pooling_mode == "cls"
    assert not (both / "adapter_config.json").exists()


def test_plain_models_and_older_layouts(tmp_path: Path, sts: Path) -> None:
    bert = save_bert(tmp_path / "bert", 1)
    found = evaluate(bert, sts, task="sts", device="cpu").rows[0]
    encoder = sentence_transformers.SentenceTransformer(
        modules=[modules.Transformer(str(bert)), modules.Pooling(16, pooling_mode="mean")], device="cpu"
    )
    assert found.key == pytest.approx(correlations(encoder)[0], abs=1e-4)
    older = save_encoder(tmp_path / "older", 1)
    listing = json.loads((older / "modules.json").read_text())
    (older / "0_Transformer").mkdir()
    for path in list(older.glob("*.*")):
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(older / "0_Transformer" / path.name)
    listing[0]["path"] = "0_Transformer"
    (older / "modules.json").write_text(json.dumps(listing))
    assert evaluate(older, sts, task="sts", device="cpu").rows[0].key == pytest.approx(found.key, abs=1e-4)


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path, sts: Path) -> None:
    model = save_encoder(tmp_path / "a", 1)
    one = write(tmp_path / "one.jsonl", [{"body": "x", "other": "y"}])
    with pytest.raises(UserError, match="no two columns of texts") as caught:
        evaluate(model, one, task="retrieval")
    assert "--text-pair-column" in str(caught.value)
    found = evaluate(model, one, task="retrieval", columns={"text": "body", "text_pair": "other"}, device="cpu")
    assert found.rows[0].key == 1
    with pytest.raises(UserError, match="not a finite number"):
        evaluate(model, write(tmp_path / "bad.jsonl", [{"sentence1": "a", "sentence2": "b", "score": "x"}]), task="sts")
    cross = shutil.copytree(model, tmp_path / "cross")
    (cross / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    with pytest.raises(UserError, match="cross-encoder"):
        evaluate(cross, sts, task="sts")
    with pytest.raises(UserError, match="--task sts"):
        evaluate(model, sts)


def test_without_the_library(tmp_path: Path, sts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_bert(tmp_path / "a", 1)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'merganser\[embeddings\]'"):
        evaluate(model, sts, task="sts")
