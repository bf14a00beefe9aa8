"""The zoo in a bucket, over HTTP, against a server that speaks S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merganser.errors import FileError
from merganser.lab.zoo import Zoo, ZooError
from s3_server import bucket as bucket
from s3_server import endpoint as endpoint

s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install 'merganser[s3]'")

KEY = {"suite": "emotion", "set": "isear", "seed": 1}


def make(folder: Path) -> dict[str, Any]:
    (folder / "config.json").write_text("{}")
    (folder / "heads").mkdir()
    (folder / "heads" / "a.safetensors").write_bytes(bytes(range(256)) * 4096)
    return {"score": 0.5}


def never(_: Path) -> Any:
    raise AssertionError("made again")


def test_built_here_got_there(bucket: Any, tmp_path: Path) -> None:
    here, there = (Zoo("s3://zoos/prefix", cache=tmp_path / name) for name in "ab")
    assert there.ls() == [] and there.get(KEY) is None
    made = here.build(KEY, make)
    statistics = here.attach(made, "statistics/x.safetensors", lambda path: path.write_bytes(b"gram") and None)
    names = {name.removeprefix(f"zoos/prefix/{made.id}/") for name in bucket.find("zoos/prefix") if made.id in name}
    beside = {"statistics/x.safetensors", "statistics/x.safetensors.record.json"}
    assert names == {"entry.json", "model/config.json", "model/heads/a.safetensors", *beside}

    (listed,) = there.ls()
    assert listed.id == made.id and not listed.path.exists()
    got = there.get(KEY)
    assert got is not None and got == there.build(KEY, never) and tmp_path / "b" in got.path.parents
    for name in made.files:
        assert (got.path / name).read_bytes() == (made.path / name).read_bytes()
    assert there.attach(got, "statistics/x.safetensors", never).read_bytes() == statistics.read_bytes()
    assert there.verify(got) == 3 and sum(there.files(got).values()) == 2**20 + 2 + 4

    bucket.rm(f"zoos/prefix/{made.id}/model/config.json")
    assert there.get(KEY) == got  # downloaded once
    assert there.remove(made.id[:8]) == made.id
    assert here.ls() == [] and not [name for name in bucket.find("zoos") if made.id in name]


def test_a_corrupt_object_is_named(bucket: Any, tmp_path: Path) -> None:
    made = Zoo("s3://zoos/prefix", cache=tmp_path / "a").build(KEY, make)
    there = Zoo("s3://zoos/prefix", cache=tmp_path / "b")
    path = f"zoos/prefix/{made.id}/model/heads/a.safetensors"
    data = bucket.cat(path)
    bucket.pipe(path, data[:-1] + b"X")
    with pytest.raises(ZooError, match=rf"s3://{path}: damaged: SHA-256"):
        there.get(KEY)
    with pytest.raises(ZooError, match=rf"s3://{path}: damaged"):
        there.verify(there.entry(made.id))
    bucket.pipe(path, data[:-1])
    with pytest.raises(ZooError, match=rf"s3://{path}: damaged: {len(data) - 1} bytes"):
        there.get(KEY)
    assert not (there.root / made.id).exists()
    bucket.pipe(path, data)
    assert there.build(KEY, never).id == made.id


def test_an_unfinished_upload_is_not_there(bucket: Any, tmp_path: Path) -> None:
    here, there = (Zoo("s3://zoos/prefix", cache=tmp_path / name) for name in "ab")
    made = here.build(KEY, make)
    bucket.rm(f"zoos/prefix/{made.id}/entry.json")
    assert there.get(KEY) is None and there.ls() == []
    here.build(KEY, never)
    assert there.get(KEY) is not None


def test_a_missing_bucket_is_noticed_before_anything_is_made(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="bucket"):
        Zoo("s3://nobody-made-this/prefix", cache=tmp_path / "a").build(KEY, never)
    assert not bucket.exists("nobody-made-this")


def test_a_server_that_is_not_there(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(FileError, match="cannot be reached"):
        Zoo("s3://zoos/prefix", cache=tmp_path / "a").get(KEY)
