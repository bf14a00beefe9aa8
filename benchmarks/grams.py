"""Merge statistics that look like those of a trained encoder, made without a model or data.

The Gram matrix of an input is X'X/n of normal inputs with a decaying spectrum, features of uneven size and a mean,
as collected Grams of encoders have them: eigenvalues fall like 1/j^0.8 and then faster, to a condition number near
10^6, and a fifth of the trace lies in the mean. X'X itself is drawn (Bartlett's decomposition), not X.
Contributors share directions and scales of an input; their spectra, means and samples differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
from checkpoints import Encoder, generator
from merganser.checkpoints import open_checkpoint
from merganser.statistics import FILE_NAME, write_statistics
from merganser.statistics.format import LayerStatistics, StatisticsHeader

ROWS_PER_FEATURE = 4  # how many inputs, as a multiple of their width


def encoder_family(scratch: Path, encoder: Encoder, contributors: int = 4) -> list[Path]:
    """Contributors of an encoder in float32, statistics in their folders; made where they are not there yet."""
    folder = scratch / f"encoder-{encoder.layers}x{encoder.hidden}"
    _, models = checkpoints.write_family(folder, encoder.shapes(), encoder.config(), torch.float32, contributors)
    for number, model in enumerate(models):
        if not (model / FILE_NAME).exists():
            _write(model, encoder, number)
    return models


def gram_and_mean(key: str, width: int, contributor: int) -> tuple[Tensor, Tensor]:
    """The Gram matrix (width, width) and mean (width,) of the input ``key`` of a contributor, float32.

    Args:
        key: what contributors share.
        width: of the input.
        contributor: its number.
    """
    shared, own = generator(key), generator(f"{key} of {contributor}")
    order = torch.randperm(width, generator=shared)
    features = (0.5 * torch.randn(width, generator=shared)).exp()
    place = torch.arange(width) / width
    spectrum = (1 + torch.arange(width)) ** -0.8 * 10 ** (-3 * place)
    spectrum *= (0.5 * torch.randn(width, generator=own)).exp()
    spectrum /= spectrum.sum()
    rows = ROWS_PER_FEATURE * width
    lower = torch.randn(width, width, generator=own).tril_(-1)
    freedom = torch.arange(rows, rows - width, -1, dtype=torch.float32)  # chi squared, which is nearly normal here
    lower.diagonal().copy_((freedom + (2 * freedom).sqrt() * torch.randn(width, generator=own)).sqrt())
    root = (spectrum.sqrt()[:, None] * (lower / rows**0.5)).T @ _rotation(width)[:, order] * features
    mean = torch.randn(width, generator=shared) + 0.5 * torch.randn(width, generator=own)
    mean *= features * (0.25 / width / 1.25) ** 0.5
    return (root.T @ root).addr_(mean, mean), mean


@lru_cache(maxsize=2)
def _rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator(f"rotation of {width}")))[0]


def _inputs(encoder: Encoder, number: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, (_, width) in dict(encoder.linear().values()).items():
        yield key, *gram_and_mean(key, width, number)


def _write(model: Path, encoder: Encoder, number: int) -> None:
    from merganser.tensors import pack_upper

    checkpoint = open_checkpoint(model)
    tensors = {}
    for key, gram, mean in _inputs(encoder, number):
        tensors |= {f"gram.{key}": pack_upper(gram), f"mean.{key}": mean}
    rows = ROWS_PER_FEATURE * encoder.intermediate
    layers = tuple(
        LayerStatistics(module=m, kind="linear", weight=f"{m}.weight", bias=f"{m}.bias", input=key, rows=rows)
        for m, (key, _) in encoder.linear().items()
    )
    header = StatisticsHeader(
        layers=layers,
        protocol=3,
        hash_kind="blake3",
        manifest_hash=checkpoint.manifest_hash("blake3"),
        tensor_hashes={name: checkpoint.hash(name, "blake3") for name in checkpoint.tensors},
        examples=rows,
        tokens=rows,
        masking="none: drawn at random",
        label="made to measure with; no data",
    )
    write_statistics(model / FILE_NAME, header, tensors)
