"""The engine for one machine with several cores, or a GPU that one process does not keep busy: a process a job.

    make_engine("processes", workers=8)

Processes are started when the first jobs come and stay until the engine is closed or this process ends, since each
has to import what it works with. A process that is lost, for want of memory say, fails the jobs that were running; the
others go on in new ones.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from merganser.engines.base import Engine, Job, Outcome, call, describe, job_bar, outcome_of, payload_of
from merganser.errors import UserError

_LOST = "the process that worked on it was lost: out of memory? Give fewer workers, or the same command again"


class ProcessEngine(Engine):
    """Runs several jobs at once, each in a process of its own on this machine.

    Args:
        workers: how many; by default one for each core that this process may use. What jobs say of cpus, memory and
            gpus changes nothing.
        description: what the jobs are for, shown in front of the bar.

    Raises:
        UserError: fewer than one worker.
    """

    name = "processes"

    def __init__(self, workers: int | None = None, *, description: str = "experiment") -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers, self.description = cores if workers is None else workers, description
        if self.workers < 1:
            raise UserError(f"{workers} workers", where="--workers", mend="give 1 or more")
        self._threads = max(1, cores // self.workers)
        self._pool: ProcessPoolExecutor | None = None

    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        waiting, running = list(reversed(jobs)), dict[Future[str], Job]()
        with job_bar(jobs, self.description) as shown:
            try:
                while waiting or running:
                    while waiting and len(running) < self.workers:
                        job = waiting.pop()
                        running[self._submit(function, payload_of(job))] = job
                    told = ", ".join(job.description for job in list(running.values())[:2])
                    done = len(jobs) - len(waiting) - len(running)
                    describe(shown, f"{self.description} [{done}/{len(jobs)}]: {told}")
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        shown.update(job.cost)
                        yield self._outcome(job, future)
            except BaseException:
                self.close(stop=True)
                raise

    def _submit(self, function: str, payload: str) -> Future[str]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_begin, initargs=(self._threads,))
        try:
            return self._pool.submit(call, function, payload)
        except BrokenProcessPool:
            self.close()
            return self._submit(function, payload)

    def _outcome(self, job: Job, future: Future[str]) -> Outcome:
        try:
            return outcome_of(job, future.result())
        except BrokenProcessPool:
            return Outcome(job, None, _LOST, 0)

    def close(self, *, stop: bool = False) -> None:
        """End the processes; with ``stop`` also what they are working on."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes: dict[int, Any] = dict(getattr(pool, "_processes", None) or {}) if stop else {}
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes.values():
            process.terminate()


def _begin(threads: int) -> None:
    """Give a new process its share of the cores, and leave interrupts to the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read by torch when a job imports it
