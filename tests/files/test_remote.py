"""Folders behind a URL."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from merganser.errors import FileError
from merganser.files import RemoteFolder, is_url, write_bytes


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_files_behind_a_url(protocol: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far" if protocol == "file" else f"memory://{uuid.uuid4().hex}/far"
    here, there = RemoteFolder(f"{url}/"), RemoteFolder(url)  # as two machines see it
    source = write_bytes(tmp_path / "source", b"weights")
    assert is_url(url) and not is_url(tmp_path)
    assert there.sizes() == {} and there.read("a/b") is None and there.size("a/b") is None
    there.remove()  # nothing is there, and that is fine
    here.put(source, "a/b")
    here.put(source, "c")
    assert there.sizes() == {"a/b": 7, "c": 7} and there.sizes("a") == {"b": 7} and there.size("c") == 7
    assert there.read("a/b") == b"weights" and there.read("a/b", 3) == b"wei"
    there.get("a/b", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"weights"
    with pytest.raises(FileNotFoundError):
        there.get("a/none", tmp_path / "none")
    here.remove("a/b")
    assert there.sizes() == {"c": 7}
    here.remove()
    assert there.sizes() == {}


def test_what_goes_wrong_names_the_url_and_a_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    with pytest.raises(FileError, match=r"nosuchprotocol://x: cannot be reached.*\n.*fsspec URL"):
        RemoteFolder("nosuchprotocol://x").sizes()
    with pytest.raises(FileError, match=r"dropbox://x: cannot be reached.*\n.*pip install"):
        RemoteFolder("dropbox://x").sizes()

    def lost(*_: object, **__: object) -> None:
        raise ConnectionResetError("the line went dead")

    folder = RemoteFolder("memory://here")
    for name in ("put_file", "get_file", "info", "find", "open", "exists"):
        monkeypatch.setattr(MemoryFileSystem, name, lost)
    for work in (
        lambda: folder.put(tmp_path, "a"),
        lambda: folder.get("a", tmp_path / "b"),
        lambda: folder.size("a"),
        lambda: folder.sizes("a"),
        lambda: folder.read("a"),
        lambda: folder.remove("a"),
    ):
        with pytest.raises(FileError, match=r"memory://here/a: .*the line went dead\n.*check the URL"):
            work()


def test_a_bucket_is_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(MemoryFileSystem, "put_file", absent)
    monkeypatch.setattr(MemoryFileSystem, "protocol", ("s3", "s3a"))
    with pytest.raises(FileError, match=r"memory://b: The specified bucket does not exist\n.*create the bucket"):
        RemoteFolder("memory://b").put(tmp_path, "a")
