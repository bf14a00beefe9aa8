"""The store itself: making each model once, keeping it whole, sharing it.

Everything is made in hidden folders of the zoo (``.partial``, ``.work``, ``.locks``) and renamed into place while a
lock is held that the operating system drops when its holder dies. A remote zoo works in a local cache of the same
form: an entry is uploaded with its ``entry.json`` last, and downloaded once. Locks do not reach between machines: two
that make the same model at once both work. The later one takes what the earlier one uploaded; where the two uploads
overlap, the same bytes are written twice, and if training did not repeat to the bit, the hashes show it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from merganser.errors import ErrorCollector, UserError, did_you_mean, raise_all
from merganser.files import is_url, locked, remove, remove_dead_scratch, scratch_folder, write_bytes
from merganser.lab.zoo.keys import ZooError, id_of, matches, plain
from merganser.lab.zoo.places import Folder, Remote, check_size, damaged
from merganser.lab.zoo.record import (
    ENTRY,
    MODEL,
    RECORD,
    Entry,
    FileRecord,
    check_name,
    read_entry,
    read_record,
    record_file,
    record_folder,
    write_entry,
    write_record,
)
from merganser.paths import expanded
from merganser.progress import bar


def default_zoo() -> str:
    """``$MERGANSER_ZOO``, or ``merganser/zoo`` in the user's cache folder."""
    return os.environ.get("MERGANSER_ZOO") or str(_caches() / "zoo")


def _caches() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "merganser"


