"""Rows that models have from others: tokens with a source of their own, models that lack tokens and vote, padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser.errors import UserError
from merganser.merging import merge, verify
from vocabulary_examples import TOKENS, write_model

Rows = Mapping[str, np.ndarray]


def table(folder: Path) -> tuple[Rows, np.ndarray]:
    """The row of each token of the input embedding in float64, and the whole."""
    whole = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double().numpy()
    ids = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return {token: whole[row] for token, row in ids.items() if row < len(whole)}, whole


def filled(tables: list[Rows], first: int | None = None) -> list[dict[str, np.ndarray]]:
    """Every model's rows with those that it lacks: of one that is asked first, or the mean of those that know it."""
    found: list[dict[str, np.ndarray]] = [dict(one) for one in tables]
    for token in dict.fromkeys(token for one in tables for token in one):
        known = [one[token] for one in tables if token in one]
        row = tables[first][token] if first is not None and token in tables[first] else np.mean(known, 0)
        for one in found:
            one.setdefault(token, row)
    return found


def opens(folder: Path) -> Any:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def check(result: Path, expected: Rows) -> None:
    rows, whole = table(result)
    assert opens(result).config.vocab_size == len(whole)
    assert set(rows) >= set(expected)
    for token, row in expected.items():
        np.testing.assert_allclose(rows[token], row, rtol=1e-6, atol=1e-6, err_msg=token)
    verify(result)


@pytest.mark.parametrize(
    "asked",
    [
        {"layers": [{"sources": [{"contributor": "a", "range": [0, 1]}, {"contributor": "b", "range": [0, 1]}]}]},
        {"layers": [{"sources": [{"contributor": "b", "range": [1, 2]}]}] * 3},
        {"names": "canonical"},
        {"config_from": "b"},
    ],
)
@pytest.mark.parametrize("more", [{"vocabulary": "union"}, {"vocabulary": "tokenizer", "pad_to_multiple_of": 1}])
def test_the_configuration_says_how_many_rows_there_are(
    three: list[Path], tmp_path: Path, asked: dict[str, Any], more: dict[str, Any]
) -> None:
    merge(three[:2], tmp_path / "out", method="simple", **asked, **more)
    assert opens(tmp_path / "out").config.vocab_size == len(table(tmp_path / "out")[1])
    verify(tmp_path / "out")


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        write_model(tmp_path / "a", 1, 42, added=["<a>", "<shared>"]),
        write_model(tmp_path / "b", 2, 43, added=["<b>", "<shared>", "<too>"]),
        write_model(tmp_path / "c", 3),
    ]


def test_models_that_lack_a_token_vote_with_the_row_they_are_given(three: list[Path], tmp_path: Path) -> None:
    tables = [table(one)[0] for one in three]
    merge(
        three, tmp_path / "out", method="simple", coefficients=[1, 2, 5], vocabulary="union", fill_missing_rows=True
    )  # fmt: skip
    each = filled(tables)
    check(tmp_path / "out", {t: (each[0][t] + 2 * each[1][t] + 5 * each[2][t]) / 8 for t in each[0]})
    merge(
        three, tmp_path / "first", method="simple", coefficients=[1, 2, 5], vocabulary="union", fill_missing_rows=True,
        missing_rows="b",
    )  # fmt: skip
    each = filled(tables, 1)
    check(tmp_path / "first", {t: (each[0][t] + 2 * each[1][t] + 5 * each[2][t]) / 8 for t in each[0]})


def test_the_base_is_given_rows_too(three: list[Path], tmp_path: Path) -> None:
    a, b, base = three
    merge(
        [a, b], tmp_path / "out", method="task_arithmetic", base=base, options={"scale": 0.5}, vocabulary="union",
        fill_missing_rows=True, missing_rows="base", tokenizer_from="base",
    )  # fmt: skip
    x, y, zero = filled([table(one)[0] for one in three], 2)
    check(tmp_path / "out", {t: zero[t] + 0.5 * (x[t] - zero[t] + y[t] - zero[t]) for t in zero})


