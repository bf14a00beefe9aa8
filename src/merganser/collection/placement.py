"""Where a model stands while it is collected: in memory, on a GPU, or with its weights left on the disk.

With a memory limit accelerate keeps as many weights in memory as fit, and reads the others from the checkpoint at
every pass of the model, module by module. So a pass costs a read of the file, and larger batches cost fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merganser.checkpoints import AdapterCheckpoint
from merganser.collection.pipeline import attach_modules
from merganser.errors import UserError, require
from merganser.files import scratch_folder
from merganser.paths import expanded
from merganser.tasks.base import Task
from merganser.tasks.models import Opened, load_model

LEAST_MEMORY = 2**20


@dataclass(frozen=True)
class Placement:
    """Where the weights go.

    Attributes:
        device: ``cpu`` or ``cuda``.
        max_memory: bytes of weights in memory; None: all of them.
        offload_folder: for weights that cannot stay in the checkpoint's own files; None: a temporary folder.
    """

    device: str = "cpu"
    max_memory: int | None = None
    offload_folder: Path | None = None


def choose_placement(
    device: str, max_memory: int | None, offload_folder: str | Path | None, opened: Opened, *, fisher: bool
) -> Placement:
    """The placement that was asked for.

    Raises:
        UserError: a device that is not there, or a limit that cannot be kept.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise UserError(f"unknown device {device!r}", where="--device", mend="give cpu, cuda or auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here", where="--device", mend="use cpu or auto")
    if device == "auto":
        device = "cuda" if max_memory is None and torch.cuda.is_available() else "cpu"
    if max_memory is None:
        if offload_folder is not None:
            mend = "give --max-memory, too"
            raise UserError("nothing is left on the disk without a limit", where="--offload-folder", mend=mend)
        return Placement(device)
    problem = None
    if max_memory < LEAST_MEMORY:
        problem = f"a limit of {max_memory} bytes is too small", "give at least 1MB, such as 2GB"
    elif device == "cuda":
        problem = "a model that stays on the disk runs on the CPU", "leave the limit or --device out"
    elif fisher:
        problem = (
            "Fisher information needs all weights in memory, and so does K-FAC",
            "leave the limit, or --fisher and --kfac, out",
        )
    elif isinstance(opened.checkpoint, AdapterCheckpoint):
        what = "an adapter's base is changed in memory, so it cannot stay on the disk"
        problem = what, "leave the limit out, or merge the adapter into its base first"
    elif opened.checkpoint.quantisation is not None:
        what = f"weights that are quantised ({opened.checkpoint.quantisation.name}) are dequantised in memory"
        mend = f"leave the limit out, or make a BF16 copy first: merganser merge {opened.name} --method simple -o COPY"
        problem = what, mend
    if problem is not None:
        raise UserError(problem[0], where="--max-memory", mend=problem[1])
    require("train", "a limit of memory", "accelerate", where="--max-memory")
    folder = None if offload_folder is None else expanded(offload_folder)
    if folder is not None and not folder.is_dir():
        raise UserError("there is no such folder", where=f"--offload-folder {folder}", mend="make it, or leave it out")
    return Placement(device, max_memory, folder)


@contextmanager
def placed_model(opened: Opened, task: Task, placement: Placement, *, allow_pickle: bool) -> Iterator[nn.Module]:
    """The model, loaded and placed; what was written to the offload folder is removed afterwards.

    Raises:
        CheckpointError: as :func:`merganser.tasks.models.load_model`.
    """
    load = partial(
        load_model, opened, task.model_class(opened.config), complete=task.complete, allow_pickle=allow_pickle
    )
    if placement.max_memory is None:
        model = load()
        attach_modules(model, opened, task)
        yield model.to(placement.device)
        return
    with scratch_folder(placement.offload_folder) as folder:
        settings = {"device_map": "auto", "max_memory": {"cpu": placement.max_memory}, "offload_folder": str(folder)}
        yield load(placement=settings)


def inputs_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs; on the CPU where accelerate brings weights from the disk."""
    return torch.device("cpu") if is_offloaded(model) else next(model.parameters()).device


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are on the disk and come into memory, by accelerate, for a moment only."""
    return any(parameter.is_meta for parameter in model.parameters())


def empty_twin(model: nn.Module) -> nn.Module:
    """A model of the same structure on the meta device."""
    make: Any = type(model)
    with torch.device("meta"):
        twin: nn.Module = make(model.config)
    return twin
