"""TSV-M and Iso-C of four encoders' linear layers: merganser beside full singular value decompositions in float32.

    python benchmarks/spectral.py                       # 4 layers x 768 of each kind: minutes; all layers are alike
    python benchmarks/spectral.py --layers 1 --hidden 64
    python benchmarks/spectral.py --threads 2           # as it is used: wall time, on two cores

Task matrices are in memory; what is timed is the arithmetic, in processor seconds of one thread, so that a busy machine
disturbs it little. With several threads it is wall time: merganser works on as many matrices at once, and torch's
decompositions use the threads one after the other, as they do in a script. Variants take turns at every layer. Full
decompositions are ``torch.linalg.svd``'s, of each matrix as it is, and, since LAPACK takes long for wide ones, of their
transposes. Errors are ‖τ − τ*‖/‖τ*‖ with τ* by full decompositions in float64 of the same float32 weights, in the first
layers.

Task matrices are of four kinds. Gaussian ones have singular values that lie close to each other. Those of others fall
like i^-0.5, or like 1/i, so that small ones are told less well from large ones. And there are such as adapters leave:
a change of low rank, as large as a hundredth of the weights, and the rounding of all weights to bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measure
from merganser.methods import METHODS
from merganser.methods.matrix import Matrix
from merganser.tensors import one_thread

OURS, FULL, TURNED = "merganser", "full SVDs", "full SVDs, wide matrices transposed"
METHOD_NAMES = ("tsv_m", "iso_c")


def main() -> int:
    """Measure and write the tables."""
    options = _options()
    values = {kind: measured(kind, options) for kind in KINDS}
    machine = measure.machine()
    alone = options.threads == 1
    title = f"# TSV-M and Iso-C of {options.contributors} encoders, {options.layers} layers x {options.hidden}"
    head = f"{title}, {'one thread' if alone else f'{options.threads} threads'}\n\n{measure.machine_line(machine)}\n"
    seconds = "Processor seconds" if alone else "Seconds of wall time"
    text = f"{seconds}; in brackets as a multiple of merganser's.\n\n" + table(values)
    name = "spectral" if alone else f"spectral-{options.threads}-threads"
    measure.save(name, head + text, {"machine": machine, **values}, options.results)
    return 0


def measured(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and errors by method and variant, over all layers and by shape."""
    hidden, threads = options.hidden, options.threads
    of_a_layer = {(hidden, hidden): 4, (4 * hidden, hidden): 1, (hidden, 4 * hidden): 1}
    seconds: dict[str, dict[str, dict[str, float]]] = {m: {} for m in METHOD_NAMES}
    errors: dict[str, dict[str, list[float]]] = {m: {} for m in METHOD_NAMES}
    draw = torch.Generator().manual_seed(0)
    for layer in range(0, options.layers, threads):  # so many at a time that every thread has a matrix of each shape
        for shape, count in of_a_layer.items():
            count *= min(threads, options.layers - layer)
            bases = [(torch.randn(shape, generator=draw) * 0.02).bfloat16().float() for _ in range(count)]
            tuned = [[KINDS[kind](base, draw) for _ in range(options.contributors)] for base in bases]
            for method in METHOD_NAMES:
                works = [variants(method, base, ones) for base, ones in zip(bases, tuned, strict=True)]
                answers = (
                    [right(method, *one) for one in zip(bases, tuned, strict=True)] if layer < options.judged else []
                )
                for variant in works[0]:
                    results, spent = timed([work[variant] for work in works], threads, at_once=variant == OURS)
                    by_shape = seconds[method].setdefault(variant, {})
                    by_shape[str(shape)] = by_shape.get(str(shape), 0.0) + spent
                    found = zip(results, bases, answers, strict=True) if answers else ()
                    errors[method].setdefault(variant, []).extend(missed(*one) for one in found)
        print(f"{kind}: layer {min(layer + threads, options.layers)} of {options.layers}", file=sys.stderr, flush=True)
    return {"seconds": seconds, "errors": errors}


def timed(works: Sequence[Callable[[], Tensor]], threads: int, *, at_once: bool) -> tuple[list[Tensor], float]:
    """Results, and the seconds of all: of so many threads that each do one at once, or that do one after the other."""
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    start = clock()
    if not at_once:
        return [work() for work in works], clock() - start
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda work: work(), works)), clock() - start