def test_only_the_tokens_of_the_tokenizer_that_is_written(three: list[Path], tmp_path: Path) -> None:
    merge(three, tmp_path / "out", method="simple", vocabulary="tokenizer", tokenizer_from="c", pad_to_multiple_of=1)
    rows, whole = table(tmp_path / "out")
    assert len(whole) == 40 and "<a>" not in rows
    tables = [table(one)[0] for one in three]
    check(tmp_path / "out", {t: np.mean([one[t] for one in tables], 0) for t in TOKENS})


def test_rows_of_single_tokens(three: list[Path], tmp_path: Path) -> None:
    a, b, c = (table(one)[0] for one in three)
    tokens = {
        "<new>": {"take": "b", "token": "<too>"},
        "<zero>": {"zero": True},
        "w3": {"take": "a", "force": True},
        "w4": {"zero": True, "force": True},
        "w5": {"zero": True},  # every model knows it
        "<shared>": {"take": "c", "id": 7},
        "<a>": {"take": "a"},
    }
    merge(three, tmp_path / "out", method="simple", vocabulary="union", fill_missing_rows=True, tokens=tokens)
    check(
        tmp_path / "out",
        {
            "<new>": b["<too>"],
            "<zero>": np.zeros(32),
            "w3": a["w3"],
            "w4": np.zeros(32),
            "w5": (a["w5"] + b["w5"] + c["w5"]) / 3,
            "<shared>": (a["<shared>"] + b["<shared>"] + table(three[2])[1][7]) / 3,
            "<a>": a["<a>"],
            "<b>": b["<b>"],
        },
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer("w3 <new> <zero>").input_ids) == 3


def test_padding_is_the_mean_of_each_models_rows(three: list[Path], tmp_path: Path) -> None:
    tables = [table(one)[0] for one in three]
    merge(
        three, tmp_path / "out", method="simple", coefficients=[1, 1, 2], vocabulary="union", fill_missing_rows=True,
        pad_to_multiple_of=16,
    )  # fmt: skip
    each = filled(tables)
    _, whole = table(tmp_path / "out")
    assert len(whole) == 48
    mean = sum(c * np.mean([*one.values()], 0) for c, one in zip((1, 1, 2), each, strict=True)) / 4
    np.testing.assert_allclose(whole[44:], np.tile(mean, (4, 1)), rtol=1e-6, atol=1e-6)
    check(tmp_path / "out", {t: (each[0][t] + each[1][t] + 2 * each[2][t]) / 4 for t in each[0]})


def test_whole_tensors_are_the_filled_ones(three: list[Path], tmp_path: Path) -> None:
    a, b, base = three
    merge(
        [a, b], tmp_path / "out", method="ties", base=base, options={"density": 0.3}, vocabulary="union",
        fill_missing_rows=True, missing_rows="base", tokenizer_from="base",
    )  # fmt: skip
    x, y, zero = filled([table(one)[0] for one in three], 2)
    names = sorted(zero)
    deltas = [np.stack([one[t] - zero[t] for t in names]) for one in (x, y)]
    kept = []
    for delta in deltas:
        smallest = np.sort(np.abs(delta).ravel())[-int(0.3 * delta.size)]
        kept.append(np.where(np.abs(delta) >= smallest * (1 - 1e-9), delta, 0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [np.where(np.sign(one) == sign, one, 0) for one in kept]
    merged = sum(agree) / np.maximum(sum(np.sign(np.abs(one)) for one in agree), 1)
    check(tmp_path / "out", {t: zero[t] + row for t, row in zip(names, merged, strict=True)})


def test_the_bytes_do_not_depend_on_threads_and_memory(three: list[Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "vocabulary": "union", "fill_missing_rows": True, "pad_to_multiple_of": 16, "method": "simple",
        "tokens": {"w3": {"take": "a", "force": True}},
    }  # fmt: skip
    merge(three, tmp_path / "one", threads=1, **settings)
    merge(three, tmp_path / "other", threads=2, max_memory="2GB", **settings)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "one" / "model.safetensors").values())


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"w3": {"take": "d"}}, "no model of this merge is called 'd'"),
        ({"w3": {"take": "c", "token": "<a>"}}, "c has no row for '<a>'"),
        ({"w3": {"force": True}}, "nothing is said"),
        ({"w3": {"take": "c", "id": 400}}, "has no row 400"),
    ],
)
def test_sources_that_cannot_be(three: list[Path], tmp_path: Path, tokens: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        merge(three, tmp_path / "out", method="simple", vocabulary="union", tokens=tokens)
