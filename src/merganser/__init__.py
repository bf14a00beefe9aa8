"""merganser: fuse fine-tuned language models by merging their weights, without anyone's training data.

The three verbs, as functions: :func:`collect` (statistics, next to the data), :func:`merge` and :func:`evaluate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from merganser.collection import collect
    from merganser.evaluation import evaluate
    from merganser.merging import (
        Contributor,
        Plan,
        Recipe,
        RunSettings,
        extract,
        ledger,
        make_plan,
        merge,
        reproduce,
        verify,
    )
    from merganser.signing import check_signature, sign

_HOMES = {
    "Contributor": "merganser.merging",
    "Plan": "merganser.merging",
    "Recipe": "merganser.merging",
    "RunSettings": "merganser.merging",
    "check_signature": "merganser.signing",
    "collect": "merganser.collection",
    "evaluate": "merganser.evaluation",
    "extract": "merganser.merging",
    "ledger": "merganser.merging",
    "make_plan": "merganser.merging",
    "merge": "merganser.merging",
    "reproduce": "merganser.merging",
    "sign": "merganser.signing",
    "verify": "merganser.merging",
}

__all__ = [
    "Contributor",
    "Plan",
    "Recipe",
    "RunSettings",
    "__version__",
    "check_signature",
    "collect",
    "evaluate",
    "extract",
    "ledger",
    "make_plan",
    "merge",
    "reproduce",
    "sign",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds, ``--help`` must not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'merganser' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return importlib.import_module(f"{_HOMES[name]}.{name}") if name == "ledger" else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
