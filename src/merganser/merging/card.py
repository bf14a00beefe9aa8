"""The model card of a merge: what the Hub shows, and what a reader needs to judge the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import yaml

from merganser.merging.execution import Outcome
from merganser.merging.layout import HEADS, Layout
from merganser.merging.plan import Plan


def model_card(plan: Plan, layout: Layout, outcomes: Mapping[str, Outcome]) -> str:
    """README.md of the merged folder, with the metadata that the Hub reads."""
    sources = [public_name(parent.contributor.model, parent.checkpoint.revision) for parent in plan.parents]
    library = "sentence-transformers" if "modules.json" in plan.parents[0].checkpoint.side_files() else "transformers"
    front = yaml.safe_dump(
        {
            "base_model": list(dict.fromkeys(sources)),
            "base_model_relation": "merge",
            "library_name": library,
            "tags": ["merge", "merganser"],
        },
        sort_keys=False,
    )
    options = ", ".join(f"{key} {value}" for key, value in plan.recipe.options.items()) or "no options"
    rows = "\n".join(
        f"| {source} | {parent.contributor.coefficient:g} | "
        f"{parent.statistics.header.examples if parent.statistics and plan.method.needs.statistics else '–'} |"
        for source, parent in zip(sources, plan.parents, strict=True)
    )
    used = Counter((o.method, o.reason if o.method != "kept separate" else None) for o in outcomes.values())
    treatment = "\n".join(
        f"| {method} | {count} | {reason or ''} |" for (method, reason), count in sorted(used.items(), key=str)
    )
    heads = ""
    if any(plan.separate):
        listing = "\n".join(
            f'- `from_pretrained(folder, subfolder="{folder}")`'
            for folder, names in zip(layout.head_folders, plan.separate, strict=True)
            if names
        )
        heads = (
            f"\n## Heads\n\nEach contributor's own head is kept under `{HEADS}/`; the root opens with the first. "
            f"Download the whole folder, then\n\n{listing}\n"
        )
    notes = "\n## Notes\n\n" + "".join(f"- {note}\n" for note in plan.notes) if plan.notes else ""
    return f"""---
{front}---

# Merge of {len(plan.parents)} models by {plan.method.name}

Made with merganser: {plan.method.summary} ({options}). `provenance.json` holds the recipe, the hash of every
parent and of every tensor, and the method that was really used for each; `merganser verify` checks it and
`merganser reproduce` repeats the merge byte for byte.

| contributor | coefficient | examples in its statistics |
|---|---|---|
{rows}

| treatment | tensors | why not the method |
|---|---|---|
{treatment}
{heads}{notes}
The licences of the contributors apply to the result.
"""


def public_name(model: str, revision: str | None) -> str:
    """A Hub name as it is; of a local folder only its last part, which says nothing about the machine."""
    if revision and "+" in revision:  # an adapter on its base, one of them on the Hub
        name, _, commit = revision.rsplit("+", 1)[1].partition("@")
        return public_name(name, commit or None)
    return model.rsplit("@", 1)[0] if revision else model.rstrip("/").rsplit("/", 1)[-1]
