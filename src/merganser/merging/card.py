"""The model card of a result: what the Hub shows, and what a reader needs to judge the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from merganser.merging.execution import TensorRecord
from merganser.merging.plan import Plan


def model_card(
    plan: Plan,
    people: Sequence[Mapping[str, Any]],
    records: Mapping[str, TensorRecord],
    *,
    front: Mapping[str, Any],
    made: str,
    title: str = "",
    sections: str = "",
    notes: Sequence[str] = (),
) -> str:
    """README.md of a result, with the metadata that the Hub reads.

    Args:
        plan: what was done.
        people: the contributors, as provenance has them.
        records: what became of each tensor.
        front: the metadata, beside the tags of a merge.
        made: how it was made, a paragraph.
        title: what it is, beside a merge of so many models.
        sections: more, in Markdown.
        notes: what the user should know.
    """
    metadata = {**front, "tags": [*front.get("tags", ()), "merge", "merganser"]}
    rows = "\n".join(
        f"| {public_name(one['model'], one['revision'])} | {one['coefficient']:g} | "
        f"{one['statistics']['examples'] if one['statistics'] else '–'} |"
        for one in people
    )
    used = Counter((r.method, r.reason if r.method != "kept separate" else None) for r in records.values())
    treatment = "\n".join(
        f"| {method} | {count} | {reason or ''} |" for (method, reason), count in sorted(used.items(), key=str)
    )
    options = ", ".join(f"{key} {value}" for key, value in plan.recipe.options.items()) or "no options"
    said = "\n## Notes\n\n" + "".join(f"- {note}\n" for note in notes) if notes else ""
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# Merge of {len(people)} models by {plan.method.name}{title}

{made.format(f"{plan.method.summary} ({options})")}

| contributor | coefficient | examples in its statistics |
|---|---|---|
{rows}

| treatment | tensors | why not the method |
|---|---|---|
{treatment}
{sections}{said}
The licences of the contributors apply to the result.
"""


def public_name(model: str, revision: str | None) -> str:
    """A Hub name as it is; of a local folder only its last part, which says nothing about the machine."""
    if revision and "+" in revision:  # an adapter on its base, one of them on the Hub
        name, _, commit = revision.rsplit("+", 1)[1].partition("@")
        return public_name(name, commit or None)
    return model.rsplit("@", 1)[0] if revision else model.rstrip("/").rsplit("/", 1)[-1]
