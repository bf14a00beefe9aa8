"""A LoRA adapter as the target of a plan: the best of a given rank in the norm that the layers' inputs make.

    merganser merge base+adapter-a base+adapter-b --as-adapter 16 -o merged-adapter

Each linear weight's change is the nearest of that rank in the norm of its inputs' Gram matrices, see
:mod:`merganser.merging.targets.low_rank`; an embedding's, in that of the token frequencies. Whatever else the merge
changes (heads, norms, biases) goes into the adapter as a whole, where PEFT has a place for it. Finished tensors wait
on disk, not in memory, until it is known which there are.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merganser.checkpoints import AdapterCheckpoint, hash_tensor
from merganser.checkpoints.adapters import CONFIG, WEIGHTS
from merganser.checkpoints.layers import Layer, empty_model, layers_of, map_parameters
from merganser.checkpoints.sources import read_source
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import RecipeError
from merganser.merging.execution import TensorRecord, storable
from merganser.merging.inputs import Inputs
from merganser.merging.judging import NOTHING_JUDGED, Verdict
from merganser.merging.plan import Plan, Step
from merganser.merging.provenance import describe_inputs, model_card, public_name, write_provenance
from merganser.merging.targets.low_rank import best_low_rank
from merganser.methods import Merged
from merganser.methods.base import elements, input_width
from merganser.tensors import DTYPES, byte_view
from merganser.text import markdown

PREFIX = "base_model.model."
_HEAD_CLASSES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


_MADE = """Made with merganser: {}. Each layer's change is the nearest of this rank in the norm of its inputs' Gram
matrices, where the contributors publish them. `provenance.json` holds the recipe, the plan, the hash of every parent
and tensor, and each layer's error; `merganser verify` checks it and `merganser reproduce` repeats it byte for byte."""


