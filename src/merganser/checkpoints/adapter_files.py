"""Putting an adapter on its base: what the names in a PEFT weight file mean, checked against the base's headers.

All of it is data from a stranger. Everything that does not fit is found from headers, all at once, before a weight is
read: factors without their twin, ranks that differ, layers or shapes that the base lacks, kinds of adapters whose
effect is not a sum of low-rank products.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merganser.checkpoints.adapter_settings import MERGE_FIRST, AdapterSettings, read_settings
from merganser.checkpoints.adapters import CONFIG, WEIGHTS, AdapterCheckpoint, Change
from merganser.checkpoints.reader import Checkpoint, align, read_json, renamed
from merganser.errors import CheckpointError, ErrorCollector, UserError, raise_all
from merganser.tensors import is_floating

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_OTHER_PARTS = ("lora_magnitude_vector", "token_adapter", "trainable_tokens_delta", "lora_E", "ranknum")
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3"}  # model types with Conv1D layers
_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj|logits_proj)\.(weight|bias)$")
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")
_OTHER_BASE = "give the base that the adapter was trained on, as base+adapter"
_MOST_NAMED = 8  # problems of one sort that are spelt out


@dataclass
class _Found:
    """The adapter's tensors of one module: names in the file, by what they are."""

    factors: dict[str, str] = field(default_factory=dict)
    vector: str | None = None
    whole: dict[str, str] = field(default_factory=dict)


def combine(name: str, base: Checkpoint, adapter: Checkpoint) -> AdapterCheckpoint:
    """An adapter on its base, everything checked from headers.

    Args:
        name: as the user gave it.
        base: a full checkpoint.
        adapter: the files of a PEFT folder.

    Raises:
        UserError: the adapter is no plain LoRA, malformed, or not of this base; several at once.
    """
    settings = read_settings(adapter)
    errors = ErrorCollector()
    modules = _modules(adapter, errors)
    wanted = [f"{module}.{kind}" for module, found in modules.items() for kind in _kinds(found)]
    twins = _twins(wanted, base)
    changes: dict[str, Change] = {}
    added: dict[str, Change] = {}
    modules_added: dict[str, Change] = {}  # of sentence-transformers, beside the adapter and not in the base

    def take(module: str, found: _Found, kind: str) -> None:
        change = _change(adapter, settings, module, found, kind)
        name = f"{module}.{kind}"
        if name in twins:
            changes[twins[name]] = _fitted(base, adapter, settings, module, twins[name], change)
        elif change.whole and "/" in module:
            modules_added[name] = change
        elif change.whole and not change.a and settings.saves(module):
            added[name] = change
        else:
            raise _absent(base, module, kind)

    for module, found in modules.items():
        for kind in _kinds(found):
            errors.catch(take, module, found, kind)
    raise_all(_shortened(errors.found, adapter))
    names = {own: own for own in base.tensors}
    if added:
        prefix = _missing_prefix(twins)
        names = {own if "/" in own else prefix + own: own for own in base.tensors}
        changes = {prefix + own: change for own, change in changes.items()} | added
    config = _config(base, adapter, settings, changes, bool(added))
    raw = read_json(adapter.path / CONFIG, missing={})
    if added:
        names = _without_old_heads(names, AdapterCheckpoint(name, base, adapter, changes, names, raw, config))
    changes |= modules_added
    return _oriented(AdapterCheckpoint(name, base, adapter, changes, names, raw, config), settings)


def _modules(adapter: Checkpoint, errors: ErrorCollector) -> dict[str, _Found]:
    """The adapter's tensors by module, in the model's own names."""
    modules: dict[str, _Found] = {}
    for key, info in adapter.tensors.items():
        parts = key.removeprefix("base_model.model.").split(".")
        if "original_module" in parts:  # the head before training, which some versions also save
            continue
        if not is_floating(info.dtype) or not _place(key, parts, modules):
            errors.add(CheckpointError(f"tensor {key!r} is no part of a LoRA adapter", mend=MERGE_FIRST))
    return modules


def _place(key: str, parts: list[str], modules: dict[str, _Found]) -> bool:
    """Note one tensor under its module; False where its name means nothing here."""
    if any(part in _OTHER_PARTS for part in parts) or len(parts) < 2:
        return False
    role = next((part for part in parts if part in _FACTORS), None)
    if role is not None:
        at = parts.index(role)
        module, rest = ".".join(parts[:at]), parts[at + 1 :]
        kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
        if not module or len(rest) > 1:  # one component may be the adapter's name
            return False
        found = modules.setdefault(module, _Found())
        if kind == "bias":
            found.vector = key
            return role == "lora_B"
        found.factors[role] = key
        return True
    rest = [part for part in parts if part not in ("modules_to_save", "base_layer")]
    if "modules_to_save" in parts and parts[parts.index("modules_to_save") + 1] == "default":
        rest.pop(parts.index("modules_to_save"))
    modules.setdefault(".".join(rest[:-1]), _Found()).whole[rest[-1]] = key
    return True


