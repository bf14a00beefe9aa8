"""The ledger: what it solves to, that leaving undoes joining, and sums of ledgers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from ledger_examples import Family, distance, drop_layer, fill, solved, weights
from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.merging import ledger, memory, merge, verify
from merganser.statistics import FILE_NAME, Statistics, write_statistics


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing guards against power cuts, which no test makes; on a busy disk it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def sums(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / str(ledger.show(folder).file))


def oracle(models: Sequence[Path], c: Sequence[float], alpha: float) -> dict[str, numpy.ndarray]:
    """RegMean with augmented biases and token counts, in numpy and from the formula, without any reference point."""
    loaded = [weights(model) for model in models]
    published = [Statistics.open(model) for model in models]
    merged = {
        name: sum(ci * w[name].double().numpy() for ci, w in zip(c, loaded, strict=True)) / sum(c)
        for name, tensor in loaded[0].items()
        if tensor.is_floating_point()
    }
    for layer in published[0].header.layers:
        stacked = [w[layer.weight].double().numpy() for w in loaded]
        if layer.input is None:
            counts = [s.count(layer.module).double().numpy()[:, None] for s in published]
            shares = [ci * k / k.sum() for ci, k in zip(c, counts, strict=True)]
            top, bottom = sum(s * w for s, w in zip(shares, stacked, strict=True)), sum(shares)
            merged[layer.weight] = numpy.where(bottom > 0, top / numpy.maximum(bottom, 1e-300), merged[layer.weight])
            continue
        top, bottom = 0.0, 0.0
        for ci, w, own, statistics in zip(c, stacked, loaded, published, strict=True):
            gram = statistics.gram(layer.input).double().numpy()
            if layer.bias:
                mean = statistics.mean(layer.input).double().numpy()
                gram = numpy.block([[gram, mean[:, None]], [mean[None], numpy.ones((1, 1))]])
                w = numpy.concatenate([w, own[layer.bias].double().numpy()[:, None]], axis=1)
            gram = alpha * gram + (1 - alpha) * numpy.diag(numpy.diag(gram))
            top, bottom = top + ci * w @ gram, bottom + ci * gram
        solution = numpy.linalg.solve(bottom, top.T).T
        if layer.bias:
            merged[layer.bias], solution = solution[:, -1], solution[:, :-1]
        merged[layer.weight] = solution
    return merged


def test_it_solves_to_the_formula(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    c = [1.0, 2.0, 0.5]
    folder = fill(
        tmp_path / "sums", base, models, c, options={"alpha": 0.5}
    )  # exact in float32, in which statistics are shrunk
    found = solved(folder, tmp_path / "out")
    wanted = {name: torch.from_numpy(value) for name, value in oracle(models, c, 0.5).items()}
    assert distance(found, wanted) < 1e-11
    assert distance(weights(base), wanted) > 1e-3  # the test can fail


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "t5", "gpt2", "qwen2"])
def test_it_solves_to_the_merge(family: Family, tmp_path: Path, architecture: str) -> None:
    """Tied weights, weights that lie as (in, out), layers without statistics: as the merge treats them."""
    base, models = family(architecture, 3)
    c = [1.0, 2.0, 0.5]
    folder = fill(tmp_path / "sums", base, models, c)
    out = ledger.solve(folder, tmp_path / "out", dtype="F64")
    plain = merge(models, tmp_path / "plain", method="regmean", coefficients=c, dtype="F64")
    assert distance(weights(out), weights(plain)) < 1e-6  # the merge averages in float32
    mine, theirs = (json.loads((f / "provenance.json").read_text()) for f in (out, plain))
    assert {n: (o["method"], o["reason"]) for n, o in mine["tensors"].items()} == {
        n: (o["method"], o["reason"]) for n, o in theirs["tensors"].items()
    }
    assert [p["manifest_sha256"] for p in mine["parents"]] == [
        open_checkpoint(model).manifest_sha256() for model in models
    ]
    assert [p["coefficient"] for p in mine["parents"]] == c
    assert verify(out).parents == 4 and not verify(out).absent


@pytest.mark.parametrize(("method", "statistics"), [("simple", None), ("fisher", "expected")])
def test_other_methods_of_sums(family: Family, tmp_path: Path, method: str, statistics: str | None) -> None:
    base, models = family("bert", 3, statistics=statistics is not None, fisher=statistics)
    folder = fill(tmp_path / "sums", base, models, [1, 2, 0.5], method=method)
    plain = merge(models, tmp_path / "plain", method=method, coefficients=[1, 2, 0.5], dtype="F64")
    assert distance(solved(folder, tmp_path / "out"), weights(plain)) < 1e-6


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_sums_of_actmat_need_no_statistics(family: Family, tmp_path: Path, architecture: str) -> None:
    base, models = family(architecture, 3, statistics=False)
    c = [1.0, 2.0, 0.5]
    folder = fill(tmp_path / "sums", base, models, c, method="actmat")
    out = ledger.solve(folder, tmp_path / "out", dtype="F64")
    plain = merge(models, tmp_path / "plain", method="actmat", base=base, coefficients=c, dtype="F64")
    average = merge(models, tmp_path / "average", method="simple", coefficients=c, dtype="F64")
    assert distance(weights(out), weights(plain)) < 1e-6
    assert distance(weights(average), weights(plain)) > 1e-3  # the test can fail
    used, wanted = (json.loads((f / "provenance.json").read_text())["tensors"] for f in (out, plain))
    assert {n: (o["method"], o["reason"]) for n, o in used.items()} == {
        n: (o["method"], o["reason"]) for n, o in wanted.items()
    }


def test_the_result_is_a_model(family: Family, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base, models = family("bert", 2)
    (base / "tokenizer.json").write_text("{}")
    folder = fill(tmp_path / "sums", base, models, [1, 1])
    shutil.rmtree(models[0])
    shutil.rmtree(models[1])  # neither weights nor statistics are needed any more
    out = ledger.solve(folder, tmp_path / "out")
    AutoModelForSequenceClassification.from_pretrained(out)
    assert {t.dtype for t in weights(out).values()} == {torch.float32}
    assert (out / "tokenizer.json").read_text() == "{}"
    assert "tuned-1" in (out / "README.md").read_text()
    again = ledger.solve(folder, tmp_path / "again", threads=1)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_result_is_as_wide_as_the_widest(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, statistics=False)
    for name, dtype in ((base, torch.bfloat16), (models[1], torch.float16)):
        save_file({n: t.to(dtype) for n, t in weights(name).items()}, name / "model.safetensors", {"format": "pt"})
    folder = fill(tmp_path / "sums", base, models, [1, 1], method="simple")
    assert {t.dtype for t in weights(ledger.solve(folder, tmp_path / "out")).values()} == {torch.float32}
    ledger.remove(folder, models[0])
    assert {t.dtype for t in weights(ledger.solve(folder, tmp_path / "o")).values()} == {torch.float32}
    ledger.add(folder, models[0])
    assert {t.dtype for t in weights(ledger.solve(folder, tmp_path / "b", dtype="BF16")).values()} == {torch.bfloat16}


def test_ridge_is_chosen_when_solving(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models, [1, 1])
    plain = merge(models, tmp_path / "plain", method="regmean", options={"ridge": 0.3}, dtype="F64")
    assert distance(solved(folder, tmp_path / "out", options={"ridge": 0.3}), weights(plain)) < 1e-6
    assert distance(solved(folder, tmp_path / "none"), weights(plain)) > 1e-5
    with pytest.raises(UserError, match="'alpha' went into the sums"):
        solved(folder, tmp_path / "no", options={"alpha": 0.3})


@pytest.mark.parametrize("c", [1.0, 1e7])
def test_adding_then_removing_is_never_adding(family: Family, tmp_path: Path, c: float) -> None:
    """A contributor of any weight leaves nothing behind: not 1e-10, but the same bytes."""
    base, models = family("bert", 4)
    never = fill(tmp_path / "never", base, models[:2], [1, 2])
    there = fill(tmp_path / "there", base, models, [1, 2, c, 3])
    assert distance(solved(there, tmp_path / "all"), solved(never, tmp_path / "a")) > 1e-3
    ledger.remove(there, models[2])
    ledger.remove(there, models[3])
    highs = {n: t for n, t in sums(never).items() if n.endswith(".high")}
    assert all(torch.equal(sums(there)[name], tensor) for name, tensor in highs.items())
    ledger.solve(there, tmp_path / "out", dtype="F64")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_what_only_removed_contributors_had_seen_is_averaged_again(family: Family, tmp_path: Path) -> None:
    """Rows of tokens: 0 + a + b - a - b is not 0 in float64, and a metric of rounding noise would make noise."""
    base, models = family("bert", 4)
    for number, model in enumerate(models):
        statistics = Statistics.open(model)
        tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
        (name,) = [n for n in tensors if n.startswith("count.") and "word" in n]
        seen = torch.arange(len(tensors[name])) * (7 + number) % 11 + 1
        tensors[name] = seen if number > 1 else seen * (torch.arange(len(seen)) > 10)
        write_statistics(model / FILE_NAME, statistics.header, tensors)
    folder = fill(tmp_path / "sums", base, models, [1, 1, 0.3, 0.7])
    never = fill(tmp_path / "never", base, models[:2], [1, 1])
    ledger.remove(folder, models[2])
    ledger.remove(folder, models[3])
    found, wanted = solved(folder, tmp_path / "out"), solved(never, tmp_path / "wanted")
    word = "bert.embeddings.word_embeddings.weight"
    mean = (weights(models[0])[word].double() + weights(models[1])[word].double()) / 2
    assert torch.allclose(found[word][:11], mean[:11], rtol=1e-14, atol=1e-17)
    assert distance(found, wanted) == 0


def test_the_order_of_joining_does_not_matter(family: Family, tmp_path: Path) -> None:
    base, models = family("gpt2", 3)
    one = fill(tmp_path / "one", base, models, [1, 2, 0.1])
    two = fill(tmp_path / "two", base, models[::-1], [0.1, 2, 1])
    assert distance(solved(one, tmp_path / "a"), solved(two, tmp_path / "b")) == 0


def test_sites_add_to_ledgers_of_their_own(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 4)
    c = [1.0, 2.0, 0.5, 3.0]
    whole = fill(tmp_path / "whole", base, models, c)
    sites = [
        fill(tmp_path / "first", base, models[:1], c[:1]),
        fill(tmp_path / "empty", base, [], []),
        fill(tmp_path / "second", base, models[1:3], c[1:3]),
        fill(tmp_path / "third", base, models[3:], c[3:]),
    ]
    shutil.copytree(base, tmp_path / "elsewhere")
    total = ledger.combine(sites, tmp_path / "total")
    assert [e.name for e in ledger.show(total).contributors] == [m.name for m in models]
    found = solved(total, tmp_path / "a", base=tmp_path / "elsewhere")
    assert distance(found, solved(whole, tmp_path / "b")) == 0
    ledger.remove(total, models[2])  # it is an ordinary ledger
    assert len(ledger.show(total).contributors) == 3
    empty = ledger.combine([sites[1], fill(tmp_path / "other", base, [], [])], tmp_path / "nothing")
    assert not ledger.show(empty).contributors and ledger.show(empty).file is None


def test_sums_of_ledgers_that_do_not_fit(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    one = fill(tmp_path / "one", base, models[:2], [1, 1])
    twice = fill(tmp_path / "twice", base, models[1:], [1, 1])
    alpha = fill(tmp_path / "alpha", base, [], [], options={"alpha": 0.5})
    simple = fill(tmp_path / "simple", base, [], [], method="simple")
    other = fill(tmp_path / "other", models[0], [], [])
    for folders, word in (
        ([one, twice], "tuned-1 .* is a contributor of .*one too"),
        ([one, alpha], "another options"),
        ([one, simple], "another method"),
        ([one, other], "another base"),
        ([one, one], "named twice"),
        ([one], "at least two"),
    ):
        with pytest.raises(UserError, match=word):
            ledger.combine(folders, tmp_path / "total")
        assert not (tmp_path / "total").exists()
    with pytest.raises(UserError, match="not empty"):
        ledger.combine([one, alpha], twice)


def test_sums_of_ledgers_whose_statistics_cover_different_layers(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    drop_layer(models[1], "bert.pooler.dense.weight")
    sites = [fill(tmp_path / f"{i}", base, [model], [1]) for i, model in enumerate(models)]
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.weight.*cover different layers"):
        ledger.combine(sites, tmp_path / "total")


def test_a_ledger_keeps_to_its_memory(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little is said before any change; what suffices gives the same bytes, whatever the threads."""
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 10_000_000)
    room = 10_000_000 + memory.OWN_BYTES + 20_000
    with pytest.raises(UserError, match=r"GB at once and cannot be cut"):
        ledger.add(folder, models[1], max_memory=room)
    with pytest.raises(UserError, match="the process itself takes"):
        ledger.solve(folder, tmp_path / "out", max_memory=1000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not (tmp_path / "out").exists()
    ledger.add(folder, models[1], max_memory="8GB", threads=1)
    other = fill(tmp_path / "other", base, models, [1, 1])
    results = [
        ledger.solve(sums, tmp_path / name, max_memory="8GB", threads=threads)
        for sums, name, threads in ((folder, "one", 1), (other, "two", 2))
    ]
    first, second = ((Path(one) / "model.safetensors").read_bytes() for one in results)
    assert first == second
    assert results[0].method == "regmean" and sum(part.tensors for part in results[0].treatments) == len(weights(base))
