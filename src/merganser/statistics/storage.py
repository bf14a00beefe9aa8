"""Statistics in fewer bytes: Gram matrices rounded to bfloat16, or cut to a diagonal and a few eigenpairs.

    header, tensors = compress(Statistics.open(path), "lowrank:64")
    write_statistics(smaller, header, tensors)

Whatever the storage, the diagonal of every Gram matrix G is kept to the bit and G − m mᵀ, with m the mean input,
stays positive semi-definite:

``bfloat16``   rounding moves the covariance C = G − m mᵀ by up to 2⁻⁹ of each entry, which can be more than its
               smallest eigenvalues. So the rounded matrix is factored; where that fails, its off-diagonals are divided
               by 1 + τ with the smallest τ = 2⁻¹⁴, 2⁻¹³, … that mends it: the diagonal is loaded by τ, then all of C
               is divided by 1 + τ. RegMean's α does the same, and its default of 0.9 more of it. Where 2⁻² does not
               help, the Gram matrix is refused.
``lowrank:r``  C ≈ FᵀF + diag(rest) with F (r, d) the top-r eigenpairs, √λ·v in a row each, of the correlations, that
               is of C with rows and columns divided by standard deviations, as a merge does not care for the units of
               an input. F is bfloat16, at half the bytes. Measured on NER fine-tunes of a 22M encoder, as the error of
               RegMean's solution relative to how far the contributors differ (α 0.9, rank 64): 0.057 with eigenpairs
               of C, with F in float32 and in bfloat16; 0.052 with those of the correlations. Eigenpairs of G itself,
               with its diagonal kept, made several systems indefinite that solve for biases, too.

That rest = diag(C) − diag(FᵀF) is nowhere negative has two reasons, so the low-rank sum is positive semi-definite.
In exact arithmetic C − FᵀF is positive semi-definite, for the eigenpairs and also for Nyström's approximation of them
(a Schur complement; Gittens & Mahoney 2013). And where F is rounded to bfloat16, a column whose squares would sum to
more than the diagonal's entry is shortened to it and rounded toward zero.

Fisher information is rounded to bfloat16 by both. Means, diagonals and token counts stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from merganser.checkpoints.writer import TensorSpec
from merganser.errors import StatisticsError, UserError, did_you_mean
from merganser.statistics.format import AGAIN, StatisticsHeader
from merganser.statistics.gram_encodings import WIDEST, GramEncoding, gram_specs, protocol_of, variances_of
from merganser.statistics.judging import is_semidefinite
from merganser.statistics.reading import Statistics
from merganser.statistics.writing import LazyTensors, TensorGroup
from merganser.tensors import DTYPES, one_thread, pack_upper, unpack_upper

_ENCODINGS: dict[str, GramEncoding] = {"float32": "gram", "bfloat16": "covariance", "lowrank": "factor"}
_CONSTANT = 1e-5  # a variance below this part of the mean square is the rounding of float32 sums
_LOADINGS = (0.0, *(2.0**-power for power in range(14, 1, -1)))
_ROUNDS = 6  # of subspace iteration; after them the error is within a percent of the eigenpairs' on flat spectra, too
_MORE = 8  # directions beside the r that are wanted
_TINY = 1e-12  # of the trace: keeps the Nyström core regular where the rank is lower than r


@dataclass(frozen=True)
class Storage:
    """How Gram matrices are stored; ``rank`` with ``lowrank`` alone."""

    kind: Literal["float32", "bfloat16", "lowrank"]
    rank: int = 0

    def __str__(self) -> str:
        return f"lowrank:{self.rank}" if self.kind == "lowrank" else self.kind

    def pays(self, width: int) -> bool:
        """Whether eigenpairs take less room than the bfloat16 triangle of a (width, width) matrix."""
        return self.kind != "lowrank" or 2 * self.rank < width + 1


def parse_storage(text: str) -> Storage:
    """``float32``, ``bfloat16`` or ``lowrank:r``.

    Raises:
        UserError: anything else.
    """
    if text == "float32" or text == "bfloat16":
        return Storage("float32" if text == "float32" else "bfloat16")
    if rank := re.fullmatch(r"lowrank:([1-9][0-9]{0,5})", text):
        return Storage("lowrank", int(rank[1]))
    if text.startswith("lowrank"):
        raise UserError(f"{text!r} has no rank of at least 1", where="--storage", mend="write it like lowrank:64")
    mend = did_you_mean(text, ["float32", "bfloat16", "lowrank:64"])
    raise UserError(f"unknown storage {text!r}", where="--storage", mend=mend)


def compress(
    statistics: Statistics, storage: Storage | str, exceptions: Mapping[str, Storage] | None = None
) -> tuple[StatisticsHeader, Mapping[str, Tensor]]:
    """The statistics in another storage; what a storage has lost, no other one brings back.

    Args:
        statistics: in any storage. What is in the wanted one already, or of a lower rank, stays as it is.
        storage: see :func:`parse_storage`. Where r eigenpairs take more room than a bfloat16 triangle, that is taken.
        exceptions: inputs that are to have another storage, where that pays.

    Returns:
        Header and tensors for :func:`merganser.statistics.write_statistics`. The tensors are computed when they are
        asked for, one input at a time, so that more is never in memory; each is on one thread, hence the same bytes.

    Raises:
        UserError: no such storage.
        StatisticsError: low rank pays for no Gram matrix of the file. When the tensors are asked for: a Gram matrix
            that is not positive semi-definite, or that rounding damages more than a loading of 2⁻² mends.
    """
    storage = parse_storage(storage) if isinstance(storage, str) else storage
    inputs = statistics.inputs
    others = {i: other for i, other in (exceptions or {}).items() if i in inputs and other.pays(statistics.width(i))}
    dense = [input for input in inputs if input not in others and not storage.pays(statistics.width(input))]
    if dense and len(dense) == len(inputs):
        widest = max(statistics.width(input) for input in inputs)
        what = f"{storage} takes more room than bfloat16 for every Gram matrix: the widest is {widest}"
        mend = f"use bfloat16, or a rank of at most {widest // 2}" if widest > 1 else "use bfloat16"
        raise StatisticsError(what, where=statistics.path, mend=mend)
    chosen = others | dict.fromkeys(dense, Storage("bfloat16"))
    groups = [_gram_group(statistics, input, chosen.get(input, storage)) for input in inputs]
    groups += [_plain_group(statistics, name, storage) for name in statistics.others]
    tensors = LazyTensors(groups)
    notes = statistics.header.notes
    if storage.kind != "float32" or statistics.storage != "float32":
        notes = (*notes, _note(statistics, storage, len(dense)))
    if others:
        kinds = " and ".join(sorted({str(other) for other in others.values()}))
        notes = (*notes, f"storage of {len(others)} inputs inside experts: {kinds}")
    protocol = statistics.header.protocol_with(protocol_of(tensors.infos))
    return statistics.header.model_copy(update={"protocol": protocol, "notes": notes}), tensors


def _note(statistics: Statistics, storage: Storage, dense: int) -> str:
    text = f"storage: {storage}"
    if statistics.storage != "float32":
        text += f", of {statistics.storage}, whose losses stay"
    if storage.kind == "bfloat16" or dense:
        text += "; off-diagonals were shrunk by scale.<input> where rounding had cost positive semi-definiteness"
    if dense:
        text += f"; bfloat16 for {dense} narrow inputs, for which so many eigenpairs take more room"
    return text


def _plain_group(statistics: Statistics, name: str, storage: Storage) -> TensorGroup:
    info = statistics.tensors[name]
    dtype = info.dtype
    if name.startswith("fisher."):
        dtype = "F32" if storage.kind == "float32" else "BF16"
    return [TensorSpec(name, dtype, info.shape)], lambda: {name: statistics.packed(name).to(DTYPES[dtype])}


def _gram_group(statistics: Statistics, input: str, storage: Storage) -> TensorGroup:
    width, encoding = statistics.width(input), _ENCODINGS[storage.kind]
    if statistics.inputs[input] == encoding:
        rank = statistics.tensors[f"factor.{input}"].shape[0] if encoding == "factor" else 0
        if rank <= storage.rank:  # it is in the wanted storage already
            specs = gram_specs(encoding, input, width, rank)
            return specs, lambda: {spec.name: statistics.packed(spec.name) for spec in specs}
    specs = gram_specs(encoding, input, width, storage.rank)
    if encoding != "factor":
        return specs, partial(_dense if encoding == "gram" else _rounded, statistics, input)
    if width > WIDEST:
        what = f"low rank is for inputs of at most {WIDEST} components, {input} has {width}"
        raise StatisticsError(what, where=statistics.path, mend="use bfloat16")
    return specs, partial(_low_rank, statistics, input, storage.rank)


def _dense(statistics: Statistics, input: str) -> dict[str, Tensor]:
    with one_thread():
        return {f"gram.{input}": pack_upper(statistics.gram(input)), f"mean.{input}": statistics.mean(input)}


def _low_rank(statistics: Statistics, input: str, rank: int) -> dict[str, Tensor]:
    with one_thread():
        covariance, variances, kept = _covariance(statistics, input)
        deviations = covariance.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(deviations > 0, 1 / deviations, 0.0)
        covariance.mul_(inverse[:, None]).mul_(inverse[None, :])  # the correlations
        factor = rounded_within(top_factor(covariance, rank) * deviations, variances)
    return {f"factor.{input}": factor, **kept}


def _rounded(statistics: Statistics, input: str) -> dict[str, Tensor]:
    with one_thread():
        covariance, variances, kept = _covariance(statistics, input)
        packed = pack_upper(covariance.to(torch.bfloat16))
        del covariance
        loading = _loading(unpack_upper(packed).to(torch.float64), variances)
    if loading is None:
        raise StatisticsError(
            f"rounding to bfloat16 breaks the positive semi-definiteness of gram.{input}, beyond what a loading of "
            f"its diagonal by {_LOADINGS[-1]:.0%} mends",
            where=statistics.path,
            mend="use float32 or lowrank",
        )
    return {f"covariance.{input}": packed, f"scale.{input}": torch.tensor([1 / (1 + loading)]), **kept}


def _covariance(statistics: Statistics, input: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """C = G − m mᵀ and its diagonal (float64), and what is stored as it is: the diagonal of G, and m.

    Rows and columns of inputs that do not vary beyond rounding are zero in C.
    """
    gram, mean = statistics.gram(input), statistics.mean(input)
    diagonal = gram.diagonal().clone()
    wide = mean.to(torch.float64)
    covariance = gram.to(torch.float64)
    del gram
    covariance.addr_(wide, wide, alpha=-1)
    if not is_semidefinite(covariance.clone(), diagonal.to(torch.float64)):
        raise StatisticsError(
            f"the Gram matrix of {input} minus the square of its mean is not positive semi-definite, so it is no mean "
            "of x xᵀ and cannot be compressed",
            where=statistics.path,
            mend=AGAIN,
        )
    variances = variances_of(diagonal, mean)
    constant = variances <= _CONSTANT * diagonal
    covariance[constant] = 0
    covariance[:, constant] = 0
    return covariance, variances, {f"diagonal.{input}": diagonal, f"mean.{input}": mean}


def _loading(rounded: Tensor, variances: Tensor) -> float | None:
    """The smallest τ of the ladder with which the rounded covariance, its diagonal exact, can be factored.

    Args:
        rounded: (d, d) float64; used up.
        variances: (d,), its exact diagonal.
    """
    scale = torch.where(variances > 0, variances, 1.0).rsqrt()
    rounded.mul_(scale[:, None]).mul_(scale[None, :])
    for loading in _LOADINGS:
        rounded.diagonal().fill_(1 + loading)
        if int(torch.linalg.cholesky_ex(rounded).info) == 0:
            return loading
    return None


def top_factor(matrix: Tensor, rank: int) -> Tensor:
    """(r, d) float64: rows √λ·v of the r largest eigenpairs, by randomized subspace iteration and Nyström's formula.

    Costs O(d²·r), where all eigenpairs would cost O(d³) with a large constant. The same input gives the same output.

    Args:
        matrix: (d, d) float64, symmetric positive semi-definite up to rounding.
        rank: r, less than d.
    """
    width = matrix.shape[0]
    trace = float(matrix.trace())
    if trace <= 0:
        return matrix.new_zeros(rank, width)
    columns = min(width, rank + rank // 2 + _MORE)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    for _ in range(_ROUNDS):
        basis, _ = torch.linalg.qr(matrix @ basis)
    shift = _TINY * trace
    image = matrix @ basis + shift * basis
    core, failed = torch.linalg.cholesky_ex(basis.T @ image)
    while int(failed):  # C has eigenvalues below zero, by rounding
        shift = 100 * shift
        identity = torch.eye(columns, dtype=basis.dtype)
        core, failed = torch.linalg.cholesky_ex(basis.T @ (matrix @ basis) + shift * identity)
        image = matrix @ basis + shift * basis
    half = torch.linalg.solve_triangular(core, image.T, upper=False)  # halfᵀ half is Nyström's approximation
    _, values, vectors = torch.linalg.svd(half, full_matrices=False)
    lengths = (values[:rank].square() - shift).clamp_min(0).sqrt()
    return vectors[:rank] * lengths[:, None]


def rounded_within(factor: Tensor, room: Tensor) -> Tensor:
    """(r, d) bfloat16: ``factor`` rounded such that the squares of no column sum to more than ``room`` says.

    Args:
        factor: (r, d) float64.
        room: (d,) float64, what the diagonal has to give; nothing where it is negative.
    """
    nearest = factor.to(torch.bfloat16)
    over = nearest.to(torch.float64).square_().sum(0) > room
    sums = factor[:, over].square().sum(0)
    most = room[over].clamp_min(0)
    shorter = torch.where(sums > most, (most / sums.clamp_min(1e-300)).sqrt(), 1.0) * (1 - 2.0**-20)
    nearest[:, over] = _toward_zero((factor[:, over] * shorter).to(torch.float32))
    return nearest


def _toward_zero(values: Tensor) -> Tensor:
    """bfloat16 by cutting the lower half of float32's bits off."""
    return (values.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
