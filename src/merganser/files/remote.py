"""Folders behind a URL that fsspec knows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from merganser.errors import FileError, UserError
from merganser.paths import check_type

#: Stores without folders. What is missing there is the bucket, and that is not ours to create.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}
_TRIES = 5  # at removing what others remove as well
_PIECE = 8 * 2**20  # bytes that are copied at once by stores that cannot copy


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL, such as ``s3://bucket/merged``.

    Raises:
        UserError: an object that is no path.
    """
    check_type(place, mend="give a folder or a URL as text")
    return "://" in str(place)


def local_path(place: str | Path) -> Path | None:
    """The path of a place on this machine, a ``file://`` or ``local://`` URL among them; None: it is elsewhere."""
    if not is_url(place):
        return Path(place)
    protocol, _, path = str(place).partition("://")
    return Path(path) if protocol in ("file", "local") else None


def _is_object_store(system: Any) -> bool:
    protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    return bool(_OBJECT_STORES.intersection(protocols))


class RemoteFolder:
    """A folder at a URL that fsspec knows. Names in it are written with ``/``; the empty name is the folder itself.

    Args:
        url: such as ``s3://bucket/prefix``; nothing is opened before the first use.

    Every failure is a :class:`FileError` that names the URL.
    """

    def __init__(self, url: str) -> None:
        protocol, mark, path = url.partition("://")
        self.url = f"{protocol}{mark}{path.rstrip('/')}"
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
        self._store(name, lambda system, path: system.put_file(str(source), path))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; object stores show it whole or not at all."""
        self._store(name, lambda system, path: system.pipe_file(path, data))

    def copy(self, source: RemoteFolder, name: str, to: str) -> None:
        """Copy a file from another folder of the same store, within the store where it can do that.

        Raises:
            FileNotFoundError: it is not there.
        """
        with source.reached(name) as (_, origin), self.reached(to) as (system, path):
            if not _is_object_store(system):
                system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            try:
                system.cp_file(origin, path)
            except NotImplementedError:
                with system.open(origin, "rb") as stream, system.open(path, "wb") as target:
                    shutil.copyfileobj(stream, target, _PIECE)

    def _store(self, name: str, write: Callable[[Any, str], object]) -> None:
        with self.reached(name) as (system, path):
            try:
                write(system, path)
            except FileNotFoundError as error:
                if _is_object_store(system):
                    mend = "create the bucket, or mend its name"
                    raise FileError(str(error), where=self.url, mend=mend) from None
                system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                write(system, path)

    def remove(self, name: str = "") -> None:
        """Remove a file, or everything below a name, if it is there."""
        with self.reached(name) as (system, path):
            for _ in range(_TRIES):
                if not system.exists(path):
                    return
                with suppress(FileNotFoundError):  # another command removes the same
                    system.rm(path, recursive=True)
                    return
