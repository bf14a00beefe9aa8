"""Running a plan in the memory there is: how it is run, how much is free, and how tall steps are cut into slices.

A slice that costs nothing (elementwise work) is cut wherever a step is large. One that has a price, such as reading
Gram matrices a second time, is cut only where memory asks for it. What can be cut at all is the method's to say.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue

import torch

from merganser.engines import Engine
from merganser.errors import ErrorCollector, RecipeError
from merganser.files import parse_size
from merganser.merging.inputs import without_collection
from merganser.merging.plan import COPY, Step
from merganser.methods.base import elements

_STATUS, _INFO = Path("/proc/self/status"), Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_UNLIMITED = 1 << 60
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT, _MAPPED = 256 * 2**20, 8 * 2**20

#: Numbers of a slice where slices cost nothing: few enough for the processor's caches, enough to keep it busy.
SLICE = 1 << 19
#: So many times as much on another device, where each operation costs its start and caches hold no slice.
ELSEWHERE = 32
SMALL = 64 * 2**20  # bytes of a step that it is no use to cut
HELD = 96 * 2**20  # bytes of a step's tensors that are kept, instead of being read a second time
#: What the process takes beside tensors once it works: thread stacks, the libraries' own buffers.
OWN_BYTES = 24 * 2**20
#: Slices of the slicing, as read and as written, beside what the method holds.
_PIECES = 3


@dataclass(frozen=True)
class RunSettings:
    """How a plan is run; the bytes of the result do not depend on it.

    Attributes:
        threads: how many steps are worked on at once.
        max_memory: bytes that the whole process may take; by default what the machine has.
        device: where tensors are computed.
        sums: a folder where sums of earlier merges are to go on from and those of this one are put.
        engine: where the work is done, one job a weight file; None: in this process.
        allow_pickle: whether pickled weights are read (with ``weights_only``); no recipe, plan or record can say so.
    """

    threads: int = 2
    max_memory: int | None = None
    device: str = "cpu"
    sums: Path | None = None
    engine: Engine | None = None
    allow_pickle: bool = False

    @classmethod
    def make(
        cls,
        threads: int | None = None,
        max_memory: str | int | None = None,
        device: str = "cpu",
        sums: str | Path | None = None,
        engine: Engine | None = None,
        allow_pickle: bool = False,
    ) -> RunSettings:
        """From what a user says: all cores by default, sizes such as ``"2GB"``, ``auto`` for a CUDA device if any.

        Raises:
            RecipeError: no size, an unknown device, or CUDA where there is none.
        """
        available = torch.cuda.is_available() if device != "cpu" else False
        if device not in ("cpu", "cuda", "auto"):
            raise RecipeError(f"unknown device {device!r}", where="device", mend="give cpu, cuda or auto")
        if device == "cuda" and not available:
            raise RecipeError("there is no CUDA device", where="device", mend="use cpu or auto")
        size = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
        chosen = "cuda" if available else "cpu"
        place = None if sums is None else Path(sums)
        return cls(threads or os.cpu_count() or 1, size, chosen, place, engine, allow_pickle)

    @property
    def torch_device(self) -> torch.device | None:
        """Where tensors are put; None for where they are read to."""
        return None if self.device == "cpu" else torch.device(self.device)


@dataclass(frozen=True)
class Schedule:
    """How the steps of a plan are fitted into memory.

    Attributes:
        steps: the plan's.
        rows: of each step, how many rows of its stack are merged at once; None: all.
        sizes: of each step, an estimate of the bytes that it takes at its worst moment.
        threads: how many steps are worked on at once.
        budget: bytes that these may take together.
        resident: bytes of the process itself.
    """

    steps: tuple[Step, ...]
    rows: tuple[int | None, ...]
    sizes: tuple[int, ...]
    threads: int
    budget: int
    resident: int

    @property
    def peak_bytes(self) -> int:
        """Estimate of the anonymous memory of the process at its worst moment."""
        return self.resident + min(self.budget, _busiest(self.sizes, self.threads))

    def uncut(self) -> list[tuple[str, int]]:
        """What can only be merged as a whole: the first tensor of each step and its bytes, the costliest first."""
        pairs = zip(self.steps, self.sizes, strict=True)
        whole = [(s.unit.names[0], size) for s, size in pairs if size > SMALL and min_slice_rows(s) is None]
        return sorted(whole, key=lambda entry: -entry[1])


@without_collection()
def fit(
    steps: Sequence[Step],
    settings: RunSettings,
    *,
    extra: Callable[[Step], int] | None = None,
    known: Callable[[Step], int | None] | None = None,
    whole: bool = False,
) -> Schedule:
    """The steps cut into slices where that is of use, or where memory asks for it.

    Args:
        steps: of a plan.
        settings: how it is run.
        extra: the bytes that the target takes for a step beside the method; nothing by default.
        known: the bytes of a step that is not merged as its method says, everything with it; None: it is.
        whole: leave the steps in one piece.

    Raises:
        RecipeError: a step that cannot be cut small enough; several come as ``Problems``.
    """
    allowed, resident = settings.max_memory, anonymous_bytes() + OWN_BYTES
    room = None if allowed is None else allowed - resident
    numbers = SLICE * (1 if settings.device == "cpu" else ELSEWHERE)
    where = f"max_memory: {(allowed or 0) / 1e9:.2f} GB"
    if room is not None and room <= 0:
        what = f"the process itself takes {resident / 1e9:.2f} GB, without a single tensor"
        raise RecipeError(what, where=where, mend="allow more memory")
    rows, sizes, problems = list[int | None](), list[int](), ErrorCollector()
    for step in steps:
        if known is not None and (size := known(step)) is not None:
            rows.append(None)
            sizes.append(size)
            continue
        beside = extra(step) if extra else 0
        height, size = (
            (None, step_bytes(step)) if whole else _cut(step, None if room is None else room - beside, numbers)
        )
        rows.append(height)
        sizes.append(size + beside)
        if room is not None and sizes[-1] > room:
            what = f"{step.unit.names[0]!r} needs {(sizes[-1] + resident) / 1e9:.2f} GB at once"
            what += "" if min_slice_rows(step) and not whole else " and cannot be cut into rows"
            mend = "allow more memory"
            mend += "" if whole or extra else ", or exclude this tensor (--exclude), which averages it"
            problems.add(RecipeError(what, where=where, mend=mend))
    problems.raise_all()
    budget = _busiest(sizes, settings.threads) if room is None else room
    return Schedule(tuple(steps), tuple(rows), tuple(sizes), settings.threads, budget, resident)


def _busiest(sizes: Sequence[int], threads: int) -> int:
    """The memory of the costliest steps that could be worked on together."""
    return sum(sorted(sizes, reverse=True)[:threads])


def _cut(step: Step, room: int | None, numbers: int) -> tuple[int | None, int]:
    """How many rows of a step are merged at once (None: all), about so many numbers, and the bytes that this takes."""
    whole, least = step_bytes(step), min_slice_rows(step)
    if least is None:
        return None, whole
    height = step.unit.height()
    rows = max(1, numbers // max(1, elements(step.unit) // max(height, 1))) if least == 1 else height
    if rows >= height and (room is None or whole <= room):
        return None, whole
    size = step_bytes(step, rows) + (kept_bytes(step) if room is None else 0)
    while room is not None and size > room and rows > least:
        rows = max(least, rows // 2 // least * least)
        size = step_bytes(step, rows)
    return rows, size


def min_slice_rows(step: Step) -> int | None:
    """The fewest rows that can be merged apart; None where only the whole can."""
    if step.method == COPY or not step.unit.height():
        return None
    method = step.treatment
    least = 1 if method is None else method.min_slice_rows(step.unit)
    matched = step.rows is not None  # then only what needs no more than the rows themselves is cut
    return None if matched and (least != 1 or (step.rows is not None and step.rows.columns)) else least


def step_bytes(step: Step, rows: int | None = None) -> int:
    """Estimate of the memory that a step, or a slice of so many rows, takes at its worst moment."""
    unit = step.unit if rows is None else step.unit.cut(0, rows)[0]
    largest = max((prod(fact.shape) for fact in unit.facts), default=0)
    method = step.treatment
    held = elements(unit) * 4 * 4 if method is None else method.memory(unit, len(step.takers))
    return (held + largest * 4 * _PIECES) * (2 if step.computation == "F64" else 1)


def kept_bytes(step: Step) -> int:
    """How much of a step's tensors is kept, where memory is not limited, from a pass over the whole for the slices."""
    if step.treatment is None or not step.treatment.reads_twice:
        return 0
    return min(HELD, elements(step.unit) * 2 * (len(step.takers) + 1))


