"""Whole merges against oracles written from the formulas: safetensors in, numpy, no code of ours in between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ARCHITECTURES
from merganser.merging import merge

_TIED = "tied: one tensor serves several layers"


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in load_file(folder / "model.safetensors").items()}


def unpacked(packed: torch.Tensor) -> np.ndarray:
    d = int((np.sqrt(8 * len(packed) + 1) - 1) / 2)
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d)] = packed.double().numpy()
    return matrix + np.triu(matrix, 1).T


def statistics_of(folder: Path):  # type: ignore[no-untyped-def]
    from safetensors import safe_open

    path = folder / "merge_statistics.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["merganser"])
    return header, load_file(path)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_simple(family, tmp_path: Path, architecture: str) -> None:
    _, models = family(architecture, 3, statistics=False)
    out = merge(models, tmp_path / "out", method="simple", coefficients=[1, 2, 5])
    parents = [weights_of(m) for m in models]
    merged = weights_of(out)
    assert set(merged) == set(parents[0])
    for name, tensor in merged.items():
        close(tensor, (parents[0][name] + 2 * parents[1][name] + 5 * parents[2][name]) / 8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("augment", [True, False])
def test_regmean(family, tmp_path: Path, architecture: str, augment: bool) -> None:
    """Every linear map, with its bias as one more input or without, on every architecture."""
    _, models = family(architecture, 2)
    alpha, c = 0.7, [1.0, 3.0]
    out = merge(
        models, tmp_path / "out", method="regmean", coefficients=c,
        options={"alpha": alpha, "augment_bias": augment},
    )  # fmt: skip
    parents, merged = [weights_of(m) for m in models], weights_of(out)
    files = [statistics_of(m) for m in models]
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    checked = set()
    for layer in files[0][0]["layers"]:
        name, bias = layer["weight"], layer["bias"]
        if layer["tied"] or name in checked:
            continue
        checked.add(name)
        if layer["kind"] == "embedding":
            counts = [t[f"count.{layer['module']}"].double().numpy() for _, t in files]
            shares = [ci * n / n.sum() for ci, n in zip(c, counts, strict=True)]
            total = sum(shares)
            seen = total > 0
            expected = sum(ci * p[name] for ci, p in zip(c, parents, strict=True)) / sum(c)
            expected[seen] = (
                sum(s[:, None] * p[name] for s, p in zip(shares, parents, strict=True))[seen] / total[seen, None]
            )
            close(merged[name], expected)
            continue
        numerator, denominator = 0.0, 0.0
        with_bias = augment and bias is not None
        for ci, p, (_, t) in zip(c, parents, files, strict=True):
            gram = unpacked(t[f"gram.{layer['input']}"])
            weight = p[name].T if layer["kind"] == "conv1d" else p[name]
            if with_bias:
                mean = t[f"mean.{layer['input']}"].double().numpy()
                gram = np.block([[gram, mean[:, None]], [mean[None, :], np.ones((1, 1))]])
                weight = np.hstack([weight, p[bias][:, None]])
            gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            numerator, denominator = numerator + ci * weight @ gram, denominator + ci * gram
        if np.linalg.cond(denominator) > 1e7:
            continue  # the stated ridge acts; tested in test_least_squares
        expected = numerator @ np.linalg.inv(denominator)
        if with_bias:
            close(merged[bias], expected[:, -1])
            expected = expected[:, :-1]
            assert used[bias]["method"] == "regmean"
        close(merged[name], expected.T if layer["kind"] == "conv1d" else expected)
        assert used[name]["method"] == "regmean"
    assert len(checked) > 8
    for name, entry in used.items():  # what is not in the statistics is the average, and says so
        if entry["method"] == "average":
            assert entry["reason"]
            close(merged[name], (c[0] * parents[0][name] + c[1] * parents[1][name]) / sum(c))


def test_regmean_diagonal_is_alpha_zero_and_both_differ_from_full(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    results = {
        name: weights_of(merge(models, tmp_path / name, method="regmean", options=options))
        for name, options in {"diagonal": {"diagonal": True}, "zero": {"alpha": 0.0}, "full": {"alpha": 1.0}}.items()
    }
    key = "bert.encoder.layer.0.output.dense.weight"
    assert all(np.array_equal(results["diagonal"][n], results["zero"][n]) for n in results["zero"])
    assert not np.allclose(results["zero"][key], results["full"][key], atol=1e-4)
    header, first = statistics_of(models[0])
    _, second = statistics_of(models[1])
    inputs = {layer["weight"]: layer["input"] for layer in header["layers"]}
    g = [np.diag(unpacked(t[f"gram.{inputs[key]}"])) for t in (first, second)]
    w = [weights_of(m)[key] for m in models]
    close(results["diagonal"][key], (w[0] * g[0] + w[1] * g[1]) / (g[0] + g[1]))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_actmat(family, tmp_path: Path, architecture: str) -> None:
    """Linear layers by ΔᵀΔ, biases by ‖Δ‖², rows of embeddings by each row's own; the rest is the average."""
    base, models = family(architecture, 3, statistics=False)
    ridge, c = 0.05, [1.0, 2.0, 1.0]
    out = merge(models, tmp_path / "out", method="actmat", base=base, coefficients=c, options={"ridge": ridge})
    origin, parents, merged = weights_of(base), [weights_of(m) for m in models], weights_of(out)
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    checked = dict.fromkeys(("linear", "bias", "embedding", "average"), 0)
    for name, entry in used.items():
        embedding = any(word in name for word in ("embeddings.weight", "wte", "wpe"))
        norm = any(word in name for word in ("LayerNorm", "ln_"))
        linear = not embedding and not norm and origin[name].ndim == 2
        turn = (lambda a: a.T) if architecture == "gpt2" and linear and "score" not in name else (lambda a: a)
        w = [turn(p[name]) for p in parents]
        average = sum(ci * wi for ci, wi in zip(c, w, strict=True)) / sum(c)
        if entry["method"] == "average":
            assert (norm, entry["reason"]) in ((True, "not a linear map"), (False, _TIED)), name
            close(merged[name], average)
            checked["average"] += 1
            continue
        deltas = [wi - turn(origin[name]) for wi in w]
        if not linear:
            costs = [np.sum(delta**2, axis=1, keepdims=True) if embedding else np.sum(delta**2) for delta in deltas]
            total = sum(ci * m for ci, m in zip(c, costs, strict=True))
            lam = ridge * np.mean(total)
            top = sum(ci * m * wi for ci, m, wi in zip(c, costs, w, strict=True)) + lam * average
            close(merged[name], top / (total + lam))
            checked["embedding" if embedding else "bias"] += 1
            continue
        checked["linear"] += 1
        grams = [delta.T @ delta for delta in deltas]
        total = sum(ci * g for ci, g in zip(c, grams, strict=True))
        lam = ridge * np.trace(total) / len(total)
        top = sum(ci * wi @ g for ci, wi, g in zip(c, w, grams, strict=True)) + lam * average
        close(turn(merged[name]), top @ np.linalg.inv(total + lam * np.eye(len(total))))
    assert min(checked.values()) >= 1 and checked["linear"] >= 8


