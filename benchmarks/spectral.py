"""TSV-M and Iso-C of four encoders' linear layers: merganser beside full singular value decompositions in float32.

    python benchmarks/spectral.py                       # 12 layers x 768: minutes; all layers are alike
    python benchmarks/spectral.py --layers 1 --hidden 64

Task matrices are in memory; what is timed is the arithmetic, in processor seconds of one thread, so that a busy machine
disturbs it little. Variants take turns at every layer. Full decompositions are ``torch.linalg.svd``'s, of each matrix
as it is, and, since LAPACK takes long for wide ones, of their transposes. Errors are ‖τ − τ*‖/‖τ*‖ with τ* by full
decompositions in float64 of the same float32 weights, in the first layers.

Matrices are Gaussian, whose singular values lie close to each other, or have singular values like i^-d (``--decay``),
as task vectors rather have them: small ones then are told less well from large ones, and more is done in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measure
from merganser.methods import METHODS
from merganser.methods.matrix import Matrix

OURS, FULL, TURNED = "merganser", "full SVDs", "full SVDs, wide matrices transposed"
METHOD_NAMES = ("tsv_m", "iso_c")


def main() -> int:
    """Measure and write the tables."""
    options = _options()
    torch.set_num_threads(1)
    text, values = "", {}
    for decay, layers in ((0.0, options.layers), (options.decay, options.decayed)):
        if not layers:
            continue
        found = measured(options.hidden, layers, options.contributors, decay, options.judged)
        what = f"singular values like i^-{decay:g}" if decay else "Gaussian"
        text += f"\n## {what}, {layers} layers\n\n{table(found)}"
        values[what] = found
    machine = measure.machine()
    title = f"# TSV-M and Iso-C of {options.contributors} encoders, layers x {options.hidden}, one thread"
    head = f"{title}\n\n{measure.machine_line(machine)}\nProcessor seconds; in brackets as a multiple of merganser's.\n"
    measure.save("spectral", head + text, {"machine": machine, **values}, options.results)
    return 0


def measured(hidden: int, layers: int, contributors: int, decay: float, judged: int) -> dict[str, Any]:
    """Seconds and errors by method and variant, over all layers and by shape."""
    square = [(hidden, hidden)] * 4
    shapes = [*square, (4 * hidden, hidden), (hidden, 4 * hidden)]
    seconds: dict[str, dict[str, dict[str, float]]] = {m: {} for m in METHOD_NAMES}
    errors: dict[str, dict[str, list[float]]] = {m: {} for m in METHOD_NAMES}
    draw = torch.Generator().manual_seed(0)
    for layer in range(layers):
        for shape in shapes:
            base = torch.randn(shape, generator=draw) * 0.02
            tuned = [base + 1e-3 * matrix for matrix in drawn(shape, contributors, decay, draw)]
            for method in METHOD_NAMES:
                answer = None
                if layer < judged:
                    answer = FULLY[method]([one.double() - base.double() for one in tuned], turned=True)
                for variant, work in variants(method, base, tuned).items():
                    start = time.process_time()
                    result = work()
                    spent = time.process_time() - start
                    by_shape = seconds[method].setdefault(variant, {})
                    by_shape[str(shape)] = by_shape.get(str(shape), 0.0) + spent
                    if answer is not None:
                        missed = float((result.double() - base.double() - answer).norm() / answer.norm())
                        errors[method].setdefault(variant, []).append(missed)
        print(f"layer {layer + 1} of {layers}", file=sys.stderr, flush=True)
    return {"seconds": seconds, "errors": errors}


def drawn(shape: tuple[int, int], count: int, decay: float, draw: torch.Generator) -> Iterator[Tensor]:
    """Gaussian matrices, or such with the singular values i^-decay."""
    side = min(shape)
    for _ in range(count):
        if not decay:
            yield torch.randn(shape, generator=draw)
            continue
        left, right = (torch.linalg.qr(torch.randn(size, side, generator=draw))[0] for size in shape)
        yield (left * torch.arange(1, side + 1) ** -decay) @ right.T * side**0.5


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


def table(found: dict[str, Any]) -> str:
    """Seconds, ratios and errors as Markdown."""
    rows = []
    for method in METHOD_NAMES:
        ours = found["seconds"][method][OURS]
        for variant, by_shape in found["seconds"][method].items():
            cells = [f"{by_shape[shape]:.2f} ({by_shape[shape] / ours[shape]:.2f})" for shape in by_shape]
            whole = sum(by_shape.values())
            missed = found["errors"][method].get(variant)
            error = f"{statistics.median(missed):.1e}, {max(missed):.1e}" if missed else "–"
            title = METHODS[method].title
            rows.append([title, variant, f"{whole:.1f} ({whole / sum(ours.values()):.2f})", *cells, error])
    shapes = [shape.strip("()").replace(", ", "×") for shape in found["seconds"]["tsv_m"][OURS]]
    return measure.markdown(["", "", "all", *shapes, "error: median, worst"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--contributors", type=int, default=4)
    parser.add_argument("--decay", type=float, default=0.5, help="of the second kind of matrices' singular values")
    parser.add_argument("--decayed", type=int, default=2, help="layers of the second kind")
    parser.add_argument("--judged", type=int, default=3, help="layers whose errors are measured")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the tables")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
