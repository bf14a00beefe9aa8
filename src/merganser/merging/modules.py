"""How the contributors' sentence-transformers modules fit together: the same ones, that do the same.

A module that only some contributors have cannot be merged, and dropping it gives another model. What the modules'
configurations say (how tokens are pooled, what activation a dense layer has) is part of the function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.json_files import read_json
from merganser.checkpoints.modules import MODULES, Module
from merganser.errors import CheckpointError, ErrorCollector, RecipeError
from merganser.merging.inputs import Parent
from merganser.merging.matching import matches
from merganser.merging.recipe import Recipe

_POOLING = "pooling_mode"
_FLAGS = {  # how versions before 5.4 spelt the modes of pooling
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: Of each kind of module, the settings that change what it computes, with their defaults.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "Pooling": {_POOLING: "mean", "include_prompt": True},
    "Dense": {"activation_function": "torch.nn.modules.activation.Tanh", "use_residual": False},
    "SpladePooling": {"pooling_strategy": "max", "activation_function": "relu"},
    "WeightedLayerPooling": {"num_hidden_layers": 12, "layer_start": 4},
    "Router": {"structure": None},
}


def check_modules(recipe: Recipe, parents: Sequence[Parent], problems: ErrorCollector) -> list[str]:
    """Check that every contributor has the modules of the first one, with the same settings.

    Args:
        recipe: of the merge.
        parents: the open contributors, the reference first.
        problems: receives what cannot be merged.

    Returns:
        what the user should know: modules without weights that not all contributors have.

    Raises:
        Problems: modules with weights that not all contributors have; everything that depends on them is left alone.
    """
    first, *others = parents
    notes: list[str] = []
    for parent in parents:
        kept = [name for name in parent.checkpoint.tensors if "/" in name and matches(name, recipe.keep_separate)]
        for folder in sorted({name.rpartition("/")[0] for name in kept}):
            what = f"the module {folder} cannot be kept separate: a model has one module of each place"
            mend = f"give patterns that do not match {folder}/…"
            problems.add(RecipeError(what, where="keep_separate", mend=mend))
    for other in others:
        for one, two in ((first, other), (other, first)):
            for folder in sorted(set(one.checkpoint.nested) - set(two.checkpoint.nested)):
                problems.add(_lacking(folder, one, two))
        notes += _unlike(first, other)
        _check_settings(first, other, problems)
    problems.raise_all()
    return list(dict.fromkeys(notes))


def _lacking(folder: str, one: Parent, two: Parent) -> CheckpointError:
    return CheckpointError(
        f"has no module {folder}, whose weights {one.title} has",
        where=two.checkpoint.name,
        mend=f"give a model that was trained with {folder}; or merge without it: take the entry of {folder} out of "
        f"{MODULES} in a copy of {one.checkpoint.name}, and give the copy",
    )


def _unlike(first: Parent, other: Parent) -> list[str]:
    """What is said of modules without weights that the two do not have in common."""
    kinds = [[module.kind for module in parent.checkpoint.modules] for parent in (first, other)]
    if not kinds[1] or kinds[0] == kinds[1] or {*kinds[0]} == {*kinds[1]}:
        return []
    listing = "; ".join(f"{p.title}: {', '.join(k) or 'none'}" for p, k in zip((first, other), kinds, strict=True))
    return [f"the modules differ ({listing}): those of {first.title} are taken"]


def _check_settings(first: Parent, other: Parent, problems: ErrorCollector) -> None:
    """The modules of one place and kind do the same."""
    theirs = {module.path: module for module in other.checkpoint.modules}
    for module in first.checkpoint.modules:
        twin = theirs.get(module.path)
        if twin is None or twin.kind != module.kind:
            continue
        mine, its = _settings(first.checkpoint, module), _settings(other.checkpoint, twin)
        differing = [key for key in mine if mine[key] != its[key]]
        if differing:
            shown = "; ".join(f"{key}: {json.dumps(its[key])}, not {json.dumps(mine[key])}" for key in differing)
            problems.add(
                CheckpointError(
                    f"the module {module.path or module.kind} does not do the same as that of {first.title} ({shown})",
                    where=other.checkpoint.name,
                    mend="merge models that use their embeddings alike; where the setting makes no difference to "
                    f"them, write it alike into a copy of {other.checkpoint.name}",
                )
            )


def _settings(checkpoint: Checkpoint, module: Module) -> dict[str, Any]:
    """What a module's configuration says of what it computes, in the words of today."""
    wanted = _SETTINGS.get(module.kind, {})
    name = "router_config.json" if module.kind == "Router" else "config.json"
    config = read_json(checkpoint.modules_path / module.path / name, missing={})
    if module.kind == "Pooling" and _POOLING not in config:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)]
        config = {**config, _POOLING: modes[0] if len(modes) == 1 else modes or "mean"}
    return {key: config.get(key, default) for key, default in wanted.items()}
