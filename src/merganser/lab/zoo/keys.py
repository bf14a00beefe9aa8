"""Keys of the zoo: their canonical bytes, the identity made of them, and finding by parts of them.

A key is a JSON object that says all that a model was made from: suite, set, architecture, seed, training settings.
Nothing here touches files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from merganser.errors import UserError, did_you_mean

#: Length of an identity, in hexadecimal digits.
ID_LENGTH = 16


class ZooError(UserError):
    """A zoo, an entry of it or a file of an entry that cannot be used."""


def plain(value: Any, what: str = "the key") -> dict[str, Any]:
    """``value`` as it reads back from JSON: dictionaries, sorted by key, lists and scalars of its own.

    Raises:
        ZooError: ``value`` is no object, or holds something that JSON has no word for.
    """
    if not isinstance(value, Mapping):
        raise ZooError(f"{what} is a {type(value).__name__}, not an object", mend="give a dictionary")
    read: dict[str, Any] = _plain(value, what, "")
    return read


def _plain(value: Any, what: str, place: str) -> Any:
    at = f" at {place!r}" if place else ""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ZooError(f"{what} has the name {name!r}{at}, which is no string", mend="use strings")
        inside = sorted(value.items())
        return {name: _plain(inner, what, f"{place}.{name}" if place else name) for name, inner in inside}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, what, f"{place}[{number}]") for number, inner in enumerate(value)]
    if type(value) not in (str, int, float, bool, type(None)):
        mend = "give strings, numbers, booleans, null, lists and objects only"
        raise ZooError(f"{what} holds a {type(value).__name__}{at}, which JSON cannot write", mend=mend)
    if isinstance(value, float) and not math.isfinite(value):
        raise ZooError(f"{what} holds {value}{at}, which is no JSON number", mend="give finite numbers only")
    return value


def canonical(key: Mapping[str, Any]) -> bytes:
    """The one way of writing a JSON object: sorted keys, no spaces, ASCII, no NaN.

    Numbers are written as Python writes them: ``1`` and ``1.0`` are different values.

    Raises:
        ZooError: the key is no JSON object.
    """
    return json.dumps(plain(key), sort_keys=True, separators=(",", ":")).encode()


def id_of(key: Mapping[str, Any]) -> str:
    """The identity of a key: the first 16 hexadecimal digits of the SHA-256 of its canonical bytes.

    Raises:
        ZooError: the key is no JSON object.
    """
    return hashlib.sha256(canonical(key)).hexdigest()[:ID_LENGTH]


def flatten(key: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by dotted name: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for name, value in key.items():
        if isinstance(value, Mapping) and value:
            found.update(flatten(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def matches(key: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    """Whether every filter holds: its dotted name is in the key, with an :func:`equal` value."""
    leaves = flatten(key)
    return all(name in leaves and equal(leaves[name], wanted) for name, wanted in filters.items())


def equal(value: Any, wanted: Any) -> bool:
    """Whether a value of a key is the wanted one.

    Where the key holds a number the two are compared as numbers (``0.1`` is ``"1e-1"``), otherwise as text
    (``true``, ``null``), in which ``*`` stands for anything. A list is met by any of its items, or by a list as a
    whole.
    """
    if isinstance(value, (list, tuple)):
        if isinstance(wanted, (list, tuple)):
            return len(value) == len(wanted) and all(map(equal, value, wanted))
        return any(equal(item, wanted) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _number(wanted)
        if number is not None:
            return value == number
    pattern = ".*".join(re.escape(part) for part in show(wanted).split("*"))
    return re.fullmatch(pattern, show(value), re.DOTALL) is not None


def _number(value: Any) -> int | float | None:
    """The number that a value is, or that its text is."""
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return kind(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def show(value: Any) -> str:
    """A value as filters and tables write it: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def explain(keys: Sequence[Mapping[str, Any]], filters: Mapping[str, Any]) -> UserError:
    """Why no key matches the filters, naming the names and values that exist."""
    if not keys:
        return ZooError("the zoo is empty", mend="train something into it, or name another zoo with --zoo")
    leaves = [flatten(key) for key in keys]
    names = sorted({name for leaf in leaves for name in leaf})
    for name in filters:
        if name not in names:
            return ZooError(f"no key has the name {name!r}", mend=did_you_mean(name, names))
    told = {name: f"{name}={show(wanted)}" for name, wanted in filters.items()}
    alone = [
        f"nothing has {told[name]}" for name in filters if not any(matches(key, {name: filters[name]}) for key in keys)
    ]
    what = "; ".join(alone) or f"nothing has all of {', '.join(told.values())}"
    return ZooError(what, mend="there is " + "; ".join(f"{name}: {_values(leaves, name)}" for name in filters))


def _values(leaves: Sequence[Mapping[str, Any]], name: str) -> str:
    values: set[str] = set()
    for leaf in leaves:
        value = leaf.get(name, ())
        values.update(map(show, value) if isinstance(value, (list, tuple)) else [show(value)])
    shown = sorted(values, key=lambda text: (_number(text) is None, _number(text) or 0, text))
    return ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")
