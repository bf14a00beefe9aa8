"""A folder behind a URL is the old one or the new one, whatever fails, and whoever comes next."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kill.store import KeptStore, register
from merganser.errors import FileError
from merganser.files import RemoteFolder, uploads
from merganser.files.uploads import new_remote_folder, settle

URL = "kept://bucket/x/out"
OLD = {"config.json": "old", "model.safetensors": "old", "heads/a/config.json": "old"}
NEW = {"config.json": "new", "m-1.safetensors": "new 1", "heads/a/config.json": "new", "modules.json": "new"}

Files = Mapping[str, str]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEPT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(uploads, "_POLL", 0.01)
    (tmp_path / "store").mkdir()
    register()
    return tmp_path / "store"


def anything(place: RemoteFolder, files: Mapping[str, int]) -> None:
    """Everything may be replaced."""


def upload(files: Files, url: str = URL, check: uploads.RemoteCheck = anything) -> None:
    settle(url)
    with new_remote_folder(url, check) as staging:
        for name, text in files.items():
            (staging.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.folder / name).write_text(text)


def found(url: str = URL) -> Files:
    place = RemoteFolder(url)
    return {name: (place.read(name) or b"").decode() for name in place.sizes()}


def beside() -> list[str]:
    """Whatever lies in the store besides the place."""
    return [key for key in KeptStore().objects() if not key.startswith(URL.removeprefix("kept://") + "/")]


def start_from_old() -> None:
    for path in KeptStore().objects().values():
        path.unlink()
    for name, text in OLD.items():
        RemoteFolder(URL).write(name, text.encode())


def opens(files: Files) -> dict[str, str]:
    return {name: text for name, text in files.items() if name.endswith(("config.json", "modules.json"))}


def may_be(files: Files) -> bool:
    """Whether what can be opened belongs to one result that has all its other files."""
    rest = {name: text for name, text in files.items() if name not in opens(files)}
    wanted = [{n: t for n, t in one.items() if n not in opens(one)} for one in (OLD, NEW)]
    return not opens(files) or any(
        rest == others and opens(files).items() <= opens(one).items()
        for one, others in zip((OLD, NEW), wanted, strict=True)
    )


@pytest.mark.parametrize("url", [URL, "memory://out", "memory://a/b/out"])
def test_the_new_one_replaces_the_old_one_whole(url: str) -> None:
    for files in (OLD, NEW, OLD):
        upload(files, url)
        assert found(url) == files
    assert not beside()


class Failing:
    """Lets so many acts of a store pass; then it does or raises something, once or ever after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed, self.limit = 0, -1
        self.error: type[BaseException] | None = None
        self.watch: Callable[[], Any] | None = None
        for name in ("_write", "rm_file", "_read"):
            monkeypatch.setattr(KeptStore, name, self._wrapped(getattr(KeptStore, name)))

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any) -> Any:
            if self.passed == self.limit and self.error is not None:
                if not issubclass(self.error, Exception):
                    self.limit = -1
                raise self.error("it failed")
            self.passed += self.limit >= 0
            done = original(*arguments)
            if self.watch is not None:
                self.watch()
            return done

        return act

    def after(self, limit: int, error: type[BaseException]) -> None:
        self.passed, self.limit, self.error = 0, limit, error

    def stop(self) -> None:
        self.limit = -1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