def anonymous_bytes() -> int:
    """The memory of this process that no file stands behind; where the system does not tell, its peak so far."""
    found = _entry(_STATUS, "RssAnon")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def available_bytes() -> int:
    """The memory that could still be taken; a very large number where the system does not tell."""
    found = _entry(_INFO, "MemAvailable")
    free = _UNLIMITED if found is None else found
    for path in _LIMITS:
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # another system, or "max"
            continue
        free = min(free, max(limit - anonymous_bytes(), 0))
    return free


def keep_freed() -> None:
    """Let the allocator keep what is freed of small buffers, for the rest of this process; does nothing without glibc.

    A slice's buffers would otherwise go back to the system and be cleared page by page for the next slice.
    """
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
    except (OSError, AttributeError, TypeError):  # another system
        return


def _entry(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class Budget:
    """Bytes that are drawn and given back, from any thread.

    Whoever gives back waits for nobody: an interrupt can leave the one who draws at any point, and a lock that both
    took would then hold up every other thread for good.

    Args:
        total: how many there are. Something larger is let through when nothing else is drawn.
    """

    def __init__(self, total: int) -> None:
        self._total, self._drawn = total, 0
        self._turn, self._returned = threading.Lock(), SimpleQueue[int]()

    def draw(self, nbytes: int) -> None:
        """Wait until there is room for so many bytes, and take them; one at a time."""
        with self._turn:
            while self._drawn and self._drawn + nbytes > self._total:
                self._drawn -= self._returned.get()
            self._drawn += nbytes

    @contextmanager
    def returning(self, nbytes: int) -> Iterator[None]:
        """Give bytes that were drawn back at the end of the block."""
        try:
            yield
        finally:
            self._returned.put(nbytes)
