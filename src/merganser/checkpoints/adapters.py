"""LoRA adapters as checkpoints: the base's tensors with low-rank products added where they are read, row by row.

A PEFT folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with, for each adapted layer, the factors
A (r, in) and B (out, r) of a change ΔW = s·BA, and whole tensors (heads, biases) that take the place of the base's.
Layout: https://huggingface.co/docs/peft. Whoever reads the result sees one more checkpoint; the product exists only for
the rows that are asked for, and a tensor's hash is made of the hashes of its parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.modules import MODULES
from merganser.checkpoints.reader import HASHES, Checkpoint
from merganser.tensors import DTYPES

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
#: Products are made in blocks of rows that start at multiples of this: the same bits however a tensor is cut.
_BLOCK = 128


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: W' = (its own whole tensor, else the base's) + scale · (BA or a vector).

    Attributes:
        whole: the adapter's tensor that takes the place of the base's.
        a: the adapter's factor (r, in).
        b: the adapter's factor (out, r).
        vector: the adapter's vector that is added to a bias (``lora_bias``).
        scale: α/r, or α/√r for rank-stabilised LoRA.
        transposed: the tensor is (in, out), as in Conv1D layers and embeddings.
    """

    whole: str | None = None
    a: str | None = None
    b: str | None = None
    vector: str | None = None
    scale: float = 1.0
    transposed: bool = False

    @property
    def parts(self) -> list[str]:
        """The adapter's tensors that are used."""
        return [part for part in (self.whole, self.a, self.b, self.vector) if part]