def test_nothing_half_can_be_opened_at_any_moment(failing: Failing) -> None:
    upload(OLD)
    states: list[Files] = []
    root = URL.removeprefix("kept://") + "/"

    def look() -> None:
        files = {key: path.read_text() for key, path in KeptStore().objects().items()}
        states.append({key.removeprefix(root): text for key, text in files.items() if key.startswith(root)})

    failing.watch = look
    upload(NEW)
    failing.watch = None
    assert all(map(may_be, states)) and OLD in states and states[-1] == NEW
    assert any(not opens(files) for files in states)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_wherever_it_stops_the_next_command_makes_it_whole(
    failing: Failing, error: type[BaseException], caplog: Any
) -> None:
    """A store that goes away (and stays away: nothing can be tidied up), and Ctrl-C, after each number of acts."""
    finished, kept = 0, 0
    for limit in range(200):
        start_from_old()
        failing.after(limit, error)
        try:
            upload(NEW)
        except (FileError, KeyboardInterrupt):
            failing.stop()
        else:
            break
        left = found()
        assert may_be(left)
        if error is KeyboardInterrupt and not any(key.endswith("manifest.json") for key in beside()):
            assert not beside()  # there was time to tidy up
        caplog.clear()
        settle(URL)
        assert found() in (OLD, NEW) and not beside()
        if left != OLD:
            assert found() == NEW
            finished += left != NEW
        kept += found() == OLD
    assert finished > 5 and kept > 5 and limit < 199


def test_an_error_leaves_the_old_one(store: Path) -> None:
    upload(OLD)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), new_remote_folder(URL, anything) as staging:
            (staging.folder / "config.json").write_text("new")
            RemoteFolder(staging.reference).write("model.safetensors", b"put by another process")
            raise error
        assert found() == OLD and not beside()


def test_what_has_appeared_meanwhile_is_not_replaced() -> None:
    def nothing(place: RemoteFolder, files: Mapping[str, int]) -> None:
        if files:
            raise FileError("the output exists", where=place.url, mend="give another URL")

    with pytest.raises(FileError, match="exists"), new_remote_folder(URL, nothing) as staging:
        (staging.folder / "config.json").write_text("new")
        RemoteFolder(URL).write("config.json", b"theirs")
    assert found() == {"config.json": "theirs"} and not beside()


def test_files_that_others_put_belong_to_it_and_must_be_there() -> None:
    with new_remote_folder(URL, anything) as staging:
        staging.others.add("model.safetensors")
        RemoteFolder(staging.reference).write("model.safetensors", b"weights")
        (staging.folder / "config.json").write_text("new")
    assert found() == {"config.json": "new", "model.safetensors": "weights"}
    with (
        pytest.raises(FileError, match=r"not there any more: model\.safetensors"),
        new_remote_folder(URL, anything) as staging,
    ):
        staging.others.add("model.safetensors")
    assert found() == {"config.json": "new", "model.safetensors": "weights"} and not beside()


def stage(
    files: Files, *, machine: str, silent: float = 0.0, whole: bool, pid: int = 1, replaces: Files = OLD
) -> RemoteFolder:
    """What another command has uploaded, before it stopped."""
    staged = RemoteFolder(f"{URL}.partial-0123abcd")
    owner = {"machine": machine, "pid": pid, "started": "7", "renewed": time.time() - silent}
    staged.write("owner.json", json.dumps(owner).encode())
    for name, text in files.items():
        staged.write(f"files/{name}", text.encode())
    if whole:
        manifest = {"files": {name: len(text) for name, text in files.items()}, "replaces": sorted(replaces)}
        staged.write("manifest.json", json.dumps(manifest).encode())
    return staged


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_dead_process_of_this_machine_has_left(whole: bool, caplog: Any) -> None:
    upload(OLD)
    stage(NEW, machine=uploads._machine(), whole=whole)  # process 1 is there, and began at another time
    settle(URL)
    assert found() == (NEW if whole else OLD) and not beside()
    assert ("finishing" if whole else "removed") in caplog.text and URL in caplog.text


def test_what_another_machine_uploads_is_let_be_for_hours(caplog: Any) -> None:
    upload(OLD)
    staged = stage(NEW, machine="another", whole=False)
    upload(OLD)
    assert staged.sizes() and staged.url in caplog.text
    stage(NEW, machine="another", whole=False, silent=7 * 3600)
    settle(URL)
    assert not beside() and found() == OLD


