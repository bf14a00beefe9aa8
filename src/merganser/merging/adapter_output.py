"""The result of a merge as a LoRA adapter: the best of a given rank in the norm that the layers' inputs make.

    merganser merge base+adapter-a base+adapter-b --as-adapter 16 -o merged-adapter

Each linear weight's change is the nearest of that rank in the norm of its inputs' Gram matrices, see
:mod:`merganser.merging.low_rank`; an embedding's, in that of the token frequencies. Whatever else the merge changes
(heads, norms, biases) goes into the adapter as a whole, where PEFT has a place for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from merganser.checkpoints import AdapterCheckpoint, hash_tensor, home_of
from merganser.checkpoints.adapters import CONFIG, WEIGHTS
from merganser.checkpoints.layers import Layer, empty_model, layers_of, map_parameters
from merganser.checkpoints.writer import check_output
from merganser.errors import RecipeError, UserError, raise_all
from merganser.files import new_folder
from merganser.merging import provenance
from merganser.merging.card import public_name
from merganser.merging.execution import Outcome, run_step
from merganser.merging.low_rank import best_low_rank
from merganser.merging.parents import Parent, open_base
from merganser.merging.plan import Plan
from merganser.merging.step import Step
from merganser.progress import track
from merganser.tensors import DTYPES, one_thread

PREFIX = "base_model.model."
_PT = {"format": "pt"}
_HEAD_CLASSES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


@dataclass
class _Adapter:
    """What is being put together; dictionaries are filled from several threads, each tensor once.

    Attributes:
        tensors: by name in the adapter file, without the prefix.
        outcomes: of each of these.
        targets: modules with factors.
        saved: modules that are kept as a whole.
        lost: tensors that differ from the base and have no place, with the reason.
        biases: modules whose bias differs, beside those kept as a whole.
        errors: of each module with factors, relative, in the norm that was used.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    biases: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)


def carry_out_adapter(plan: Plan, output: Path, rank: int, *, overwrite: bool = False) -> Path:
    """Do what a plan says, and write the result as a LoRA adapter of the base.

    Args:
        plan: of the merge; its base, or that of its contributors where all are adapters, is the adapter's.
        output: the folder to write; written whole or not at all.
        rank: of the factors, at least 1.
        overwrite: replace an existing folder.

    Returns:
        The output folder.

    Raises:
        UserError: no base, no such rank, statistics of other weights, vocabularies or separate heads that one adapter
            cannot hold; anything that a merge raises. Nothing is left behind.
    """
    base = _base(plan, rank)
    sources = [place.path for p in [*plan.parents, base] for place in (p.checkpoint, home_of(p.checkpoint))]
    if problem := check_output(output, overwrite, sources):
        raise problem
    writer = _Writer(plan, base, rank)
    with new_folder(output, overwrite=overwrite) as folder, one_thread():
        with ThreadPoolExecutor(plan.threads) as pool:
            for _ in track(pool.map(writer.add, plan.steps), "merging", "units", len(plan.steps)):
                pass
        adapter = writer.finish()
        save_file({name: adapter.tensors[name] for name in sorted(adapter.tensors)}, folder / WEIGHTS, _PT)
        _write_json(folder / CONFIG, writer.settings())
        config = plan.parents[0].checkpoint.config
        if adapter.saved and config != base.checkpoint.config:  # its head has other labels, or the base none
            _write_json(folder / "config.json", config)
        notes = [*plan.notes, *writer.notes()]
        (folder / "README.md").write_text(_card(plan, base, writer, notes), encoding="utf-8")
        outcomes = {name: adapter.outcomes[name] for name in sorted(adapter.tensors)}
        record = provenance.make_provenance(plan, outcomes, folder)
        described = provenance.describe_parent(base, False)
        provenance.write_provenance({**record, "as_adapter": rank, "notes": notes, "base": described}, folder)
    return output


def _base(plan: Plan, rank: int) -> Parent:
    """The base model, and everything checked that the plan did not need to."""
    problems: list[UserError] = []
    names = list(plan.parents[0].checkpoint.tensors)
    base = plan.base or open_base(plan.recipe, names, problems, plan.parents)
    if rank < 1:
        problems.append(RecipeError(f"the rank is {rank}", where="--as-adapter", mend="give at least 1"))
    if base is None and not problems:
        problems.append(
            RecipeError(
                "an adapter needs the model that it is put on",
                where="--as-adapter",
                mend="add --base MODEL, or merge adapters of one base",
            )
        )
    if base is not None and isinstance(base.checkpoint, AdapterCheckpoint):
        problems.append(
            RecipeError(f"the base {base.title} is itself an adapter", where="--base", mend="give the model below it")
        )
    if any(plan.separate):
        problems.append(
            RecipeError(
                "heads that are kept separate do not fit into one adapter",
                where="--as-adapter",
                mend="leave out --keep-separate, or write a full checkpoint",
            )
        )
    if plan.recipe.vocabulary == "largest":
        problems.append(
            RecipeError(
                "an adapter cannot hold another vocabulary than its base's",
                where="--as-adapter",
                mend="write a full checkpoint",
            )
        )
    raise_all(problems)
    if base is None:
        raise RuntimeError("no base and no problem")
    base.checkpoint.fetch()
    if not plan.method.needs.statistics:  # the plan then has not checked them
        for parent in plan.parents:
            if parent.statistics is not None:
                problems += parent.statistics.check_names(parent.checkpoint)
                problems += parent.statistics.check_binding(parent.checkpoint)
    raise_all(problems)
    return base


