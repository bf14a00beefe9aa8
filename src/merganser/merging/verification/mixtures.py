"""What the provenance of a mixture of experts says, held against its models; and the mixture made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.errors import CheckpointError
from merganser.files import scratch_folder
from merganser.merging.inputs import Inputs
from merganser.merging.memory import RunSettings
from merganser.merging.moe.build import Assembling, assembling, write_configuration, write_moe
from merganser.merging.moe.config import MoeConfig, make_config
from merganser.merging.moe.planning import MOE, MoePlan, plan_moe, recipe_of_moe
from merganser.merging.plan import Plan
from merganser.merging.provenance import FILE_NAME, describe_parent, file_digests, located, pinned, told_by
from merganser.merging.targets.checkpoint import make_layout, write_small_files
from merganser.merging.verification.record_checks import weight_files


def is_mixture(provenance: Mapping[str, Any]) -> bool:
    """Whether a record is that of a mixture of experts."""
    return bool(provenance["recipe"]["method"] == MOE)


def mixture_anew(provenance: Mapping[str, Any], folder: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What a record is to say, by the plan that is made today of what was asked for and of the models.

    Raises:
        UserError: what is recorded as asked for is no mixture, or its models cannot be read.
    """
    recorded = _recorded(provenance, folder)
    recipe = recipe_of_moe(recorded, _shard_size(provenance)).model_dump(mode="json")
    made = _planned(provenance, folder, allow_pickle=allow_pickle)
    people = [describe_parent(parent, False) for parent in made.inputs.parents]
    for entry, one in zip(people, recipe["contributors"], strict=True):
        entry["model"] = one["model"]
    told: dict[str, Any] = json.loads(json.dumps(told_by(made.plan, people, None)))
    told |= {"recipe": recipe, "format": provenance["format"]}
    said = provenance.get("notes") or []
    if said[: len(told["notes"])] == told["notes"]:  # what was found of the routers is said behind the plan's notes
        told |= {"notes": said, "plan": {**told["plan"], "notes": said} if said else told["plan"]}
    told["tensors"] = {
        name: {"method": step.method, "reason": step.reason} for step in made.plan.steps for name in step.unit.names
    }
    with scratch_folder() as scratch:
        write_small_files(made.plan, made.inputs, make_layout(made.plan), scratch)
        write_configuration(made, scratch)
        told["files"] = {**file_digests(scratch, {}, {}), **weight_files(made.plan, provenance)}
    return told


def mixture_work(provenance: Mapping[str, Any], folder: Path, settings: RunSettings) -> tuple[Plan, Inputs, Assembling]:
    """The plan of a mixture, its open models, and what makes its tensors again.

    Raises:
        UserError: as of :func:`merganser.merging.moe.build_moe`.
    """
    made = _planned(provenance, folder, allow_pickle=settings.allow_pickle)
    return made.plan, made.inputs, assembling(made, settings)


def mixture_again(provenance: Mapping[str, Any], folder: Path, output: Path, settings: RunSettings) -> None:
    """Make a mixture again, from its record.

    Raises:
        UserError: as of :func:`merganser.merging.moe.build_moe`.
    """
    made = _planned(provenance, folder, allow_pickle=settings.allow_pickle)
    write_moe(made, output, settings, reads=[folder])


def _recorded(provenance: Mapping[str, Any], folder: Path) -> MoeConfig:
    where = str(folder / FILE_NAME)
    options = provenance["recipe"].get("options")
    if not isinstance(options, dict):
        raise CheckpointError("does not say what was asked for", where=where, mend="restore the file")
    return make_config(options, where, allow_same=True)


def _shard_size(provenance: Mapping[str, Any]) -> str:
    return str(provenance["recipe"].get("max_shard_size", "5GB"))


def _planned(provenance: Mapping[str, Any], folder: Path, *, allow_pickle: bool) -> MoePlan:
    """The plan, its models as they are found from here."""
    recorded = _recorded(provenance, folder)
    found = {
        entry["model"]: pinned(entry) if entry.get("revision") else located(entry["model"], folder)
        for entry in provenance["parents"]
    }

    def placed(model: str) -> str:
        return found.get(model) or located(model, folder)

    def all_placed(experts: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(one.model_copy(update={"source_model": placed(one.source_model)}) for one in experts)

    here = {
        "base_model": placed(recorded.base_model),
        "experts": all_placed(recorded.experts),
        "shared_experts": all_placed(recorded.shared_experts),
    }
    config = recorded.model_copy(update=here)
    return plan_moe(config, max_shard_size=_shard_size(provenance), allow_pickle=allow_pickle)
