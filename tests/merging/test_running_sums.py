"""A merge of n + 1 goes on from the sums of n: same bytes, earlier Gram matrices not read, nothing stale used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.errors import UserError
from merganser.merging import merge
from merganser.statistics import Statistics


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a Gram matrix was read, by the name of the model folder."""
    counts: Counter[str] = Counter()
    original = Statistics.gram

    def counted(self: Statistics, input: str) -> torch.Tensor:
        assert self.path is not None
        counts[self.path.parent.name] += 1
        return original(self, input)

    monkeypatch.setattr(Statistics, "gram", counted)
    return counts


def outcome(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_greedy_sequence_reads_each_gram_once_and_gives_the_same_bytes(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path, reads: Counter[str], architecture: str
) -> None:
    _, models = family(architecture, 4)
    c = [1.0, 2.0, 0.5, 3.0]
    plain = [
        outcome(merge(models[:n], tmp_path / f"plain-{n}", method="regmean", coefficients=c[:n])) for n in (2, 3, 4)
    ]
    reads.clear()
    sums, sizes = tmp_path / "sums", []
    for step, n in enumerate((2, 3, 4)):
        out = merge(
            models[:n], tmp_path / f"kept-{n}", method="regmean", coefficients=c[:n], sums=sums,
            threads=1 + step,
        )  # fmt: skip
        assert outcome(out) == plain[step]
        sizes.append({name: len(data) for name, data in files(sums).items()})
    units = len(sizes[0])
    assert units > 4
    assert reads == {f"tuned-{i}": units for i in range(4)}
    assert [set(size) for size in sizes] == [set(sizes[0])] * 3  # one file a unit, however long the sequence
    assert max(sizes[2].values()) < max(sizes[0].values()) + 1000
    reads.clear()
    again = merge(models, tmp_path / "again", method="regmean", coefficients=c, sums=sums)
    assert outcome(again) == plain[2] and not reads


def test_the_first_contributors_must_be_the_same_in_everything(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path, reads: Counter[str]
) -> None:
    """Order, coefficient, option, weights, statistics: each difference starts anew, and the bytes are right."""
    _, models = family("bert", 3)
    sums = tmp_path / "sums"

    def check(name: str, order: list[int], c: list[float], alpha: float, expected: set[int]) -> None:
        chosen = [models[i] for i in order]
        settings = {"method": "regmean", "coefficients": c, "options": {"alpha": alpha}}
        plain = outcome(merge(chosen, tmp_path / f"plain {name}", **settings))  # type: ignore[arg-type]
        reads.clear()
        found = outcome(merge(chosen, tmp_path / name, sums=sums, **settings))  # type: ignore[arg-type]
        assert found == plain, name
        assert set(reads) == {f"tuned-{i}" for i in expected}, name

    check("first", [0, 1], [1, 1], 0.9, {0, 1})
    check("third", [0, 1, 2], [1, 1, 1], 0.9, {2})
    check("shorter", [0, 1], [1, 1], 0.9, {0, 1})
    check("order", [1, 0], [1, 1], 0.9, {0, 1})
    check("coefficient", [1, 0, 2], [1, 2, 1], 0.9, {0, 1, 2})
    check("alpha", [1, 0, 2], [1, 2, 1], 0.8, {0, 1, 2})
    check("the same", [1, 0, 2], [1, 2, 1], 0.8, set())

    place = models[1] / "merge_statistics.safetensors"
    from safetensors import safe_open

    with safe_open(place, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(place)
    save_file({n: t * 1.5 if n.startswith("gram.") else t for n, t in tensors.items()}, place, metadata)
    check("statistics", [1, 0, 2], [1, 2, 1], 0.8, {0, 1, 2})
    check("the same again", [1, 0, 2], [1, 2, 1], 0.8, set())


def test_other_weights_with_the_same_grams_start_anew(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path, reads: Counter[str]
) -> None:
    """One weight differs, and the hash that the statistics state of it."""
    from merganser.checkpoints import open_checkpoint
    from merganser.statistics import write_statistics

    _, models = family("bert", 2)
    sums = tmp_path / "sums"
    merge(models, tmp_path / "one", method="regmean", sums=sums)
    name = "bert.encoder.layer.0.output.dense.weight"
    weights = load_file(models[0] / "model.safetensors")
    weights[name] += 1
    save_file(weights, models[0] / "model.safetensors", {"format": "pt"})
    statistics = Statistics.open(models[0])
    checkpoint = open_checkpoint(models[0])
    header = statistics.header.model_copy(
        update={
            "tensor_hashes": {n: checkpoint.hash(n, "blake3") for n in statistics.header.tensor_hashes},
            "manifest_hash": checkpoint.manifest_hash("blake3"),
        }
    )
    tensors = {n: statistics.packed(n).clone() for n in statistics.tensors}
    write_statistics(models[0] / "merge_statistics.safetensors", header, tensors)
    plain = outcome(merge(models, tmp_path / "plain", method="regmean"))
    reads.clear()
    assert outcome(merge(models, tmp_path / "two", method="regmean", sums=sums)) == plain
    assert reads["tuned-0"] == reads["tuned-1"] == len(files(sums))  # another statistics file, for every unit


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty", "folder"])
def test_damaged_and_foreign_files_are_rebuilt(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path, reads: Counter[str], damage: str
) -> None:
    _, models = family("bert", 3)
    sums = tmp_path / "sums"
    merge(models[:2], tmp_path / "two", method="regmean", sums=sums)
    whole = files(sums)
    for path in sorted(sums.iterdir()):
        data = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "flipped":
            data[-5] ^= 1  # in the numbers: the file still opens
            path.write_bytes(data)
        elif damage == "foreign":
            save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            (sums / f"{path.name}.old").mkdir()
    plain = outcome(merge(models, tmp_path / "plain", method="regmean"))
    reads.clear()
    assert outcome(merge(models, tmp_path / "three", method="regmean", sums=sums)) == plain
    assert set(reads) == ({"tuned-2"} if damage == "folder" else {f"tuned-{i}" for i in range(3)})
    assert {name for name in whole if (sums / name).is_file()} == set(whole)


def test_heads_whose_labels_differ(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path, reads: Counter[str]
) -> None:
    """Rows with other contributors have sums of their own."""
    _, models = family("bert", 3, num_labels=3)
    names = (["joy", "anger", "fear"], ["fear", "joy", "trust"], ["trust", "joy", "anger"])
    for folder, labels in zip(models, names, strict=True):
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
        (folder / "config.json").write_text(json.dumps(config))
    settings = {"method": "regmean", "labels": "union"}
    plain = [outcome(merge(models[:n], tmp_path / f"plain-{n}", **settings)) for n in (2, 3)]  # type: ignore[arg-type]
    for n in (2, 3):
        reads.clear()
        out = merge(models[:n], tmp_path / f"kept-{n}", sums=tmp_path / "sums", **settings)  # type: ignore[arg-type]
        assert outcome(out) == plain[n - 2]
    units = len(files(tmp_path / "sums"))
    assert reads["tuned-2"] > reads["tuned-0"] and reads["tuned-0"] < units / 2


def test_other_methods_keep_nothing_and_a_place_that_cannot_be_is_said_first(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path
) -> None:
    _, models = family("bert", 2)
    merge(models, tmp_path / "simple", method="simple", sums=tmp_path / "sums")
    assert not (tmp_path / "sums").exists()
    (tmp_path / "file").write_text("")
    for place, word in (
        (tmp_path / "file", "no folder"),
        (models[0], "model folder"),
        (tmp_path / "o" / "s", "model folder"),
    ):
        with pytest.raises(UserError, match=word):
            merge(models, tmp_path / "o", method="regmean", sums=place)
        assert not (tmp_path / "o").exists()


def test_sums_that_cannot_be_written_stop_the_merge_and_leave_no_output(
    family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merganser.merging.running_sums as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, models = family("bert", 2)
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="running sums cannot be written"):
        merge(models, tmp_path / "out", method="regmean", sums=tmp_path / "sums")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "sums").iterdir())
