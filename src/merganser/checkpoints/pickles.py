"""Weights that are there as pickles alone: refused, or read as plain tensors where the user allows it.

They are read with ``weights_only=True``, which runs no code; what is in them is measured before it is copied, because
a few bytes can stand for any number of values.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints.header import TensorInfo, read_infos
from merganser.errors import CheckpointError
from merganser.files import lasting_scratch
from merganser.paths import check_file
from merganser.tensors import DTYPE_NAMES

_CONVERT = "convert it to safetensors where it was made"
_MOST_COPIES = 8  # times the size of the file that its tensors may take: several names can share one tensor


class PickledWeights(CheckpointError):
    """Weights that are there as pickles alone, and may not be read."""


def pickled(place: str | Path, stem: str) -> CheckpointError:
    """The error for weights that are there as pickles alone, with a command that converts them.

    Args:
        place: the folder, or a name on the Hub.
        stem: ``pytorch_model`` or ``adapter_model``: what their files' names begin with.
    """
    target = "model" if stem == "pytorch_model" else stem
    convert = (
        "import glob, torch; from safetensors.torch import save_file; save_file({n: t.contiguous().clone() "
        f"for f in glob.glob('{stem}*.bin') for n, t in torch.load(f, map_location='cpu', "
        "weights_only=True).items() if torch.is_tensor(t)}, "
        f"'{target}.safetensors', {{'format': 'pt'}})"
    )
    return PickledWeights(
        f"the weights are pickled ({stem}.bin), and a pickle from a stranger can run code",
        where=place,
        mend="add --allow-pickle (from Python: allow_pickle=True; read with weights_only=True), or write them as "
        f'safetensors, in a copy of the folder: python -c "{convert}"',
    )


def converted(folder: Path, files: Sequence[str], target_name: str) -> list[TensorInfo]:
    """The tensors of pickles, written as safetensors where they stay until the process ends.

    Args:
        folder: that the files lie in.
        files: the pickles.
        target_name: of the files that are written.

    Raises:
        CheckpointError: a file that is no archive of tensors alone, or one whose tensors take far more than the file.
    """
    from safetensors.torch import save_file

    place = lasting_scratch()
    infos: list[TensorInfo] = []
    for number, file in enumerate(files):
        path = folder / file
        tensors = _read(path)
        target = place / str(number) / target_name
        target.parent.mkdir()
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, target)
        infos += read_infos(target, str(target))
    return infos


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped into memory and not copied.

    Raises:
        CheckpointError: see :func:`converted`.
    """
    size = check_file(path, CheckpointError)
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            unpacked = sum(entry.file_size for entry in archive.infolist())
        state = {} if packed else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        problem = next(_problems(state, size), None)
    except Exception as error:  # whatever a stranger's pickle provokes
        said = str(error).strip().splitlines()
        problem = said[0] if said else type(error).__name__
    if not problem and (packed or unpacked > size):
        problem = "it is compressed, and nobody knows how much it is when it is not"
    if problem:
        raise CheckpointError(f"cannot be read as plain tensors: {problem}", where=path, mend=_CONVERT)
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def _problems(state: object, size: int) -> Iterator[str]:
    """What keeps an unpickled value from being written as tensors.

    Args:
        state: the value.
        size: of the file, in bytes.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        yield "it holds no table of tensors by name"
        return
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            yield f"tensor {name!r} is of a kind that safetensors has not ({tensor.dtype}, {tensor.layout})"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            yield f"tensor {name!r} of shape {list(tensor.shape)} repeats the few numbers that are there"
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > _MOST_COPIES * size:
        yield f"its tensors take more than {_MOST_COPIES} times the size of the file"