class _Writer:
    """Turns merged units into the tensors of an adapter."""

    def __init__(self, plan: Plan, base: Parent, rank: int) -> None:
        self.plan, self.base, self.rank = plan, base, rank
        self.adapter = _Adapter()
        first = plan.parents[0].checkpoint
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
            for parent in plan.parents
            if isinstance(parent.checkpoint, AdapterCheckpoint)
            for module in parent.checkpoint.settings.get("modules_to_save") or ()
        ]
        self._heads = tuple(dict.fromkeys(heads))

    def add(self, step: Step) -> None:
        """Merge one unit and note what it changes."""
        try:
            merged = run_step(self.plan, step)
        except ValueError as error:
            raise RecipeError(
                f"{', '.join(step.unit.names)}: {error}",
                mend="collect the statistics again, or exclude this tensor (--exclude)",
            ) from None
        for name in step.unit.names:
            self._add_tensor(name, merged.tensors.pop(name), step, merged.note)

    def _add_tensor(self, name: str, merged: Tensor, step: Step, note: str | None) -> None:
        merged = merged.cpu()
        if merged.is_floating_point() and not bool(torch.isfinite(merged).all()):
            raise RecipeError(
                f"{step.method} produced NaN or Inf in {name!r}",
                mend="use a larger ridge, or exclude this tensor (--exclude)",
            )
        before = self._before(name, tuple(merged.shape))
        if before is not None and torch.equal(merged.to(torch.float64), before.to(torch.float64)):
            return
        layer, parameter = self._layers.get(name), self._parameters.get(name)
        if parameter is None or not merged.is_floating_point():
            self.adapter.lost[name] = "no parameter of the model"
            return
        module, _, kind = parameter.rpartition(".")
        if before is None or self._is_head(module):
            self._keep(parameter, merged, step, note)
        elif layer is not None and min(merged.shape) >= self.rank:
            delta = merged.to(torch.float64) - before.to(torch.float64)
            self._add_factors(layer, delta, step, note)
        elif name in self._linear_biases and kind == "bias":
            self.adapter.biases.add(module)
            self._put(parameter, merged, step, note)
        else:  # norms, and heads whose factors would be no smaller
            self._keep(parameter, merged, step, note)

    def _before(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The base's tensor, if it has one of this shape."""
        own = self.base.names.get(name)
        if own is None or self.base.checkpoint.tensors[own].shape != shape:
            return None
        return self.base.checkpoint.read(own)

    def _is_head(self, module: str) -> bool:
        parents = [module[:at] for at, letter in enumerate(module) if letter == "."]
        return any(name.endswith(head) for name in [*parents, module] for head in self._heads)

    def _keep(self, parameter: str, merged: Tensor, step: Step, note: str | None) -> None:
        module = parameter.rpartition(".")[0]
        if any(True for _ in self._model.get_submodule(module).children()):
            self.adapter.lost[parameter] = "a bare parameter, not of a layer"
            return
        self.adapter.saved.add(module)
        self._put(parameter, merged, step, note)

    def _add_factors(self, layer: Layer, delta: Tensor, step: Step, note: str | None) -> None:
        turned = layer.kind in ("conv1d", "embedding")
        gram = self._gram(layer)
        found = best_low_rank(delta.T if turned else delta, gram, self.rank)
        names = ("lora_embedding_A", "lora_embedding_B") if layer.kind == "embedding" else None
        a, b = names or ("lora_A.weight", "lora_B.weight")
        norm = {"embedding": "of the token counts"}.get(layer.kind, "of the Gram matrices")
        said = f"rank {self.rank}: relative error {found.error:.2e} in the "
        said += "plain norm: no statistics" if gram is None else f"norm {norm}"
        said = f"{said}; {note}" if note else said
        self.adapter.targets.add(layer.module)
        self.adapter.errors[layer.module] = found.error
        self._put(f"{layer.module}.{a}", found.a, step, said)
        self._put(f"{layer.module}.{b}", found.b, step, said)

    def _gram(self, layer: Layer) -> Tensor | None:
        """The contributors' Gram matrices (or token frequencies) summed by coefficient; None where one has none."""
        total: Tensor | None = None
        for parent in self.plan.parents:
            weight = abs(parent.contributor.coefficient)
            if weight == 0:
                continue
            statistics, own = parent.statistics, parent.names.get(layer.weight)
            entry = statistics.layer(own) if statistics and own else None
            if statistics is None or entry is None:
                return None
            if layer.kind == "embedding":
                if not statistics.has_count(entry.module):
                    return None
                counts = statistics.count(entry.module).to(torch.float64)
                part = counts / counts.sum().clamp_min(1)
            elif entry.input is None:
                return None
            else:
                part = statistics.gram(entry.input).to(torch.float64)
            total = part * weight if total is None else total.add_(part, alpha=weight)
        return total

    def _put(self, name: str, tensor: Tensor, step: Step, note: str | None) -> None:
        outcome = Outcome("", step.method, step.reason, note)
        self._store(name, tensor, outcome)

    def _store(self, name: str, tensor: Tensor, outcome: Outcome) -> None:
        dtype = self.plan.recipe.dtype or "F32"
        stored = tensor.to(DTYPES[dtype]).contiguous().clone()
        self.adapter.tensors[f"{PREFIX}{name}"] = stored
        self.adapter.outcomes[f"{PREFIX}{name}"] = replace(outcome, blake3=hash_tensor(stored, dtype, "blake3"))

    def finish(self) -> _Adapter:
        """The adapter when every unit was added: modules complete, names as PEFT has them.

        Raises:
            RecipeError: no linear layer differs from the base's.
        """
        made = self.adapter
        if not made.targets:
            raise RecipeError(
                "no linear layer of the merge differs from the base's: there is nothing for an adapter to hold",
                where="--as-adapter",
                mend="write a full checkpoint, or check the contributors and the base",
            )
        made.biases -= made.saved
        own_names = {parameter: own for own, parameter in self._parameters.items()}
        for module in made.saved:  # PEFT wants all parameters of a module that it replaces
            for kind, _ in self._model.get_submodule(module).named_parameters():
                name = f"{module}.{kind}"
                own = self.base.names.get(own_names.get(name, ""))
                if f"{PREFIX}{name}" not in made.tensors and own is not None:
                    outcome = Outcome("", "copy", "as in the base", None)
                    self._store(name, self.base.checkpoint.read(own), outcome)
        for module in made.biases & made.targets:  # PEFT wraps the layer that has the bias
            plain, wrapped = (f"{PREFIX}{module}.{name}" for name in ("bias", "base_layer.bias"))
            made.tensors[wrapped] = made.tensors.pop(plain)
            made.outcomes[wrapped] = made.outcomes.pop(plain)
        return made

    def settings(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        checkpoint = self.base.checkpoint
        architecture = str((self.plan.parents[0].checkpoint.config.get("architectures") or [""])[0])
        task = next((t for suffix, t in _HEAD_CLASSES.items() if architecture.endswith(suffix)), None)
        conv1d = [layer for layer in self._layers.values() if layer.kind == "conv1d"]
        return {
            "peft_type": "LORA",
            "task_type": task,
            "auto_mapping": None,
            "base_model_name_or_path": checkpoint.name.split("@")[0] if checkpoint.revision else checkpoint.name,
            "revision": checkpoint.revision,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": bool(conv1d),
            "bias": "all" if self.adapter.biases else "none",
            "target_modules": sorted(self.adapter.targets),
            "modules_to_save": sorted(self.adapter.saved) or None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def notes(self) -> list[str]:
        """What the adapter holds only in part, or not at all."""
        made = self.adapter
        worst = max(made.errors, key=lambda module: (made.errors[module], module))
        middle = sorted(made.errors.values())[len(made.errors) // 2]
        found = [
            f"{len(made.errors)} layers at rank {self.rank}: relative error {middle:.2e} in the middle, at most "
            f"{made.errors[worst]:.2e} ({worst})"
        ]
        if whole := sorted(made.saved | made.biases):
            found.append(f"held as a whole: {len(whole)} modules' norms, heads or biases")
        found += [
            f"{layer.module} is tied to another layer, which an adapter reaches only when merged into its base"
            for layer in self._layers.values()
            if layer.tied and layer.module in made.targets
        ]
        return found + [f"lost: {name} ({reason})" for name, reason in sorted(made.lost.items())]


def _card(plan: Plan, base: Parent, writer: _Writer, notes: list[str]) -> str:
    """README.md of the adapter, with the metadata that the Hub reads."""
    place = public_name(base.contributor.model, base.checkpoint.revision)
    front = {"base_model": place, "base_model_relation": "adapter", "library_name": "peft"}
    shown = yaml.safe_dump({**front, "tags": ["lora", "merge", "merganser"]}, sort_keys=False)
    people = "\n".join(
        f"| {public_name(p.contributor.model, p.checkpoint.revision)} | {p.contributor.coefficient:g} |"
        for p in plan.parents
    )
    errors = writer.adapter.errors
    worst = sorted(errors, key=lambda module: (-errors[module], module))[:10]
    rows = "\n".join(f"| {module} | {errors[module]:.2e} |" for module in worst)
    listing = "".join(f"- {note}\n" for note in notes)
    return f"""---
{shown}---

# Merge of {len(plan.parents)} models by {plan.method.name}, as a LoRA adapter of rank {writer.rank}

Made with merganser: {plan.method.summary}. Each layer's change is the nearest of this rank in the norm of its inputs'
Gram matrices, where the contributors publish them. `provenance.json` holds the recipe, the hash of every parent and
tensor, and each layer's error.

| contributor | coefficient |
|---|---|
{people}

| layer | relative error |
|---|---|
{rows}

## Notes

{listing}
The licences of the contributors and of the base apply to the result.
"""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
