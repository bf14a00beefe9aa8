"""Heads with a row for each label: rows are matched by the names of the labels, wherever a model keeps its head.

Which tensors are heads is found from the model: they are those that grow when the configuration has one label more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merganser.errors import CheckpointError, ErrorCollector, RecipeError, did_you_mean
from merganser.merging.inputs import Parent
from merganser.merging.matching import RowMap
from merganser.merging.recipe import Recipe

#: What heads are called where transformers does not know the model.
_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj|logits_proj|qa_outputs)\.(weight|bias)$")
_BODY = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")


@dataclass(frozen=True)
class LabelPlan:
    """How the heads' rows are matched: the result's labels, the rows of each head tensor, what to tell the user."""

    labels: tuple[str, ...]
    rows: dict[str, RowMap]
    notes: tuple[str, ...] = ()


def match_labels(
    recipe: Recipe, parents: Sequence[Parent], names: Sequence[str], problems: ErrorCollector
) -> LabelPlan | None:
    """Match the rows of the heads by the names of their labels; None where all heads agree anyway.

    Args:
        recipe: for ``labels`` and the contributors' own lists.
        parents: the open contributors.
        names: tensors to be merged; those kept separate are not among them.
        problems: receives what cannot be matched.
    """
    known = [plain_labels(parent.label_names, parents) for parent in parents]
    restricted = any(parent.contributor.labels is not None for parent in parents)
    if all(labels == known[0] for labels in known) and not restricted:
        return None
    heads = _heads(names, parents)
    if not heads:
        return None
    doubled = [p for p, labels in zip(parents, known, strict=True) if len(set(labels)) < len(labels)]
    for parent in doubled:
        text = "its configuration gives two labels of its head one name (id2label), so that rows cannot be told apart"
        problems.add(CheckpointError(text, where=parent.checkpoint.name, mend="give every label a name of its own"))
    if doubled:
        return None
    if any(set(labels) != set(known[0]) for labels in known) and recipe.labels == "same":
        listing = "; ".join(f"{p.title}: {', '.join(k)}" for p, k in zip(parents, known, strict=True))
        problems.add(
            RecipeError(
                f"the heads have different label spaces ({listing}; tensors {', '.join(heads)})",
                mend="--labels union for one head that knows every label, or "
                f"--keep-separate '{next(iter(heads)).rsplit('.', 1)[0]}*' so that each contributor keeps its own",
            )
        )
        return LabelPlan((), dict.fromkeys(heads, RowMap(0, ())))  # one problem, not another for each shape
    union = list(dict.fromkeys(label for labels in known for label in labels))
    own, voted = [], []
    for parent, labels in zip(parents, known, strict=True):
        chosen = set(labels) if parent.contributor.labels is None else set(parent.contributor.labels)
        for label in sorted(chosen - set(labels)):
            problems.add(
                RecipeError(
                    f"{parent.title} has no label {label!r}",
                    where=f"labels of {parent.title}",
                    mend=did_you_mean(label, labels),
                )
            )
        own.append([labels.index(label) if label in labels else -1 for label in union])
        voted.append([label in chosen for label in union])
    notes = []
    orphans = [label for j, label in enumerate(union) if not any(v[j] for v in voted)]
    if orphans:
        notes.append(f"no contributor votes on {', '.join(orphans)}: averaged over all that have the row")
    final = [
        tuple(row if vote[j] or union[j] in orphans else -1 for j, row in enumerate(rows))
        for rows, vote in zip(own, voted, strict=True)
    ]
    notes.append(f"heads matched by label name: {', '.join(union)}")
    sizes = [len(labels) for labels in known]
    rows = {
        name: RowMap.of([[*own, *range(n, n + more)] for own, n in zip(final, sizes, strict=True)])
        for name, more in heads.items()
    }
    return LabelPlan(tuple(union), rows, tuple(notes))


def head_labels(parent: Parent, names: Iterable[str]) -> tuple[str, ...]:
    """The labels of a contributor's head, where it names them and the head is among these tensors."""
    labels = parent.label_names
    return tuple(labels) if not _unnamed(labels) and _heads(names, [parent]) else ()


def _heads(names: Iterable[str], parents: Sequence[Parent]) -> dict[str, int]:
    """The tensors with a row for each label, and how many rows follow those, such as that of no object."""
    first = parents[0]
    known = first.view.heads if first.view.model is not None else None
    heads = {}
    for name in names:
        if known is None and (not _HEAD.search(name) or _BODY.search(name)):
            continue
        more = 0 if known is None else known.get(name)
        infos = [parent.info(name) for parent in parents]
        if more is not None and all(
            info is not None and info.shape and info.shape[0] == len(parent.label_names) + more
            for info, parent in zip(infos, parents, strict=True)
        ):
            heads[name] = more
    return heads


def _unnamed(labels: Sequence[str]) -> bool:
    """Whether these are the names that transformers makes up."""
    return all(label == f"LABEL_{i}" for i, label in enumerate(labels))


def plain_labels(labels: list[str], parents: Sequence[Parent]) -> list[str]:
    """Unnamed labels (LABEL_0, …) take the names that a contributor with as many labels gives them."""
    if labels and _unnamed(labels):
        for parent in parents:
            if len(parent.label_names) == len(labels):
                named = parent.label_names
                if not _unnamed(named):
                    return named
    return labels