def test_what_another_machine_puts_into_place_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    upload(OLD)
    staged = stage(NEW, machine="another", whole=True)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) < 5:
            stage(NEW, machine="another", whole=True, silent=-len(looks))  # it lives
        elif len(looks) == 5:
            assert found() == OLD
            uploads._discard(staged)  # it is through

    monkeypatch.setattr(time, "sleep", sleep)
    settle(URL)
    assert len(looks) == 5 and "waiting for another command" in caplog.text and found() == OLD


def test_one_that_falls_silent_is_finished_for(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    upload(OLD)
    stage(NEW, machine="another", whole=True)
    monkeypatch.setattr(uploads, "_SILENT", 0.05)
    settle(URL)
    assert found() == NEW and not beside()


def test_of_two_at_once_one_comes_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another manifest appears just after ours was written: ours is taken back, and comes when that one is through."""
    upload(OLD)
    original = RemoteFolder.write
    seen = []

    def write(self: RemoteFolder, name: str, data: bytes) -> None:
        original(self, name, data)
        if name == "manifest.json" and "0123abcd" not in self.url:
            seen.append(self.url)
            if len(seen) == 1:
                stage({"config.json": "theirs"}, machine=uploads._machine(), whole=True)
        if name == "config.json" and self.url == URL and data == b"theirs":
            assert RemoteFolder(seen[0]).read("manifest.json") is None

    monkeypatch.setattr(RemoteFolder, "write", write)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    upload(NEW)
    assert found() == NEW and len(seen) == 2 and not beside()


def test_two_that_finish_the_same_at_once_end_the_same(failing: Failing) -> None:
    """While one command puts a result into place, at each moment another does the same from beginning to end."""
    for moment in range(100):
        start_from_old()
        stage(NEW, machine=uploads._machine(), whole=True)
        acts = count()

        def other(moment: int = moment, acts: Iterator[int] = acts) -> None:
            if next(acts) == moment:
                failing.watch = None
                settle(URL)

        failing.watch = other
        settle(URL)
        failing.watch = None
        assert found() == NEW and not beside(), moment
        if next(acts) <= moment:
            break
    assert moment > 10


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": {"../x": 1}, "replaces": []}', '{"files": {}, "replaces": ["/a"]}']
)
def test_a_manifest_that_is_none_finishes_nothing(text: str) -> None:
    upload(OLD)
    staged = stage(NEW, machine=uploads._machine(), whole=False)
    staged.write("manifest.json", text.encode())
    settle(URL)
    assert found() == OLD and not beside()


@pytest.mark.parametrize("url", ["kept://bucket", "kept://bucket/", "memory://", "memory:///"])
def test_a_whole_bucket_is_no_place_for_a_result(url: str) -> None:
    RemoteFolder("kept://bucket/a").write("b", b"c")
    with pytest.raises(FileError, match="whole bucket"):
        settle(url)


def test_a_store_that_cannot_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(KeptStore, "cp_file", refused)
    for files in (OLD, NEW):
        upload(files)
        assert found() == files
    assert not beside()


def test_signs_of_life_are_given_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_BEAT", 0.01)
    with new_remote_folder(URL, anything) as staging:
        owner = RemoteFolder(staging.reference.removesuffix("/files"))
        first = owner.read("owner.json")
        for _ in range(500):
            if owner.read("owner.json") != first:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("no sign of life")
        assert json.loads(first or b"")["pid"] == os.getpid()
        (staging.folder / "config.json").write_text("new")
    assert found() == {"config.json": "new"} and not beside()


def test_stopped_when_all_is_in_place_it_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the manifest goes: the next command has nothing to do."""
    start_from_old()
    remove = RemoteFolder.remove

    def stopped(self: RemoteFolder, name: str = "") -> None:
        if name == "manifest.json":
            monkeypatch.setattr(RemoteFolder, "remove", remove)
            raise KeyboardInterrupt
        remove(self, name)

    monkeypatch.setattr(RemoteFolder, "remove", stopped)
    with pytest.raises(KeyboardInterrupt):
        upload(NEW)
    assert found() == NEW and not beside()
