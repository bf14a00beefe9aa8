"""Where a merge's files go: a local or shared folder, or anything that fsspec can write to; and what it replaces."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merganser.checkpoints import sha256_file
from merganser.checkpoints.places import places_read
from merganser.errors import CheckpointError, UserError
from merganser.files import Output, Refusal, RemoteFolder, files_below, is_url, scratch_folder, unlisted
from merganser.merging.provenance import FILE_NAME, read_provenance
from merganser.merging.recipe import Inputs

_STAGING = ".worker-"
_CARD = "README.md"


def merge_output(output: Path, reads: Iterable[Path], *, overwrite: bool) -> Output:
    """The folder of a merge, which may take the place of another merge's.

    Args:
        output: the folder.
        reads: what the merge reads, see :func:`merge_reads`.
        overwrite: whether the user said so.
    """
    return Output(output, recognise_merge, overwrite, tuple(reads))


def merge_reads(inputs: Inputs) -> list[Path]:
    """Every folder and file that a merge reads: its contributors, its base model, those of adapters, statistics."""
    found = [place for parent in inputs.sources for place in places_read(parent.checkpoint)]
    return [*found, *(p.statistics.path for p in inputs.parents if p.statistics and p.statistics.path)]


def recognise_merge(folder: Path) -> Refusal | None:
    """Why a folder is not replaced by a merge: it is none itself, or holds something that is no part of it."""
    try:
        found = read_provenance(folder)
    except UserError:
        what = f"the output exists and is no merge (no sound {FILE_NAME} is in it), so it is not replaced"
        return Refusal(what, "give another folder, or remove it yourself")
    refused = foreign_to_merge(found, files_below(folder))
    return refused or _edited(found, folder)


def foreign_to_merge(provenance: Mapping[str, Any], names: Iterable[str]) -> Refusal | None:
    """Why a folder is not replaced that holds these files, of which provenance does not say that a merge wrote them."""
    return unlisted(names, {*provenance["files"], FILE_NAME, _CARD}, "the merge")


def _edited(provenance: Mapping[str, Any], folder: Path) -> Refusal | None:
    """Why a folder is not replaced whose small files somebody has changed; weights are not read for it."""
    recorded = {name: digest for name, digest in provenance["files"].items() if ":" not in str(digest)}
    if isinstance(card := provenance.get("card"), str):
        recorded[_CARD] = card
    there = {name: digest for name, digest in recorded.items() if (folder / name).is_file()}
    changed = sorted(name for name, digest in there.items() if sha256_file(folder / name) != digest)
    if not changed:
        return None
    what = f"the output holds what was changed after the merge: {', '.join(changed[:5])}"
    return Refusal(what + (f" and {len(changed) - 5} more" if len(changed) > 5 else ""))


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
    with scratch_folder() as folder:
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
