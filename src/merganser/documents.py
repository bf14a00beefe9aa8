"""JSON and YAML that strangers wrote, read as data: bounded in size, depth and number of values.

A file is measured before it is read, and its values are counted before they are made. What both formats allow and
nobody means is refused: keys that come twice, numbers of thousands of digits, halves of surrogate pairs, which no
terminal and no file can hold, and infinite numbers where they are not expected. YAML aliases may be used as long as
what they stand for, written out, stays small.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from merganser.errors import UserError
from merganser.paths import check_file

MAX_BYTES = 64 * 2**20  # of a JSON file: the largest honest ones are tokenizers of 40 MB
MAX_YAML = 2**18  # bytes; a recipe of a thousand contributors has half of that
MAX_VALUES = 5_000_000  # of a JSON text: the largest tokenizers have two million
MAX_WRITTEN_OUT = 4 * MAX_YAML  # characters and values of a YAML text with its aliases written out
MAX_DEPTH = 64
_MAX_DIGITS = 40  # tokenizers write 10^30 for "no limit"
_SURROGATE = re.compile("[\ud800-\udfff]")
_RESTORE = "restore the file"
_CORRECT = "correct the file"


class _Refused(ValueError):
    """A text that parses, and holds what is not accepted."""


# ── JSON ──


def read_json(
    path: Path, kind: type[UserError] = UserError, *, mend: str = _RESTORE, finite: bool = True, limit: int = MAX_BYTES
) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        kind: of the errors.
        mend: for a file that is damaged.
        finite: refuse infinite numbers and NaN.
        limit: bytes that the file may have.

    Raises:
        UserError: unreadable, no plain file, too large, not JSON, or refused (see :func:`parse_json`).
    """
    return parse_json(read_text(path, kind, mend=mend, limit=limit), path, kind, mend=mend, finite=finite)


def parse_json(
    text: str | bytes,
    where: str | Path,
    kind: type[UserError] = UserError,
    *,
    mend: str = _RESTORE,
    finite: bool = True,
) -> Any:
    """What a JSON text holds.

    Args:
        text: the text, as UTF-8 where it is bytes.
        where: it stands, for errors.
        kind: of the errors.
        mend: for a text that is damaged.
        finite: refuse infinite numbers and NaN.

    Raises:
        UserError: not JSON, nested too deeply, too many values, keys that come twice, numbers that are too long or
            infinite, or text that cannot be encoded.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
            raise _Refused(f"it has more than {MAX_VALUES} values")
        value = (_FINITE if finite else _ANY_FLOAT).decode(text)
        _check_depth(value)
        if "\\ud" in text or "\\uD" in text or _SURROGATE.search(text):
            _check_text(json.dumps(value, ensure_ascii=False))
        return value
    except RecursionError:
        error: Exception = _Refused(_too_deep())
    except ValueError as found:  # of these are UnicodeDecodeError, JSONDecodeError and Python's own limit of digits
        error = found
    raise kind(f"unreadable JSON: {error}", where=where, mend=mend) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused(f"the key {_repeated(key for key, _ in pairs)!r} comes twice")
    return found


def _repeated(keys: Iterable[Any]) -> Any:
    return Counter(keys).most_common(1)[0][0]


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _Refused(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"{text[:_MAX_DIGITS]} is no finite number")
    return value


_decoder: Callable[..., json.JSONDecoder] = partial(json.JSONDecoder, object_pairs_hook=_unique, parse_int=_integer)
_FINITE = _decoder(parse_float=_finite, parse_constant=_finite)
_ANY_FLOAT = _decoder()


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if type(outer) in (dict, list)
            for inner in (outer.values() if type(outer) is dict else outer)
        ]
        if not level:
            return
    raise _Refused(_too_deep())


def _too_deep() -> str:
    return f"it is nested more than {MAX_DEPTH} deep"


def _check_text(text: str) -> None:
    if _SURROGATE.search(text):
        raise _Refused("it has half of a surrogate pair, which is no character")


# ── YAML ──


def read_yaml(path: Path, kind: type[UserError] = UserError, *, mend: str = _CORRECT) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        kind: of the errors.
        mend: for a file that is no such YAML.

    Raises:
        UserError: unreadable, no plain file, too large, not YAML, or refused (see :func:`parse_yaml`).
    """
    return parse_yaml(read_yaml_text(path, kind, mend=mend), path, kind, mend=mend)


def read_yaml_text(path: Path, kind: type[UserError] = UserError, *, mend: str = _CORRECT) -> str:
    """The text of a YAML file, within the bounds of :func:`parse_yaml`.

    Args:
        path: of the file.
        kind: of the errors.
        mend: for a file that is no such YAML.

    Raises:
        UserError: unreadable, no plain file, or too large.
    """
    return read_text(path, kind, mend=mend, limit=MAX_YAML)