def _kinds(found: _Found) -> list[str]:
    kinds = dict.fromkeys(found.whole)
    if found.factors:
        kinds["weight"] = None
    if found.vector:
        kinds["bias"] = None
    return list(kinds)


def _change(adapter: Checkpoint, settings: AdapterSettings, module: str, found: _Found, kind: str) -> Change:
    """What happens to one parameter of a module.

    Raises:
        CheckpointError: the adapter contradicts itself.
    """
    change = Change(whole=found.whole.get(kind))
    if kind == "bias" and found.vector:
        rank = settings.rank_of(module)
        return replace(change, vector=found.vector, scale=settings.scale_of(module, rank))
    if kind != "weight" or not found.factors:
        return change
    embedding = any(role.startswith("lora_embedding") for role in found.factors)
    roles = _FACTORS[2:] if embedding else _FACTORS[:2]

    def wrong(what: str, mend: str = "save the adapter again, whole") -> CheckpointError:
        return CheckpointError(f"{module}: {what}", mend=mend)

    if set(found.factors) != set(roles):
        raise wrong(f"{', '.join(sorted(found.factors))} without {', '.join(sorted(set(roles) - set(found.factors)))}")
    a, b = (found.factors[role] for role in roles)
    shape_a, shape_b = adapter.tensors[a].shape, adapter.tensors[b].shape
    if len(shape_a) != 2 or len(shape_b) != 2:
        raise wrong(
            f"the factors {list(shape_a)} and {list(shape_b)} are no matrices: "
            "only linear, Conv1D and embedding layers can be adapted",
            MERGE_FIRST,
        )
    rank = shape_a[0]
    if rank != shape_b[1]:
        raise wrong(f"A {list(shape_a)} is of rank {rank}, B {list(shape_b)} of rank {shape_b[1]}")
    if rank == 0:
        raise wrong(f"rank 0: {a} is {list(shape_a)}", "gather the shards of a sharded training before saving")
    if rank != settings.rank_of(module):
        raise wrong(
            f"A {list(shape_a)} is of rank {rank}, {CONFIG} says {settings.rank_of(module)}",
            "give the configuration that belongs to these weights (r, rank_pattern)",
        )
    scale = settings.scale_of(module, rank)
    return replace(change, a=a, b=b, scale=scale, transposed=embedding)


def _fitted(
    base: Checkpoint, adapter: Checkpoint, settings: AdapterSettings, module: str, own: str, change: Change
) -> Change:
    """A change that fits the shape of the base's tensor, transposed where that says so.

    Raises:
        CheckpointError: it does not fit.
    """
    shape = base.tensors[own].shape

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{module}: {what}, tensor {own!r} of {base.name} is {list(shape)}", mend=_OTHER_BASE)

    if not is_floating(base.tensors[own].dtype):
        raise CheckpointError(
            f"{module}: tensor {own!r} of {base.name} is {base.tensors[own].dtype}, a quantised weight",
            mend="give the base in full precision, as base+adapter",
        )
    for part in (change.whole, change.vector):
        if part and (theirs := adapter.tensors[part].shape) != shape:
            head = settings.saves(module) and _HEAD.search(own) and theirs[1:] == shape[1:]
            if part != change.whole or not head:
                raise wrong(f"{part} is {list(theirs)}")
    if change.a and change.b:
        wide = (adapter.tensors[change.b].shape[0], adapter.tensors[change.a].shape[1])
        if shape == wide and shape != wide[::-1]:
            return replace(change, transposed=False)
        if shape == wide[::-1] and shape != wide:
            return replace(change, transposed=True)
        if shape != wide:
            raise wrong(f"B·A is {list(wide)}")
    return change


