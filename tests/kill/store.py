"""``kept://``: an object store in a local folder, which outlives the process that writes to it when this is killed.

As in S3 there are objects and no folders, an object is there whole or not at all, and nothing is renamed: a prefix can
only be copied object by object. The folder is that of ``KEPT_STORE`` in the environment. Each object is one file there,
its key percent-encoded; what a writer has not finished lies in ``.unfinished`` beside them, where no reader looks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

PROTOCOL, VARIABLE = "kept", "KEPT_STORE"


class KeptStore(AbstractFileSystem):
    """The file system that fsspec finds under ``kept://``."""

    protocol = PROTOCOL
    cachable = False

    @property
    def folder(self) -> Path:
        return Path(os.environ[VARIABLE])

    def objects(self) -> dict[str, Path]:
        """The file of each object."""
        return {unquote(path.name): path for path in self.folder.iterdir() if path.name != ".unfinished"}

    def _file(self, key: str) -> Path:
        return self.folder / quote(self._strip_protocol(key), safe="")

    def _write(self, key: str, write: Callable[[Path], Any]) -> None:
        hidden = self.folder / ".unfinished"
        hidden.mkdir(parents=True, exist_ok=True)
        work = hidden / secrets.token_hex(4)
        write(work)
        work.replace(self._file(key))

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self._write(rpath, lambda work: work.write_bytes(Path(lpath).read_bytes()))

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self._write(path, lambda work: work.write_bytes(value))

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        data = self._read(path1)
        self._write(path2, lambda work: work.write_bytes(data))

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(self._read(rpath))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self._read(path)[start:end]

    def rm_file(self, path: str) -> None:
        self._file(path).unlink()

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        key = self._strip_protocol(path)
        for other in self.objects():
            if other == key or (recursive and other.startswith(f"{key}/")):
                self.rm_file(other)

    def _read(self, key: str) -> bytes:
        return self._file(key).read_bytes()

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key = self._strip_protocol(path)
        if self._file(key).is_file():
            return {"name": key, "size": self._file(key).stat().st_size, "type": "file"}
        if any(other.startswith(f"{key}/") for other in self.objects()):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        above = f"{self._strip_protocol(path)}/".lstrip("/")
        names = {above + key.removeprefix(above).split("/")[0] for key in self.objects() if key.startswith(above)}
        if not names:
            return [self.info(path)] if detail else [self.info(path)["name"]]
        return [self.info(name) if detail else name for name in sorted(names)]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            return _Upload(self, path, mode)
        return self._file(path).open("rb")


class _Upload(AbstractBufferedFile):
    """An object being written in one piece."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.pipe_file(self.path, b"".join(self.parts))
        return True


def register() -> None:
    """Make ``kept://`` known to fsspec in this process and its forks."""
    fsspec.register_implementation(PROTOCOL, KeptStore, clobber=True)
