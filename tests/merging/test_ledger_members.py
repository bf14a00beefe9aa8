"""Who may join a ledger, who may leave it, and what it says to others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ledger_examples import Family, distance, drop_layer, fill, solved, weights
from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.merging import ledger, merge
from merganser.statistics import FILE_NAME, Statistics, write_statistics


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing guards against power cuts, which no test makes; on a busy disk it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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


def test_contributors_that_do_not_fit(family: Family, tmp_path: Path, save_model: Callable[..., Path]) -> None:
    base, models = family("bert", 3)
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    refuses(folder, save_model("wide", "bert", 0, num_labels=5), r"(?s)different label spaces.*classifier.*ledger init")
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
    turned = fill(tmp_path / "turned", base, [models[1], models[0]], [1, 1])  # more than is asked for is no harm
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
    refuses(fill(tmp_path / "no", base, [], []), models[0], "(?s)'classifier.weight' are not in plain.*ledger init")
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
    assert not torch.equal(found["bert.pooler.dense.weight"], weights(base)["bert.pooler.dense.weight"].double())
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


def test_the_statistics_of_a_ledger_are_bound_to_the_weights(family: Family, tmp_path: Path) -> None:
    """An entry names the weights' hash as the checkpoint has it, whatever the folder is called."""
    base, models = family("bert", 1)
    entry = ledger.add(ledger.init(tmp_path / "sums", base), models[0])
    assert entry.manifest_sha256 == open_checkpoint(models[0]).manifest_sha256()
    assert entry.statistics is not None and entry.statistics.sha256 == Statistics.open(models[0]).sha256()


def test_heads_whose_labels_stand_in_another_order_do_not_join(family: Family, tmp_path: Path) -> None:
    """The base names no labels, so that only the contributors' configurations tell them apart."""
    base, models = family("bert", 3)
    for model, labels in zip(models, (["no", "yes"], ["yes", "no"], ["no", "yes"]), strict=True):
        config = json.loads((model / "config.json").read_text())
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        (model / "config.json").write_text(json.dumps(config))
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    refuses(folder, models[1], r"labels of its head are yes, no, those in the ledger no, yes.*")
    ledger.add(folder, models[2])
    other = fill(tmp_path / "other", base, models[1:2], [1])
    with pytest.raises(UserError, match="labels of heads differ, or their order: no, yes; yes, no"):
        ledger.combine([folder, other], tmp_path / "total")
    without = fill(tmp_path / "without", base, models, [1, 1, 1], keep_separate=["classifier*"])
    assert [member.labels for member in ledger.show(without).contributors] == [(), (), ()]


def test_a_ledger_of_format_1_is_read_and_goes_on(family: Family, tmp_path: Path) -> None:
    """It did not know the labels of heads."""
    base, models = family("bert", 2)
    folder = fill(tmp_path / "sums", base, models[:1], [1])
    fields = json.loads((folder / "ledger.json").read_text())
    fields["format"] = 1
    fields.pop("sha256")
    for member in fields["contributors"]:
        member.pop("labels")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    fields["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "ledger.json").write_text(json.dumps(fields))
    assert ledger.show(folder).format == 1
    ledger.add(folder, models[1])
    assert ledger.show(folder).format == 2
    other = fill(tmp_path / "other", base, models, [1, 1])
    assert distance(solved(folder, tmp_path / "a"), solved(other, tmp_path / "b")) == 0
