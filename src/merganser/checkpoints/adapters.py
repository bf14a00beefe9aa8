"""LoRA adapters as checkpoints: the base's tensors with low-rank products added where they are read, row by row.

A PEFT folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with, for each adapted layer, the factors
A (r, in) and B (out, r) of a change ΔW = s·BA, and whole tensors (heads, biases) that take the place of the base's.
Layout: https://huggingface.co/docs/peft. Whoever reads the result sees one more checkpoint; the product exists only for
the rows that are asked for, and a tensor's hash is made of the hashes of its parts.

The layer that is adapted and the tensor that is stored may differ (experts are packed here and separate there), so a
change says which box of a stored tensor it changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.changes import Change, apply
from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.modules import MODULES
from merganser.checkpoints.reader import HASHES, Checkpoint
from merganser.checkpoints.tokenizer_files import is_tokenizer_file, lists_tokens
from merganser.tensors import DTYPES

_OF_MODELS = ("generation_config.json",)  # beside a tokenizer, and not of it
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class AdapterCheckpoint(Checkpoint):
    """A base with a LoRA adapter on it. Made by :func:`merganser.checkpoints.open_checkpoint`.

    Tensors that the adapter changes are read as float32 or wider; their :class:`TensorInfo` names the base's storage
    dtype, which a merge's output takes.

    Args:
        name: as the user gave it.
        base: the model that the adapter was trained on.
        adapter: the adapter's own files.
        changes: what the adapter does, by tensor; several changes are of different boxes of it.
        names: the base's name of each of its tensors, by the name that it has here.
        settings: ``adapter_config.json``.
        config: what ``config.json`` says differently with the adapter on (labels of a head, say).
    """

    def __init__(
        self,
        name: str,
        base: Checkpoint,
        adapter: Checkpoint,
        changes: Mapping[str, Sequence[Change]],
        names: Mapping[str, str],
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        self.base, self.adapter, self.settings = base, adapter, dict(settings)
        self.changes = {name: tuple(found) for name, found in changes.items()}
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

    @property
    def tokenizer_path(self) -> Path:
        """The adapter's own folder where it was saved with the tokenizer that it was trained with, else the base's."""
        own = self.adapter.path
        return own if lists_tokens(own) else self.base.tokenizer_path

    def side_paths(self) -> dict[str, Path]:
        """The base's files, and in their place the adapter's own tokenizer.

        Over both go the files of an adapter that sentence-transformers saved with its modules.
        """
        found = self.base.side_paths()
        own = self.adapter.path
        if self.tokenizer_path == own:
            kept = {file: path for file, path in found.items() if not is_tokenizer_file(file) or file in _OF_MODELS}
            theirs = [file for file in self.adapter.side_files() if is_tokenizer_file(file)]
            found = kept | {file: own / file for file in theirs}
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
        changes = self.changes.get(name)
        if changes is None:
            return self.base.read(self._own[name], start, stop)
        whole = next((change.whole for change in changes if change.replaces), None)
        if whole is not None:
            tensor = self.adapter.read(whole, start, stop)
        else:
            tensor = self.base.read(self._own[name], start, stop)
            self.base.observe(self._own[name], tensor, start)  # its bytes are here: no need to read them again
        if any(change.widens for change in changes) or any(change.rows for change in changes):
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for change in changes:
            apply(change, self.adapter, tensor, start)
        return tensor

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
            changes = self.changes.get(name)
            if changes is None:
                known[name] = self.base.hash(self._own[name], kind, tensor)
            else:
                known[name] = self._hash_of_parts(name, changes, kind)
        return known[name]

    def _hash_of_parts(self, name: str, changes: Sequence[Change], kind: str) -> str:
        found = [self._parts(change, kind) for change in changes]
        if not any(change.replaces for change in changes):
            found[0]["base"] = self.base.hash(self._own[name], kind)
        text = json.dumps(found[0] if len(found) == 1 else found, sort_keys=True)
        return HASHES[kind](f"low-rank change\n{text}\n".encode()).hexdigest()

    def _parts(self, change: Change, kind: str) -> dict[str, object]:
        """What a change is made of, with the hashes of its tensors; what is usual is not said."""
        parts: dict[str, object] = {role: self.adapter.hash(part, kind) for role, part in change.parts.items()}
        parts |= {"scale": change.scale, "transposed": change.transposed}
        special = {"experts": change.experts, "tokens": change.tokens}
        box = change.box and (change.box.at, change.box.part, change.box.dims)
        return parts | {key: value for key, value in {**special, "box": box}.items() if value}

    def _infos(self) -> dict[str, TensorInfo]:
        infos = {name: replace(self.base.tensors[own], name=name) for name, own in self._own.items()}
        for name, changes in self.changes.items():
            whole = next((change.whole for change in changes if change.replaces), None)
            if whole is None:
                continue
            theirs = self.adapter.tensors[whole]
            mine = infos.get(name)
            if mine is None:  # a head that the base lacks: as if it lay in the base's last file
                infos[name] = replace(theirs, name=name, file="model.safetensors")
            elif mine.shape != theirs.shape:  # a head with other labels
                size = torch.Size(theirs.shape).numel() * DTYPES[mine.dtype].itemsize
                infos[name] = replace(mine, shape=theirs.shape, nbytes=size)
        return infos


def pinned_name(checkpoint: Checkpoint) -> str:
    """A Hub reference with its commit; a folder as it was given."""
    if checkpoint.revision is None:
        return checkpoint.name
    return f"{checkpoint.name.split('@')[0]}@{checkpoint.revision}"