class Zoo:
    """Trained models and what was made from them, found by key.

    Args:
        url: a folder, or any fsspec URL (``s3://bucket/prefix``, ``memory://``, ``file://``); it need not exist.
        cache: where a remote zoo keeps its local copies, in a folder of its own for each URL; by default in the
            user's cache folder. A local zoo needs none.
    """

    def __init__(self, url: str | Path, *, cache: Path | None = None) -> None:
        text = str(url)
        for prefix in ("file://", "local://"):
            text = text.removeprefix(prefix)
        remote = is_url(text)
        self.url = text.rstrip("/") if remote else str(expanded(text).absolute())
        self._remote = Remote(self.url) if remote else None
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.root = (cache or _caches() / "zoo-remote").absolute() / name if remote else Path(self.url)
        self._folder = Folder(self.root)
        self._source = self._remote or self._folder  # what is listed and verified

    def __repr__(self) -> str:
        return f"Zoo({self.url!r})"

    def _scratch(self, identity: str) -> Path:
        """The scratch folder for the training of an entry; it may not be there."""
        return self.root / ".work" / identity

    def _lock(self, name: str, *, wait: bool = True) -> AbstractContextManager[None]:
        """Hold the lock of an entry or of a file beside it."""
        return locked(self.root / ".locks" / f"{name}.lock", f"makes {name} in {self.root}", wait=wait)

    @property
    def _partial(self) -> Path:
        """The folder that everything is made in, in folders of their own."""
        folder = self.root / ".partial"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def get(self, key: Mapping[str, Any]) -> Entry | None:
        """The model of a key, downloaded if need be; ``None`` where there is none.

        Raises:
            ZooError: it is damaged or of another format.
            FileError: the zoo cannot be reached.
        """
        return self._get(id_of(key))

    def _get(self, identity: str) -> Entry | None:
        entry = self._here(identity)
        if entry is None and self._remote is not None and self._remote.read(f"{identity}/{ENTRY}") is not None:
            with self._lock(identity):
                entry = self._here(identity) or self._download(identity)
        elif entry is not None and self._remote is not None and self._unshared(identity).exists():
            self._share(entry, self._remote)  # whoever made it was stopped before everybody had it
        return entry

    def _unshared(self, identity: str) -> Path:
        """A file that is there from before an entry is in the local folder until it is uploaded."""
        return self.root / ".unshared" / identity

    def _here(self, identity: str) -> Entry | None:
        """The entry in the local folder, its files compared by size."""
        entry = self._parse(self._folder, identity, self._folder.read(f"{identity}/{ENTRY}"))
        for name, record in entry.files.items() if entry else ():
            path = self._folder.path(f"{identity}/{MODEL}/{name}")
            mend = f"remove {self.root / identity}, then it is downloaded again" if self._remote else None
            size = None if path is None else path.stat().st_size
            check_size(size, record, self._folder.where(f"{identity}/{MODEL}/{name}"), mend)
        return entry

    def _parse(self, place: Folder | Remote, identity: str, data: bytes | None) -> Entry | None:
        if data is None:
            return None
        return read_entry(data, identity, self.root / identity, place.where(f"{identity}/{ENTRY}"))

    def build(self, key: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """The model of a key, made now if nobody has made it.

        Of several processes of a machine that want the same model exactly one makes it; the others wait. If the maker
        fails or is killed, nothing looks finished and the next one makes it.

        Args:
            key: what the model is made from, a JSON object.
            make: writes the model into the empty folder that it is given, and returns facts about it (a JSON object).

        Raises:
            ZooError: the key or the facts are no JSON objects, no file was written, or the entry is damaged.
        """
        identity = id_of(key)
        remove_dead_scratch(self.root / ".partial")
        entry = self._get(identity)
        if entry is None:
            with self._lock(identity):
                entry = self._here(identity) or self._download(identity)
                if entry is None:
                    if self._remote is not None:
                        self._remote.prepare()
                    made = self._make(identity, key, make)
                    entry = self._download(identity) or made  # what another machine uploaded meanwhile wins
                remove(self._scratch(identity))
        if self._remote is not None:
            self._share(entry, self._remote)
        return entry

    def _make(self, identity: str, key: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Entry:
        with scratch_folder(self._partial) as folder:
            (folder / MODEL).mkdir()
            facts = plain(make(folder / MODEL), "what the maker returned")
            files = record_folder(folder / MODEL)
            created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            entry = Entry(identity, plain(key), facts, created, self.root / identity / MODEL, files)
            if self._remote is not None:
                write_bytes(self._unshared(identity), b"")
            self._publish(entry, folder)
        return entry

    def _publish(self, entry: Entry, folder: Path) -> None:
        """Give a finished folder its ``entry.json`` and its place."""
        write_bytes(folder / ENTRY, write_entry(entry))
        remove(self.root / entry.id)  # no entry.json in there, or the caller would not be here
        folder.rename(self.root / entry.id)

    def _download(self, identity: str) -> Entry | None:
        if self._remote is None:
            return None
        entry = self._parse(self._remote, identity, self._remote.read(f"{identity}/{ENTRY}"))
        if entry is None:
            return None
        total = sum(record.size for record in entry.files.values())
        with scratch_folder(self._partial) as folder, bar(total, f"fetching {identity}", "B", scale=True) as progress:
            for name, record in entry.files.items():
                self._remote.fetch(f"{identity}/{MODEL}/{name}", folder / MODEL / name, record)
                progress.update(record.size)
            self._publish(entry, folder)
        return entry

    def _share(self, entry: Entry, remote: Remote) -> None:
        """Upload an entry that the remote zoo lacks, ``entry.json`` last."""
        if remote.read(f"{entry.id}/{ENTRY}") is not None:
            remove(self._unshared(entry.id))
            return
        total = sum(record.size for record in entry.files.values())
        with self._lock(entry.id), bar(total, f"uploading {entry.id}", "B", scale=True) as progress:
            for name, record in entry.files.items():
                remote.put(entry.path / name, f"{entry.id}/{MODEL}/{name}")
                progress.update(record.size)
            remote.put(self.root / entry.id / ENTRY, f"{entry.id}/{ENTRY}")
            remove(self._unshared(entry.id))

    def attach(self, entry: Entry, name: str, make: Callable[[Path], None]) -> Path:
        """A file beside the model, made once, whole or not at all.

        Args:
            entry: a model of this zoo.
            name: such as ``statistics/ab12cd.safetensors``; say in it what the file was made with.
            make: writes the file at the path that it is given (whose name ends as ``name`` does).

        Returns:
            The local file.

        Raises:
            ZooError: the name is taken by the entry itself or leads elsewhere, the file is damaged, ``make`` wrote
                none, or the entry is not there any more.
        """
        check_name(name, entry.id)
        if name == ENTRY or name.split("/")[0] == MODEL or name.endswith(RECORD):
            raise ZooError(f"the name {name!r} is the entry's own", where=entry.id, mend="give another name")
        path = self.root / entry.id / name
        remove_dead_scratch(self.root / ".partial")
        if self._attached(entry.id, name) is not None:
            return path
        task = f"{entry.id}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        with self._lock(task):
            if self._attached(entry.id, name) is not None:
                return path
            if self._get(entry.id) is None:
                raise ZooError(f"no model {entry.id}", where=self.url, mend="build it first")
            with scratch_folder(self._partial) as folder:
                file = folder / path.name
                record = self._fetch_attached(entry.id, name, file)
                if record is None:
                    make(file)
                    if not file.is_file() or file.is_symlink():
                        raise ZooError(f"{name} was not written", where=entry.id, mend="write the file that is given")
                    record = record_file(file)
                    if self._remote is not None:
                        self._remote.put(file, f"{entry.id}/{name}")
                if not (self.root / entry.id / ENTRY).is_file():
                    what = f"the model {entry.id} was removed meanwhile"
                    raise ZooError(what, where=self.url, mend="build it again")
                write_bytes(_beside(file), write_record(record))
                if self._remote is not None and self._remote.read(f"{entry.id}/{name}{RECORD}") is None:
                    self._remote.put(_beside(file), f"{entry.id}/{name}{RECORD}")
                path.parent.mkdir(parents=True, exist_ok=True)  # what is here, others can have
                file.replace(path)
                _beside(file).replace(_beside(path))  # its record comes last
        return path

    def has(self, entry: Entry, name: str) -> bool:
        """Whether a file beside the model is here, or where the zoo is; nothing is made or fetched."""
        record = f"{entry.id}/{name}{RECORD}"
        return self._folder.read(record) is not None or self._source.read(record) is not None

    def _attached(self, identity: str, name: str) -> FileRecord | None:
        """The record of a file beside the model that is here, compared by size."""
        path = self.root / identity / name
        data = self._folder.read(f"{identity}/{name}{RECORD}")
        if data is None:
            return None
        record = read_record(data, str(_beside(path)))
        mend = f"remove {_beside(path)}, then it is made or fetched again"
        found = self._folder.path(f"{identity}/{name}")
        check_size(None if found is None else found.stat().st_size, record, str(path), mend)
        return record

    def _fetch_attached(self, identity: str, name: str, file: Path) -> FileRecord | None:
        data = self._remote.read(f"{identity}/{name}{RECORD}") if self._remote is not None else None
        if self._remote is None or data is None:
            return None
        record = read_record(data, self._remote.where(f"{identity}/{name}{RECORD}"))
        self._remote.fetch(f"{identity}/{name}", file, record)
        return record

    def work(self, key: Mapping[str, Any]) -> Path:
        """A scratch folder for the training of a key: kept when it is interrupted, removed when it succeeds.

        Only the maker of the key may write to it, while :meth:`build` runs it.
        """
        folder = self._scratch(id_of(key))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def scan(self) -> tuple[list[Entry], list[UserError]]:
        """All entries, in order of their creation, and what is wrong with those that cannot be read.

        Entries of a remote zoo are listed without downloading them: ``get(entry.key)`` brings the files.
        """
        place, errors, ids = self._source, ErrorCollector(), self._source.ids()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(place.read, [f"{identity}/{ENTRY}" for identity in ids]))
        parsed = [errors.catch(self._parse, place, *one) for one in zip(ids, found, strict=True)]
        entries = [entry for entry in parsed if entry is not None]
        return sorted(entries, key=lambda entry: (entry.created, entry.id)), errors.found

    def ls(self) -> list[Entry]:
        """All entries (see :meth:`scan`).

        Raises:
            ZooError: some cannot be read; each is named.
        """
        entries, problems = self.scan()
        raise_all(problems)
        return entries

    def find(self, **filters: Any) -> list[Entry]:
        """The entries whose key meets every filter (:func:`merganser.lab.zoo.keys.equal`).

        Nested keys are named with dots: ``find(suite="emotion", **{"training.epochs": 3, "set": "a*"})``. What a remote
        zoo finds is downloaded, so that it can be used.
        """
        found = [entry for entry in self.ls() if matches(entry.key, filters)]
        return [entry for listed in found if (entry := self._get(listed.id)) is not None]

    def entry(self, prefix: str) -> Entry:
        """The entry whose id begins with ``prefix``, without downloading its files.

        Raises:
            ZooError: there is none, several, or it cannot be read.
        """
        identity = self.resolve(prefix)
        entry = self._parse(self._source, identity, self._source.read(f"{identity}/{ENTRY}"))
        if entry is None:
            what = f"{identity} has no {ENTRY}: it is being uploaded, or that was interrupted"
            raise ZooError(what, where=self.url, mend="wait, build it again, or remove it with 'merganser zoo rm'")
        return entry

    def resolve(self, prefix: str) -> str:
        """The id that begins with ``prefix``, of an entry that may be damaged.

        Raises:
            ZooError: there is none, or several.
        """
        ids = self._source.ids()
        found = [identity for identity in ids if prefix and identity.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            what = f"{prefix!r} begins several ids: {', '.join(found)}"
            raise ZooError(what, where=self.url, mend="give more digits")
        raise ZooError(f"no id begins with {prefix!r}", where=self.url, mend=did_you_mean(prefix, ids))

    def remove(self, prefix: str) -> str:
        """Remove the entry whose id begins with ``prefix``, with everything beside it; copies in other caches stay.

        Returns:
            The id.

        Raises:
            ZooError: there is none, several, or somebody is making it.
        """
        identity = self.resolve(prefix)
        with self._lock(identity, wait=False), scratch_folder(self._partial) as folder:
            if self._remote is not None:
                self._remote.delete(identity)
            if (self.root / identity).exists():
                (self.root / identity).rename(folder / identity)
            remove(self._scratch(identity))
        return identity

    def files(self, entry: Entry) -> dict[str, int]:
        """Every file of an entry with its size in bytes, by name below its folder, without the records."""
        listing = self._source.sizes(entry.id)
        return {name: size for name, size in listing.items() if name != ENTRY and not name.endswith(RECORD)}

    def verify(self, entry: Entry) -> int:
        """Read every file of an entry and compare it with its record; a remote zoo's are read where they lie.

        Returns:
            How many files there are.

        Raises:
            ZooError: some are damaged; each is named.
        """
        place = self._source
        listing = place.sizes(entry.id)
        records = {f"{MODEL}/{name}": record for name, record in entry.files.items()}
        for name in listing:
            if name.endswith(RECORD):
                path = f"{entry.id}/{name}"
                records[name.removesuffix(RECORD)] = read_record(place.read(path) or b"", place.where(path))
        problems: list[UserError] = []
        for name in listing:
            if name.startswith(f"{MODEL}/") and name not in records:
                mend = "remove the file, or the entry with 'merganser zoo rm'"
                problems.append(
                    ZooError("a file that the entry does not list", where=place.where(f"{entry.id}/{name}"), mend=mend)
                )
        for name, record in records.items():
            found = place.digest(f"{entry.id}/{name}")
            if found != record:
                seen = f"{found.size} bytes and SHA-256 {found.sha256}" if found else "absent"
                problems.append(damaged(place.where(f"{entry.id}/{name}"), seen, record))
        raise_all(problems)
        return len(records)


def _beside(path: Path) -> Path:
    """The record of a file."""
    return path.with_name(path.name + RECORD)
