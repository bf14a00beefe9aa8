"""What ``config.json`` must be before a model is built from it: of the types that are read, no larger than its weights.

A configuration is a few bytes and can ask for a billion layers. Counts of things that a model has several of (layers,
experts, labels) cannot be larger than what the files hold, and are looked at before transformers makes lists of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.checkpoints.header import TensorInfo
from merganser.errors import CheckpointError, ErrorCollector
from merganser.tensors import DTYPES

RESTORE = "restore its config.json"
#: Counts and lists of this length take no time; longer ones have to be found among the tensors' sizes.
_ALWAYS_FINE = 10_000
_LARGEST_SIZE = 2**24  # of a dimension or of positions, unless a tensor is that large
_COUNT = re.compile(r"(^|_)(depth|layer|label|expert|block|head|group|stage|level|stack|codebook)s?($|_)")
_SIZE = re.compile(r"(size|dim|dims|width|positions|embeddings)$")
_DTYPE_NAMES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()} | {"half", "float", "double", "auto"}
_QUANTISATION = ("quantization_config", "compression_config", "quantization")


def check_configuration(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: Path) -> None:
    """Refuse a configuration that no model opens with, as far as its values alone show it.

    Args:
        config: the values of ``config.json``.
        tensors: that it describes.
        where: the file.

    Raises:
        UserError: values of other types than transformers reads, or counts and sizes that are far beyond what the
            tensors have; all at once.
    """
    largest = max((size for info in tensors.values() for size in info.shape), default=0)
    errors = ErrorCollector()
    for what in [*_wrong_types(config), *_too_many(config, max(_ALWAYS_FINE, largest, len(tensors)))]:
        errors.add(CheckpointError(what, where=where, mend=RESTORE))
    errors.raise_all()


def _wrong_types(config: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Values of another type than transformers reads, in nested configurations too."""
    checks = {
        "model_type": _is_text,
        "architectures": lambda value: isinstance(value, list) and all(map(_is_class_name, value)),
        "id2label": _are_labels,
        "label2id": _are_numbers,
        "auto_map": lambda value: isinstance(value, dict) and all(map(_is_reference, value.values())),
        "dtype": _is_dtype,
        "torch_dtype": _is_dtype,
        "num_labels": _is_count,
        "vocab_size": _is_count,
        "pad_token_id": lambda value: type(value) is int,
        **dict.fromkeys(_QUANTISATION, lambda value: isinstance(value, dict)),
    }
    for key, value in config.items():
        if value is not None and key in checks and not checks[key](value):
            yield f"{place}{key} is {value!r}"
        elif isinstance(value, dict) and key.endswith("_config") and key not in _QUANTISATION:
            yield from _wrong_types(value, f"{place}{key}.")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_class_name(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _are_labels(value: object) -> bool:
    """Whether this is a table of names by number, which JSON writes as a text."""
    if not isinstance(value, dict) or not all(isinstance(label, (str, int, float)) for label in value.values()):
        return False
    return all(key.isascii() and key.isdigit() for key in value)


def _are_numbers(value: object) -> bool:
    """Whether this is a table of numbers by label."""
    return isinstance(value, dict) and all(isinstance(number, (int, str)) for number in value.values())


def _is_reference(value: object) -> bool:
    """Whether this names code: a class, or one for each of a slow and a fast tokenizer."""
    return all(one is None or isinstance(one, str) for one in (value if isinstance(value, list) else [value]))


def _is_dtype(value: object) -> bool:
    """Whether this is a dtype, or one for each part of a model."""
    if isinstance(value, dict):
        return bool(value) and all(map(_is_dtype, value.values()))
    return isinstance(value, str) and value.removeprefix("torch.") in _DTYPE_NAMES


def _too_many(value: Any, most: int, key: str = "", place: str = "") -> Iterator[str]:
    """Counts and sizes that the tensors cannot have.

    Args:
        value: of the configuration, or of a part of it.
        most: that a count can be.
        key: of the value; of a list's items, that of the list.
        place: the way to it.
    """
    if type(value) is int:
        limit = max(_LARGEST_SIZE, most) if _SIZE.search(key) else most
        if abs(value) > limit and (_SIZE.search(key) or _COUNT.search(key)):
            yield f"{place} is {value}, and the largest dimension and the number of the tensors are far below"
    elif isinstance(value, (dict, list)):
        if len(value) > most:
            yield f"{place or 'it'} has {len(value)} entries, and no tensor has so many rows"
            return
        items: Sequence[tuple[str, Any]]
        items = [*value.items()] if isinstance(value, dict) else [(key, item) for item in value]
        for name, item in items:
            inner = f"{place}.{name}" if place and isinstance(value, dict) else place or name
            yield from _too_many(item, most, name, inner)
