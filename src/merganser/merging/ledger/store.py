"""The folder of a ledger: one process at a time, a new file of sums beside the old one, one rename to switch.

``ledger.json`` names the file of sums that counts. A change writes a new file, flushes it, replaces ``ledger.json``.
Killed before that, the ledger is the old one; after it, the new one. What is left over is removed by the next change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merganser import files
from merganser.checkpoints import Checkpoint, hash_tensor
from merganser.checkpoints.header import read_infos
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import UserError
from merganser.merging.execution import Slice, execute
from merganser.merging.ledger.record import FILE_NAME, RESTORE, LedgerError, LedgerPart, LedgerRecord, dump, load
from merganser.merging.ledger.terms import shapes
from merganser.merging.memory import RunSettings, Schedule, fit
from merganser.merging.plan import Step
from merganser.methods import Merged
from merganser.paths import inside

LOCK = ".lock"
HALVES = ("high", "low")
_SPARE = 1_000_000  # bytes for ledger.json

Pair = tuple[Tensor, Tensor]
#: Number of a part and the part → its sums by term.
Compute = Callable[[int, LedgerPart], dict[str, Pair]]


@contextmanager
def locked(folder: Path, *, write: bool = True) -> Iterator[LedgerRecord]:
    """The ledger, for this process alone; what a killed change left over is removed.

    Args:
        folder: of the ledger.
        write: False: where the folder cannot be written to, go without lock.

    Raises:
        LedgerError: there is no ledger, or it is damaged.
    """
    load(folder)  # no lock file in a folder that is no ledger
    with files.locked(folder / LOCK, f"uses {folder}", needed=write):
        record = load(folder)
        if write:
            _discard_others(folder, record.file)
        yield record


def file_name(generation: int) -> str:
    """Of the sums of a generation."""
    return f"sums-{generation:06d}.safetensors"


def specs(record: LedgerRecord, parts: Sequence[LedgerPart]) -> list[TensorSpec]:
    """The tensors of a file of sums."""
    method = record.make_method()
    return [
        TensorSpec(f"{number}.{term}.{half}", "F64", shape)
        for number, part in enumerate(parts)
        for term, shape in shapes(method, part).items()
        for half in HALVES
    ]


def check_disk(folder: Path, specs: Sequence[TensorSpec]) -> UserError | None:
    """Whether the disk has no room for sums, said before work."""
    return files.space_error(
        folder,
        sum(spec.nbytes for spec in specs) + _SPARE,
        "the new sums take",
        "free some space for them beside the old ones, or move the ledger to another disk",
    )


def new_ledger(folder: Path, reads: Sequence[Path]) -> files.Output:
    """The folder of a new ledger, which may be there if it is empty.

    Args:
        folder: of the ledger.
        reads: what it is made from.
    """

    def recognise(_: Path) -> files.Refusal:
        return files.Refusal("the folder is not empty", "give a new folder")

    return files.Output(folder, recognise, True, reads)


@dataclass
class SumsWork:
    """The sums of each part, computed.

    Args:
        record: names the parts.
        compute: the sums of a part, by term; called on several threads.
    """

    record: LedgerRecord
    compute: Compute
    mend: str = "collect the statistics again, or make a ledger with --exclude for this tensor"

    def prefetch(self, step: Step) -> None:
        """Parts are read when they are summed."""

    def slices(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """Every sum of a part, by its name in the file."""
        number = self.record.numbers[step.unit.names]
        pairs = self.compute(number, self.record.parts[number]).items()
        halves = {f"{number}.{term}.{half}": t for term, pair in pairs for half, t in zip(HALVES, pair, strict=True)}
        yield {}, Merged(halves)


class SumsTarget:
    """A file of sums, being written.

    Args:
        writer: of the file.
        file: its name.
        wanted: the tensors in it.
    """

    def __init__(self, writer: SafetensorsWriter, file: str, wanted: Sequence[TensorSpec]) -> None:
        self.total, self.hashes = sum(spec.nbytes for spec in wanted), dict[str, str]()
        self._writer, self._file = writer, file

    def take(self, step: Step, firsts: Mapping[str, int], merged: Merged) -> int:
        """Write the sums of a part."""
        for name, tensor in merged.tensors.items():
            self._writer.write(self._file, name, tensor)
            self.hashes[name] = hash_tensor(tensor, "F64", "sha256")
        return sum(tensor.nbytes for tensor in merged.tensors.values())

    def finish(self, step: Step, note: str | None) -> None:
        """Nothing is left to do."""


def write_sums(
    folder: Path, file: str, record: LedgerRecord, compute: Compute, settings: RunSettings
) -> dict[str, str]:
    """Compute the sums part by part, a few at a time, and write them; returns their hashes.

    Args:
        folder: of the ledger.
        file: name of the file; removed again if anything fails.
        record: names the method and the parts.
        compute: the sums of a part; called on several threads.
        settings: how many of them, and how much memory; the bytes do not depend on it.

    Raises:
        FileError: the disk is full or the folder cannot be written to.
    """
    wanted = specs(record, record.parts)
    try:
        schedule = schedule_of(record, wanted, settings)
        with files.writing(folder, "the ledger is as it was"), SafetensorsWriter(folder, {file: wanted}) as writer:
            target = SumsTarget(writer, file, wanted)
            execute(schedule, SumsWork(record, compute), target, "sums")
    except BaseException:
        (folder / file).unlink(missing_ok=True)
        raise
    return {spec.name: target.hashes[spec.name] for spec in wanted}


def schedule_of(record: LedgerRecord, sums: Sequence[TensorSpec], settings: RunSettings) -> Schedule:
    """The parts as steps, fitted into memory: each is worked on as a whole, beside its sums and a term of each."""
    sizes: dict[tuple[str, ...], int] = {}
    for spec in sums:
        names = record.parts[int(spec.name.partition(".")[0])].names
        sizes[names] = sizes.get(names, 0) + spec.nbytes
    return fit(record.steps(), settings, extra=lambda step: 2 * sizes.get(step.unit.names, 0), whole=True)


def commit(folder: Path, record: LedgerRecord) -> None:
    """Make ``record`` what the ledger says: the one step that counts. Then the sums before it are removed.

    Raises:
        FileError: the folder cannot be written to; the ledger is as it was.
    """
    with files.writing(folder, "the ledger is as it was"):
        files.sync(folder)  # the sums that it names
        files.write_bytes(folder / FILE_NAME, dump(record))
    _discard_others(folder, record.file)


@dataclass(frozen=True)
class Sums:
    """The sums of a ledger, read part by part and held against their hashes.

    Attributes:
        record: what the ledger says of them.
        checkpoint: the file; None where there are none.
    """

    record: LedgerRecord
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, folder: Path, record: LedgerRecord) -> Sums:
        """Open the file of sums; its header is checked, no sum is read.

        Raises:
            LedgerError: it is missing, truncated or of other tensors than the ledger says.
        """
        if record.file is None:
            return cls(record, None)
        path = folder / inside(folder, record.file, LedgerError, where=folder, what="the file of sums", mend=RESTORE)
        try:
            infos = {info.name: info for info in read_infos(path, record.file)}
        except UserError as error:
            raise LedgerError(f"the sums are damaged: {error.what}", where=path, mend=RESTORE) from None
        wanted = specs(record, record.parts)
        stored = [(info.name, info.dtype, info.shape) for info in infos.values()]
        if sorted(stored) != sorted((s.name, s.dtype, s.shape) for s in wanted) or set(infos) != set(record.sums):
            raise LedgerError("the sums are not those of this ledger", where=path, mend=RESTORE)
        return cls(record, Checkpoint(str(folder), folder, infos))

    def pairs(self, number: int, terms: Sequence[str]) -> dict[str, Pair]:
        """The sums of a part."""
        return {term: (self._half(number, term, "high"), self._half(number, term, "low")) for term in terms}

    def rounded(self, number: int, terms: Sequence[str]) -> dict[str, Tensor]:
        """The sums of a part, each rounded to float64."""
        return {term: self._half(number, term, "high") for term in terms}

    def _half(self, number: int, term: str, half: str) -> Tensor:
        name = f"{number}.{term}.{half}"
        if self.checkpoint is None:
            raise RuntimeError("there are no sums yet")
        tensor = self.checkpoint.read(name)
        if hash_tensor(tensor, "F64", "sha256") != self.record.sums[name]:
            raise LedgerError(
                f"the sums are damaged: {term} of {', '.join(self.record.parts[number].names)} "
                "does not have its recorded hash",
                where=self.checkpoint.path / str(self.record.file),
                mend=RESTORE,
            )
        return tensor


def zeros_like(terms: dict[str, Tensor]) -> dict[str, Pair]:
    """Empty sums."""
    return {name: (torch.zeros_like(term), torch.zeros_like(term)) for name, term in terms.items()}


def _discard_others(folder: Path, file: str | None) -> None:
    files.remove_leftovers(folder / FILE_NAME)
    for path in folder.glob("sums-*.safetensors"):
        if path.name != file:
            with suppress(OSError):  # the next change tries again
                path.unlink(missing_ok=True)
