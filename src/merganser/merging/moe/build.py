"""Making a mixture of experts: tensors are read, scaled and written one piece at a time, whole or nothing.

The result is a folder as a merge writes it, with a card, provenance, and the hash of every parent and every tensor.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from merganser.errors import raise_all
from merganser.merging.execution import Merging, Slice, execute
from merganser.merging.memory import RunSettings, fit
from merganser.merging.merge import MergeResult
from merganser.merging.moe.config import RANDOM, MoeConfig, load_config, make_config
from merganser.merging.moe.planning import ROUTER, MoePlan, plan_moe
from merganser.merging.moe.routers import degenerate, encode, normal_numbers, prompt_vectors, random_rows
from merganser.merging.outputs import merge_reads
from merganser.merging.plan import Plan, Step
from merganser.merging.provenance import CARD, describe_parent, public_name, write_provenance
from merganser.merging.shares import read_finite
from merganser.merging.targets.checkpoint import (
    CheckpointTarget,
    Layout,
    check_opening,
    make_layout,
    new_output,
    output_problems,
    write_small_files,
)
from merganser.methods import Merged
from merganser.methods.base import wide
from merganser.tensors import DTYPES, is_floating
from merganser.text import markdown

_LAYER = 2  # the part of a tensor's name that is the number of its layer


def build_moe(
    config: MoeConfig | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    max_memory: str | int | None = None,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    allow_same: bool = False,
    allow_pickle: bool = False,
) -> MergeResult:
    """Make a mixture of experts of dense models, as mergekit-moe does.

    Args:
        config: the values, or the YAML file that has them.
        output: the folder or fsspec URL to write; written whole or not at all.
        overwrite: replace what an earlier merge has written; nothing else is ever replaced.
        threads: how many tensors, and prompts, are worked on at once; the bytes do not depend on it.
        max_memory: what the writing may take, in bytes or as ``"2GB"``; nor on this.
        device: where the base model runs on the prompts: cpu, cuda or auto.
        max_shard_size: the largest weight file.
        allow_same: all experts may be one model.
        allow_pickle: accept models in ``pytorch_model.bin``.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    reads, where = list[Path](), "mixture of experts"
    if isinstance(config, str | os.PathLike):
        reads, where = [Path(config)], str(config)
        config = load_config(reads[0])
    values = config.model_dump(mode="json") if isinstance(config, MoeConfig) else config
    checked = make_config(values, where, allow_same=allow_same)
    settings = RunSettings.make(threads, max_memory, device, allow_pickle=allow_pickle)
    made = plan_moe(checked, max_shard_size=max_shard_size, allow_pickle=allow_pickle)
    return write_moe(made, output, settings, overwrite=overwrite, reads=reads)


def write_moe(
    made: MoePlan, output: str | Path, settings: RunSettings, *, overwrite: bool = False, reads: Sequence[Path] = ()
) -> MergeResult:
    """Carry out what :func:`~merganser.merging.moe.planning.plan_moe` has planned.

    Args:
        made: the plan.
        output: the folder or URL.
        settings: how it is run.
        overwrite: whether an earlier merge may be replaced.
        reads: what is read beside the models, such as the file that was given.

    Raises:
        UserError: as of :func:`build_moe`.
    """
    plan, inputs, started = made.plan, made.inputs, time.monotonic()
    everything = [*reads, *merge_reads(inputs)]
    raise_all(output_problems(output, overwrite, everything, plan.bytes_written))
    work = assembling(made, settings)
    by_layer: dict[int, list[Tensor]] = {}
    for name, rows in work.routers.items():
        by_layer.setdefault(int(name.split(".")[_LAYER]), []).append(rows)
    if alike := degenerate({layer: torch.cat(rows) for layer, rows in by_layer.items()}):
        where = "all layers" if len(alike) == len(by_layer) else f"the layers {', '.join(map(str, alike))}"
        said = f"the routers of {where} hardly tell the experts apart, so that some will be little used: give prompts "
        plan = replace(plan, notes=(*plan.notes, f"{said}that are less alike"))
    layout = make_layout(plan)
    with new_output(output, overwrite, everything) as staging:
        write_small_files(plan, inputs, layout, staging.folder)
        write_configuration(made, staging.folder)
        with CheckpointTarget(plan, layout, staging.folder) as target:
            execute(fit(plan.steps, settings), work, target, "assembling")
        raise_all(check_opening(staging.folder, inputs.reference.checkpoint))
        people = [describe_parent(parent, False) for parent in inputs.parents]
        (staging.folder / CARD).write_text(_card(made, plan, people), encoding="utf-8")
        _record(plan, layout, staging.folder, target, people)
    return MergeResult(output, plan, time.monotonic() - started)


