"""Accumulators of Gram matrices and their means, and the threads that fill and multiply them.

Real tokens are gathered into a buffer for each distinct input; when the buffers are full, all of them are
multiplied at once. Forward passes of small batches, and products, are the units of work: each runs on one
thread, as many at once as torch has threads. So sums have one order whatever the number of threads, small
matrices cost no synchronisation, and each product has thousands of rows.

torch has no symmetric rank-k update. NumPy has: ``x.T @ x`` of one array calls BLAS's ``ssyrk``, which computes
one triangle only. Measured on Zen 4, one thread, in terms of half the full product's arithmetic: ssyrk 95
GFLOP/s at widths 384–1536, recursive torch tiles 80, a full product 49.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from merganser.tensors import roomy_empty

BUFFER_BYTES = 256 * 2**20  # of all buffers together
MOST_ROWS = 8192  # of one buffer; more gains nothing
FEWEST_ROWS = 256  # below this a buffer is not worth its copies: batches are multiplied as they come
TILE = 2048  # wider matrices are cut into tiles of this width, so that all threads have work

Task = Callable[[], None]


class Gram:
    """Sums of x xᵀ and of x over rows x of width d, in float32; of the former the upper triangle counts.

    Attributes:
        rows: in the sums.
        seen: rows that those in the sums stand for: more than ``rows`` where they are a sample.

    Args:
        width: d.
        capacity: rows of the buffer; 0 for none.
        device: of the inputs. Off the CPU there is no buffer, and the device's own full product is used.
    """

    def __init__(self, width: int, capacity: int, device: torch.device) -> None:
        self.width, self.rows, self.seen = width, 0, 0
        self._total = torch.zeros(width, width, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        on_cpu = device.type == "cpu"
        self._buffer = roomy_empty(capacity, width, self._total) if capacity and on_cpu else None
        self._filled = 0

    @property
    def capacity(self) -> int:
        """Rows of the buffer; 0 where there is none."""
        return 0 if self._buffer is None else self._buffer.shape[0]

    def fits(self, rows: int) -> bool:
        """Whether so many rows still fit into the buffer, or never will."""
        return rows > self.capacity or self._filled + rows <= self.capacity

    def reserve(self, rows: int) -> Tensor | None:
        """A place (rows, d) in the buffer, to be filled before the next :meth:`flush`; None if they never fit."""
        if self._buffer is None or not 0 < rows <= self.capacity:
            return None
        self._filled += rows
        self.rows += rows
        return self._buffer[self._filled - rows : self._filled]

    def flush(self) -> list[Task]:
        """The products of what the buffer holds, as independent tasks; it counts as empty afterwards."""
        if self._buffer is None or not self._filled:
            return []
        block = self._buffer[: self._filled]
        self._filled = 0
        return self._products(block)

    def add(self, block: Tensor) -> list[Task]:
        """The products of rows (n, d) that are in no buffer, as independent tasks."""
        self.rows += block.shape[0]
        return self._products(block.to(torch.float32))

    def mean_product(self) -> Tensor:
        """(d, d): the mean of x xᵀ; only its upper triangle is meaningful. Used up until :meth:`clear`."""
        return self._total.div_(self.rows).cpu()

    def mean(self) -> Tensor:
        """(d,): the mean of x, float32."""
        return (self._sum / self.rows).to(torch.float32).cpu()

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self.rows = self.seen = self._filled = 0
        self._total.zero_()
        self._sum.zero_()

    def _products(self, block: Tensor) -> list[Task]:
        if block.device.type != "cpu":
            self._sum += block.sum(0, dtype=torch.float64)
            self._total.addmm_(block.T, block)
            return []
        x, total, sums = block.numpy(), self._total.numpy(), self._sum.numpy()
        starts = range(0, self.width, TILE)
        return [_product(x, total, sums, i, j) for i in starts for j in starts if i <= j]


def _product(x: np.ndarray, total: np.ndarray, sums: np.ndarray, i: int, j: int) -> Task:
    rows, columns = slice(i, i + TILE), slice(j, j + TILE)

    def run() -> None:
        left = x[:, rows]
        with np.errstate(all="ignore"):  # what is not finite is found at the end, and named
            if i == j:
                sums[rows] += np.ones(len(x), np.float32) @ left
                total[rows, rows] += left.T @ left  # one array, twice: ssyrk
            else:
                total[rows, columns] += left.T @ x[:, columns]

    return run


def fill(place: Tensor, rows: Tensor, index: Tensor | None) -> None:
    """Copy ``rows`` (n, d), or those of ``index``, to a place that was reserved for them."""
    if index is None:
        place.copy_(rows)
    elif rows.dtype == torch.float32:
        torch.index_select(rows, 0, index, out=place)
    else:
        place.copy_(rows.index_select(0, index))


class Workers:
    """Threads that run tasks, each with torch and BLAS on one thread. A context manager."""

    def __init__(self, threads: int) -> None:
        threads = max(1, threads)
        before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="merganser")
        self._blas = ThreadpoolController()
        started = threading.Barrier(threads)

        def start() -> None:
            torch.get_num_threads()  # a thread takes over the process's number at its first question, so first ask
            torch.set_num_threads(1)
            started.wait()

        self.run([start] * threads)
        torch.set_num_threads(before)  # of the process, which threads to come take over

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks and wait for them; after an error, for those that have begun."""
        if not tasks:
            return
        with self._blas.limit(limits=1, user_api="blas"):
            futures = [self._pool.submit(task) for task in tasks]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                wait(futures)
                raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def buffer_rows(widths: Iterable[int], budget: int = BUFFER_BYTES) -> int:
    """Rows of each buffer, so that all of them fit into ``budget`` bytes; 0 where they would be too small."""
    rows = min(MOST_ROWS, budget // max(1, 4 * sum(widths)))
    return rows if rows >= FEWEST_ROWS else 0
