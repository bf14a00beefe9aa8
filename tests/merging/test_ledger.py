"""The ledger: what it solves to, who may join, and that leaving undoes joining."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.merging import ledger, merge, verify
from merganser.merging.ledger.compensated import accumulate
from merganser.statistics import FILE_NAME, Statistics, write_statistics

Family = Callable[..., tuple[Path, list[Path]]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing guards against power cuts, which no test makes; on a busy disk it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fill(folder: Path, base: Path, models: Sequence[Path], c: Sequence[float], **settings: object) -> Path:
    ledger.init(folder, base, **settings)  # type: ignore[arg-type]
    for model, coefficient in zip(models, c, strict=True):
        ledger.add(folder, model, coefficient=coefficient)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def solved(folder: Path, output: Path, **settings: object) -> dict[str, torch.Tensor]:
    return weights(ledger.solve(folder, output, dtype="F64", **settings))  # type: ignore[arg-type]


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor, in the Frobenius norm."""
    assert set(found) == set(wanted)
    parts = [(found[n].double() - t.double(), t.double()) for n, t in wanted.items() if t.is_floating_point()]
    return max(float(d.norm() / t.norm().clamp_min(1e-300)) for d, t in parts)


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
            merged[layer.weight] = numpy.where(
                bottom > 0, top / numpy.maximum(bottom, 1e-300), merged[layer.weight]
            )
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
        p["manifest_sha256"] for p in theirs["parents"]
    ]
    assert [p["coefficient"] for p in mine["parents"]] == c
    assert verify(out).parents == 4 and not verify(out).absent


@pytest.mark.parametrize(("method", "statistics"), [("simple", None), ("fisher", "expected")])
def test_other_methods_of_sums(family: Family, tmp_path: Path, method: str, statistics: str | None) -> None:
    base, models = family("bert", 3, statistics=statistics is not None, fisher=statistics)
    folder = fill(tmp_path / "sums", base, models, [1, 2, 0.5], method=method)
    plain = merge(models, tmp_path / "plain", method=method, coefficients=[1, 2, 0.5], dtype="F64")
    assert distance(solved(folder, tmp_path / "out"), weights(plain)) < 1e-6


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
        save_file(
            {n: t.to(dtype) for n, t in weights(name).items()}, name / "model.safetensors", {"format": "pt"}
        )
    folder = fill(tmp_path / "sums", base, models, [1, 1], method="simple")
    assert {t.dtype for t in weights(ledger.solve(folder, tmp_path / "out")).values()} == {torch.float32}
    ledger.remove(folder, models[0])
    assert {t.dtype for t in weights(ledger.solve(folder, tmp_path / "o")).values()} == {torch.float32}
    ledger.add(folder, models[0])
    assert {t.dtype for t in weights(ledger.solve(folder, tmp_path / "b", dtype="BF16")).values()} == {
        torch.bfloat16
    }


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
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()


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


def drop_layer(model: Path, weight: str) -> None:
    """Rewrite statistics as if this layer had none."""
    statistics = Statistics.open(model)
    header = statistics.header
    kept = tuple(layer for layer in header.layers if layer.weight != weight)
    (gone,) = [layer for layer in header.layers if layer.weight == weight]
    assert gone.input not in [layer.input for layer in kept]
    drop = (f"gram.{gone.input}", f"mean.{gone.input}")
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors if name not in drop}
    write_statistics(model / FILE_NAME, header.model_copy(update={"layers": kept}), tensors)


# Who is refused.


