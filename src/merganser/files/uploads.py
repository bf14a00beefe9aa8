"""Folders behind a URL that are replaced as a whole, in stores that can neither lock nor rename.

What is new is uploaded beside its place, below ``<url>.partial-<hex>``:

    owner.json      who uploads, and when it was last heard of
    files/…         the new files
    manifest.json   their names and sizes, and the names of the old ones; written last

Without a manifest the upload is not finished, the place is as it was, and the next command removes what a dead owner
has left. With a manifest the new files are whole. Then they are copied into their place, by their owner or, if that
dies, by the next command. Meanwhile nothing at the place opens as a model: the small files that one is opened by go
first and come back last, when all old files are gone. They are read before, so that two commands that put the same
files into place at once end the same.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from merganser.errors import FileError
from merganser.files.claims import scratch_folder
from merganser.files.remote import RemoteFolder

logger = logging.getLogger(__name__)

_MARK, _OWNER, _FILES, _MANIFEST = ".partial-", "owner.json", "files", "manifest.json"
_OPENERS = ("adapter_config.json", "modules.json", "config.json")  # without these nothing opens as a model
_LARGEST = 64_000_000  # bytes of a file that is read into memory
_BEAT = 60.0  # seconds between two signs of life
_SILENT = 300.0  # seconds without one, after which an owner is not waited for
_POLL = 1.0  # seconds between two looks while waiting
_FORGOTTEN = 6 * 3600.0  # seconds after which it is dead

_ours: set[str] = set()  # URLs that this process uploads to now

#: Raises where the files at a place, of these names and sizes, may not be replaced.
RemoteCheck = Callable[[RemoteFolder, Mapping[str, int]], None]


@dataclass
class Staging:
    """Where new files are written before they take their place.

    Attributes:
        folder: a local folder; what is in it at the end is uploaded.
        reference: a folder or URL where other processes put the files that they write.
        others: the names of these.
    """

    folder: Path
    reference: str
    others: set[str] = field(default_factory=set)


@contextmanager
def new_remote_folder(url: str, check: RemoteCheck) -> Iterator[Staging]:
    """A folder behind a URL to fill. It takes its place when the block ends well; else the place is as it was.

    Args:
        url: of the folder.
        check: raises where what is there may not be replaced; asked when everything is uploaded.

    Raises:
        FileError: it cannot be written, or what has appeared there meanwhile may not be replaced.
    """
    place = RemoteFolder(url)
    staged = RemoteFolder(f"{place.url}{_MARK}{secrets.token_hex(4)}")
    life = _SignsOfLife(staged.url)
    with scratch_folder() as folder:
        try:
            life.begin()
            staging = Staging(folder, staged.where(_FILES))
            yield staging
            paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            for name, path in paths.items():
                staged.put(path, f"{_FILES}/{name}")
            _announce(place, staged, check, {*paths, *staging.others})
        except BaseException:
            _give_up(staged, life)
            raise
        try:
            _put_into_place(place, staged, life)
        except BaseException:
            if life.ended or _manifest(staged) is None:  # everything is in its place
                _give_up(staged, life)
            else:
                logger.warning("%s: the new result is whole in %s; the next command puts it here", url, staged.url)
            raise
        finally:
            life.end()


def settle(url: str) -> None:
    """Before a command writes to a URL: finish what a dead one had uploaded, remove what it had not; say so.

    Waits for those that are putting files into place. What another machine uploads stays, until it has not been heard
    of for hours.

    Raises:
        FileError: the URL is that of a whole bucket, or cannot be reached.
    """
    place = RemoteFolder(url)
    with place.reached() as (_, path):
        if "/" not in path:
            what = "this is a whole bucket or file system, which is no place for a result"
            raise FileError(what, where=url, mend="give a prefix in it")
    for staged in _all_staged(place):
        _settle(place, staged)


def _settle(place: RemoteFolder, staged: RemoteFolder) -> None:
    if _manifest(staged) is not None:
        _wait(place, staged)
        if _manifest(staged) is not None:
            logger.warning("%s: finishing what a command that was killed had uploaded as a whole", place.url)
            _put_into_place(place, staged)
        return
    owner = _owner(staged)
    if owner is not None and owner.is_dead(staged):
        _discard(staged)
        logger.warning("%s: removed what a command that was killed had uploaded in part", place.url)
    elif owner is None or owner.is_dead(staged) is None:
        heard = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner.renewed)) if owner else "never"
        what = "an unfinished upload of another machine, last heard of"
        logger.warning("%s: %s: %s; if nobody works on it any more, remove it", staged.url, what, heard)


def _wait(place: RemoteFolder, staged: RemoteFolder) -> None:
    """Wait until files are put into place, or whoever does that is dead."""
    seen, since = _owner(staged), time.monotonic()
    if seen is not None and not seen.is_dead(staged):
        logger.warning("%s: waiting for another command that puts its result there", place.url)
    while seen is not None and not seen.is_dead(staged) and time.monotonic() - since < _SILENT:
        time.sleep(_POLL)
        if _manifest(staged) is None:
            return
        if (found := _owner(staged)) != seen:
            seen, since = found, time.monotonic()


# ── taking the place ──


@dataclass(frozen=True)
class _Manifest:
    """What is whole in a staged folder.

    Attributes:
        files: the new files with their sizes.
        replaces: the names of the files at the place.
    """

    files: Mapping[str, int]
    replaces: tuple[str, ...]

    @property
    def openers(self) -> list[str]:
        """The new files that a model is opened by: those of inner folders first, ``config.json`` last."""
        found = [name for name in self.files if _opens(name)]
        return sorted(found, key=lambda name: (-name.count("/"), _OPENERS.index(PurePosixPath(name).name), name))


def _opens(name: str) -> bool:
    return PurePosixPath(name).name in _OPENERS


def _manifest(staged: RemoteFolder) -> _Manifest | None:
    """The manifest; None where there is none, or none yet that is whole."""
    try:
        values = json.loads(staged.read(_MANIFEST, _LARGEST) or b"")
        found = _Manifest({str(k): int(v) for k, v in values["files"].items()}, tuple(map(str, values["replaces"])))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    inside = all(part not in ("", ".", "..") for name in (*found.files, *found.replaces) for part in name.split("/"))
    return found if inside else None


def _announce(place: RemoteFolder, staged: RemoteFolder, check: RemoteCheck, names: set[str]) -> None:
    """Write the manifest, when nobody else is putting files into this place."""
    while True:
        for other in _all_staged(place):
            if other.url != staged.url and _manifest(other) is not None:
                _settle(place, other)
        old, files = place.sizes(), staged.sizes(_FILES)
        check(place, old)
        if missing := sorted(names - set(files)):
            what = f"what was uploaded is not there any more: {', '.join(missing[:5])}"
            raise FileError(what, where=staged.url, mend="run the command again, and remove nothing meanwhile")
        staged.write(_MANIFEST, json.dumps({"files": files, "replaces": sorted(old)}, indent=1).encode())
        others = [other for other in _all_staged(place) if other.url != staged.url]
        if all(_manifest(other) is None for other in others):  # of two that write theirs at once, one at least sees it
            return
        staged.remove(_MANIFEST)
        time.sleep(random.uniform(0.1, 2.0))


def _put_into_place(place: RemoteFolder, staged: RemoteFolder, life: _SignsOfLife | None = None) -> None:
    """Copy the files of a staged folder with a manifest into their place, as often as it takes.

    Args:
        place: of the files.
        staged: beside it; removed at the end.
        life: the signs of it that this process gives of itself there, if it does.

    Raises:
        FileError: the store cannot be reached, or somebody else changes what is there.
    """
    manifest = _manifest(staged)
    openers = {name: staged.read(f"{_FILES}/{name}") for name in manifest.openers} if manifest else {}
    if manifest is None or None in openers.values():
        return  # another command was faster
    for name in sorted(place.sizes()):
        if _opens(name) and (name in manifest.replaces or name in manifest.files):
            place.remove(name)
    for name in manifest.files:
        if name not in openers:
            with suppress(FileNotFoundError):  # another command has been faster: what counts is what is there below
                place.copy(staged, f"{_FILES}/{name}", name)
    for name in manifest.replaces:
        if name not in manifest.files:
            place.remove(name)
    for name, data in openers.items():
        place.write(name, data or b"")
    found = place.sizes()
    if wrong := [name for name, size in manifest.files.items() if found.get(name) != size]:
        what = f"not as uploaded: {', '.join(wrong[:5])}"
        raise FileError(what, where=place.url, mend=f"see whether something else writes there; {staged.url} is whole")
    if life is not None:
        life.end()
    _discard(staged)


def _give_up(staged: RemoteFolder, life: _SignsOfLife) -> None:
    """Remove what this process has uploaded, as far as the store lets it."""
    life.end()
    with suppress(FileError):
        _discard(staged)


def _discard(staged: RemoteFolder) -> None:
    """Remove a staged folder: the manifest first, so that what is left of it is not whole, and the owner last."""
    for name in (_MANIFEST, _FILES, ""):
        staged.remove(name)


def _all_staged(place: RemoteFolder) -> list[RemoteFolder]:
    """The staged folders beside a place."""
    try:
        with place.reached() as (system, path):
            above, _, name = path.rpartition("/")
            found = {str(one).rstrip("/").rpartition("/")[2] for one in system.ls(above or "/", detail=False)}
    except FileNotFoundError:
        return []
    pattern = re.compile(re.escape(name + _MARK) + "[0-9a-f]{8}")
    ends = sorted(one.removeprefix(name) for one in found if pattern.fullmatch(one))
    return [RemoteFolder(f"{place.url}{end}") for end in ends]


# ── owners ──


@dataclass(frozen=True)
class _Owner:
    """Who uploads.

    Attributes:
        machine: tells machines and containers apart; empty where it cannot be told.
        pid: of the process.
        started: when that began, as the machine counts.
        renewed: the last sign of life, in seconds since 1970.
    """

    machine: str
    pid: int
    started: str
    renewed: float

    def is_dead(self, staged: RemoteFolder) -> bool | None:
        """Whether nobody uploads to a staged folder any more; None where that cannot be told from here."""
        if time.time() - self.renewed > _FORGOTTEN:
            return True
        if not self.machine or self.machine != _machine():
            return None
        if self.pid == os.getpid():
            return staged.url not in _ours
        return _start(self.pid) != self.started


def _owner(staged: RemoteFolder) -> _Owner | None:
    try:
        values = json.loads(staged.read(_OWNER, _LARGEST) or b"")
        return _Owner(str(values["machine"]), int(values["pid"]), str(values["started"]), float(values["renewed"]))
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


@cache
def _machine() -> str:
    """What a running kernel and its container have alone; empty where there is no such thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start(pid: int) -> str:
    """When a process of this machine began, in clock ticks since the machine did; empty where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


class _SignsOfLife:
    """The owner's file of a staged folder, renewed now and then until the end.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self._folder, self._ended = RemoteFolder(url), threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def begin(self) -> None:
        """Write the file, and go on renewing it.

        Raises:
            FileError: the store cannot be written to.
        """
        _ours.add(self._folder.url)
        self._write()
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is not written again."""
        return self._ended.is_set()

    def end(self) -> None:
        """Do not write it again."""
        _ours.discard(self._folder.url)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT):
            with suppress(FileError):  # the next one may come through
                self._write()

    def _write(self) -> None:
        me = _Owner(_machine(), os.getpid(), _start(os.getpid()), time.time())
        self._folder.write(_OWNER, json.dumps(asdict(me)).encode())