class AdapterTarget:
    """Turns merged tensors into those of an adapter. Use as a context manager.

    Args:
        plan: what is carried out, with a rank.
        inputs: the open files, with the adapter's base.
        folder: of the result.

    Attributes:
        records: what became of each tensor of the adapter.
        targets: modules with factors.
        saved: modules that are kept as a whole.
        lost: tensors that differ from the base and have no place, with the reason.
        biases: modules whose bias differs, beside those kept as a whole.
        errors: of each module with factors, relative, in the norm that was used.
    """

    def __init__(self, plan: Plan, inputs: Inputs, folder: Path) -> None:
        if inputs.base is None or plan.rank is None:
            raise RuntimeError("the plan promised a base model and a rank")
        self.plan, self.inputs, self.base, self.rank = plan, inputs, inputs.base, plan.rank
        self._folder = folder
        self.total = plan.bytes_written
        self.records: dict[str, TensorRecord] = {}
        self.targets, self.saved, self.biases = set[str](), set[str](), set[str]()
        self.lost: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self._dtype = plan.recipe.dtype or "F32"
        self._waiting: dict[str, tuple[int, tuple[int, ...]]] = {}  # offset in the file below, and shape
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed on exit)
        self._lock, self._whole = threading.Lock(), dict[str, Tensor]()
        first = inputs.reference.checkpoint
        self._model = model = empty_model(first)
        self._layers: dict[str, Layer] = {}
        for layer in layers_of(model, first):
            self._layers.setdefault(layer.weight, layer)
        self._parameters: dict[str, str] = {}
        for parameter, own in map_parameters(model, first).items():
            self._parameters.setdefault(own, parameter)
        self._linear_biases = {layer.bias for layer in self._layers.values() if layer.bias}
        heads = [
            module
            for parent in inputs.parents
            if isinstance(parent.checkpoint, AdapterCheckpoint)
            for module in parent.checkpoint.settings.get("modules_to_save") or ()
        ]
        self._heads = tuple(dict.fromkeys(heads))

    def __enter__(self) -> AdapterTarget:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    @staticmethod
    def extra_bytes(step: Step) -> int:
        """What factors take beside the merge: the whole change, its basis, the Gram matrix, the system's vectors."""
        widths = [(prod(f.shape), input_width(f), f.shape[0]) for f in step.unit.facts if len(f.shape) == 2]
        return elements(step.unit) * 4 + max(
            (n * 3 * 8 + width**2 * 3 * 8 + min(width, height) ** 2 * 4 * 8 for n, width, height in widths), default=0
        )

    def take(self, step: Step, firsts: Mapping[str, int], merged: Merged) -> int:
        """Put the slices of each tensor together."""
        done = 0
        for name, tensor in merged.tensors.items():
            spec, tensor = self.plan.specs[name], tensor.cpu()
            if tensor.shape == spec.shape:
                self._whole[name] = tensor
            else:
                first, last = firsts[name], firsts[name] + tensor.shape[0]
                whole = self._whole.get(name)
                whole = tensor.new_empty(spec.shape) if whole is None else whole
                self._whole[name] = whole
                whole[first:last] = tensor
            done += spec.nbytes * tensor.numel() // max(1, prod(spec.shape))
        return done

    def finish(self, step: Step, note: str | None) -> None:
        """Find the adapter's tensors of what is whole now."""
        for name in step.unit.names:
            self._add_tensor(name, self._whole.pop(name), step, note)

    def _add_tensor(self, name: str, merged: Tensor, step: Step, note: str | None) -> None:
        storable(merged, merged.dtype, name, step.method)
        before = self._before(name, tuple(merged.shape))
        if before is not None and torch.equal(merged.to(torch.float64), before.to(torch.float64)):
            return
        layer, parameter = self._layers.get(name), self._parameters.get(name)
        if parameter is None or not merged.is_floating_point():
            self.lost[name] = "no parameter of the model"
            return
        module, _, kind = parameter.rpartition(".")
        if before is None or self._is_head(module):
            self._keep(parameter, merged, step, note)
        elif layer is not None and self._has_factors(layer) and min(merged.shape) >= self.rank:
            delta = merged.to(torch.float64) - before.to(torch.float64)
            self._add_factors(layer, delta, step, note)
        elif name in self._linear_biases and kind == "bias":
            self.biases.add(module)
            self._put(parameter, merged, step, note)
        else:  # norms, and heads whose factors would be no smaller
            self._keep(parameter, merged, step, note)

    def _has_factors(self, layer: Layer) -> bool:
        """Whether PEFT's plain factors are a change of it: a single matrix."""
        matrix = len(self.inputs.reference.checkpoint.tensors[layer.weight].shape) == 2
        return matrix and layer.experts is None and layer.kind in ("linear", "conv1d", "embedding")

    def _before(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The base's tensor, if it has one of this shape."""
        info = self.base.info(name)
        if info is None or info.shape != shape:
            return None
        return read_source(self.base.checkpoint, self.base.sources[name])

    def _is_head(self, module: str) -> bool:
        parents = [module[:at] for at, letter in enumerate(module) if letter == "."]
        return any(name.endswith(head) for name in [*parents, module] for head in self._heads)

    def _keep(self, parameter: str, merged: Tensor, step: Step, note: str | None) -> None:
        module = parameter.rpartition(".")[0]
        if any(True for _ in self._model.get_submodule(module).children()):
            self.lost[parameter] = "a bare parameter, not of a layer"
            return
        self.saved.add(module)
        self._put(parameter, merged, step, note)

    def _add_factors(self, layer: Layer, delta: Tensor, step: Step, note: str | None) -> None:
        transposed = layer.kind in ("conv1d", "embedding")
        gram = self._gram(layer, step)
        found = best_low_rank(delta.T if transposed else delta, gram, self.rank)
        names = ("lora_embedding_A", "lora_embedding_B") if layer.kind == "embedding" else None
        a, b = names or ("lora_A.weight", "lora_B.weight")
        norm = {"embedding": "of the token counts"}.get(layer.kind, "of the Gram matrices")
        said = f"rank {self.rank}: relative error {found.error:.2e} in the "
        said += "plain norm: no statistics" if gram is None else f"norm {norm}"
        said = f"{said}; {note}" if note else said
        self.targets.add(layer.module)
        self.errors[layer.module] = found.error
        self._put(f"{layer.module}.{a}", found.a, step, said)
        self._put(f"{layer.module}.{b}", found.b, step, said)

    def _gram(self, layer: Layer, step: Step) -> Tensor | None:
        """The contributors' Gram matrices (or token frequencies) summed by coefficient; None where one has none."""
        total: Tensor | None = None
        for number, parent in enumerate(self.inputs.parents):
            weight = abs(parent.contributor.single_coefficient)
            if weight == 0:
                continue
            statistics, own = parent.statistics, parent.sources.get(layer.weight)
            entry = statistics.layer(own.leaf.tensor) if statistics and own else None
            if statistics is None or entry is None:
                return None
            if layer.kind == "embedding":
                if not statistics.has_count(entry.module):
                    return None
                counts = statistics.count(entry.module).to(torch.float64)
                part = counts / counts.sum().clamp_min(1)
                if step.rows is not None:
                    rows = torch.tensor(step.rows.own[number])
                    part = torch.where(rows < 0, 0.0, part[rows.clamp_min(0)])
            elif entry.input is None:
                return None
            else:
                part = statistics.gram(entry.input).to(torch.float64)
            total = part * weight if total is None else total.add_(part, alpha=weight)
        return total

    def _put(self, name: str, tensor: Tensor, step: Step, note: str | None) -> None:
        self._store(name, tensor, TensorRecord("", step.method, step.reason, note))

    def _store(self, name: str, tensor: Tensor, record: TensorRecord) -> None:
        stored, name = storable(tensor, DTYPES[self._dtype], name, record.method), f"{PREFIX}{name}"
        with self._lock:
            self._waiting[name] = (self._file.seek(0, 2), tuple(stored.shape))
            self._file.write(byte_view(stored))
            self.records[name] = replace(record, blake3=hash_tensor(stored, self._dtype, "blake3"))

    def complete(self, verdict: Verdict = NOTHING_JUDGED) -> Plan:
        """Write everything, when every step is finished; returns the plan with notes on what the adapter lacks.

        Args:
            verdict: what was found of the statistics, for card and provenance.

        Raises:
            RecipeError: no linear layer differs from the base's.
        """
        specs = self._write()
        plan = replace(self.plan, notes=(*self.plan.notes, *self._notes()))
        people, base = describe_inputs(plan, self.inputs)
        front = {
            "base_model": public_name(self.base.contributor.model, self.base.checkpoint.revision),
            "base_model_relation": "adapter",
            "library_name": "peft",
            "tags": ["lora"],
        }
        title, sections = f", as a LoRA adapter of rank {self.rank}", self._sections + verdict.section()
        notes = plan.notes + verdict.notes
        card = model_card(
            plan, people, self.records, front=front, made=_MADE, title=title, sections=sections, notes=notes
        )
        (self._folder / "README.md").write_text(card, encoding="utf-8")
        places = {spec.name: (WEIGHTS, spec.name) for spec in specs}
        more = {"as_adapter": self.rank, **verdict.record()}
        write_provenance(plan, self._folder, self.records, people, base, {WEIGHTS: specs}, places, **more)
        return plan

    def _write(self) -> list[TensorSpec]:
        """The weights, modules complete and names as PEFT has them, and the configuration.

        Raises:
            RecipeError: no linear layer differs from the base's.
        """
        if not self.targets:
            raise RecipeError(
                "no linear layer of the merge differs from the base's: there is nothing for an adapter to hold",
                where="--as-adapter",
                mend="write a full checkpoint, or check the contributors and the base",
            )
        self.biases -= self.saved
        own_names = {parameter: own for own, parameter in self._parameters.items()}
        for module in self.saved:  # PEFT wants all parameters of a module that it replaces
            for kind, _ in self._model.get_submodule(module).named_parameters():
                name = f"{module}.{kind}"
                own = self.base.sources.get(own_names.get(name, ""))
                if f"{PREFIX}{name}" not in self._waiting and own is not None:
                    whole = read_source(self.base.checkpoint, own)
                    self._store(name, whole, TensorRecord("", "copy", "as in the base", None))
        for module in self.biases & self.targets:  # PEFT wraps the layer that has the bias
            plain, wrapped = (f"{PREFIX}{module}.{name}" for name in ("bias", "base_layer.bias"))
            self._waiting[wrapped] = self._waiting.pop(plain)
            self.records[wrapped] = self.records.pop(plain)
        specs = [TensorSpec(name, self._dtype, shape) for name, (_, shape) in sorted(self._waiting.items())]
        with SafetensorsWriter(self._folder, {WEIGHTS: specs}) as writer:
            for spec in specs:
                tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
                self._file.seek(self._waiting[spec.name][0])
                self._file.readinto(byte_view(tensor))  # type: ignore[attr-defined]
                writer.write(WEIGHTS, spec.name, tensor)
        _write_json(self._folder / CONFIG, self._settings())
        config = self.inputs.reference.checkpoint.config
        if self.saved and config != self.base.checkpoint.config:  # its head has other labels, or the base none
            _write_json(self._folder / "config.json", config)
        return specs

    def _settings(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        checkpoint, named = self.base.checkpoint, str(self.plan.base)
        architecture = str((self.inputs.reference.checkpoint.config.get("architectures") or [""])[0])
        task = next((t for suffix, t in _HEAD_CLASSES.items() if architecture.endswith(suffix)), None)
        conv1d = [layer for layer in self._layers.values() if layer.kind == "conv1d"]
        return {
            "peft_type": "LORA",
            "task_type": task,
            "auto_mapping": None,
            "base_model_name_or_path": named.split("@")[0] if checkpoint.revision else named,
            "revision": checkpoint.revision,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": bool(conv1d),
            "bias": "all" if self.biases else "none",
            "target_modules": sorted(self.targets),
            "modules_to_save": sorted(self.saved) or None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _notes(self) -> list[str]:
        """What the adapter holds only in part, or not at all."""
        worst = max(self.errors, key=lambda module: (self.errors[module], module))
        middle = sorted(self.errors.values())[len(self.errors) // 2]
        found = [
            f"{len(self.errors)} layers at rank {self.rank}: relative error {middle:.2e} in the middle, at most "
            f"{self.errors[worst]:.2e} ({worst})"
        ]
        if whole := sorted(self.saved | self.biases):
            found.append(f"held as a whole: {len(whole)} modules' norms, heads or biases")
        found += [
            f"{layer.module} is tied to another layer, which an adapter reaches only when merged into its base"
            for layer in self._layers.values()
            if layer.tied and layer.module in self.targets
        ]
        return found + [f"lost: {name} ({reason})" for name, reason in sorted(self.lost.items())]

    @property
    def _sections(self) -> str:
        """What the card says of the layers that are farthest off."""
        worst = sorted(self.errors, key=lambda module: (-self.errors[module], module))[:10]
        rows = "\n".join(f"| {markdown(module)} | {self.errors[module]:.2e} |" for module in worst)
        return f"\n| layer | relative error |\n|---|---|\n{rows}\n"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
