"""Files and folders that are there whole or not at all, the space for them, locks, and files behind a URL.

Everything is written beside its place and renamed at the end, so that a process that fails or is killed leaves
what was there before. What the system refuses becomes a :class:`~merganser.errors.FileError`, which says how to
mend it.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from merganser.errors import FileError, UserError

logger = logging.getLogger(__name__)

#: Stores without folders. What is missing there is the bucket, and that is not ours to create.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}


# ── sizes and space ──


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``800MB`` or ``2GiB``.

    Raises:
        UserError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"{text!r} is not a size", mend="write it like 5GB or 800MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def human_bytes(count: float) -> str:
    """A size as people write it, such as ``91.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def free_bytes(target: Path) -> int:
    """Free space on the disk that ``target`` would lie on."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def space_error(
    target: Path, needed: int, what: str = "the result takes", mend: str = "free some space or write to another disk"
) -> FileError | None:
    """The error to raise where fewer than ``needed`` bytes are free for ``target``; ``what`` begins its sentence."""
    free = free_bytes(target)
    if needed <= free:
        return None
    text = f"too little disk: {what} {human_bytes(needed)}, {human_bytes(free)} are free"
    return FileError(text, where=target, mend=mend)


# ── writing ──


@contextmanager
def writing(target: Path, kept: str = "") -> Iterator[None]:
    """Turn what the system says while ``target`` is written into an error for the user.

    Args:
        target: named in the error.
        kept: what the error says of a full disk besides, such as that the old file is still there.

    Raises:
        FileError: the disk is full, or ``target`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(target, error, kept) from None
    except SafetensorError as error:
        if "while serializing" not in str(error):
            raise  # it is about a file that was read
        raise _write_error(target, error, kept) from None


def _write_error(target: Path, error: Exception, kept: str = "") -> FileError:
    numbers = (errno.ENOSPC, errno.EDQUOT)  # safetensors gives them in its text alone
    if getattr(error, "errno", None) in numbers or any(f"os error {n})" in str(error) for n in numbers):
        what = f"the disk is full; {kept}" if kept else "the disk is full"
        return FileError(what, where=target, mend="free some space or choose another disk")
    what = f"cannot be written: {error}"
    return FileError(what, where=target, mend="check the path and its permissions")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file at; flushed and renamed to ``target`` when the block ends well.

    Raises:
        FileError: the disk is full, or the file cannot be written.
    """
    with writing(target), _staged(target) as work:
        yield work
        sync(work)
        work.replace(target)
        sync(target.parent)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, beside ``target``; renamed to ``target`` when the block ends well, removed when it does not.

    Raises:
        FileError: the disk is full, or the folder cannot be written.
    """
    target = target.absolute()
    with writing(target), _staged(target) as work:
        work.mkdir()
        yield work
        if not (overwrite and target.exists()):
            work.rename(target)
            return
        old = _free_name(target)
        target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            old.rename(target)
            raise
        with suppress(OSError):  # it is in nobody's way
            remove(old)


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file, whole or not at all.

    Raises:
        FileError: the disk is full, or the file cannot be written.
    """
    with new_file(path) as work:
        work.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        FileError: the disk is full, or the file cannot be written.
    """
    return write_bytes(path, text.encode())


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of ``target`` have left beside it; nobody may be writing it now."""
    for left in target.parent.glob(f"{glob.escape(_staging_name(target))}*"):
        with suppress(OSError):  # it is in nobody's way
            remove(left)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a network file system that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A free path beside ``target``, which no pattern such as ``*.json`` matches; what is left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _free_name(target)
    try:
        yield work
    finally:
        with suppress(OSError):  # it is in nobody's way
            remove(work)


def _free_name(target: Path) -> Path:
    return target.with_name(f"{_staging_name(target)}{secrets.token_hex(4)}")


def _staging_name(target: Path) -> str:
    return f".{target.name}.partial-"


# ── locks ──


@contextmanager
def locked(path: Path, use: str, *, wait: bool = True, needed: bool = True) -> Iterator[None]:
    """Hold a lock that one process at a time can hold; the system drops it when its holder dies.

    Args:
        path: the lock file, which is made and stays.
        use: what the holder does, such as ``uses sums``: for the warning while waiting, and the error.
        wait: False: raise where another process holds the lock.
        needed: False: go without a lock where none can be made. What nobody can write to, nobody changes.

    Raises:
        FileError: another process holds the lock, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                mend = "wait for it, or stop it"
                raise FileError(f"another process {use}", where=path, mend=mend) from None
            logger.warning("waiting for another process that %s", use)
            lock.acquire()
    except OSError as error:
        if needed or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise _write_error(path, error) from None
    try:
        yield
    finally:
        lock.release()


# ── behind a URL ──


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL, such as ``s3://bucket/merged``."""
    return "://" in str(place)


class RemoteFolder:
    """A folder at a URL that fsspec knows. Names in it are written with ``/``; the empty name is the folder itself.

    Args:
        url: such as ``s3://bucket/prefix``; nothing is opened before the first use.

    Every failure is a :class:`FileError` that names the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[Any, str] | None = None

    def where(self, name: str) -> str:
        """The name as messages show it."""
        return f"{self.url}/{name}" if name else self.url

    @contextmanager
    def reached(self, name: str = "") -> Iterator[tuple[Any, str]]:
        """The file system, and the path of a name there; ``FileNotFoundError`` is left to the caller.

        Raises:
            FileError: the file system cannot be had, or anything else that it raises in the block.
        """
        try:
            system, root = self._open()
            yield system, f"{root}/{name}" if name else root
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # each file system raises errors of its own
            raise FileError(
                f"cannot be reached: {type(error).__name__}: {error}",
                where=self.where(name),
                mend="check the URL, the network and your credentials",
            ) from error

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            try:
                system, root = fsspec.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                mend = "give a folder or an fsspec URL"
                if isinstance(error, ImportError):
                    extra = "'merganser[s3]'" if self.url.startswith("s3") else "the package that it names"
                    mend = f"pip install {extra}"
                raise FileError(f"cannot be reached: {error}", where=self.url, mend=mend) from None
            self._opened = system, root.rstrip("/")
        system, root = self._opened
        system.invalidate_cache()  # other machines write there too
        return system, root

    def sizes(self, name: str = "") -> dict[str, int]:
        """All files below a name with their sizes, by name below it; empty where there is nothing."""
        try:
            with self.reached(name) as (system, path):
                found = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        above = f"{path.strip('/')}/"
        return {n.strip("/").removeprefix(above): int(info["size"]) for n, info in sorted(found.items())}

    def size(self, name: str) -> int | None:
        """The size of a file, ``None`` where there is none."""
        try:
            with self.reached(name) as (system, path):
                return int(system.info(path)["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str, limit: int = -1) -> bytes | None:
        """The bytes of a file, at most ``limit``; ``None`` where there is none."""
        try:
            with self.reached(name) as (system, path), system.open(path, "rb") as stream:
                data: bytes = stream.read(limit)
                return data
        except FileNotFoundError:
            return None

    def get(self, name: str, target: Path) -> None:
        """Download a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.reached(name) as (system, path):
            system.get_file(path, str(target))

    def put(self, source: Path, name: str) -> None:
        """Upload a file; object stores show it whole or not at all."""
        with self.reached(name) as (system, path):
            try:
                system.put_file(str(source), path)
            except FileNotFoundError as error:
                protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
                if _OBJECT_STORES.intersection(protocols):
                    mend = "create the bucket, or mend its name"
                    raise FileError(str(error), where=self.url, mend=mend) from None
                system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                system.put_file(str(source), path)

    def remove(self, name: str = "") -> None:
        """Remove a file, or everything below a name, if it is there."""
        with self.reached(name) as (system, path):
            if system.exists(path):
                system.rm(path, recursive=True)
