"""Keys of the zoo: their canonical bytes, the identity made of them, and finding by parts of them.

A key is a JSON object that says all that a model was made from: suite, set, architecture, seed, training settings.
Nothing here touches files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from merganser.errors import UserError, did_you_mean

#: Length of an identity, in hexadecimal digits.
ID_LENGTH = 16


class ZooError(UserError):
    """A zoo, an entry of it or a file of an entry that cannot be used."""


def canonical(value: Any, what: str = "the key") -> bytes:
    """The one way of writing a JSON object: sorted keys, no spaces, ASCII, no NaN.

    Numbers are written as Python writes them: ``1`` and ``1.0`` are different values.

    Raises:
        ZooError: ``value`` is no object, or holds something that JSON has no word for.
    """
    if not isinstance(value, Mapping):
        raise ZooError(f"{what} is a {type(value).__name__}, not an object", mend="give a dictionary")
    _check(value, what, "")
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check(value: Any, what: str, place: str) -> None:
    at = f" at {place!r}" if place else ""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ZooError(f"{what} has the name {name!r}{at}, which is no string", mend="use strings")
            _check(inner, what, f"{place}.{name}" if place else name)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            _check(inner, what, f"{place}[{number}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ZooError(
            f"{what} holds a {type(value).__name__}{at}, which JSON cannot write",
            mend="give strings, numbers, booleans, null, lists and objects only",
        )
    elif isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise ZooError(f"{what} holds {value}{at}, which is no JSON number", mend="give finite numbers only")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def plain(value: Mapping[str, Any], what: str = "the key") -> dict[str, Any]:
    """``value`` as it reads back from JSON: dictionaries, lists and scalars of its own.

    Raises:
        ZooError: it is no JSON object.
    """
    read: dict[str, Any] = json.loads(canonical(value, what))
    return read


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
    if isinstance(value, bool):
        return None
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value if isinstance(value, (int, float)) else None
        except ValueError:
            continue
    return None


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
    problems = []
    for name, wanted in filters.items():
        if not any(name in leaf and equal(leaf[name], wanted) for leaf in leaves):
            problems.append(f"nothing has {name}={show(wanted)}")
    what = "; ".join(problems) or "nothing has all of " + ", ".join(f"{n}={show(w)}" for n, w in filters.items())
    return ZooError(what, mend="there is " + "; ".join(f"{name}: {_values(leaves, name)}" for name in filters))


def _values(leaves: Sequence[Mapping[str, Any]], name: str) -> str:
    values: set[str] = set()
    for leaf in leaves:
        value = leaf.get(name, ())
        values.update(map(show, value) if isinstance(value, (list, tuple)) else [show(value)])
    shown = sorted(values, key=lambda text: (_number(text) is None, _number(text) or 0, text))
    return ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")
