"""Where a merge's files go: a local or shared folder, or anything that fsspec can write to; and what it replaces."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from merganser.checkpoints import sha256_file
from merganser.checkpoints.places import places_read
from merganser.errors import ErrorCollector, FileError, UserError
from merganser.files import (
    Output,
    Refusal,
    RemoteCheck,
    RemoteFolder,
    files_below,
    is_url,
    is_within,
    scratch_folder,
    settle,
    space_error,
    unlisted,
)
from merganser.merging.inputs import Inputs
from merganser.merging.provenance import CARD, FILE_NAME, read_provenance
from merganser.text import listed

_STAGING = ".worker-"
_LARGEST = 200_000_000  # bytes of a file that is fetched to see whether a merge wrote it


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


def recognise_merge(folder: Path, names: Collection[str] | None = None) -> Refusal | None:
    """Why a folder is not replaced by a merge: it is none itself, or holds something that is no part of it.

    Args:
        folder: with its provenance and its small files at least.
        names: of all files that belong to it, where they are not there; relative to it, written with ``/``.
    """
    names = list(files_below(folder)) if names is None else names
    try:
        found = read_provenance(folder)
    except UserError:
        holds = f"it holds {len(names)} files, such as {', '.join(sorted(names)[:3])}"
        what = f"the output exists and is no merge (no sound {FILE_NAME} is in it), so it is not replaced; {holds}"
        return Refusal(what, "give another place, or remove it yourself")
    refused = foreign_to_merge(found, names)
    return refused or _edited(found, folder)


def remote_problems(url: str, overwrite: bool, nbytes: int) -> list[UserError]:
    """Why a merge cannot be written to a URL; what a command that was killed has left there is settled first.

    Args:
        url: of the result.
        overwrite: whether an earlier merge may be replaced.
        nbytes: that are written on this machine before they are uploaded.
    """
    place, problems, scratch = RemoteFolder(url), ErrorCollector(), Path(tempfile.gettempdir())
    problems.catch(settle, url)
    if not problems.found:
        problems.catch(lambda: check_remote(overwrite)(place, place.sizes()))
    mend = "free some space, or set TMPDIR to a folder on another disk"
    space = space_error(scratch, nbytes, "the result, before it is uploaded, takes", mend)
    return problems.found + [problem for problem in [space] if problem is not None]


def check_remote(overwrite: bool) -> RemoteCheck:
    """Raises where the files at a URL may not be replaced by a merge: the rules are those of folders.

    Args:
        overwrite: whether the user said that an earlier merge may be replaced.
    """

    def check(place: RemoteFolder, files: Mapping[str, int]) -> None:
        if not files:
            return
        if not overwrite:
            raise FileError("the output exists", where=place.url, mend="give another URL, or --overwrite to replace it")
        if refused := _recognise_remote(place, files):
            raise FileError(refused.what, where=place.url, mend=refused.mend)

    return check


def _recognise_remote(place: RemoteFolder, files: Mapping[str, int]) -> Refusal | None:
    """Why what is at a URL is not replaced by a merge, told from copies of its small files."""
    with scratch_folder() as folder:

        def fetch(name: str) -> None:
            if files.get(name, _LARGEST) < _LARGEST and is_within(folder / name, folder):
                with suppress(FileNotFoundError):  # somebody has just removed it
                    place.get(name, folder / name)

        fetch(FILE_NAME)
        with suppress(UserError):  # that it is no merge is said below
            for name in _small_files(read_provenance(folder)):
                fetch(name)
        return recognise_merge(folder, files)


def foreign_to_merge(provenance: Mapping[str, Any], names: Iterable[str]) -> Refusal | None:
    """Why a folder is not replaced that holds these files, of which provenance does not say that a merge wrote them."""
    return unlisted(names, {*provenance["files"], FILE_NAME, CARD}, "the merge")


def _edited(provenance: Mapping[str, Any], folder: Path) -> Refusal | None:
    """Why a folder is not replaced whose small files somebody has changed; weights are not read for it."""
    recorded = _small_files(provenance)
    there = {name: digest for name, digest in recorded.items() if (folder / name).is_file()}
    changed = sorted(name for name, digest in there.items() if sha256_file(folder / name) != digest)
    if not changed:
        return None
    return Refusal(f"the output holds what was changed after the merge: {listed(changed, 5)}")


def _small_files(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of a merge's files that are no weights, and of its card."""
    recorded = {name: digest for name, digest in provenance["files"].items() if ":" not in str(digest)}
    return {**recorded, CARD: card} if isinstance(card := provenance.get("card"), str) else recorded


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


def output_of(reference: str) -> OutputTarget:
    """The place that a worker is to write to."""
    return RemoteOutput(reference) if is_url(reference) else OutputTarget(Path(reference))
