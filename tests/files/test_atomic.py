"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from merganser import files
from merganser.errors import FileError, UserError
from merganser.files import atomic, new_file, new_folder, remove_leftovers, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    assert write_text(path, "größer\n").read_bytes() == "größer\n".encode()
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_file(path) as work:
            assert work.parent.parent == path.parent  # on the same disk
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


def anything(_: Path) -> None:
    """Lets everything be replaced."""


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system, or a system, that cannot exchange two paths in one call."""
    monkeypatch.setattr(atomic, "_exchanging_rename", lambda: None)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_there_is_replaced_when_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        without_exchange(monkeypatch)
    for new, out in ((new_folder, tmp_path / "out"), (new_file, tmp_path / "page")):

        def put(work: Path, name: str) -> None:
            if work.is_dir():
                work /= "inside"
            work.write_text(name)

        def held(out: Path) -> str:
            return (out / "inside" if out.is_dir() else out).read_text()

        with new(out, check=anything) as work:
            put(work, "first")
        if new is new_folder:
            with pytest.raises(FileError, match="cannot be written"), new(out) as work:
                put(work, "second")
        seen = []

        def refuse(path: Path) -> None:
            seen.append(held(path))  # noqa: B023
            raise UserError("it is a thesis")

        with pytest.raises(UserError, match="it is a thesis"), new(out, check=refuse) as work:
            put(work, "second")
        assert held(out) == "first" and seen == ["first"]
        with new(out, check=anything) as work:
            put(work, "second")
        assert held(out) == "second"
    assert names(tmp_path) == ["out", "page"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    out = write_text(tmp_path / "out" / "first", "").parent
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == out and path.name == "new":
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FileError, match="input/output error"), new_folder(out, check=anything) as work:
        (work / "second").write_text("")
    assert names(out) == ["first"] and names(tmp_path) == ["out"]


def test_everything_is_flushed_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flushed = tmp_path / "out", list[tuple[str, bool]]()
    real = atomic.sync

    def sync(path: Path) -> None:
        flushed.append((path.name, out.exists()))
        real(path)

    monkeypatch.setattr(atomic, "sync", sync)
    with new_folder(out) as work:
        (work / "heads" / "a").mkdir(parents=True)
        (work / "heads" / "a" / "weights").write_text("x")
        (work / "config").write_text("x")
    before = [name for name, there in flushed if not there]
    assert sorted(before) == ["a", "config", "heads", "new", "weights"]
    assert before.index("weights") < before.index("a") < before.index("heads") < before.index("new") == len(before) - 1
    assert [name for name, there in flushed if there] == [tmp_path.name]


@pytest.mark.parametrize("length", [100, 250, 255])
def test_a_long_name_leaves_room_for_what_is_beside_it(tmp_path: Path, length: int) -> None:
    for name in ("x" * length, "ü" * (length // 2)):
        write_text(tmp_path / name, "old")
        write_text(tmp_path / name, "new")
        with new_folder(tmp_path / "in" / name) as work:
            (work / "config").write_text("")
            (beside,) = (path.name for path in (tmp_path / "in").iterdir())
            assert len(os.fsencode(beside)) <= 255
        assert names(tmp_path / "in") == [name] and (tmp_path / name).read_text() == "new"
        files.remove(tmp_path / "in")


#: Writes a file and a folder that are there already, and is killed at a certain moment.
KILLED = """
import os, signal, sys
from pathlib import Path
from merganser import files
from merganser.files import atomic, claims
folder, when = Path(sys.argv[1]), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if when == "flushed":
    Path.replace = Path.rename = atomic._exchange = die
if when == "exchanged":
    claims._remove = die
if when in ("between", "renamed"):
    atomic._exchanging_rename = lambda: None
    rename = Path.rename
    def dying(path, target):
        if when == "renamed" or path.name != "new":
            rename(path, target)
        if path.name == "new":
            die()
    Path.rename = dying
with files.new_folder(folder / "model", check=lambda _: None) as work:
    (work / "config.json").write_text("new")
    if when == "writing":
        with files.new_file(folder / "page.html") as page:
            page.write_text("new")
            die()
"""


@pytest.mark.parametrize("when", ["writing", "flushed", "exchanged", "between", "renamed"])
def test_killed_at_any_moment_nothing_is_lost_and_the_next_command_tidies(
    tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "page.html", "old")
    write_text(tmp_path / "model" / "config.json", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == {"writing": 4, "between": 2}.get(when, 3)
    assert (tmp_path / "model").exists() == (when != "between")
    for name in ("page.html", "model"):
        remove_leftovers(tmp_path / name)
    assert names(tmp_path) == ["model", "page.html"] and (tmp_path / "page.html").read_text() == "old"
    assert (tmp_path / "model" / "config.json").read_text() == ("new" if when in ("exchanged", "renamed") else "old")
    assert len(caplog.messages) == (2 if when in ("writing", "between") else 1)
    remove_leftovers(tmp_path / "model")
    assert len(caplog.messages) == (2 if when in ("writing", "between") else 1)  # it has nothing more to say


def test_killed_between_two_renames_both_are_kept_where_something_new_is_there(tmp_path: Path) -> None:
    write_text(tmp_path / "model" / "config.json", "old")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "between"], timeout=60)
    write_text(tmp_path / "model" / "thesis", "mine")
    remove_leftovers(tmp_path / "model")
    (kept,) = (path for path in tmp_path.iterdir() if path.name != "model")
    assert (kept / "old" / "config.json").read_text() == "old" and names(tmp_path / "model") == ["thesis"]


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


def test_what_is_not_complete_looks_like_nothing_that_is_read(tmp_path: Path) -> None:
    """A killed process leaves a file that no pattern of results, weights or configurations matches."""
    for name in ("cell.json", "model.safetensors", "config.yaml", "rows.jsonl"):
        with new_file(tmp_path / name) as work:
            work.write_text("half of it")
            assert not list(tmp_path.glob(f"*{Path(name).suffix}"))
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_parts_of_an_output_are_tidied_with_it(tmp_path: Path) -> None:
    """Shards that a collection of one file has left are removed by whoever writes the file next."""
    with pytest.raises(KeyboardInterrupt), files.staging_folder(tmp_path / "statistics") as folder:
        (folder / "shard").write_text("x")
        write_text(tmp_path / "statistics", "another process's")  # a living one's parts stay
        assert (folder / "shard").exists()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["statistics"]
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom merganser.files import staging_folder\n"
        "with staging_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'shard').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "statistics")], timeout=60)
    assert len(names(tmp_path)) == 2
    write_text(tmp_path / "statistics", "new")
    assert names(tmp_path) == ["statistics"]


def test_what_is_left_in_a_folder_is_removed_whatever_it_was_to_become(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom merganser.files import new_file\n"
        "with new_file(Path(sys.argv[1])) as work:\n"
        "    work.write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("one.json", "b" * 250):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], timeout=60)
    (tmp_path / ".mine.partial-00000000").write_text("a file of somebody's")
    with files.new_file(tmp_path / "living") as work:
        work.write_text("y")
        assert len(names(tmp_path)) == 4
        files.remove_leftovers_in(tmp_path)
        assert len(names(tmp_path)) == 2 and work.exists()
    assert names(tmp_path) == [".mine.partial-00000000", "living"]
