"""Where entries lie: a local folder, or anything that fsspec can reach. Names are ``<id>/…``, written with ``/``."""

from __future__ import annotations

from pathlib import Path

from merganser.files import RemoteFolder, scratch_folder
from merganser.lab.zoo.keys import ZooError
from merganser.lab.zoo.record import ENTRY, MAX_BYTES, FileRecord, is_id, record_file, record_stream
from merganser.paths import check_file, inside, is_inside


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
        """The bytes of a small file, ``None`` where there is none.

        Raises:
            ZooError: it is no plain file, or a link that leads out of the zoo.
        """
        path = self.path(name)
        if path is None:
            return None
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)

    def path(self, name: str) -> Path | None:
        """A file that is there and is the zoo's own; ``None`` where there is none.

        Raises:
            ZooError: it is no plain file, or a link that leads out of the zoo.
        """
        path = self.root / name
        inside(self.root, name, ZooError, where=self.root, what="the file", mend="remove the entry")
        if not path.exists():
            return None
        check_file(path, ZooError, mend="remove the entry with 'merganser zoo rm'")
        return path

    def sizes(self, identity: str) -> dict[str, int]:
        """The files of an entry with their sizes, by name below ``<id>/``."""
        folder = self.root / identity
        files = sorted(path for path in folder.rglob("*") if path.is_file() and is_inside(self.root, path))
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

    def digest(self, name: str) -> FileRecord | None:
        """Hash and size of a file, ``None`` where there is none.

        Raises:
            ZooError: see :meth:`path`.
        """
        path = self.path(name)
        return None if path is None else record_file(path)


class Remote(RemoteFolder):
    """Entries at an fsspec URL."""

    def ids(self) -> list[str]:
        """The ids that there are folders of, finished or not, in order."""
        try:
            with self.reached() as (system, root):
                found = [path.rstrip("/").rsplit("/", 1)[-1] for path in system.ls(root, detail=False)]
        except FileNotFoundError:
            return []
        return [name for name in sorted(set(found)) if is_id(name)]

    def read(self, name: str, limit: int = MAX_BYTES + 1) -> bytes | None:
        """The bytes of a small file, ``None`` where there is none."""
        return super().read(name, limit)

    def digest(self, name: str) -> FileRecord | None:
        """Hash and size of a file, read as a stream; ``None`` where there is none."""
        try:
            with self.reached(name) as (system, path), system.open(path, "rb") as stream:
                return record_stream(stream)
        except FileNotFoundError:
            return None

    def fetch(self, name: str, target: Path, record: FileRecord) -> None:
        """Download a file and compare it with its record.

        Raises:
            ZooError: it is absent, of another size or of another hash; ``target`` is removed then.
        """
        check_size(self.size(name), record, self.where(name))  # asked first: a stranger's file may be endless
        try:
            self.get(name, target)
        except FileNotFoundError:
            raise damaged(self.where(name), "absent", record) from None
        found = record_file(target)
        if found != record:
            target.unlink()
            raise damaged(self.where(name), f"SHA-256 {found.sha256}", record)

    def prepare(self) -> None:
        """Make sure that something can be written here, before there is something to write.

        Raises:
            FileError: it cannot.
        """
        with scratch_folder() as folder:
            (folder / "probe").write_bytes(b"merganser zoo\n")
            self.put(folder / "probe", ".zoo")

    def delete(self, identity: str) -> None:
        """Remove an entry: ``entry.json`` first, so that nothing half-removed looks finished."""
        self.remove(f"{identity}/{ENTRY}")
        self.remove(identity)


def check_size(size: int | None, record: FileRecord, where: str, mend: str | None = None) -> None:
    """Refuse a file that is absent (None) or of another size than its record says."""
    if size != record.size:
        raise damaged(where, "absent" if size is None else f"{size} bytes", record, mend)


def damaged(where: str, found: str, record: FileRecord, mend: str | None = None) -> ZooError:
    """The error for a file that is not as its record says."""
    what = f"damaged: {found}, but it was written with {record.size} bytes and SHA-256 {record.sha256}"
    return ZooError(what, where=where, mend=mend or "remove the entry with 'merganser zoo rm' and build it again")
