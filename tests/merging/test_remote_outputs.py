"""Merges to URLs: the files are those of a folder, and only an earlier merge is replaced, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kill.store import KeptStore, register
from merganser.engines import SerialEngine
from merganser.errors import FileError, UserError
from merganser.files import RemoteFolder
from merganser.merging import ledger, merge, verify
from s3_server import bucket as bucket
from s3_server import endpoint as endpoint

Family = Callable[..., tuple[Path, list[Path]]]
URL = "kept://bucket/x/out"
SHARDS = {"max_shard_size": "20kB", "threads": 1}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT_STORE", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    register()


def found() -> dict[str, bytes]:
    """Everything in the store, and whatever is not below the URL by its whole key."""
    keys = KeptStore().objects()
    return {key.removeprefix(URL.removeprefix("kept://") + "/"): path.read_bytes() for key, path in keys.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil(model: Path) -> None:
    """Put a NaN into the last tensor of a model."""
    tensors = load_file(model / "model.safetensors")
    list(tensors.values())[-1].view(-1)[-1] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def jobs() -> SerialEngine:
    return SerialEngine()


@pytest.mark.parametrize("engine", [None, jobs])
def test_the_files_are_those_of_a_folder_and_replace_another_merge(
    family: Family, tmp_path: Path, engine: Callable[[], SerialEngine] | None
) -> None:
    _, models = family("bert", 2)
    run = engine() if engine else None
    merge(models, tmp_path / "first", method="simple")
    merge(models, tmp_path / "second", method="regmean", **SHARDS)
    assert merge(models, URL, method="simple", engine=run) == URL
    assert found() == files_of(tmp_path / "first")
    with pytest.raises(UserError, match="the output exists"):
        merge(models, URL, method="regmean", engine=run, **SHARDS)
    assert found() == files_of(tmp_path / "first")
    merge(models, URL, method="regmean", engine=run, overwrite=True, **SHARDS)
    assert found() == files_of(tmp_path / "second")


@pytest.mark.parametrize("engine", [None, jobs])
def test_an_error_in_the_middle_leaves_the_old_merge(family: Family, engine: Callable[[], SerialEngine] | None) -> None:
    _, models = family("bert", 2)
    merge(models, URL, method="simple")
    before = found()
    spoil(models[1])
    for url in (URL, "kept://bucket/new"):
        with pytest.raises(UserError, match="NaN or Inf"):
            merge(models, url, method="simple", overwrite=True, engine=engine() if engine else None, **SHARDS)
        assert found() == before


def test_what_is_no_merge_is_not_replaced(family: Family) -> None:
    _, models = family("bert", 2)
    place = RemoteFolder(URL)
    for name in ("config.json", "model.safetensors", "thesis/chapter-1.tex"):
        place.write(name, b"{}")
    before = found()
    with pytest.raises(FileError, match=r"is no merge.*it holds 3 files, such as config\.json"):
        merge(models, URL, method="simple", overwrite=True)
    place.write("provenance.json", json.dumps({"format": 3, "files": {"config.json": "0"}}).encode())
    with pytest.raises(FileError, match="is no merge"):
        merge(models, URL, method="simple", overwrite=True)
    assert {name: data for name, data in found().items() if name != "provenance.json"} == before


@pytest.mark.parametrize("name", ["thesis/chapter-1.tex", "merge_statistics.safetensors", "heads/x/config.json"])
def test_what_lies_beside_a_merge_is_kept(family: Family, name: str) -> None:
    _, models = family("bert", 2)
    merge(models, URL, method="simple")
    RemoteFolder(URL).write(name, b"somebody's work")
    before = found()
    with pytest.raises(FileError, match=f"no part of the merge: {name}"):
        merge(models, URL, method="regmean", overwrite=True)
    assert found() == before


def test_what_was_changed_since_is_kept(family: Family) -> None:
    _, models = family("bert", 2)
    merge(models, URL, method="simple")
    RemoteFolder(URL).write("config.json", b"{}")
    before = found()
    with pytest.raises(FileError, match=r"changed after the merge: config\.json"):
        merge(models, URL, method="regmean", overwrite=True)
    assert found() == before


@pytest.mark.parametrize("url", ["kept://bucket", "kept://bucket/", "memory://"])
def test_a_bucket_is_not_replaced(family: Family, url: str) -> None:
    _, models = family("bert", 2)
    RemoteFolder(URL).write("photos/1.jpg", b"x")
    with pytest.raises(FileError, match="whole bucket"):
        merge(models, url, method="simple", overwrite=True)
    assert found() == {"photos/1.jpg": b"x"}


def test_a_prefix_above_a_merge_is_not_replaced(family: Family) -> None:
    _, models = family("bert", 2)
    merge(models, URL, method="simple")
    before = found()
    with pytest.raises(FileError, match="is no merge"):
        merge(models, "kept://bucket/x", method="simple", overwrite=True)
    with pytest.raises(FileError, match="the output exists"):
        merge(models, "kept://bucket/x", method="simple")
    assert found() == before


def test_a_name_that_begins_alike_is_another_place(family: Family) -> None:
    _, models = family("bert", 2)
    for url in (f"{URL}-2", f"{URL}.partial-notes", URL):
        merge(models, url, method="simple")
    merge(models, URL, method="regmean", overwrite=True)
    whole = {name for name in found() if name.endswith("provenance.json")}
    assert whole == {"provenance.json", "bucket/x/out-2/provenance.json", "bucket/x/out.partial-notes/provenance.json"}


def test_a_ledger_is_solved_to_a_url(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, models = family("bert", 2)
    sums = ledger.init(tmp_path / "sums", base)
    ledger.add(sums, models[0])
    ledger.solve(sums, tmp_path / "out")
    ledger.solve(sums, URL)
    assert found() == files_of(tmp_path / "out") and not (tmp_path / "kept:").exists()
    with pytest.raises(FileError, match="the output exists"):
        ledger.solve(sums, URL)


def test_a_file_url_is_the_folder(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    for scheme in ("file", "local"):
        url = f"{scheme}://{tmp_path}/{scheme}"
        merge(models, url, method="regmean", engine=SerialEngine(), **SHARDS)
        assert verify(tmp_path / scheme).files
        with pytest.raises(UserError, match="one of the inputs"):
            merge(models, f"{scheme}://{models[0]}", method="simple", overwrite=True)
        with pytest.raises(UserError, match="the output holds"):
            merge(models, f"{scheme}://{tmp_path}", method="simple", overwrite=True)
    adapter = merge(models, f"file://{tmp_path}/adapter", method="regmean", as_adapter=4, base=base)
    assert adapter == f"file://{tmp_path}/adapter" and (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="written by this process"):
        merge(models, URL, method="regmean", as_adapter=4, base=base)


def test_space_is_asked_for_where_the_result_is_written_first(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    _, models = family("bert", 2)
    monkeypatch.setattr("merganser.files.space.free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match="before it is uploaded"):
        merge(models, URL, method="simple")
    assert not found()


def test_a_bucket_of_s3(family: Family, tmp_path: Path, bucket: Any) -> None:
    _, models = family("bert", 2)
    url = "s3://zoos/merged"

    def stored() -> dict[str, bytes]:
        bucket.invalidate_cache()
        return {name.removeprefix("zoos/merged/"): bucket.cat_file(name) for name in bucket.find("zoos")}

    for method, shards in (("simple", {}), ("regmean", SHARDS)):
        merge(models, tmp_path / method, method=method, **shards)
        merge(models, url, method=method, overwrite=True, **shards)
        assert stored() == files_of(tmp_path / method)
    for place, what in (("s3://zoos", "whole bucket"), ("s3://nobody-made-this/x", "create the bucket")):
        with pytest.raises(FileError, match=what):
            merge(models, place, method="simple", overwrite=True)
    spoil(models[1])
    with pytest.raises(UserError, match="NaN or Inf"):
        merge(models, url, method="simple", overwrite=True)
    assert stored() == files_of(tmp_path / "regmean")