def test_fisher(family, tmp_path: Path) -> None:
    _, models = family("bert", 2, fisher="expected")
    out = merge(models, tmp_path / "out", method="fisher", coefficients=[1, 2], options={"ridge": 0})
    parents, merged = [weights_of(m) for m in models], weights_of(out)
    fishers = [statistics_of(m)[1] for m in models]
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert all(entry["method"] == "fisher" for entry in used.values())
    for name, tensor in merged.items():
        f = [ci * t[f"fisher.{name}"].double().numpy() for ci, t in zip((1, 2), fishers, strict=True)]
        total = f[0] + f[1]
        average = (parents[0][name] + 2 * parents[1][name]) / 3
        informed = np.where(total > 0, total, 1)
        expected = np.where(total > 0, (f[0] * parents[0][name] + f[1] * parents[1][name]) / informed, average)
        close(tensor, expected)


@pytest.mark.parametrize("method", ["simple", "regmean", "fisher", "actmat"])
def test_merging_a_model_with_itself_returns_it(family, tmp_path: Path, method: str) -> None:
    base, models = family("bert", 1, fisher="expected")
    out = merge([models[0]] * 3, tmp_path / "out", method=method, base=base, coefficients=[0.2, 0.3, 0.5])
    for name, tensor in weights_of(out).items():
        np.testing.assert_allclose(tensor, weights_of(models[0])[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["simple", "regmean", "fisher", "actmat"])
def test_the_order_of_contributors_is_irrelevant(family, tmp_path: Path, method: str) -> None:
    base, models = family("bert", 3, fisher="expected")
    c = [1.0, 2.0, 4.0]
    one = weights_of(merge(models, tmp_path / "one", method=method, base=base, coefficients=c))
    two = weights_of(merge(models[::-1], tmp_path / "two", method=method, base=base, coefficients=c[::-1]))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5)
