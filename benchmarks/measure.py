"""What the benchmarks share: variants that take turns, time and peak memory of processes, tables of the results.

Machines are noisy and caches remember, so variants are run in rounds, one of each a round, and are compared by
ratios within a round; the median over the rounds is what counts. Memory is sampled from ``/proc`` (Linux) over a
process and all its children: anonymous memory is what a run really needs, while resident memory also counts
pages of mapped files that the system could drop.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).parent / "merganser"  # of the environment that runs the benchmark
RESULTS = Path(__file__).resolve().parent / "results"
INTERVAL = 0.02  # seconds between two samples of memory
_TAIL = 2000  # characters of a failed command's output that are shown


class CommandFailed(Exception):
    """A command ended with an error; the message holds the end of what it printed."""


@dataclass(frozen=True)
class Run:
    """What one run took.

    Attributes:
        seconds: wall-clock time.
        anonymous: peak of anonymous memory in bytes, the process and its children together; 0: not measured.
        resident: peak of resident memory likewise, mapped files included.
    """

    seconds: float
    anonymous: int = 0
    resident: int = 0


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: variables beside those of this process.

    Raises:
        CommandFailed: it cannot be started, or its exit status is not 0.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(environment or {})})
        except OSError as error:
            raise CommandFailed(f"{command[0]}: {error}") from None
        anonymous = resident = 0
        while True:
            now = memory_of(process.pid)
            anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
            try:
                process.wait(INTERVAL)
            except subprocess.TimeoutExpired:
                continue
            break
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")[-_TAIL:]
            raise CommandFailed(f"{' '.join(command)}: exit status {process.returncode}\n{said}")
    return Run(seconds, anonymous, resident)


def memory_of(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and its descendants now; zeros once it has ended."""
    anonymous = resident = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except OSError:
        return 0, 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            anonymous = int(line.split()[1]) * 1024
        elif line.startswith("VmRSS:"):
            resident = int(line.split()[1]) * 1024
    for child in children:
        more = memory_of(child)
        anonymous, resident = anonymous + more[0], resident + more[1]
    return anonymous, resident


def timed(work: Callable[[], object], *, cpu: bool = False) -> Callable[[], Run]:
    """A function of this process as a variant: its time (``cpu``: processor time), without memory."""
    clock = time.process_time if cpu else time.perf_counter

    def run() -> Run:
        start = clock()
        work()
        return Run(clock() - start)

    return run


def take_turns(
    variants: Mapping[str, Callable[[], Run]], rounds: int, before: Callable[[], object] | None = None
) -> dict[str, list[Run]]:
    """Run each variant once a round. One that fails is left out from then on, and its failure printed.

    Args:
        variants: by name, in the order in which they take turns.
        rounds: how often.
        before: done before each run and not timed, such as reading the inputs once.
    """
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(runs):
            if before:
                before()
            try:
                run = variants[name]()
            except CommandFailed as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                del runs[name]
                continue
            runs[name].append(run)
            memory = f", {run.anonymous / 1e9:.2f} GB anonymous" if run.anonymous else ""
            print(f"round {number + 1}  {name}: {run.seconds:.2f} s{memory}", file=sys.stderr, flush=True)
    return runs


def summary(runs: Mapping[str, Sequence[Run]], reference: str) -> list[dict[str, Any]]:
    """One row a variant: medians, fastest, its time as a multiple of the reference's in the same round, memory.

    Where the reference is absent (it failed), there is no ratio.
    """
    rows = []
    for name, found in runs.items():
        ratios = [run.seconds / other.seconds for run, other in zip(found, runs.get(reference, ()), strict=False)]
        rows.append(
            {
                "variant": name,
                "runs": len(found),
                "median_seconds": round(statistics.median(run.seconds for run in found), 3),
                "fastest_seconds": round(min(run.seconds for run in found), 3),
                "ratio": round(statistics.median(ratios), 2) if ratios else None,
                "peak_anonymous_bytes": max(run.anonymous for run in found),
                "peak_resident_bytes": max(run.resident for run in found),
            }
        )
    return rows


def summary_table(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Rows of :func:`summary` as Markdown; memory only where it was measured."""
    with_memory = any(row["peak_anonymous_bytes"] for row in rows)
    head = ["variant", "median", "fastest", f"times {reference}"]
    head += ["peak anonymous", "peak resident"] if with_memory else []
    cells = []
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        line = [row["variant"], f"{row['median_seconds']:.2f} s", f"{row['fastest_seconds']:.2f} s", ratio]
        if with_memory:
            line += [f"{row[key] / 1e9:.2f} GB" for key in ("peak_anonymous_bytes", "peak_resident_bytes")]
        cells.append(line)
    return markdown(head, cells)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(*packages: str) -> dict[str, Any]:
    """The machine and the versions that matter, without names or paths that belong to it alone."""
    processor = platform.processor() or platform.machine()
    memory = 0
    if Path("/proc/cpuinfo").exists():
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        processor = facts.get("model name", processor)
        if {"cpu family", "model"} <= set(facts):  # virtual machines often hide the name
            processor += f" (family {facts['cpu family']}, model {facts['model']})"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "safetensors", "merganser", *packages)},
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in a sentence for the head of a table."""
    versions = [f"{k} {v}" for k, v in found.items() if k not in _NOT_VERSIONS and v]
    return (
        f"{found['cores']} cores of an {found['processor']}, {found['memory_gib']} GiB of memory, "
        f"{found['system']}, {', '.join(versions)}; load average at the end {found['load_average']}."
    )


_NOT_VERSIONS = ("processor", "cores", "memory_gib", "system", "load_average")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(name: str, text: str, values: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write ``name.md`` and ``name.json`` into the folder of results, and print the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(text)


def warm(folders: Iterable[Path], outputs: Path | None = None) -> None:
    """Read every file once, so that the page cache holds it, and let earlier writes reach the disk.

    Args:
        folders: with the inputs.
        outputs: what earlier runs wrote there leaves the cache, so that no run has to make room first.
    """
    os.sync()
    for file in sorted(outputs.rglob("*.safetensors")) if outputs and hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as written:
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for folder in folders:
        for file in sorted(folder.rglob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                buffer = bytearray(16 << 20)
                while stream.readinto(buffer):
                    pass


def command(line: Sequence[str], output: Path) -> Callable[[], Run]:
    """A command that writes the folder ``output``, as a variant: it finds none in its place."""

    def run() -> Run:
        remove(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        return run_command(line, {"HF_HUB_OFFLINE": "1"})

    return run


def remove(folder: Path) -> None:
    """Remove an output, where it is."""
    shutil.rmtree(folder, ignore_errors=True)