def right(method: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """The merged task matrix by full decompositions in float64."""
    return FULLY[method]([one.double() - base.double() for one in tuned], turned=True)


def missed(result: Tensor, base: Tensor, answer: Tensor) -> float:
    """The relative error of a merged weight's task matrix."""
    return float((result.double() - base.double() - answer).norm() / answer.norm())


def gaussian(base: Tensor, draw: torch.Generator) -> Tensor:
    """Weights that differ from the base model's by as much everywhere."""
    return base + 1e-3 * torch.randn(base.shape, generator=draw)


def decaying(base: Tensor, draw: torch.Generator, power: float = -0.5) -> Tensor:
    """Weights whose differences have the singular values i^power."""
    side = min(base.shape)
    left, right = (torch.linalg.qr(torch.randn(size, side, generator=draw))[0] for size in base.shape)
    return base + 1e-3 * side**0.5 * (left * torch.arange(1, side + 1) ** power) @ right.T


def fine_tuned(base: Tensor, draw: torch.Generator, rank: int = 16, share: float = 0.01) -> Tensor:
    """Weights in bfloat16 that were changed in a few directions, by so large a share of their norm."""
    left, right = (torch.randn(size, rank, generator=draw) for size in base.shape)
    change = (left / torch.arange(1, rank + 1)) @ right.T
    return (base + change * (share * base.norm() / change.norm())).bfloat16().float()


KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "Gaussian": gaussian,
    "i^-0.5": decaying,
    "i^-1": partial(decaying, power=-1.0),
    "low rank + rounding": fine_tuned,
}


def variants(method: str, base: Tensor, tuned: Sequence[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """What takes turns; each returns the merged weight, once. What is read is there before."""
    chosen = METHODS[method]
    if not isinstance(chosen, Matrix):
        raise TypeError(method)
    origin, weights = base.clone(), Read(tuned)

    def full(turned: bool) -> Tensor:
        return base + FULLY[method]([one - base for one in tuned], turned=turned)

    return {
        OURS: lambda: chosen.function(origin, weights, [1.0] * len(tuned), chosen.options),
        FULL: lambda: full(False),
        TURNED: lambda: full(True),
    }


class Read(list[Tensor]):
    """Weights as a method reads them, which are its own each time; the first time they are at hand."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._at_hand = [tensor.clone() for tensor in tensors]

    def __getitem__(self, index: Any) -> Any:
        own, self._at_hand[index] = self._at_hand[index], None  # type: ignore[call-overload]
        return super().__getitem__(index).clone() if own is None else own


def decomposed(matrix: Tensor, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ."""
    if turned and matrix.shape[0] < matrix.shape[1]:
        right, values, left = torch.linalg.svd(matrix.T.contiguous(), full_matrices=False)
        return left.T, values, right.T
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def tsv_m(tasks: Sequence[Tensor], *, turned: bool) -> Tensor:
    """TSV-M's task matrix by full decompositions."""
    count = min(tasks[0].shape) // len(tasks)
    found = [decomposed(task, turned) for task in tasks]
    one = decomposed(torch.cat([left[:, :count] for left, _, _ in found], dim=1), turned)
    two = decomposed(torch.cat([right[:count] for _, _, right in found]), turned)
    return (one[0] @ one[2] * torch.cat([values[:count] for _, values, _ in found])) @ (two[0] @ two[2])


def iso_c(tasks: Sequence[Tensor], *, turned: bool) -> Tensor:
    """Iso-C's task matrix by a full decomposition."""
    left, values, right = decomposed(torch.stack(list(tasks)).sum(0), turned)
    return values.mean() * left @ right


FULLY: dict[str, Callable[..., Tensor]] = {"tsv_m": tsv_m, "iso_c": iso_c}


def table(values: dict[str, dict[str, Any]]) -> str:
    """Seconds, ratios and errors as Markdown."""
    rows, shapes = [], []
    for method in METHOD_NAMES:
        for kind, found in values.items():
            ours = found["seconds"][method][OURS]
            for variant, by_shape in found["seconds"][method].items():
                cells = [f"{by_shape[shape]:.2f} ({by_shape[shape] / ours[shape]:.2f})" for shape in by_shape]
                whole = sum(by_shape.values())
                missed = found["errors"][method].get(variant)
                error = f"{statistics.median(missed):.1e}, {max(missed):.1e}" if missed else "–"
                title = f"{METHODS[method].title}, {kind}"
                rows.append([title, variant, f"{whole:.1f} ({whole / sum(ours.values()):.2f})", *cells, error])
            shapes = [shape.strip("()").replace(", ", "×") for shape in ours]
    return measure.markdown(["task matrices", "", "all", *shapes, "error: median, worst"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of each kind of task matrices")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--contributors", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="cores to use")
    parser.add_argument("--judged", type=int, default=2, help="layers whose errors are measured")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the tables")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