def refuses(folder: Path, model: Path | str, word: str, **settings: object) -> None:
    """Adding fails with this message and changes nothing."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=word):
        ledger.add(folder, model, **settings)  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


def test_a_contributor_joins_once(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models, [1, 1])
    shutil.copytree(models[1], tmp_path / "copy")
    refuses(folder, tmp_path / "copy", r"contributor already \(as tuned-1")
    ledger.remove(folder, tmp_path / "copy")
    ledger.add(folder, tmp_path / "copy", coefficient=2)
    assert [e.coefficient for e in ledger.show(folder).contributors] == [1, 2]


def test_contributors_that_do_not_fit(
    family: Family, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    base, models = family("bert", 3)
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    refuses(
        folder, save_model("wide", "bert", 0, num_labels=5), r"classifier.weight.*the base's F32 \[2, 16\]"
    )
    refuses(folder, save_model("other", "gpt2"), "another architecture: 'gpt2'")
    refuses(folder, save_model("bare"), "has no statistics")
    refuses(folder, models[1], "negative", coefficient=-1)
    refuses(folder, models[1], "zero", coefficient=0)
    refuses(folder, models[1], "not finite", coefficient=float("inf"))
    refuses(folder, models[1], "statistics of other weights", statistics=models[2] / FILE_NAME)
    refuses(folder, models[1], "of another base", base=models[2])
    refuses(folder, tmp_path / "nowhere", "no such folder")
    shutil.move(base, tmp_path / "moved")
    refuses(folder, models[1], "base model cannot be had")
    ledger.add(folder, models[1], base=tmp_path / "moved")


def test_statistics_are_looked_at_before_they_are_believed(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    statistics = Statistics.open(models[1])
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
    name = next(name for name in tensors if name.startswith("gram."))
    tensors[name][1] = 1e6  # far off the diagonal
    write_statistics(models[1] / FILE_NAME, statistics.header, tensors)
    refuses(folder, models[1], "not positive semi-definite")


def test_later_statistics_cover_what_the_first_did(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    drop_layer(models[1], "bert.pooler.dense.weight")
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    refuses(folder, models[1], r"no gram of 'bert\.pooler\.dense\.weight'")
    wide = fill(tmp_path / "excluded", base, models, [1, 1, 1], exclude=["*pooler*"])
    assert ledger.show(wide).counts["average"] == 12
    turned = fill(
        tmp_path / "turned", base, [models[1], models[0]], [1, 1]
    )  # more than is asked for is no harm
    plain = merge(models[:2], tmp_path / "plain", method="regmean", dtype="F64")
    assert distance(solved(turned, tmp_path / "out"), weights(plain)) < 1e-6


def test_weights_that_are_not_finite(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, statistics=False)
    broken = weights(models[1])
    broken["bert.pooler.dense.weight"][0, 0] = float("nan")
    save_file(broken, models[1] / "model.safetensors", {"format": "pt"})
    folder = fill(tmp_path / "sums", base, models[:1], [1], method="simple")
    refuses(folder, models[1], "NaN or Inf")
    refuses(folder, models[0], "contributor already")


def test_heads_are_left_out_by_name(family: Family, tmp_path: Path) -> None:
    """Contributors with heads of their own on a base without: the result is the base's kind of model."""
    from transformers import AutoModel

    _, models = family("bert", 2)
    base = tmp_path / "plain"
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(base)
    refuses(fill(tmp_path / "no", base, [], []), models[0], "'classifier.weight' is not in the base")
    folder = fill(tmp_path / "sums", base, models, [1, 1], keep_separate=["classifier.*"])
    plain = merge(models, tmp_path / "merged", method="regmean", dtype="F64")
    wanted = {n.removeprefix("bert."): t for n, t in weights(plain).items() if not n.startswith("classifier")}
    assert distance(solved(folder, tmp_path / "out"), wanted) < 1e-6
    AutoModel.from_pretrained(tmp_path / "out")


def test_heads_that_the_base_has_stay_the_bases(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models, [1, 1], keep_separate=["classifier.*"])
    found = solved(folder, tmp_path / "out")
    assert torch.equal(found["classifier.weight"], weights(base)["classifier.weight"].double())
    assert not torch.equal(
        found["bert.pooler.dense.weight"], weights(base)["bert.pooler.dense.weight"].double()
    )
    tensors = json.loads((tmp_path / "out" / "provenance.json").read_text())["tensors"]
    assert tensors["classifier.weight"]["reason"] == "no part of the ledger: the base's own"


# Leaving.


