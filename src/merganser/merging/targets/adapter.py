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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merganser.checkpoints import hash_tensor
from merganser.checkpoints.adapters import CONFIG, WEIGHTS
from merganser.checkpoints.layers import Layer
from merganser.checkpoints.sources import read_source
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import RecipeError
from merganser.merging.adapters import rank_of
from merganser.merging.execution import TensorRecord, storable, takes_products
from merganser.merging.inputs import Inputs
from merganser.merging.judging import NOTHING_JUDGED, Verdict
from merganser.merging.matching import matches
from merganser.merging.memory import RunSettings, Schedule, fit
from merganser.merging.plan import AdapterForm, Plan, Step
from merganser.merging.provenance import describe_inputs, model_card, public_name, write_provenance
from merganser.merging.targets.adapter_names import (
    READ_DIRECTLY,
    NamesOfChanges,
    NamesOfModel,
    adapter_settings,
    known_to_be_tied,
)
from merganser.merging.targets.low_rank import best_low_rank
from merganser.methods import Merged
from merganser.methods.base import elements, input_width
from merganser.methods.products import Product
from merganser.tensors import DTYPES, byte_view
from merganser.text import markdown

PREFIX = "base_model.model."
_INSIDE = "a part of a larger parameter, such as packed experts, for which no factors are written"


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
        ranks: of the modules with factors.
        vectors: modules whose bias has a vector added to it (``lora_bias``).
        saved: modules that are kept as a whole.
        lost: by the reason, the tensors that differ from the base and have no place, with ‖ΔW‖ / ‖W‖.
        resized: tensors that have another number of rows than in the base, with both.
        biases: modules whose bias differs, beside those kept as a whole.
        errors: of each module with factors, relative, in the norm that was used.
    """

    def __init__(self, plan: Plan, inputs: Inputs, folder: Path) -> None:
        if inputs.base is None or plan.rank is None:
            raise RuntimeError("the plan promised a base model and a rank")
        self.plan, self.inputs, self.base, self.form = plan, inputs, inputs.base, plan.form or AdapterForm()
        self._folder = folder
        self.total = sum(spec.nbytes for spec in plan.outputs)
        self.records: dict[str, TensorRecord] = {}
        self.ranks: dict[str, int] = {}
        self.saved, self.biases, self.vectors = set[str](), set[str](), set[str]()
        self.lost: dict[str, dict[str, float]] = {}
        self.resized: dict[str, tuple[int, int]] = {}
        self.errors: dict[str, float] = {}
        self._dtype = plan.recipe.dtype or "F32"
        self._waiting: dict[str, tuple[int, tuple[int, ...]]] = {}  # offset in the file below, and shape
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed on exit)
        self._lock, self._whole = threading.Lock(), dict[str, Tensor]()
        self._products: dict[str, Product] = {}
        self._names = NamesOfChanges(inputs) if inputs.without_base else NamesOfModel(inputs)

    def __enter__(self) -> AdapterTarget:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def take(self, step: Step, firsts: Mapping[str, int], merged: Merged) -> int:
        """Put the slices of each tensor together."""
        done = sum(self.plan.specs[name].nbytes for name in merged.products)
        self._products |= {n: Product(p.left.cpu(), p.right.cpu()) for n, p in merged.products.items()}
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
            product = self._products.pop(name, None)
            if product is None:
                self._add_tensor(name, self._whole.pop(name), step, note)
            elif product.rank and bool(product.left.any()) and bool(product.right.any()):
                self._add_product(name, product, step, note)

    def _add_product(self, name: str, product: Product, step: Step, note: str | None) -> None:
        """A change that is known by its factors; only where it has to be held whole it is multiplied out."""
        layer, shape = self._names.layers.get(name), self.plan.specs[name].shape
        if layer is not None and self._as_factors(name, layer, shape):
            self._add_factors(layer, product, step, note)
            return
        before = self._before(name, shape)
        if before is None:
            raise RuntimeError(f"a change of {name}, which the base has not")
        turned = layer is not None and layer.kind in ("conv1d", "embedding")
        change = product.dense().T if turned else product.dense()
        self._add_tensor(name, before.to(torch.float64) + change, step, note)

    def _add_tensor(self, name: str, merged: Tensor, step: Step, note: str | None) -> None:
        storable(merged, merged.dtype, name, step.method)
        before = self._before(name, tuple(merged.shape))
        if before is not None and torch.equal(merged.to(torch.float64), before.to(torch.float64)):
            return
        info = self.base.info(name)
        if before is None and info is not None:
            self.resized[name] = (merged.shape[0], info.shape[0])
        layer, parameter = self._names.layers.get(name), self._names.parameters.get(name)
        if parameter is None or not merged.is_floating_point():
            inside = name in self.inputs.reference.view.uses
            self._lose(name, _INSIDE if inside else "no parameter of the model", before, merged)
            return
        module, _, kind = parameter.rpartition(".")
        if self._kept_as(name, layer) == "left out":
            self._lose(name, "left out as asked for", before, merged)
        elif self.inputs.without_base and module.endswith(".base_layer"):  # a copy of what the base has
            self._put(parameter, merged, step, note)
        elif before is None and kind == "bias" and self.inputs.without_base and self._names.head_of(module) is None:
            self.biases.add(module)
            self._put(parameter, merged, step, note)
        elif before is not None and self.inputs.without_base and layer is None:
            self.vectors.add(module)
            self._put(f"{module}.lora_B.bias", merged, step, note)
        elif before is None or self._names.head_of(module) is not None:
            self._keep(parameter, before, merged, step, note)
        elif layer is not None and self._as_factors(name, layer, merged.shape):
            delta = merged.to(torch.float64) - before.to(torch.float64)
            self._add_factors(layer, delta.T if layer.kind in ("conv1d", "embedding") else delta, step, note)
        elif name in self._names.linear_biases and kind == "bias":
            self.biases.add(module)
            self._put(parameter, merged, step, note)
        else:  # norms, and heads whose factors would be no smaller
            self._keep(parameter, before, merged, step, note)

    def _lose(self, name: str, reason: str, before: Tensor | None, merged: Tensor) -> None:
        """Leave a tensor as it is in the base."""
        with self._lock:
            self.lost.setdefault(reason, {})[name] = _share_of_change(before, merged)

    def _kept_as(self, name: str, layer: Layer | None) -> str:
        """What the form says of a tensor: ``factors``, ``whole`` or ``left out``."""
        form = self.form
        if matches(name, form.left_out) or (form.only and not matches(name, form.only)):
            return "left out"
        if matches(name, form.whole):
            return "whole"
        if layer is None:
            return form.others
        return form.embeddings if layer.kind == "embedding" else "factors"

    def _rank(self, name: str) -> int:
        """The rank that a tensor's factors have at most."""
        return self.plan.ranks.get(name, self.plan.rank or 1)

    def _as_factors(self, name: str, layer: Layer, shape: Sequence[int]) -> bool:
        """Whether a change is held as factors; PEFT's plain ones are those of a single matrix."""
        matrix = len(self.inputs.reference.checkpoint.tensors[layer.weight].shape) == 2
        plain = matrix and layer.experts is None and layer.kind in ("linear", "conv1d", "embedding")
        wanted = self._kept_as(name, layer) == "factors" and self._names.head_of(layer.module) is None
        seen = self.inputs.without_base or not layer.module.endswith(READ_DIRECTLY)
        return plain and wanted and seen and min(shape) >= self._rank(name)

    def _before(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The base's tensor, if it has one of this shape."""
        info = self.base.info(name)
        if info is None or info.shape != shape:
            return None
        return read_source(self.base.checkpoint, self.base.sources[name])

    def _keep(self, parameter: str, before: Tensor | None, merged: Tensor, step: Step, note: str | None) -> None:
        module = parameter.rpartition(".")[0]
        head = self._names.head_of(module)
        if head is None and self._names.has_children(module):
            self._lose(parameter, "a bare parameter, not of a layer", before, merged)
            return
        self.saved.add(head or module)
        self._put(parameter, merged, step, note)

    def _add_factors(self, layer: Layer, delta: Tensor | Product, step: Step, note: str | None) -> None:
        """The factors of a change that is (out, in)."""
        gram = self._gram(layer, step)
        found = best_low_rank(delta, gram, self._rank(layer.weight), self.form.energy)
        names = ("lora_embedding_A", "lora_embedding_B") if layer.kind == "embedding" else None
        a, b = names or ("lora_A.weight", "lora_B.weight")
        norm = {"embedding": "of the token counts"}.get(layer.kind, "of the Gram matrices")
        rank = found.a.shape[0]
        said = f"rank {rank}: relative error {found.error:.2e} in the "
        said += "plain norm: no statistics" if gram is None else f"norm {norm}"
        said = f"{said}; {note}" if note else said
        self.ranks[layer.module] = rank
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
        title, sections = f", as a LoRA adapter of {self._said_ranks}", self._sections + verdict.section()
        notes = plan.notes + verdict.notes
        card = model_card(
            plan, people, self.records, front=front, made=_MADE, title=title, sections=sections, notes=notes
        )
        (self._folder / "README.md").write_text(card, encoding="utf-8")
        places = {spec.name: (WEIGHTS, spec.name) for spec in specs}
        more = {"as_adapter": self.plan.rank, **verdict.record()}
        write_provenance(plan, self._folder, self.records, people, base, {WEIGHTS: specs}, places, **more)
        return plan

    def _write(self) -> list[TensorSpec]:
        """The weights, modules complete and names as PEFT has them, and the configuration.

        Raises:
            RecipeError: no linear layer differs from the base's, or none is large enough for the rank.
        """
        if not self.ranks:
            shapes = [info.shape for info in self.inputs.reference.checkpoint.tensors.values()]
            widest = max((min(shape) for shape in shapes if len(shape) == 2), default=0)
            if self.plan.rank is not None and self.plan.rank > widest:
                what = f"rank {self.plan.rank} is more than any layer has, and factors would hold more than its weights"
                raise RecipeError(what, where="--as-adapter", mend=f"give a rank of {widest} at most")
            raise RecipeError(
                "no linear layer of the merge differs from the base's: there is nothing for an adapter to hold",
                where="--as-adapter",
                mend="write a full checkpoint, or check the contributors and the base",
            )
        self.biases -= self.saved
        own_names = {parameter: own for own, parameter in self._names.parameters.items()}
        for module in self.saved:  # PEFT wants all parameters of a module that it replaces
            for kind in self._names.kinds(module):
                name = f"{module}.{kind}"
                own = self.base.sources.get(own_names.get(name, ""))
                if f"{PREFIX}{name}" not in self._waiting and own is not None:
                    whole = read_source(self.base.checkpoint, own)
                    self._store(name, whole, TensorRecord("", "copy", "as in the base", None))
        self._complete_vectors()
        for module in self.biases & set(self.ranks):  # PEFT wraps the layer that has the bias
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
        settings = adapter_settings(
            self.plan,
            self._names,
            self.base.checkpoint.revision,
            self.ranks,
            saved=self.saved,
            biases=bool(self.biases),
            vectors=bool(self.vectors),
        )
        _write_json(self._folder / CONFIG, settings)
        config = self.inputs.reference.checkpoint.config
        # Its head may have other labels than the base's, or the base none; without the base nobody has a configuration.
        if self.saved and config and config != self.base.checkpoint.config:
            _write_json(self._folder / "config.json", config)
        return specs

    def _complete_vectors(self) -> None:
        """Where one module has a vector, PEFT wants one of every module with factors, and factors with every vector."""
        if not self.vectors:
            return
        by_module = {layer.module: layer for layer in self._names.layers.values() if layer.kind == "linear"}
        record = TensorRecord("", "zero", "for the others' sake", None)
        for module in sorted((self.vectors | set(self.ranks)) & set(by_module)):
            height, width = self.base.checkpoint.tensors[by_module[module].weight].shape
            if module not in self.ranks:
                self.ranks[module], self.errors[module] = 1, 0.0
                self._store(f"{module}.lora_A.weight", torch.zeros(1, width), record)
                self._store(f"{module}.lora_B.weight", torch.zeros(height, 1), record)
            if module not in self.vectors:
                self._store(f"{module}.lora_B.bias", torch.zeros(height), record)

    @property
    def _said_ranks(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"

    def _notes(self) -> list[str]:
        """What the adapter holds only in part, or not at all."""
        worst = max(self.errors, key=lambda module: (self.errors[module], module))
        middle = sorted(self.errors.values())[len(self.errors) // 2]
        found = [
            f"{len(self.errors)} layers at {self._said_ranks}: relative error {middle:.2e} in the middle, at most "
            f"{self.errors[worst]:.2e} ({worst})"
        ]
        if whole := sorted(self.saved | self.biases):
            found.append(f"held as a whole: {len(whole)} modules' norms, heads or biases")
        found += [
            f"{module} is tied to another layer, and PEFT ties no module of this name: the change reaches the other "
            "layer only where the adapter is merged into its base"
            for module in self._names.tied({*self.ranks, *self.saved})
            if not known_to_be_tied(module)
        ]
        found += [
            f"{name} has {rows} rows, and {before} in the base: PEFT opens the adapter on a base that has as many "
            "(labels: num_labels; tokens: resize_token_embeddings)"
            for name, (rows, before) in sorted(self.resized.items())
        ]
        for reason, names in sorted(self.lost.items()):
            most = max(names, key=lambda name: (names[name], name))
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            much = f"changed by {names[most]:.2e} of its norm" if isfinite(names[most]) else "which is nothing there"
            found.append(f"lost: {most}{others}, {much} ({reason})")
        return found

    @property
    def _sections(self) -> str:
        """What the card says of the layers that are farthest off."""
        worst = sorted(self.errors, key=lambda module: (-self.errors[module], module))[:10]
        rows = "\n".join(f"| {markdown(module)} | {self.errors[module]:.2e} |" for module in worst)
        return f"\n| layer | relative error |\n|---|---|\n{rows}\n"


def fit_adapter(plan: Plan, inputs: Inputs, settings: RunSettings) -> Schedule:
    """The steps of a merge into an adapter fitted into memory, with what the target takes.

    Raises:
        RecipeError: see :func:`merganser.merging.memory.fit`.
    """
    published = any(parent.statistics is not None for parent in inputs.parents)

    def gram(width: int) -> int:
        return width**2 * 3 * 8 if published else 0

    def extra(step: Step) -> int:
        """The whole change, its basis, the Gram matrix, the system's vectors."""
        widths = [(prod(f.shape), input_width(f), f.shape[0]) for f in step.unit.facts if len(f.shape) == 2]
        return elements(step.unit) * 4 + max(
            (n * 3 * 8 + gram(width) + min(width, height) ** 2 * 4 * 8 for n, width, height in widths), default=0
        )

    def known(step: Step) -> int | None:
        """Of products: the factors, what a method makes of them, their bases, the Gram matrix."""
        if not takes_products(step, inputs):
            return None
        (fact,), takers = step.unit.facts, step.takers
        parents = [(inputs.parents[number].checkpoint, step.sources[number][fact.name].tensor) for number in takers]
        rank = sum(rank_of(checkpoint, name) for checkpoint, name in parents)
        return rank * sum(fact.shape) * 8 * (3 * len(takers) + 6) + gram(input_width(fact))

    return fit(plan.steps, settings, extra=extra, known=known)


def _share_of_change(before: Tensor | None, merged: Tensor) -> float:
    """‖ΔW‖ / ‖W‖ of a tensor that is left as it is in the base, where it may be nothing."""
    there = torch.zeros(()) if before is None else before.to(torch.float64)
    change, norm = float((merged.to(torch.float64) - there).norm()), float(there.norm())
    return change / norm if norm else float("inf")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