def assembling(made: MoePlan, settings: RunSettings) -> Assembling:
    """What is done for each tensor of a mixture, its routers computed; weights on the Hub are downloaded.

    Raises:
        UserError: the base model cannot be run on the prompts.
    """
    prompts = encode(made.config, settings.allow_pickle)
    for source in made.inputs.sources:
        source.checkpoint.fetch()
    vectors = prompt_vectors(made.config, prompts, made.inputs.parents[0], settings) if prompts else None
    routers = {step.unit.names[0]: _router(made, step, vectors) for step in made.plan.steps if step.method == ROUTER}
    return Assembling(made.inputs, settings, routers=routers, seed=made.config.seed)


def write_configuration(made: MoePlan, folder: Path) -> None:
    """``config.json`` of the mixture, in place of the base model's."""
    stored = {DTYPES[spec.dtype] for spec in made.plan.outputs if is_floating(spec.dtype)}
    said = {"dtype": str(stored.pop()).removeprefix("torch.")} if len(stored) == 1 else {}
    text = json.dumps({**made.values, **said}, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _record(
    plan: Plan, layout: Layout, folder: Path, target: CheckpointTarget, people: Sequence[Mapping[str, Any]]
) -> None:
    write_provenance(plan, folder, target.records, people, None, layout.files, layout.places)


def _router(made: MoePlan, step: Step, vectors: Tensor | None) -> Tensor:
    """The rows of one router, (experts, hidden size) in float32."""
    (name,), (fact,) = step.unit.names, step.unit.facts
    rows, width = fact.shape
    if made.config.gate_mode in RANDOM or vectors is None:
        return random_rows(made.config.gate_mode, name, rows, width, made.config.seed)
    layer = vectors[0 if len(vectors) == 1 else int(name.split(".")[_LAYER])]
    experts = len(made.config.experts)
    return layer[:experts] if name.endswith(made.architecture.router) else layer[experts:]


@dataclass
class Assembling(Merging):
    """Tensors of one model each, scaled and with noise where the mixture says so; and the routers."""

    routers: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    mend: str = "give a smaller noise_scale or residual_scale, or another model"

    def slices(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """In the storage dtype of the model, but in float32 where something is computed."""
        (name,), (fact,) = step.unit.names, step.unit.facts
        if step.method == ROUTER:
            yield {name: 0}, Merged({name: self.routers[name]})
            return
        (number,) = step.takers
        parent, source, height = self.inputs.parents[number], step.sources[number][name], fact.shape[0]
        noise, scale = step.options.get("noise_scale"), step.options.get("residual_scale")
        for start in range(0, height, rows or height):
            stop = min(height, start + (rows or height))
            tensor = read_finite(parent, source, start, stop)
            if noise:
                tensor = wide(tensor) + noise * normal_numbers(name, range(start, stop), fact.shape[1], self.seed)
            if scale is not None:
                tensor = wide(tensor) * scale
            yield {name: start}, Merged({name: tensor})


def _card(made: MoePlan, plan: Plan, people: Sequence[Mapping[str, Any]]) -> str:
    """README.md of the result."""
    config = made.config
    names = {one["model"]: public_name(one["model"], one["revision"]) for one in people}
    front = {
        "base_model": list(dict.fromkeys(names.values())),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["moe", "merge", "merganser"],
    }
    places = [*map(str, range(len(config.experts))), *["shared"] * len(config.shared_experts)]
    rows = "\n".join(
        f"| {place} | {markdown(names[expert.source_model])} | {len(expert.positive_prompts)} | "
        f"{len(expert.negative_prompts)} |"
        for place, expert in zip(places, config.everyone, strict=True)
    )
    said = "\n## Notes\n\n" + "".join(f"- {markdown(note)}\n" for note in plan.notes) if plan.notes else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Mixture of {len(config.experts)} experts ({made.architecture.name})

Made with `merganser moe`: feed-forward blocks of dense models side by side, {config.experts_per_token} of them on each
token, chosen by routers of gate mode `{config.gate_mode}`. Embeddings, attention, norms and head are those of
{markdown(names[config.base_model])}. `provenance.json` holds what was asked for, the hash of every model and of every
tensor; `merganser verify` checks it, and `merganser reproduce` makes the mixture again.

| expert | model | positive prompts | negative prompts |
|---|---|---|---|
{rows}
{said}
The licences of the models apply to the result.
"""
