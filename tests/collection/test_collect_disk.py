"""The disk that statistics take is known before anything is collected, and where they are written is checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from merganser.checkpoints.places import places_read
from merganser.collection import collect
from merganser.collection.jobs import file_bytes
from merganser.errors import FileError, UserError
from merganser.statistics import FILE_NAME, Statistics
from merganser.statistics.storage import parse_storage
from merganser.tasks.models import open_model


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "reviews.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f'{{"text": "a b {word} d", "label": {n % 2}}}\n' for n, word in enumerate("efgh")))
    return path


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "lowrank:3"])
def test_the_size_is_known_before(save_ready, reviews: Path, architecture: str, storage: str) -> None:
    """About; the header, which a tiny model's statistics mostly consist of, is left out on both sides."""
    folder = save_ready("m", architecture)
    for fisher in (None, "expected"):
        known = file_bytes(
            open_model(folder), parse_storage(storage), grams=True, fisher=fisher is not None, experts=False
        )
        written = collect(folder, reviews, storage=storage, fisher=fisher, overwrite=True)
        size = sum(info.nbytes for info in Statistics.open(written).tensors.values())
        assert 0.3 * size < known < 1.1 * size, (known, size)


@pytest.mark.usefixtures("no_loading")
def test_too_little_disk_is_found_before_work(
    save_ready, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_ready("m")
    before = sorted(folder.iterdir())
    monkeypatch.setattr("merganser.files.space.free_bytes", lambda target: 100)
    with pytest.raises(FileError, match="too little disk: the statistics take about"):
        collect(folder, reviews)
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before everything was checked")

    monkeypatch.setattr("merganser.collection.run.shard_collector", loading)


@pytest.mark.usefixtures("no_loading")
def test_no_input_and_nothing_else_is_replaced(save_ready, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    other = shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "thesis.safetensors").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(folder)
    wrong = {
        folder / "model.safetensors": "the output lies in",
        tmp_path / "linked" / "model.safetensors": "the output lies in",
        folder / "x" / ".." / "config.json": "the output lies in",
        folder / "pytorch_model.bin": "the output lies in",  # it would be loaded as the model's
        folder / "fisher.safetensors": "the output lies in",
        reviews: "one of the inputs",
        other / "model.safetensors": "no statistics file",
        other / "config.json": "no statistics file",
        tmp_path / "thesis.safetensors": "no statistics file",
        tmp_path / "dangling": "where nothing is",
        tmp_path / ("x" * 256): "too long",
        tmp_path / "a\0b": "control characters",
        reviews / "statistics": "is a file",
        tmp_path / "no" / "folder": "does not exist",
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, what in wrong.items():
        with pytest.raises(UserError, match=what):
            collect(folder, reviews, output=output, overwrite=True)
    with pytest.raises(UserError, match="the output lies in"):
        collect(folder, reviews.parent, output=reviews.parent / "statistics", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_model_folder_and_its_sub_folders_take_their_statistics(save_ready, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    assert collect(folder, reviews, output=folder).path == folder / FILE_NAME
    assert collect(folder, reviews, output=folder / FILE_NAME, overwrite=True).path == folder / FILE_NAME
    assert folder in places_read(open_model(folder).checkpoint)
