"""What PEFT calls the parts of an adapter: its modules, heads and ties, and ``adapter_config.json``.

With the base they are those of the model that the adapter is put on; without it, those that the contributors use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from merganser.checkpoints import AdapterCheckpoint, ChangesCheckpoint
from merganser.checkpoints.layers import Layer, empty_model, layers_of, map_parameters
from merganser.merging.inputs import Inputs
from merganser.merging.plan import Plan

_HEAD_CLASSES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_SAVED_HEADS = ("classifier", "score")  # that PEFT replaces as a whole for these tasks, whatever else is said
#: Embeddings whose table a model (DeBERTa) reads without calling the module, so that factors beside it do nothing.
READ_DIRECTLY = ("rel_embeddings",)
_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # names of modules that it finds to be tied


class NamesOfModel:
    """What an adapter calls things, by the model that it is put on.

    Args:
        inputs: the open files.

    Attributes:
        layers: by the stored name of their weight.
        parameters: of the model, by the stored name.
        linear_biases: the stored names of the layers' biases.
        transposed: some layers are stored (in, out).
        task: PEFT's word for it.
    """

    layers: dict[str, Layer]
    parameters: dict[str, str]
    linear_biases: set[str]
    transposed: bool
    task: str | None

    def __init__(self, inputs: Inputs) -> None:
        checkpoints = [parent.checkpoint for parent in inputs.parents]
        self._said = [one.settings for one in checkpoints if isinstance(one, AdapterCheckpoint | ChangesCheckpoint)]
        self._find(inputs)
        heads = [head for settings in self._said for head in settings.get("modules_to_save") or ()]
        self._heads = [*heads, *(_SAVED_HEADS if self.task in _HEAD_CLASSES.values() else ())]

    def _find(self, inputs: Inputs) -> None:
        first = inputs.reference.checkpoint
        self._model = empty_model(first)
        self.layers, self.parameters = {}, {}
        for layer in layers_of(self._model, first):
            self.layers.setdefault(layer.weight, layer)
        for parameter, own in map_parameters(self._model, first).items():
            self.parameters.setdefault(own, parameter)
        self.linear_biases = {layer.bias for layer in self.layers.values() if layer.bias}
        self.transposed = any(layer.kind == "conv1d" for layer in self.layers.values())
        architecture = str((first.config.get("architectures") or [""])[0])
        self.task = next((task for suffix, task in _HEAD_CLASSES.items() if architecture.endswith(suffix)), None)

    def has_children(self, module: str) -> bool:
        """Whether a module has others in it."""
        return any(True for _ in self._model.get_submodule(module).children())

    def kinds(self, module: str) -> list[str]:
        """The names of a module's parameters in it."""
        return [name for name, _ in self._model.get_submodule(module).named_parameters()]

    def head_of(self, module: str) -> str | None:
        """The outermost module around this one, or itself, that is replaced as a whole.

        PEFT compares the ends of names: DistilBERT's ``pre_classifier`` is replaced where ``classifier`` is.
        """
        parents = [module[:at] for at, letter in enumerate(module) if letter == "."]
        named = (name for name in [*parents, module] if name.endswith(tuple(self._heads)))
        return next(named, None)

    def replaced_heads(self) -> set[str]:
        """The modules that PEFT replaces as a whole for the task; it does not open an adapter that lacks one."""
        modules = (name for name, _ in self._model.named_modules() if name.endswith(_SAVED_HEADS))
        return {head for module in modules if (head := self.head_of(module)) is not None}

    def tied(self, modules: Collection[str]) -> list[str]:
        """Those of some modules that the model ties to others."""
        return [layer.module for layer in self.layers.values() if layer.tied and layer.module in modules]

    def keeps_tied(self, modules: Collection[str]) -> bool:
        """Whether PEFT has to keep some of these modules tied, and can."""
        return any(known_to_be_tied(module) for module in self.tied(modules))

    def more_settings(self) -> dict[str, Any]:
        """What else the configuration says, by its contributors."""
        return {"auto_mapping": None}


class NamesOfChanges(NamesOfModel):
    """The same by adapters alone: tensors have the names that adapters give them, and whole modules are complete."""

    def _find(self, inputs: Inputs) -> None:
        self.layers = dict(inputs.reference.view.layers)
        self.parameters = {name: name for name in inputs.reference.checkpoint.tensors}
        self.linear_biases = set()
        self.transposed = any(bool(settings.get("fan_in_fan_out")) for settings in self._said)
        self.task = self._agreed("task_type")

    def _agreed(self, key: str) -> Any:
        """What all contributors say; None where they differ."""
        said = [settings.get(key) for settings in self._said]
        return said[0] if said and all(one == said[0] for one in said) else None

    def has_children(self, module: str) -> bool:
        """Never: it was trained as a module."""
        return False

    def kinds(self, module: str) -> list[str]:
        """None beside those that are there."""
        return []

    def replaced_heads(self) -> set[str]:
        """None that have to be asked for: the contributors have them, as they open."""
        return set()

    def keeps_tied(self, modules: Collection[str]) -> bool:
        """What the contributors say that adapt an embedding; they agree."""
        return any(bool(settings.get("ensure_weight_tying")) for settings in self._said)

    def more_settings(self) -> dict[str, Any]:
        """The class of the model, where they agree."""
        return {"auto_mapping": self._agreed("auto_mapping")}


def known_to_be_tied(module: str) -> bool:
    """Whether PEFT finds a module by its name where a model ties it to another."""
    return module.rpartition(".")[2] in _TIED_BY_PEFT


def adapter_settings(
    plan: Plan,
    names: NamesOfModel,
    revision: str | None,
    ranks: Mapping[str, int],
    *,
    saved: Collection[str],
    biases: bool,
    vectors: bool,
) -> dict[str, Any]:
    """``adapter_config.json``: the rank that most modules have, the larger of two, and patterns for the others.

    Args:
        plan: of the merge.
        names: of the adapter.
        revision: the commit of the base.
        ranks: of each module with factors; α is the rank.
        saved: modules that are kept as a whole.
        biases: other biases are kept, too.
        vectors: some are vectors that are added.
    """
    counts, named = Counter(ranks.values()), str(plan.base)
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    pattern = {module: rank for module, rank in sorted(ranks.items()) if rank != usual}
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": names.task if names.replaced_heads() <= set(saved) else None,
        **names.more_settings(),
        "base_model_name_or_path": named.split("@")[0] if revision else named,
        "revision": revision,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": names.transposed,
        "bias": "all" if biases else "none",
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    special = {"lora_bias": vectors, "ensure_weight_tying": names.keeps_tied({*ranks, *saved})}
    return {**settings, **{key: True for key, is_set in special.items() if is_set}}