def test_removing(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    folder = fill(tmp_path / "sums", base, models[:2], [1, 1])
    digits = ledger.show(folder).contributors[0].manifest_sha256[:10]
    for model, word in (
        (models[2], "is no contributor of this ledger"),
        ("0000000000", "no contributor has a hash"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=word):
            ledger.remove(folder, model)
    with pytest.raises(UserError, match="statistics of other weights"):
        ledger.remove(folder, models[0], statistics=models[1] / FILE_NAME)
    assert ledger.remove(folder, digits).name == "tuned-0"
    assert ledger.remove(folder, models[1]).name == "tuned-1"
    assert {path.name for path in folder.iterdir()} == {"ledger.json", ".lock"}
    with pytest.raises(UserError, match="no contributors"):
        ledger.solve(folder, tmp_path / "out")
    ledger.add(folder, models[2])  # and life goes on
    assert distance(solved(folder, tmp_path / "out"), weights(models[2])) < 1e-12


def test_other_statistics_than_were_added_are_not_subtracted(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models, [1, 1])
    statistics = Statistics.open(models[0])
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
    gram = next(name for name in tensors if name.startswith("gram."))
    tensors[gram][0] *= 1.0001
    write_statistics(models[0] / FILE_NAME, statistics.header, tensors)
    with pytest.raises(UserError, match="other statistics than were added"):
        ledger.remove(folder, models[0])


def test_weights_that_were_replaced_are_not_subtracted(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    folder = fill(tmp_path / "sums", base, models[:2], [1, 1])
    digits = ledger.show(folder).contributors[0].manifest_sha256[:10]
    shutil.rmtree(models[0])
    shutil.copytree(models[1], models[0])
    with pytest.raises(UserError, match="no longer the weights of tuned-0"):
        ledger.remove(folder, digits)


def test_init_that_cannot_be(family: Family, tmp_path: Path) -> None:
    base, _ = family("bert", 1, statistics=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for settings, word in (
        ({"method": "ot"}, "no ledgers of method 'ot'"),
        ({"method": "regmeen"}, "did you mean 'regmean'"),
        ({"options": {"alhpa": 1}}, "alhpa"),
        ({"options": {"alpha": 2}}, "alpha"),
        ({"exclude": ["nothing*"]}, "no tensor of the base is called 'nothing"),
    ):
        with pytest.raises(UserError, match=word):
            ledger.init(tmp_path / "sums", base, **settings)  # type: ignore[arg-type]
        assert not (tmp_path / "sums").exists()
    with pytest.raises(UserError, match="not empty"):
        ledger.init(tmp_path / "full", base)
    with pytest.raises(UserError, match="no such folder"):
        ledger.init(tmp_path / "sums", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no ledger here"):
        ledger.show(tmp_path / "full")


def test_a_method_that_can_treat_nothing(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 1)
    folder = ledger.init(tmp_path / "sums", base, method="fisher")
    refuses(folder, models[0], "can treat no tensor")


# The arithmetic.


def test_compensated_sums_hold_twice_the_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [
        torch.randn(70_000, dtype=torch.float64, generator=generator) * 10.0**exponent
        for exponent in (0, 9, -7, 3)
    ]
    high, low = torch.zeros(70_000, dtype=torch.float64), torch.zeros(70_000, dtype=torch.float64)
    for term in terms:
        accumulate(high, low, term)
    for entry in (0, 1, 40_000, 69_999):
        exact = sum(Fraction(float(term[entry])) for term in terms)
        found = Fraction(float(high[entry])) + Fraction(float(low[entry]))
        assert abs(found - exact) <= abs(exact) * Fraction(2) ** -100
        assert float(exact) == float(high[entry])
    other_high, other_low = high.clone(), low.clone()
    accumulate(high, low, other_high, other_low)
    assert torch.equal(high, 2 * other_high) and torch.equal(low, 2 * other_low)
    accumulate(high, low, -other_high, -other_low)
    for term in terms:
        accumulate(high, low, -term)
    assert float(high.abs().max()) < 1e9 * 2.0**-100


def test_the_statistics_of_a_ledger_are_bound_to_the_weights(family: Family, tmp_path: Path) -> None:
    """An entry names the weights' hash as the checkpoint has it, whatever the folder is called."""
    base, models = family("bert", 1)
    entry = ledger.add(ledger.init(tmp_path / "sums", base), models[0])
    assert entry.manifest_sha256 == open_checkpoint(models[0]).manifest_sha256()
    assert entry.statistics is not None and entry.statistics.sha256 == Statistics.open(models[0]).sha256()
