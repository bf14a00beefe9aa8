"""Labels that a corpus does not annotate: what the verb collect makes of them, in made and in real corpora."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from conftest import WORDS
from merganser.cli.collect import collect_command
from merganser.collection import collect, placement
from merganser.collection.scores import FISHER_OF_ALL, FISHER_OF_ANNOTATED
from merganser.engines import SerialEngine
from merganser.errors import DataError, UserError
from merganser.lab.suites.emotion import LABELS, Emotion
from merganser.statistics import FILE_NAME, Statistics
from merganser.tasks.data import Rows

Save = Callable[..., Path]
NAMES = ("joy", "anger", "fear")


def model_of(save_ready: Save, name: str, labels: Sequence[str] = NAMES) -> Path:
    return save_ready(
        name,
        num_labels=len(labels),
        problem_type="multi_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )


def write(path: Path, marks: Sequence[dict[str, int | None]]) -> Path:
    rows = [{"text": " ".join(WORDS[n : 2 * n + 1]), "labels": row} for n, row in enumerate(marks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


#: Rows 0, 3, 4 and 8 have no annotated label; fear is annotated nowhere.
SPARSE: list[dict[str, int | None]] = [
    {"joy": None}, {"joy": 1, "fear": None}, {"anger": 0}, {}, {"joy": None, "anger": None, "fear": None},
    {"joy": 0, "anger": 1}, {"anger": 1}, {"joy": 1}, {}, {"joy": 0},
]  # fmt: skip
KEPT = [1, 2, 5, 6, 7, 9]


def same(one: Path, two: Path) -> None:
    a, b = Statistics.open(one), Statistics.open(two)
    assert set(a.tensors) == set(b.tensors) and a.header.layers == b.header.layers
    assert (a.header.examples, a.header.tokens) == (b.header.examples, b.header.tokens)
    assert all(torch.equal(a.packed(name), b.packed(name)) for name in a.tensors)


@pytest.mark.parametrize("fisher", [None, "expected", "empirical"])
def test_rows_without_an_annotated_label_are_in_no_statistic(
    save_ready: Save, tmp_path: Path, fisher: str | None
) -> None:
    folder = model_of(save_ready, "m")
    data = write(tmp_path / "sparse.jsonl", SPARSE)
    lines = data.read_text().splitlines(keepends=True)
    dense = tmp_path / "dense.jsonl"
    dense.write_text("".join(lines[row] for row in KEPT))
    options: dict[str, Any] = {"fisher": fisher, "shard_examples": 4, "batch_size": 2}
    if fisher:
        options["fisher_examples"] = 5
    whole = collect(folder, data, **options)
    alone = collect(folder, dense, output=tmp_path / "dense.safetensors", **options)
    same(whole, alone)
    header, other = Statistics.open(whole).header, Statistics.open(alone).header
    assert header.examples == 6 and header.fisher_examples == (5 if fisher else 0)
    assert set(header.notes) - set(other.notes) == {"left out, without an annotated label: 4 examples"}
    assert (FISHER_OF_ANNOTATED in header.notes) == bool(fisher)
    jobs = collect(folder, data, output=tmp_path / "jobs.safetensors", engine=SerialEngine(), **options)
    assert jobs.read_bytes() == whole.read_bytes()


def test_early_stopping_and_samples_know_of_annotated_rows_alone(save_ready: Save, tmp_path: Path) -> None:
    folder = model_of(save_ready, "m")
    data = write(tmp_path / "sparse.jsonl", SPARSE)
    header = Statistics.open(collect(folder, data, until_converged=0.9, sample_tokens=3)).header
    assert header.examples == 6
    assert any("after 6 of 6 examples" in note or "all 6 examples" in note for note in header.notes)


@pytest.mark.parametrize("fisher", [None, "expected", "empirical"])
def test_no_annotated_label_at_all(
    save_ready: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fisher: str | None
) -> None:
    folder = model_of(save_ready, "m")
    data = write(tmp_path / "none.jsonl", [{"joy": None}, {}])
    with monkeypatch.context() as patch:
        patch.setattr(placement, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        with pytest.raises(DataError, match=r"none\.jsonl: no row of 2 has an annotated label") as caught:
            collect(folder, data, fisher=fisher)
    assert not (folder / FILE_NAME).exists()
    assert ("--ignore-labels" in str(caught.value)) == (fisher != "empirical")
    if fisher != "empirical":
        assert Statistics.open(collect(folder, data, fisher=fisher, use_labels=False)).header.examples == 2


def test_labels_that_are_not_read_let_every_output_count(save_ready: Save, tmp_path: Path) -> None:
    folder = model_of(save_ready, "m")
    data = write(tmp_path / "sparse.jsonl", SPARSE)
    arguments = [str(folder), "--data", str(data), "--fisher", "--ignore-labels"]
    result = CliRunner().invoke(collect_command, arguments)
    assert result.exit_code == 0 and FISHER_OF_ALL in result.stderr
    ignoring = Statistics.open(folder)
    assert ignoring.header.examples == 10 and bool(ignoring.fisher("classifier.bias").all())
    bare = tmp_path / "bare.jsonl"
    texts = [{"text": json.loads(line)["text"]} for line in data.read_text().splitlines()]
    bare.write_text("".join(json.dumps(row) + "\n" for row in texts))
    without = Statistics.open(collect(folder, bare, fisher="expected", output=tmp_path / "bare.safetensors"))
    columns = [note for note in ignoring.header.notes if note not in without.header.notes]
    assert len(columns) == 1 and "column" in columns[0]  # which were there to be read
    assert all(torch.equal(without.packed(name), ignoring.packed(name)) for name in ignoring.tensors)
    assert without.tensors.keys() == ignoring.tensors.keys()


def corpus(root: Path, name: str, rows: int) -> Rows:
    if name not in Emotion(root).sets():
        pytest.skip(f"no corpus {name}")
    whole = Emotion(root).read(name, "train")
    return Rows(whole.source, whole.rows[:rows], whole.places[:rows])


@pytest.mark.parametrize("name", ["isear", "crowdflower", "dailydialog", "tales-emotion", "tec"])
def test_emotion_corpora(save_ready: Save, tmp_path: Path, resources: Path, name: str) -> None:
    """Outputs that a corpus does not annotate have no information, and add none to the encoder's."""
    rows = corpus(resources / "emotion_splits", name, 10)
    votes = Emotion(resources / "emotion_splits").votes(name)
    places = [LABELS.index(label) for label in votes]
    assert 0 < len(votes) < len(LABELS)
    whole = model_of(save_ready, "whole", LABELS)
    part = model_of(save_ready, "part", votes)
    weights = transformers.AutoModelForSequenceClassification.from_pretrained(whole).state_dict()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(part)
    heads = {key: weights[key][places] for key in ("classifier.weight", "classifier.bias")}
    model.load_state_dict(weights | heads)
    model.save_pretrained(part)
    fewer = [{**row, "labels": {label: row["labels"][label] for label in votes}} for row in rows]
    ours = Statistics.open(collect(whole, rows, fisher="expected"))
    truth = Statistics.open(collect(part, Rows("voted", tuple(fewer), rows.places), fisher="expected"))
    assert ours.header.examples == 10 and FISHER_OF_ANNOTATED in ours.header.notes
    absent = [place for place in range(len(LABELS)) if place not in places]
    for tensor in (name for name in truth.tensors if name.startswith("fisher.")):
        found, expected = ours.packed(tensor), truth.packed(tensor)
        if tensor.startswith("fisher.classifier."):
            assert not found[absent].any() and bool(found[places].any())
            found = found[places]
        assert (found - expected).abs().max() <= 1e-4 * expected.max() + 1e-10, tensor


def test_a_device_that_is_chosen_by_itself_is_the_cpu_of_a_cluster(save_ready: Save, tmp_path: Path) -> None:
    folder, data = model_of(save_ready, "m"), write(tmp_path / "sparse.jsonl", SPARSE)
    assert collect(folder, data, device="auto", engine=SerialEngine()).exists()
    with pytest.raises(UserError, match="--device with --engine ray"):
        collect(folder, data, device="cuda", engine=SerialEngine(), overwrite=True)
