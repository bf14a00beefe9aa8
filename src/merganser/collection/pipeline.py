"""The modules of a sentence-transformers model behind its transformer, run along while statistics are collected.

What a dense layer sees is the pooled output of the transformer, after all modules before it. So the modules are
attached to the loaded transformer under the names of their folders, and run after each of its forward passes.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import nn

from merganser.checkpoints.modules import Module, is_model
from merganser.errors import CheckpointError
from merganser.tasks.base import Task, architecture
from merganser.tasks.feature_extraction import FeatureExtraction
from merganser.tasks.models import Opened, first_line, quiet

_LIBRARY = "sentence_transformers"


def attach_modules(model: nn.Module, opened: Opened, task: Task) -> None:
    """Let a loaded transformer run the modules behind it, where any of them has weights; nothing to do for others.

    Args:
        model: in memory, with ``last_hidden_state`` among its outputs.
        opened: its files.
        task: that it was loaded for.

    Raises:
        CheckpointError: a module cannot be loaded.
    """
    chain = _chain(opened)
    if not chain or reason_against(opened, task) is not None:
        return
    loaded: list[nn.Module] = []
    for module in chain:
        try:
            with quiet():
                package, _, name = module.type.rpartition(".")
                kind: Any = getattr(importlib.import_module(package), name)
                one: nn.Module = kind.load(
                    str(opened.checkpoint.modules_path), subfolder=module.path, local_files_only=True
                )
        except Exception as error:  # whatever damaged weights or a stranger's configuration provoke
            what = f"the module {module.path} cannot be loaded: {first_line(error)}"
            raise CheckpointError(what, where=opened.name, mend="check its configuration and weights") from None
        one.float().requires_grad_(False)
        if module.path in opened.checkpoint.nested:
            model.add_module(module.path, one)
        loaded.append(one)

    def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        features = {"token_embeddings": output.last_hidden_state, "attention_mask": kwargs["attention_mask"]}
        for one in loaded:
            features = one(features)

    model.register_forward_hook(run, with_kwargs=True)


def reason_against(opened: Opened, task: Task, *, offloaded: bool = False) -> str | None:
    """Why the modules behind the transformer get no statistics, as a note; None where they do, or there are none."""
    chain = _chain(opened)
    if not chain:
        return None
    named = ", ".join(module.path for module in chain if module.path in opened.checkpoint.nested)
    foreign = [module.path for module in chain if not module.type.startswith(f"{_LIBRARY}.")]
    if foreign:
        return f"{named}: no statistics, since {foreign[0]} is code of the model's own"
    if importlib.util.find_spec(_LIBRARY) is None:
        return f"{named}: no statistics without sentence-transformers (pip install 'merganser[embeddings]')"
    if not isinstance(task, FeatureExtraction) or architecture(opened.config).endswith("ForMaskedLM"):
        return f"{named}: no statistics, since the model was run with a head that comes before it"
    if offloaded:
        return f"{named}: no statistics in limited memory"
    return None


def _chain(opened: Opened) -> list[Module]:
    """The modules behind the transformer up to the last that has weights, in their order."""
    nested, main = opened.checkpoint.nested, opened.checkpoint.main
    behind = [module for module in opened.checkpoint.modules if not module.routed and module.path not in ("", main)]
    if any(is_model(opened.root / module.path) for module in behind):
        return []
    last = max((number for number, module in enumerate(behind, 1) if module.path in nested), default=0)
    return behind[:last]
