"""Where a command writes, and what it may replace there: the one place that has the rules.

An output that is there is replaced only when the user asks for it, and only where it is recognised by its contents as
what the same kind of command has written: nothing else may lie in it. What the command reads is never replaced, nor a
folder that holds it; and nothing is written into a folder that is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from merganser.errors import FileError, UserError
from merganser.files.atomic import new_file, new_folder, remove_leftovers
from merganser.files.claims import is_there
from merganser.paths import real
from merganser.text import listed

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of a URL, which as a path has one slash after it
_SHOWN = 5  # names in a message
_PATH_MAX = 4096 - 300  # bytes of a path, less what lies inside the folder

MOVE = "give another place, or move these away"


class Refusal(NamedTuple):
    """Why something is not replaced, and what to do about it."""

    what: str
    mend: str = "give another place, or move what is there away"


#: Why what lies at a path is not what the command writes; None where it is.
Recognise = Callable[[Path], Refusal | None]


@dataclass(frozen=True)
class Output:
    """A file or folder that a command writes.

    Attributes:
        path: as the user gave it.
        recognise: why what lies at a path is not this kind of output; an empty folder is never asked about.
        overwrite: whether the user said that an existing one may be replaced.
        reads: every file and folder that the command reads.
        allowed: those of them that it may be written into or replace all the same: a model's folder takes its
            statistics, and a file may be replaced by what was made of it, which is written whole first.
        folder: whether it is a folder.
    """

    path: Path
    recognise: Recognise
    overwrite: bool = False
    reads: Collection[Path] = ()
    allowed: Collection[Path] = ()
    folder: bool = True

    def problems(self) -> list[UserError]:
        """Why it cannot be written, from what is there now; to be called before any work."""
        try:
            if refused := _unusable(self.path, self.folder) or self._touching():
                return [self._error(refused)]
            remove_leftovers(self.path)
            refused = self._refusal(self.path) if is_there(self.path) else None
            return [self._error(refused)] if refused else []
        except OSError as error:
            return [FileError(f"cannot be written: {error}", where=self.path, mend="check the path")]

    def raise_problem(self) -> None:
        """Raise what :meth:`problems` finds.

        Raises:
            FileError: it cannot be written.
        """
        for problem in self.problems():
            raise problem

    @contextmanager
    def new(self) -> Iterator[Path]:
        """The file or folder to write, which takes its place at the end, if what is there may be replaced even then.

        Raises:
            FileError: the disk is full, it cannot be written, or something has appeared there meanwhile.
        """
        path = self.path if self.path.name not in ("", "..") else real(self.path)
        with (new_folder if self.folder else new_file)(path, check=self.check) as work:
            yield work

    def check(self, path: Path) -> None:
        """Refuse to replace what has lain at the output's place and lies at ``path`` now.

        Raises:
            FileError: it may not be replaced.
        """
        if refused := self._refusal(path):
            raise self._error(refused)

    def _error(self, refused: Refusal) -> FileError:
        return FileError(refused.what, where=self.path, mend=refused.mend)

    def _touching(self) -> Refusal | None:
        """Where the output is, holds or lies in what is read."""
        for path in self.reads:
            holds, inside = is_within(path, self.path), is_within(self.path, path)
            if inside and path in self.allowed:
                continue
            if holds and inside:
                return Refusal("the output is one of the inputs", "give another place")
            if holds:
                return Refusal(f"the output holds {path}, which is read", "give another place")
            if inside:
                return Refusal(f"the output lies in {path}, which is read", "give a place outside of it")
        return None

    def _refusal(self, path: Path) -> Refusal | None:
        """Why what is there now may not be replaced; None where it may."""
        if path.is_symlink():
            what = f"the output is a link to {path.readlink()}, and links are not replaced"
            return Refusal(what, "give the place that it points to, or remove the link")
        if not self.overwrite:
            return Refusal("the output exists", "give another place, or --overwrite to replace it")
        if self.folder != path.is_dir():
            return Refusal(f"the output is a {'folder' if path.is_dir() else 'file'}")
        if self.folder and not any(path.iterdir()):
            return None
        return self.recognise(path)


def other_kind(kind: str, place: str = "file") -> Refusal:
    """Why an output is not replaced that is not of the kind that the command writes.

    Args:
        kind: what it is not, such as ``statistics file``.
        place: the word for what is to be given instead.
    """
    what = f"the output exists and is no {kind}, so it is not replaced"
    return Refusal(what, f"give another {place}, or remove it yourself")


def unlisted(names: Iterable[str], known: Collection[str], what: str) -> Refusal | None:
    """Why a folder is not replaced that holds other files than are known; None where it holds none.

    Args:
        names: of the files in it, see :func:`files_below`.
        known: names of those that are known.
        what: the known ones are, such as ``the merge``.
    """
    found = sorted(name for name in names if name not in known)
    if not found:
        return None
    return Refusal(f"the output holds what is no part of {what}: {listed(found, _SHOWN)}", MOVE)


def files_below(folder: Path) -> Iterator[str]:
    """The names of everything but folders below a folder, relative to it; links are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in [*names, *links]:
            yield Path(place, name).relative_to(folder).as_posix()


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder (or file) itself or lies below it, whatever links, ``..``, case or hard links say.

    Args:
        path: that may lie in ``folder``; need not be there.
        folder: likewise.
    """
    path, folder = _real(path), _real(folder)
    if path == folder or folder in path.parents:
        return True
    try:
        place = folder.stat()
    except OSError:
        return False
    for one in (path, *path.parents):
        try:
            if os.path.samestat(one.stat(), place):
                return True
        except OSError:
            continue
    return False


def real_files(folder: Path) -> Iterable[Path]:
    """A folder that is read, and what links in it point to, which is read as well."""
    yield folder
    if folder.is_dir():
        for name in files_below(folder):
            if (folder / name).is_symlink():
                yield real(folder / name)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


# ── names and places ──


def _unusable(path: Path, folder: bool) -> Refusal | None:
    """Why nothing can be written at a path, whatever is there."""
    text = str(path)
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        return Refusal(f"the name {text!r} has control characters", "give another name")
    if len(path.parts) > 1 and _PROTOCOL.fullmatch(path.parts[0]) and not Path(path.parts[0]).exists():
        return Refusal("looks like a URL, and this is written to a folder of this machine", "give a path")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > 255 or len(os.fsencode(path.absolute())) > _PATH_MAX:
        size = f"{longest} bytes in one name" if longest > 255 else f"{len(os.fsencode(path.absolute()))} bytes"
        return Refusal(f"the path is too long: {size}", "give a shorter one")
    if path.name in ("", ".."):
        return None if path.is_dir() else Refusal("is no name of an output", "give a name")
    if path.is_symlink() and not path.exists():
        return Refusal(f"the output is a link to {path.readlink()}, where nothing is", "remove the link")
    place = path.absolute().parent
    while not place.exists():
        if place.is_symlink():
            return Refusal(f"{place} is a link to {place.readlink()}, where nothing is", "remove or mend the link")
        place = place.parent
    if not place.is_dir():
        return Refusal(f"{place} is a file, so nothing can be written in it", "give another place")
    if not os.access(place, os.W_OK | os.X_OK):
        return Refusal(f"the folder {place} is not writable", "give another place, or change its permissions")
    return None
