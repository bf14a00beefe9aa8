"""Files that are whole or not there, space, locks, and folders behind a URL."""

from __future__ import annotations

import errno
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from safetensors import SafetensorError

from merganser import files
from merganser.errors import FileError, UserError
from merganser.files import (
    RemoteFolder,
    human_bytes,
    is_url,
    locked,
    new_file,
    new_folder,
    parse_size,
    remove_leftovers,
    space_error,
    write_bytes,
    write_text,
)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "not" / "there" / "yet"
    assert space_error(target, 1) is None
    monkeypatch.setattr(files, "free_bytes", lambda _: 999)
    assert space_error(target, 999) is None
    error = space_error(target, 91_200_000, "running sums take", "make room")
    assert error is not None and error.mend == "make room" and error.where == str(target)
    assert error.what == "too little disk: running sums take 91.2 MB, 999 B are free"
    assert human_bytes(2e12) == "2.00 TB"


# ── writing ──


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    assert write_text(path, "größer\n").read_bytes() == "größer\n".encode()
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_file(path) as work:
            assert work.parent == path.parent
            work.write_text("half")
            raise error
        assert path.read_text() == "größer\n" and names(path.parent) == ["page.html"]
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second" and names(path.parent) == ["page.html"]
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as any file, not a private one


def test_nothing_is_left_when_a_folder_fails(tmp_path: Path) -> None:
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(tmp_path / "out") as work:
            (work / "config.json").write_text("{}")
            raise error
        assert names(tmp_path) == []
    with new_folder(tmp_path / "out") as work:
        (work / "first").write_text("")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_there_is_replaced_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with new_folder(out) as work:
        (work / "first").write_text("")
    with pytest.raises(FileError, match="cannot be written"), new_folder(out) as work:
        (work / "second").write_text("")
    assert names(out) == ["first"]
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == out and names(path) == ["second"]:
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(FileError, match="input/output error"), new_folder(out, overwrite=True) as work:
            (work / "second").write_text("")
    assert names(out) == ["first"]  # it is back
    with new_folder(out, overwrite=True) as work:
        (work / "second").write_text("")
    assert names(out) == ["second"] and names(tmp_path) == ["out"]


#: Writes a file and a folder that are there already, and is killed in the middle, or just before the rename.
KILLED = """
import os, signal, sys
from pathlib import Path
from merganser import files
folder, when = Path(sys.argv[1]), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if when == "renaming":
    Path.replace = Path.rename = die
with files.new_folder(folder / "model", overwrite=True) as work:
    (work / "config.json").write_text("new")
    with files.new_file(folder / "page.html") as page:
        page.write_text("new")
        if when == "writing":
            die()
"""


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_killed_in_the_middle_the_old_is_still_there(tmp_path: Path, when: str) -> None:
    write_text(tmp_path / "page.html", "old")
    write_text(tmp_path / "model" / "config.json", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "page.html").read_text() == (tmp_path / "model" / "config.json").read_text() == "old"
    assert len(names(tmp_path)) == 4
    for name in ("page.html", "model"):
        remove_leftovers(tmp_path / name)
    assert names(tmp_path) == ["model", "page.html"]


FULL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from merganser import files
from merganser.errors import FileError
folder = Path(sys.argv[1])
files.write_text(folder / "old", "old")
def text(): files.write_text(folder / "old", "x" * 10**6)
def tensors():
    with files.new_file(folder / "w.safetensors") as work:
        save_file({"a": torch.zeros(10**6)}, work)
def model():
    with files.new_folder(folder / "model") as work:
        (work / "weights").write_bytes(bytes(10**6))
for write in (text, tensors, model):
    try:
        write()
    except FileError as error:
        print(error.what, "-", error.mend)
print([path.name for path in folder.iterdir()], (folder / "old").read_text())
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$1" && shift && exec "$@"', "sh"]
    if subprocess.run([*mount, str(tmp_path), "true"], capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    command = [*mount, str(tmp_path), sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = "the disk is full - free some space or choose another disk\n"
    assert done.stdout == said * 3 + "['old'] old\n", done.stderr


def test_a_full_disk_is_said_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    serializing = SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")
    for error in (full, serializing):
        with pytest.raises(FileError, match="out: the disk is full"), new_folder(tmp_path / "out"):
            raise error
    with (
        pytest.raises(FileError, match="the disk is full; the ledger is as it was"),
        files.writing(tmp_path, "the ledger is as it was"),
    ):
        raise full
    read = SafetensorError("Error while deserializing header: header too large")
    with pytest.raises(SafetensorError), new_folder(tmp_path / "out"):
        raise read

    def fsync(_: int) -> None:
        raise full  # as a network file system says it, when the file is flushed

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FileError, match="the disk is full"):
        write_text(tmp_path / "page", "x")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (new_file, new_folder):
        with pytest.raises(FileError, match="cannot be written") as error, write(tmp_path / "file" / "x"):
            pass
        assert error.value.mend == "check the path and its permissions"


# ── locks ──

HOLDER = """
import sys, time
from pathlib import Path
from merganser.files import locked
with locked(Path(sys.argv[1]), "uses sums"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_waited_for_and_goes_with_a_holder_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "locks" / "a.lock", queue.Queue[str]()
    monkeypatch.setattr(files.logger, "warning", lambda text, *more: said.put(text % more))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    held = threading.Event()

    def wait() -> None:
        with locked(path, "uses sums"):
            held.set()

    waiting = threading.Thread(target=wait)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(FileError, match="another process uses sums") as error,
            locked(path, "uses sums", wait=False),
        ):
            pass
        assert error.value.mend == "wait for it, or stop it"
        waiting.start()
        assert said.get(timeout=60) == "waiting for another process that uses sums" and not held.is_set()
    finally:
        holder.kill()
        holder.communicate()
    assert held.wait(60)
    waiting.join(60)
    with locked(path, "uses sums", wait=False):
        pass


def test_a_lock_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    number = errno.EROFS
    with pytest.raises(FileError, match="cannot be written"), locked(tmp_path / "lock", "uses it"):
        pass
    with locked(tmp_path / "lock", "uses it", needed=False):
        pass
    number = errno.ENOSPC
    with pytest.raises(FileError, match="the disk is full"), locked(tmp_path / "lock", "uses it", needed=False):
        pass


# ── behind a URL ──


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


def test_what_is_not_complete_looks_like_nothing_that_is_read(tmp_path: Path) -> None:
    """A killed process leaves a file that no pattern of results, weights or configurations matches."""
    for name in ("cell.json", "model.safetensors", "config.yaml", "rows.jsonl"):
        with new_file(tmp_path / name) as work:
            work.write_text("half of it")
            assert not list(tmp_path.glob(f"*{Path(name).suffix}"))
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
