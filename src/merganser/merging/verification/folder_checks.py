"""The files of a merged folder, held against those that its provenance records."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.side_files import is_licence
from merganser.errors import CheckpointError, ErrorCollector, UserError
from merganser.files import files_below
from merganser.merging.provenance import CARD, FILE_NAME, hash_file
from merganser.paths import is_inside
from merganser.signing import SIGNATURE, SIGNATURE_ENDING
from merganser.statistics import FILE_NAME as STATISTICS
from merganser.statistics import Statistics
from merganser.text import listed

_AGAIN = "merge again, or restore the file"
_FEW = 5  # names that a message gives


def differing_files(folder: Path, other: Path) -> list[str]:
    """The files of a merged folder that are not, byte for byte, in another, and the other way round."""
    names = {name for name in (*files_below(folder), *files_below(other)) if name not in (FILE_NAME, CARD)}
    found = []
    for name in sorted(names):
        here, there = folder / name, other / name
        if here.is_file() and there.is_file():
            found += [name] * (not filecmp.cmp(here, there, shallow=False))
        elif there.is_file() or not _is_beside(name):
            found.append(name)
    return [name for name in found if name != STATISTICS or (other / name).is_file()]


def check_files(folder: Path, provenance: Mapping[str, Any], *, allow_pickle: bool = False) -> list[UserError]:
    """What differs between a merged folder and its provenance: files and tensors, changed, missing or added.

    Everything that is not recorded is an error, whatever its name: which files a library loads is for the library to
    say, and changes. Let be are the card, signatures, licences, hidden files at the top, and statistics of the very
    weights that were collected since.
    """
    problems, recorded = ErrorCollector(), provenance["files"]
    present = set(files_below(folder))
    added = sorted(file for file in present if file not in recorded and file != STATISTICS and not _is_beside(file))
    if added:
        what = f"{listed(added, _FEW)} {'was' if len(added) == 1 else 'were'} added after the merge"
        problems.add(CheckpointError(what, where=folder, mend="remove what is not yours, and move elsewhere what is"))
    hashes: dict[str, dict[str, str]] = {}
    for file, expected in recorded.items():
        if file not in present:
            problems.add(CheckpointError(f"{file} is missing", where=folder, mend="merge again"))
        elif not (folder / file).is_file() or not is_inside(folder, folder / file):
            what = f"{file} is a link that leads out of the folder, or no file"
            problems.add(CheckpointError(what, where=folder, mend="put the file itself there"))
        elif (found := problems.catch(hash_file, folder / file, expected)) is not None:
            digest, hashes[file] = found
            if digest != expected:
                what = f"{file} was changed after the merge: its hash is {digest}, recorded {expected}"
                problems.add(CheckpointError(what, where=folder, mend=_AGAIN))
    if STATISTICS in present and STATISTICS not in recorded:
        problems.add(*_check_statistics(folder, allow_pickle))
    if not problems.found:
        problems.add(*_check_tensors(folder, provenance, hashes))
    return problems.found


def _check_tensors(
    folder: Path, provenance: Mapping[str, Any], hashes: Mapping[str, dict[str, str]]
) -> list[UserError]:
    """Recorded tensors whose hashes are not those of the weight files.

    Args:
        folder: named in errors.
        provenance: the record.
        hashes: of the tensors in each weight file.
    """
    recorded = {name: entry.get("blake3") or entry["sha256"] for name, entry in provenance["tensors"].items()}
    plan = provenance.get("plan")
    if plan is None:  # before format 3 it is not said which file belongs to which folder
        found = sorted(digest for file in hashes.values() for digest in file.values())
        hashed = all(hashes[file] for file in hashes if file.endswith(".safetensors"))  # as those of adapters were not
        wrong = ["some"] if hashed and found != sorted(recorded.values()) else []
    else:
        folders = plan.get("folders", {})
        above = {file: f"{inner}/" for inner, file in folders.items()} if isinstance(folders, dict) else {}
        stored = {f"{above.get(file, '')}{name}": h for file, own in hashes.items() for name, h in own.items()}
        wrong = [name for name in {**stored, **recorded} if stored.get(name) != recorded.get(name)]
    if not wrong:
        return []
    what = f"the record of tensors ({listed(wrong, _FEW)}) is not that of the tensors in the files"
    return [CheckpointError(what, where=folder / FILE_NAME, mend="merge again, or restore the file")]


def _check_statistics(folder: Path, allow_pickle: bool) -> list[UserError]:
    """Why statistics that were collected after the merge are not those of its weights."""
    problems = ErrorCollector()
    statistics = problems.catch(Statistics.open, folder / STATISTICS)
    checkpoint = problems.catch(open_checkpoint, str(folder), allow_pickle=allow_pickle)
    if statistics is not None and checkpoint is not None:
        problems.add(*statistics.check_binding(checkpoint))
    return problems.found


def _is_beside(name: str) -> bool:
    """Whether nothing that opens the model reads this file."""
    path = PurePosixPath(name)
    top = len(path.parts) == 1
    signed = name in (SIGNATURE, f"{STATISTICS}{SIGNATURE_ENDING}")
    return name in (FILE_NAME, CARD) or signed or path.parts[0].startswith(".") or (top and is_licence(name))