class AdapterCheckpoint(Checkpoint):
    """A base with a LoRA adapter on it. Made by :func:`merganser.checkpoints.open_checkpoint`.

    Tensors that the adapter changes are read as float32 or wider; their :class:`TensorInfo` names the base's storage
    dtype, which a merge's output takes.

    Args:
        name: as the user gave it.
        base: the model that the adapter was trained on.
        adapter: the adapter's own files.
        changes: what the adapter does, by tensor.
        names: the base's name of each of its tensors, by the name that it has here.
        settings: ``adapter_config.json``.
        config: what ``config.json`` says differently with the adapter on (labels of a head, say).
    """

    def __init__(
        self,
        name: str,
        base: Checkpoint,
        adapter: Checkpoint,
        changes: Mapping[str, Change],
        names: Mapping[str, str],
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        self.base, self.adapter, self.changes, self.settings = base, adapter, dict(changes), dict(settings)
        self._own, self._config, self.quantisation = dict(names), dict(config), base.quantisation
        pinned = f"{pinned_name(base)}+{pinned_name(adapter)}"
        revision = pinned if base.revision or adapter.revision else None
        super().__init__(name, base.path, self._infos(), revision=revision)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's ``config.json``, with what the adapter changes."""
        return {**self.base.config, **self._config}

    @property
    def home(self) -> Checkpoint:
        """The adapter's own files."""
        return self.adapter

    @property
    def modules_path(self) -> Path:
        """The adapter's own folder where sentence-transformers saved its modules there, else the base's."""
        own = self.adapter.path
        return own if (own / MODULES).is_file() else self.base.modules_path

    def side_paths(self) -> dict[str, Path]:
        """The base's files, and over them those of an adapter that sentence-transformers saved with its modules."""
        found = self.base.side_paths()
        own = self.adapter.path
        if self.modules_path == own:
            found |= {file: own / file for file in self.adapter.side_files()}
        return found

    def side_files(self) -> list[str]:
        """The names of these files."""
        return sorted(self.side_paths())

    @property
    def is_here(self) -> bool:
        """Whether the weights can be read without a download."""
        return self.base.is_here and self.adapter.is_here

    def fetch(self) -> None:
        """Download what is on the Hub of base and adapter."""
        self.base.fetch()
        self.adapter.fetch()
        self.path = self.base.path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor ``name``, or its rows ``start:stop``: the base's as it is stored, or as the adapter changes it."""
        change = self.changes.get(name)
        if change is None:
            return self.base.read(self._own[name], start, stop)
        if change.whole is not None:
            tensor = self.adapter.read(change.whole, start, stop)
        else:
            tensor = self.base.read(self._own[name], start, stop)
            self.base.observe(self._own[name], tensor, start)  # its bytes are here: no need to read them again
        if change.a is None and change.vector is None:
            return tensor
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if change.vector is not None:
            vector = self.adapter.read(change.vector, start, stop)
            wide += vector.to(wide.dtype).mul_(change.scale)
        if change.a is not None:
            self._add_product(wide, change, start)
        return wide

    def prefetch(self, name: str) -> None:
        """Tell the system that the base's tensor will be read soon."""
        if name in self._own:
            self.base.prefetch(self._own[name])

    def observe(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Hash a tensor of the base on the way; what the adapter changes is not hashed by its sum."""
        if name not in self.changes:
            self.base.observe(self._own[name], tensor, start)

    @property
    def hashes(self) -> dict[str, str]:
        """The tensors' hashes that are known by now; may be added to by whoever read the same files elsewhere."""
        known = self.base.hashes
        for name in self.tensors:
            if self._own.get(name) in known:
                self.hash(name, "blake3")
        return self._hashes["blake3"]

    def hash(self, name: str, kind: str, tensor: Tensor | None = None) -> str:
        """The hash of a tensor's parts (base, whole tensor, factors, scale); of a tensor that is not changed, its own.

        The sum is never made for it, and ``tensor`` saves reading only where the adapter changes nothing.
        """
        known = self._hashes[kind]
        if name not in known:
            change = self.changes.get(name)
            if change is None:
                known[name] = self.base.hash(self._own[name], kind, tensor)
            else:
                known[name] = self._hash_of_parts(name, change, kind)
        return known[name]

    def _hash_of_parts(self, name: str, change: Change, kind: str) -> str:
        parts: dict[str, object] = {
            role: self.adapter.hash(part, kind)
            for role in ("whole", "a", "b", "vector")
            if (part := getattr(change, role))
        }
        if change.whole is None:
            parts["base"] = self.base.hash(self._own[name], kind)
        parts |= {"scale": change.scale, "transposed": change.transposed}
        text = json.dumps(parts, sort_keys=True)
        return HASHES[kind](f"low-rank change\n{text}\n".encode()).hexdigest()

    def _infos(self) -> dict[str, TensorInfo]:
        infos = {name: replace(self.base.tensors[own], name=name) for name, own in self._own.items()}
        for name, change in self.changes.items():
            if change.whole is None:
                continue
            theirs = self.adapter.tensors[change.whole]
            mine = infos.get(name)
            if mine is None:  # a head that the base lacks: as if it lay in the base's last file
                infos[name] = replace(theirs, name=name, file="model.safetensors")
            elif mine.shape != theirs.shape:  # a head with other labels
                size = torch.Size(theirs.shape).numel() * DTYPES[mine.dtype].itemsize
                infos[name] = replace(mine, shape=theirs.shape, nbytes=size)
        return infos

    def _add_product(self, wide: Tensor, change: Change, start: int) -> None:
        """Add rows ``start:`` of scale · BA (or of its transpose) to ``wide``, in place."""
        if change.a is None or change.b is None:
            raise RuntimeError("one factor without the other")
        rows = self.adapter.tensors[change.a].shape[1] if change.transposed else None
        rows = self.adapter.tensors[change.b].shape[0] if rows is None else rows
        stop = start + wide.shape[0]
        first = start - start % _BLOCK
        a = self.adapter.read(change.a).to(wide.dtype)
        if change.transposed:
            left, right = a.T, self.adapter.read(change.b).to(wide.dtype).T
        else:
            last = min(stop + -stop % _BLOCK, rows)
            left, right = self.adapter.read(change.b, first, last).to(wide.dtype), a
        shift = 0 if change.transposed else first
        for begin in range(first, stop, _BLOCK):
            end = min(begin + _BLOCK, rows)
            product = (left[begin - shift : end - shift] @ right).mul_(change.scale)
            low, high = max(begin, start), min(end, stop)
            wide[low - start : high - start] += product[low - begin : high - begin]


def pinned_name(checkpoint: Checkpoint) -> str:
    """A Hub reference with its commit; a folder as it was given."""
    if checkpoint.revision is None:
        return checkpoint.name
    return f"{checkpoint.name.split('@')[0]}@{checkpoint.revision}"
