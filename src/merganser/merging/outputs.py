"""Where a merge's files go: a local or shared folder, or anything that fsspec can write to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merganser.errors import CheckpointError
from merganser.files import RemoteFolder, is_url

_STAGING = ".worker-"


class OutputTarget:
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

    def staging_folder(self, scratch: Path) -> Path:
        """A new folder to write a file in before it is put."""
        return Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.folder))

    def put(self, path: Path, name: str) -> None:
        """Put a file that is written whole into its place."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    def tidy(self) -> None:
        """Remove what workers that were lost have left."""
        for left in self.folder.glob(f"{_STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)


class RemoteOutput(OutputTarget):
    """A folder behind a URL.

    Args:
        url: such as ``s3://bucket/merged``; needs the package that fsspec asks for.
    """

    def __init__(self, url: str) -> None:
        self.files = RemoteFolder(url)

    @property
    def reference(self) -> str:
        """Its URL."""
        return self.files.url

    def staging_folder(self, scratch: Path) -> Path:
        """A local folder."""
        return Path(tempfile.mkdtemp(dir=scratch))

    def put(self, path: Path, name: str) -> None:
        """Upload a file."""
        self.files.put(path, name)

    def tidy(self) -> None:
        """Nothing is left at the URL."""

    def exists(self) -> bool:
        """Whether there is anything at the URL."""
        return bool(self.files.sizes())

    def remove(self) -> None:
        """Remove everything at the URL."""
        self.files.remove()


@contextmanager
def new_remote_output(url: str, *, overwrite: bool = False) -> Iterator[Path]:
    """A local folder for what is not at the URL yet; it is uploaded at the end, ``config.json`` last.

    So what is not complete cannot be opened; on any error everything is removed again.

    Raises:
        CheckpointError: there is something at the URL.
        FileError: it cannot be written.
    """
    place = RemoteOutput(url)
    if place.exists():
        if not overwrite:
            raise CheckpointError("the output exists", where=url, mend="give another URL, or --overwrite to replace it")
        place.remove()
    with tempfile.TemporaryDirectory(prefix="merganser-") as scratch:
        folder = Path(scratch)
        try:
            yield folder
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == "config.json"):
                place.put(path, path.relative_to(folder).as_posix())
        except BaseException:
            place.remove()
            raise


def output_of(reference: str) -> OutputTarget:
    """The place that a worker is to write to."""
    return RemoteOutput(reference) if is_url(reference) else OutputTarget(Path(reference))
