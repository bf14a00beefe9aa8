"""Paths that strangers name: what lies inside of a folder, and what is a plain file that can be read to its end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from merganser.errors import UserError

COPY = "put the files themselves there (cp -rL makes such a copy of the folder), and give that folder"
_LONGEST_NAME = 255  # bytes of a file's name that file systems accept
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def inside(
    folder: Path,
    name: object,
    kind: type[UserError] = UserError,
    *,
    root: Path | None = None,
    where: str | Path | None = None,
    what: str = "the path",
    mend: str = "put it into the folder, and name it relative to that",
) -> str:
    """A relative path that somebody wrote in a file, in its usual form, if what it names lies inside of a folder.

    Links are followed: they have to end inside of the folder, or among the blobs of the Hub's cache that the folder is
    a snapshot of. What the path names need not be there.

    Args:
        folder: that it is relative to.
        name: the path; anything that is no text is refused.
        kind: of the errors.
        root: the folder that it has to stay in, where that is one above ``folder``.
        where: the file that names it.
        what: it is, as the subject of a sentence.
        mend: for a path that leads out by its spelling.

    Returns:
        the path with single slashes; empty for the folder itself.

    Raises:
        UserError: it is no path, is absolute, leads out of the folder, or is a link to something outside of it.
    """
    said = f"{what} {name!r}"
    if not isinstance(name, str) or not is_name(name):
        raise kind(f"{said} is no path that a file can have", where=where, mend=mend)
    pure = PurePosixPath(name.replace("\\", "/"))
    if leads_anywhere(name) and (root is None or not _stays(folder / pure, root)):
        raise kind(f"{said} lies outside of the folder", where=where, mend=mend)
    if not is_inside(root or folder, folder / pure):
        raise kind(f"{said} is a link that leads out of the folder", where=where or folder, mend=COPY)
    return "" if str(pure) == "." else str(pure)


def leads_anywhere(name: str) -> bool:
    """Whether a path is absolute, begins in somebody's home or has a ``..``: it can name any place of a machine."""
    pure = PurePosixPath(name.replace("\\", "/"))
    return pure.is_absolute() or bool(PureWindowsPath(name).drive) or ".." in pure.parts or name.startswith("~")


def is_name(path: str) -> bool:
    """Whether a file can have this path: no part of it is too long, and the system can write it down."""
    try:
        return "\0" not in path and all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.split("/"))
    except UnicodeEncodeError:
        return False


def path_text(
    given: object, kind: type[UserError] = UserError, *, what: str = "a path", mend: str = "give the path as text"
) -> str:
    """A path or a name as a caller gave it, as text.

    Args:
        given: text or a path; a function of Python may be given anything.
        kind: of the errors.
        what: is expected, with its article.
        mend: what to give.

    Raises:
        UserError: it is neither, such as a list or a model in memory, or no file can have this name.
    """
    check_type(given, kind, what=what, mend=mend)
    text = str(given)
    if not is_name(text):
        raise kind("no file or folder can have this name", where=text, mend=mend)
    return text


def check_type(
    given: object, kind: type[UserError] = UserError, *, what: str = "a path", mend: str = "give the path as text"
) -> None:
    """Refuse an object of Python that is no path, likewise."""
    if not isinstance(given, str | os.PathLike):
        raise kind(f"{what} is expected, as a str or a Path, and this is {described(given)}", mend=mend)


def path_as_text(value: object) -> object:
    """A path as text, for a field that is one; anything else as it is, for the field to accept or refuse."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def described(given: object) -> str:
    """An object of Python by its kind, for messages: it may be large, or print what is private."""
    return "None" if given is None else f"of the type {type(given).__name__}"


def _stays(path: Path, root: Path) -> bool:
    """Whether a path stays in a folder by its spelling."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))  # noqa: PTH100 (links stay as they are)


def expanded(path: str | Path) -> Path:
    """A path with the home that it begins with; one of a user who is not there stays as it is.

    Raises:
        UserError: an object that is no path.
    """
    check_type(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def real(path: str | Path) -> Path:
    """An absolute path without links. A circle of links ends where it is found, where ``Path.resolve`` raises."""
    return Path(os.path.realpath(path))


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a path ends inside of a folder once all links are followed; the Hub cache's own blobs are no outside."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in _roots(folder))


def _roots(folder: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(folder))
    yield real
    yield from (place.parent.parent / "blobs" for place in (real, *real.parents) if place.parent.name == "snapshots")


def check_file(path: Path, kind: type[UserError] = UserError, mend: str = "give a plain file") -> int:
    """The size of a plain file in bytes.

    A pipe would wait for a writer for ever, and a device may never end, so that these are not even opened.

    Args:
        path: of the file; links are followed.
        kind: of the errors.
        mend: for anything that is no plain file.

    Raises:
        UserError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: NUL or lone surrogates in the name
        reason = getattr(error, "strerror", None) or error
        raise kind(f"unreadable: {reason}", where=path, mend="check the path") from None
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise kind(f"a file is expected, this is {found}", where=path, mend=mend)
    return status.st_size