def parse_yaml(text: str, where: str | Path, kind: type[UserError] = UserError, *, mend: str = _CORRECT) -> Any:
    """What a YAML text holds: mappings, lists, texts, numbers, true and false, and null; dates stay texts.

    Args:
        text: the text.
        where: it stands, for errors.
        kind: of the errors.
        mend: for a text that is no such YAML.

    Raises:
        UserError: not YAML, of other types than these, nested too deeply, too large or endless once its aliases are
            written out, keys that come twice, numbers that are too long or infinite, or text that cannot be encoded or
            has a NUL.
    """
    found = parse_yaml_documents(text, where, kind, mend=mend)
    if len(found) > 1:
        what = f"not YAML: it has {len(found)} documents, one is expected"
        raise kind(what, where=where, mend=mend)
    return found[0] if found else None


def parse_yaml_documents(
    text: str, where: str | Path, kind: type[UserError] = UserError, *, mend: str = _CORRECT
) -> list[Any]:
    """What each document of a YAML text holds; between two documents stands a line ``---``.

    Args:
        text: the text; the bounds are those of :func:`parse_yaml`, for all documents together.
        where, kind, mend: see :func:`parse_yaml`.

    Raises:
        UserError: see :func:`parse_yaml`.
    """
    try:
        if len(text) > MAX_YAML:
            raise _Refused(f"it has {len(text)} characters, {MAX_YAML} are accepted")
        loader, values, total = _PlainLoader(text), list[Any](), 0
        while loader.check_node() and (node := loader.get_node()) is not None:
            total += _written_out(node, {})
            if total > MAX_WRITTEN_OUT:
                raise _Refused("its aliases, written out, make more of it than is accepted")
            values.append(loader.construct_document(node))
        return values
    except RecursionError:
        error: Exception = _Refused(_too_deep())
    except (yaml.YAMLError, ValueError, OverflowError) as found:
        error = found
    raise kind(f"not YAML: {' '.join(str(error).split())}", where=where, mend=mend) from None


class _PlainLoader(yaml.SafeLoader):
    """YAML as plain values: those of JSON. Anything else that a tag asks for is an error."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Refuse deep nesting at once: the scanner takes time for each level at each token."""
        if self.flow_level >= MAX_DEPTH:
            raise _Refused(_too_deep())
        super().fetch_flow_collection_start(TokenClass)

    def construct_yaml_int(self, node: Any) -> int:
        """A whole number of a bearable length."""
        if len(node.value) > _MAX_DIGITS:
            raise _Refused(f"a number of {len(node.value)} digits")
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: Any) -> float:
        """A finite number."""
        value = float(super().construct_yaml_float(node))
        if not math.isfinite(value):
            raise _Refused(f"{node.value[:_MAX_DIGITS]} is no finite number")
        return value


_PREFIX = "tag:yaml.org,2002:"
_PlainLoader.yaml_constructors = {
    **{f"{_PREFIX}{name}": yaml.SafeLoader.yaml_constructors[f"{_PREFIX}{name}"]
       for name in ("null", "bool", "str", "seq", "map")},
    f"{_PREFIX}int": _PlainLoader.construct_yaml_int,
    f"{_PREFIX}float": _PlainLoader.construct_yaml_float,
    None: yaml.SafeLoader.yaml_constructors[None],
}  # fmt: skip
_PlainLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_PREFIX) not in ("timestamp", "value")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _written_out(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """How many values and characters a node stands for with its aliases written out.

    Args:
        node: of the graph that the parser has made, in which an alias is the node itself once more.
        known: the counts of the nodes that were met before; 0 for those that are being counted. Added to.
        depth: levels above this one.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise _Refused("an alias stands for something that it is itself a part of")
        return known[id(node)]
    if depth > MAX_DEPTH:
        raise _Refused(_too_deep())
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_text(node.value)
        if "\0" in node.value:
            raise _Refused("it has a text with a NUL, which no name and no path can have")
        total += len(node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_written_out(inner, known, depth + 1) for inner in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise _Refused(f"the key {_repeated(keys)[1]!r} comes twice")
        total += sum(_written_out(inner, known, depth + 1) for pair in node.value for inner in pair)
    if total > MAX_WRITTEN_OUT:
        raise _Refused("its aliases, written out, make more of it than is accepted")
    known[id(node)] = total
    return total


# ── files ──


def read_text(path: Path, kind: type[UserError] = UserError, *, mend: str = _RESTORE, limit: int = MAX_BYTES) -> str:
    """The text of a plain file in UTF-8.

    Args:
        path: of the file.
        kind: of the errors.
        mend: for a file that is damaged or too large.
        limit: bytes that it may have.

    Raises:
        UserError: unreadable, no plain file, too large, or not UTF-8.
    """
    size = check_file(path, kind)
    try:
        if size <= limit:
            with path.open("rb") as stream:
                data = stream.read(limit + 1)  # a file of the system may say that it is empty, and never end
            size = max(size, len(data))
        if size > limit:
            raise kind(f"the file has {size} bytes, {limit} are accepted", where=path, mend=mend)
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"unreadable: {reason}", where=path, mend=mend) from None
