"""What ``config.json`` says differently with an adapter on: the class and labels of a head, the vocabulary, ties."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merganser.checkpoints.adapter_places import OTHER_BASE, Changed, Names
from merganser.checkpoints.adapter_settings import AdapterSettings
from merganser.checkpoints.adapters import CONFIG
from merganser.checkpoints.layout import ties
from merganser.checkpoints.reader import Checkpoint, read_json
from merganser.errors import CheckpointError

_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj|logits_proj)\.(weight|bias)$")
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")
_SIZES = re.compile(r"(decoder_)?vocab_size\w*")
_TIES = "tie_word_embeddings"


def find_changes(
    base: Checkpoint, adapter: Checkpoint, settings: AdapterSettings, wholes: Mapping[str, str], added: bool
) -> dict[str, Any]:
    """What ``config.json`` says differently: the labels of a trained head, and the class where the base had none.

    Args:
        base: a full checkpoint.
        adapter: the files of a PEFT folder.
        settings: of the adapter.
        wholes: its tensors that take the place of the base's, by the name of what they replace.
        added: they bring a head that the base's class has not.

    Raises:
        CheckpointError: the adapter is of another type of model, or brings a head of an unknown class.
    """
    heads = {name: key for name, key in wholes.items() if _HEAD.search(name)}
    own = read_json(adapter.path / "config.json", missing={}) if heads or added else {}
    if own and own.get("model_type") != base.config.get("model_type"):
        raise CheckpointError(
            f"model_type {own.get('model_type')!r}, the base is {base.config.get('model_type')!r}",
            where=adapter.path / "config.json",
            mend=OTHER_BASE,
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
    sizes = {adapter.tensors[whole].shape[0] for whole in heads.values()}
    labels = {**base.config, **found}.get("id2label")
    known = len(labels) if isinstance(labels, dict) else 2  # transformers writes no default down
    class_name = settings.model_class or ""
    labelled = settings.task in _LABELLED or class_name.endswith(
        ("ForSequenceClassification", "ForTokenClassification")
    )
    if labelled and len(sizes) == 1 and (size := sizes.pop()) != known:
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


def grown(names: Names, changed: Mapping[str, Changed], adapter: Checkpoint) -> tuple[int, int] | None:
    """The size of the vocabulary before and after it was resized; None: the adapter has no other, or not everywhere.

    Args:
        names: of the model.
        changed: its parameters that the adapter changes.
        adapter: the adapter's files.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for name in names.vocabulary:
        change = changed[name].whole if name in changed else None
        if change is not None and change.whole is not None:
            before, after = names.wanted[name], adapter.tensors[change.whole].shape
            if len(before) == len(after) and before[1:] == after[1:]:
                sizes[name] = (before[0], after[0])
    groups = [*ties(names.view.model), *([name] for name in names.vocabulary)] if names.view.model is not None else []
    whole = all(any(twin in sizes for group in groups if name in group for twin in group) for name in names.vocabulary)
    found = set(sizes.values())
    if not whole or len(found) != 1:
        return None
    old, new = found.pop()
    return None if old == new else (old, new)


def resize(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A configuration whose vocabulary has ``new`` rows instead of ``old``, wherever it says so."""
    changed = _resized(config, old, new)
    return changed if changed != dict(config) or old == new else {**changed, "vocab_size": new}


def _resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = _resized(value, old, new)
        else:
            found[key] = new if _SIZES.fullmatch(key) and value == old else value
    return found


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of a model whose input and output embeddings are two tensors."""
    inner = {key: value for key, value in config.items() if isinstance(value, dict) and _TIES in value}
    return {**config, **{key: {**value, _TIES: False} for key, value in inner.items()}, _TIES: False}
