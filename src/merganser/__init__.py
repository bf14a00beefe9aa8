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
    from merganser.merging import Contributor, Recipe, reproduce, verify
    from merganser.merging.merge import merge

_HOMES = {
    "collect": "merganser.collection",
    "evaluate": "merganser.evaluation",
    "Contributor": "merganser.merging",
    "Recipe": "merganser.merging",
    "merge": "merganser.merging",
    "reproduce": "merganser.merging",
    "verify": "merganser.merging",
}

__all__ = ["Contributor", "Recipe", "__version__", "collect", "evaluate", "merge", "reproduce", "verify"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds, ``--help`` must not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'merganser' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
