"""The same tensor under two names: a model with a head prefixes what its base model stores plainly."""

from __future__ import annotations

from collections.abc import Collection


def align(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Map each of ``names`` to its twin among ``others``; names without a twin are absent.

    Twins are equal, or equal but for one leading component (``bert.`` before everything, say). The prefix is the
    one that pairs the most names; a name that is there literally always wins.
    """
    available = set(others)
    best: dict[str, str] = {}
    for prefix in _prefixes(names) | _prefixes(others) | {""}:
        pairs = {}
        for name in names:
            for candidate in (name, f"{prefix}{name}", name.removeprefix(prefix)):
                if candidate in available:
                    pairs[name] = candidate
                    break
        if (len(pairs), -len(prefix)) > (len(best), 0) or (len(pairs) == len(best) and not prefix):
            best = pairs
    return best


def renamed(name: str) -> list[str]:
    """How old files spell a parameter: ``gamma`` for a norm's ``weight``, ``beta`` for its ``bias``."""
    spellings = ((".weight", ".gamma"), (".bias", ".beta"))
    return [name.removesuffix(new) + old for new, old in spellings if name.endswith(new)]


def _prefixes(names: Collection[str]) -> set[str]:
    return {name.split(".", 1)[0] + "." for name in names if "." in name}