def _oriented(found: AdapterCheckpoint, settings: AdapterSettings) -> AdapterCheckpoint:
    """Square weights do not tell by their shape whether they are (in, out): ask the architecture."""
    square = {
        name: change
        for name, change in found.changes.items()
        if change.a and len(set(found.tensors[name].shape)) == 1 and not change.transposed
    }
    if not square or not (settings.transposed or found.config.get("model_type") in _CONV1D):
        return found
    from merganser.checkpoints.layers import describe_layers

    try:
        kinds = {layer.weight: layer.kind for layer in describe_layers(found)}
    except CheckpointError:
        kinds = {}
    for name, change in square.items():
        transposed = kinds[name] == "conv1d" if name in kinds else settings.transposed
        found.changes[name] = replace(change, transposed=transposed)
    return found


def _twins(wanted: list[str], base: Checkpoint) -> dict[str, str]:
    """The base's on-disk name of each parameter that the adapter names; old spellings count."""
    twins = align(wanted, base.tensors)
    for name in wanted:
        if name not in twins:
            old = align(renamed(name), base.tensors)
            twins.update(zip([name], old.values(), strict=False))
    return twins


def _missing_prefix(twins: Mapping[str, str]) -> str:
    """What the model's names have before the base's on-disk names."""
    for name, own in twins.items():
        if name != own and name.endswith(own):
            return name.removesuffix(own)
    return ""


def _absent(base: Checkpoint, module: str, kind: str) -> UserError:
    tied = base.config.get("tie_word_embeddings") and module.endswith("lm_head")
    return CheckpointError(
        f"the adapter changes {f'{module}.{kind}'!r}, which {base.name} lacks"
        + (" (it is tied to the input embeddings)" if tied else ""),
        mend=MERGE_FIRST if tied else _OTHER_BASE,
    )


def _config(
    base: Checkpoint, adapter: Checkpoint, settings: AdapterSettings, changes: Mapping[str, Change], added: bool
) -> dict[str, Any]:
    """What ``config.json`` says differently: the labels of a trained head, and the class where the base had none.

    Raises:
        CheckpointError: the adapter is of another type of model, or brings a head of an unknown class.
    """
    heads = {name: change.whole for name, change in changes.items() if change.whole and _HEAD.search(name)}
    own = read_json(adapter.path / "config.json", missing={}) if heads or added else {}
    if own and own.get("model_type") != base.config.get("model_type"):
        raise CheckpointError(
            f"model_type {own.get('model_type')!r}, the base is {base.config.get('model_type')!r}",
            where=adapter.path / "config.json",
            mend=_OTHER_BASE,
        )
    found = {key: own[key] for key in ("architectures", "id2label", "label2id", "problem_type") if key in own}
    if added and "architectures" not in found:
        name = settings.model_class or _class_for(settings.task, base.config.get("model_type"))
        if name is None:
            raise CheckpointError(
                f"the adapter brings a head that {base.name} lacks, and nothing says of which class",
                where=adapter.path / CONFIG,
                mend="put the config.json of the adapted model beside it",
            )
        found["architectures"] = [name]
    sizes = {adapter.tensors[whole].shape[0] for whole in heads.values() if whole}
    labels = {**base.config, **found}.get("id2label")
    known = len(labels) if isinstance(labels, dict) else 2  # transformers writes no default down
    if settings.task in _LABELLED and len(sizes) == 1 and (size := sizes.pop()) != known:
        names = [f"LABEL_{i}" for i in range(size)]
        found["id2label"] = {str(i): name for i, name in enumerate(names)}
        found["label2id"] = {name: i for i, name in enumerate(names)}
    return {key: value for key, value in found.items() if base.config.get(key) != value}


def _class_for(task: str | None, model_type: object) -> str | None:
    from transformers.models.auto import modeling_auto

    tables = {
        "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    name = tables.get(task or "", {}).get(str(model_type))
    return name if isinstance(name, str) else None


def _without_old_heads(names: dict[str, str], checkpoint: AdapterCheckpoint) -> dict[str, str]:
    """The base's tensors but for heads that the adapter's class of model has not (a language model's, say)."""
    from merganser.checkpoints.layers import empty_model

    roots = {name.split(".", 1)[0] for name in empty_model(checkpoint).state_dict()}
    return {name: own for name, own in names.items() if "/" in name or name.split(".", 1)[0] in roots}


def _shortened(problems: list[UserError], adapter: Checkpoint) -> list[UserError]:
    """The first problems, each with its file; the number of the others."""
    where = adapter.path / WEIGHTS
    found: list[UserError] = [CheckpointError(one.what, where=where, mend=one.mend) for one in problems[:_MOST_NAMED]]
    if len(problems) > _MOST_NAMED:
        mend = problems[-1].mend
        found.append(CheckpointError(f"{len(problems) - _MOST_NAMED} more tensors like these", where=where, mend=mend))
    return found
