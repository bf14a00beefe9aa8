"""``entry.json``: what it says of a model, and reading it when a stranger wrote it.

    {"format": 1, "id": "16 hex", "key": {…}, "facts": {…}, "created": "2026-11-23T15:00:00Z",
     "files": {"config.json": {"sha256": "64 hex", "size": 612}, …}}

Names of files are relative to the entry's ``model`` folder. A file beside the model has a small record of its own,
``<name>.record.json``: ``{"format": 1, "sha256": …, "size": …}``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from merganser.documents import parse_json
from merganser.files import sync
from merganser.lab.zoo.keys import ID_LENGTH, ZooError, id_of

FORMAT = 1
ENTRY = "entry.json"
_MEND = "remove the entry with 'merganser zoo rm', or mend the file"
MODEL = "model"
RECORD = ".record.json"
#: No entry.json is larger; one that claims to be is not read.
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when it was finished: hash in hexadecimal, size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        id: 16 hexadecimal digits, made of the key.
        key: what the model was made from.
        facts: what its maker reported, such as scores on development data.
        created: when, in UTC, as ``2026-11-23T15:00:00Z``.
        path: local folder of the model; of a remote zoo it is there only once the entry was got.
        files: the model's files by name relative to ``path``.
    """

    id: str
    key: Mapping[str, Any]
    facts: Mapping[str, Any]
    created: str
    path: Path
    files: Mapping[str, FileRecord]

    @property
    def score(self) -> float | None:
        """The key score on development data, in 0–1, where the facts name one as ``score``."""
        value = self.facts.get("score")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def write_entry(entry: Entry) -> bytes:
    """The bytes of ``entry.json``."""
    fields = {"format": FORMAT, **vars(entry), "files": {n: vars(r) for n, r in sorted(entry.files.items())}}
    del fields["path"]
    return (json.dumps(fields, indent=1, allow_nan=False) + "\n").encode()


def read_entry(data: bytes, identity: str, folder: Path, where: str) -> Entry:
    """The entry that ``data`` describes.

    Args:
        data: the bytes of an ``entry.json``; anybody may have written them.
        identity: the id that it was found under.
        folder: the local folder of the entry.
        where: the file, for messages.

    Raises:
        ZooError: another format, another id, names that lead out of the folder, or no entry at all.
    """
    fields = _read(data, where)
    try:
        key, facts, created, files = (fields[name] for name in ("key", "facts", "created", "files"))
        if not (isinstance(key, dict) and isinstance(facts, dict) and isinstance(created, str)):
            raise TypeError("key and facts are objects, created is text")
        records = {check_name(name, where): _file_record(record) for name, record in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where, str(error)) from None
    if not records:
        raise _damaged(where, "it lists no files")
    if identity != fields.get("id") or identity != id_of(key):
        raise _damaged(where, f"its key has the id {id_of(key)}, not {identity}")
    return Entry(identity, key, facts, created, folder / MODEL, records)


def write_record(record: FileRecord) -> bytes:
    """The bytes of the record of a file beside the model."""
    return (json.dumps({"format": FORMAT, **vars(record)}) + "\n").encode()


def read_record(data: bytes, where: str) -> FileRecord:
    """The record of a file beside the model.

    Raises:
        ZooError: another format, or no record at all.
    """
    try:
        return _file_record(_read(data, where))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(where, str(error)) from None


def _read(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise _damaged(where, f"it has {len(data)} bytes")
    fields = parse_json(data, where, ZooError, mend=_MEND)
    if not isinstance(fields, dict) or "format" not in fields:
        raise _damaged(where, "it names no format")
    if fields["format"] != FORMAT:
        mend = "use the version of merganser that wrote it, or another zoo"
        what = f"format {fields['format']!r}, but this version reads format {FORMAT}"
        raise ZooError(what, where=where, mend=mend)
    return fields


def _file_record(fields: Any) -> FileRecord:
    sha256, size = fields["sha256"], fields["size"]
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is no SHA-256")
    if type(size) is not int or size < 0:
        raise ValueError(f"{size!r} is no size")
    return FileRecord(sha256, size)


def _damaged(where: str, why: str) -> ZooError:
    return ZooError(f"not an entry of a zoo: {why}", where=where, mend=_MEND)


def check_name(name: str, where: str | Path) -> str:
    """``name`` itself, if it stays within its folder.

    Raises:
        ZooError: it is absolute, climbs with ``..``, or is not written plainly with ``/``.
    """
    path = PurePosixPath(name)
    plain = isinstance(name, str) and name == str(path) and not re.search(r"[\\:\x00-\x1f]", name)
    if not plain or path.is_absolute() or name == "." or ".." in path.parts:
        mend = "use relative names without '..', ':' and backslashes; do not use this entry if others wrote it"
        raise ZooError(f"{name!r} is no name of a file within its folder", where=where, mend=mend)
    return name


def is_id(name: str) -> bool:
    """Whether a folder's name is an id."""
    return re.fullmatch(rf"[0-9a-f]{{{ID_LENGTH}}}", name) is not None


def record_file(path: Path) -> FileRecord:
    """Hash and size of a file, after making sure that it is on disk."""
    sync(path)
    with path.open("rb") as stream:
        return record_stream(stream)


def record_stream(stream: Any) -> FileRecord:
    """Hash and size of an open file."""
    return FileRecord(hashlib.file_digest(stream, "sha256").hexdigest(), stream.seek(0, 2))


def record_folder(folder: Path) -> dict[str, FileRecord]:
    """The files under ``folder`` by relative name.

    Raises:
        ZooError: there is a link among them, an awkward name, or no file at all.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ZooError(f"{name} is no plain file", where=folder, mend="write the file itself, not a link")
        if path.is_file():
            found[check_name(name, folder)] = record_file(path)
    if not found:
        raise ZooError("no model was written", where=folder, mend="write the model into the folder that is given")
    return found
