"""The modules of a sentence-transformers model: what ``modules.json`` lists, each with the folder that it lies in.

The transformer is in the model's folder itself, or in a sub-folder of its own (``0_Transformer``, the older layout).
The modules behind it (pooling, dense layers, norms) have a sub-folder each. A router has a sub-folder for each module
of each of its routes, such as one encoder for queries and another one for documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoints.json_files import parse, read_json
from merganser.errors import CheckpointError
from merganser.paths import inside

MODULES, ROUTER = "modules.json", "router_config.json"
_ROUTERS = ("Router", "Asym")
#: Kinds of modules that cannot be without weights.
_WEIGHTED = {"Dense", "LayerNorm", "WeightedLayerPooling", "CNN", "LSTM"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        path: its folder, relative to the model's; empty for the model's own folder.
        type: the class that opens it, such as ``sentence_transformers.models.Dense``; empty where none is named.
        routed: whether it belongs to a route of a router.
    """

    path: str
    type: str = ""
    routed: bool = False

    @property
    def kind(self) -> str:
        """The name of the class alone, such as ``Dense``."""
        return self.type.rsplit(".", 1)[-1]

    @property
    def weighted(self) -> bool:
        """Whether it cannot be without weights."""
        return self.kind in _WEIGHTED


def read_modules(folder: Path) -> tuple[Module, ...]:
    """The modules of a model's folder in their order, those of a router after it; none where it lists none.

    Raises:
        CheckpointError: a list that is unreadable or malformed, or a module outside of the folder.
    """
    where = folder / MODULES
    if not where.is_file():
        return ()
    entries = parse(where)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError("a JSON list of modules is expected", where=where, mend="restore the file")
    found: list[Module] = []
    for entry in entries:
        module = Module(_inside(folder, entry.get("path", ""), where), str(entry.get("type", "")))
        found += [module, *_routes(folder, module)]
    return tuple(found)


def main_folder(folder: Path) -> str:
    """The sub-folder in which the transformer lies, relative to ``folder``; empty for the folder itself.

    Raises:
        CheckpointError: see :func:`read_modules`.
    """
    if has_weights(folder) or is_model(folder):
        return ""
    found = [module.path for module in read_modules(folder) if not module.routed and is_model(folder / module.path)]
    return found[0] if len(found) == 1 else ""


def is_model(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is that of a model of transformers, and not of some other module."""
    config = read_json(folder / "config.json", missing={})
    return isinstance(config.get("model_type"), str) or isinstance(config.get("architectures"), list)


def has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder, in any format that can be read."""
    return any((folder / file).is_file() for file in _WEIGHTS)


def _routes(folder: Path, router: Module) -> list[Module]:
    """The modules of a router's routes."""
    if router.kind not in _ROUTERS:
        return []
    places = [folder / router.path / file for file in (ROUTER, "config.json")]
    where = next((place for place in places if place.is_file()), places[0])
    types: Any = read_json(where, missing={}).get("types")
    if not isinstance(types, dict):
        raise CheckpointError("the router's configuration names no modules (types)", where=where, mend="restore it")
    prefix = f"{router.path}/" if router.path else ""
    found: list[Module] = []
    for name, kind in types.items():
        path = _inside(folder / router.path, name, where)
        if not path:
            mend = "name the sub-folder that it lies in"
            raise CheckpointError(f"the router's module {name!r} is the router itself", where=where, mend=mend)
        module = Module(prefix + path, str(kind), routed=True)
        found += [module, *_routes(folder, module)]
    return found


def _inside(folder: Path, path: Any, where: Path) -> str:
    """A module's path in its usual form.

    Raises:
        CheckpointError: it is no path, or leads out of the model's folder.
    """
    mend = "a module lies in a sub-folder of the model: put it there, and name that sub-folder"
    return inside(folder, path, CheckpointError, where=where, what="the module", mend=mend)
