"""Where a merge's files go: a local or shared folder, or anything that fsspec can write to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merganser.errors import CheckpointError

_WORKER = ".worker-"


def is_url(output: str | Path) -> bool:
    """Whether an output is a URL, such as ``s3://bucket/merged``."""
    return "://" in str(output)


class Place:
    """A local or shared folder that is there already.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def reference(self) -> str:
        """What a worker finds it by."""
        return str(self.folder.resolve())

    def near(self, scratch: Path) -> Path:
        """A new folder to write a file in before it is put."""
        return Path(tempfile.mkdtemp(prefix=_WORKER, dir=self.folder))

    def put(self, path: Path, name: str) -> None:
        """Put a file that is written whole into its place."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    def tidy(self) -> None:
        """Remove what workers that were lost have left."""
        for left in self.folder.glob(f"{_WORKER}*"):
            shutil.rmtree(left, ignore_errors=True)


class RemotePlace(Place):
    """A folder behind a URL.

    Args:
        url: such as ``s3://bucket/merged``; needs the package that fsspec asks for.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = _filesystem(self.url)

    @property
    def reference(self) -> str:
        """Its URL."""
        return self.url

    def near(self, scratch: Path) -> Path:
        """A local folder."""
        return Path(tempfile.mkdtemp(dir=scratch))

    def put(self, path: Path, name: str) -> None:
        """Upload a file."""
        try:
            target = f"{self._root}/{name}"
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._files.put_file(str(path), target)
        except Exception as error:  # each file system has its own
            raise CheckpointError(
                f"cannot be written: {error}",
                where=f"{self.url}/{name}",
                mend="check the URL and its permissions",
            ) from None

    def tidy(self) -> None:
        """Nothing is left at the URL."""

    def exists(self) -> bool:
        """Whether there is anything at the URL."""
        try:
            return bool(self._files.exists(self._root) and self._files.find(self._root))
        except Exception as error:
            raise CheckpointError(
                f"cannot be reached: {error}", where=self.url, mend="check the URL and its permissions"
            ) from None

    def remove(self) -> None:
        """Remove everything at the URL."""
        if self._files.exists(self._root):
            self._files.rm(self._root, recursive=True)


@contextmanager
def new_remote(url: str, *, overwrite: bool = False) -> Iterator[tuple[RemotePlace, Path]]:
    """A URL to fill, and a local folder for the small files, which are uploaded at the end, ``config.json`` last.

    So what is not complete cannot be opened; on any error everything is removed again.

    Raises:
        CheckpointError: there is something at the URL, or it cannot be written.
    """
    place = RemotePlace(url)
    if place.exists():
        if not overwrite:
            raise CheckpointError(
                "the output exists", where=url, mend="give another URL, or --overwrite to replace it"
            )
        place.remove()
    with tempfile.TemporaryDirectory(prefix="merganser-") as scratch:
        folder = Path(scratch)
        try:
            yield place, folder
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == "config.json"):
                place.put(path, path.relative_to(folder).as_posix())
        except BaseException:
            place.remove()
            raise


def place_of(reference: str) -> Place:
    """The place that a worker is to write to."""
    return RemotePlace(reference) if is_url(reference) else Place(Path(reference))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"cannot be reached: {error}", where=url, mend="install what it asks for, or give a folder"
        ) from None
    return files, str(root)
