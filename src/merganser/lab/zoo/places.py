"""Where entries lie: a local folder, or anything that fsspec can reach. Names are ``<id>/…``, written with ``/``."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merganser.errors import UserError
from merganser.lab.zoo.keys import ZooError
from merganser.lab.zoo.record import ENTRY, MAX_BYTES, FileRecord, is_id

#: Protocols without folders: what is absent there is the bucket, and that is not ours to create.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}


class Folder:
    """Entries in a local folder.

    Args:
        root: the folder; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def where(self, name: str) -> str:
        """The name as messages show it."""
        return str(self.root / name)

    def ids(self) -> list[str]:
        """The ids that have an ``entry.json``, in order."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if is_id(p.name) and (p / ENTRY).is_file())

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file, ``None`` where there is none."""
        try:
            with (self.root / name).open("rb") as stream:
                return stream.read(MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_many(self, names: list[str]) -> dict[str, bytes | None]:
        """The bytes of several small files."""
        return {name: self.read(name) for name in names}

    def listing(self, identity: str) -> dict[str, int]:
        """The files of an entry with their sizes, by name below ``<id>/``."""
        folder = self.root / identity
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

    def digest(self, name: str) -> FileRecord | None:
        """Hash and size of a file, ``None`` where there is none."""
        try:
            with (self.root / name).open("rb") as stream:
                return FileRecord(hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell())
        except (FileNotFoundError, NotADirectoryError):
            return None


class Remote:
    """Entries at an fsspec URL; every failure is a :class:`ZooError` naming the URL.

    Args:
        url: such as ``s3://bucket/prefix``; nothing is opened before the first use.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[Any, str] | None = None

    def where(self, name: str) -> str:
        """The name as messages show it."""
        return f"{self.url}/{name}"

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            try:
                system, root = fsspec.url_to_fs(self.url)
            except ImportError as error:
                extra = "merganser[s3]" if self.url.startswith("s3") else "the package that it names"
                raise ZooError(str(error), where=self.url, mend=f"pip install {extra}") from None
            except ValueError as error:
                raise ZooError(str(error), where=self.url, mend="give a folder or an fsspec URL") from None
            self._opened = system, root.rstrip("/")
        system, root = self._opened
        system.invalidate_cache()  # other machines write here too
        return system, root

    @contextmanager
    def _reached(self, name: str = "") -> Iterator[tuple[Any, str]]:
        try:
            system, root = self._open()
            yield system, f"{root}/{name}" if name else root
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # each store raises errors of its own
            raise ZooError(
                f"cannot be reached: {type(error).__name__}: {error}",
                where=self.where(name),
                mend="check the URL, the network and your credentials",
            ) from error

    def ids(self) -> list[str]:
        """The ids that there are folders of, finished or not, in order."""
        try:
            with self._reached() as (system, root):
                found = [path.rstrip("/").rsplit("/", 1)[-1] for path in system.ls(root, detail=False)]
        except FileNotFoundError:
            return []
        return [name for name in sorted(set(found)) if is_id(name)]

    def _size(self, name: str) -> int | None:
        try:
            with self._reached(name) as (system, path):
                return int(system.info(path)["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file, ``None`` where there is none."""
        try:
            with self._reached(name) as (system, path), system.open(path, "rb") as stream:
                data: bytes = stream.read(MAX_BYTES + 1)
                return data
        except FileNotFoundError:
            return None

    def read_many(self, names: list[str]) -> dict[str, bytes | None]:
        """The bytes of several small files."""
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(self.read, names), strict=True))

    def listing(self, identity: str) -> dict[str, int]:
        """The files of an entry with their sizes, by name below ``<id>/``."""
        try:
            with self._reached(identity) as (system, path):
                found: Mapping[str, Any] = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        above = f"{path.strip('/')}/"
        return {n.strip("/").removeprefix(above): int(info["size"]) for n, info in sorted(found.items())}

    def digest(self, name: str) -> FileRecord | None:
        """Hash and size of a file, read as a stream; ``None`` where there is none."""
        digest, size = hashlib.sha256(), 0
        try:
            with self._reached(name) as (system, path), system.open(path, "rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
                    size += len(block)
        except FileNotFoundError:
            return None
        return FileRecord(digest.hexdigest(), size)

    def fetch(self, name: str, target: Path, record: FileRecord) -> None:
        """Download a file and compare it with its record.

        Raises:
            ZooError: it is absent, of another size or of another hash; ``target`` is removed then.
        """
        size = self._size(name)
        if size != record.size:  # asked first: a stranger's file may be endless
            raise damaged(self.where(name), f"{size} bytes" if size is not None else "absent", record)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._reached(name) as (system, path):
                system.get_file(path, str(target))
        except FileNotFoundError:
            raise damaged(self.where(name), "absent", record) from None
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != record.sha256:
            target.unlink()
            raise damaged(self.where(name), f"SHA-256 {sha256}", record)

    def prepare(self) -> None:
        """Make sure that something can be written here, before there is something to write.

        Raises:
            ZooError: it cannot.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "probe").write_bytes(b"merganser zoo\n")
            self.send(Path(folder) / "probe", ".zoo")

    def send(self, source: Path, name: str) -> None:
        """Upload a file; stores show it whole or not at all."""
        with self._reached(name) as (system, path):
            try:
                system.put_file(str(source), path)
            except FileNotFoundError as error:
                if _OBJECT_STORES.intersection(_protocols(system)):
                    raise ZooError(
                        str(error), where=self.url, mend="create the bucket, or mend its name"
                    ) from None
                system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                system.put_file(str(source), path)

    def delete(self, identity: str) -> None:
        """Remove an entry: ``entry.json`` first, so that nothing half-removed looks finished."""
        with self._reached(identity) as (system, path):
            for step in (f"{path}/{ENTRY}", path):
                if system.exists(step):
                    system.rm(step, recursive=step == path)
                    system.invalidate_cache()


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def damaged(where: str, found: str, record: FileRecord, mend: str | None = None) -> ZooError:
    """The error for a file that is not as its record says."""
    return ZooError(
        f"damaged: {found}, but it was written with {record.size} bytes and SHA-256 {record.sha256}",
        where=where,
        mend=mend or "remove the entry with 'merganser zoo rm' and build it again",
    )


def discard(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
