"""Who votes on which row: heads whose label spaces differ, vocabularies of different length.

A contributor votes only on the output rows that it has trained. The result's rows are listed once, and for each
contributor the row of its own tensor that answers to each, or -1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from merganser.errors import RecipeError, UserError, did_you_mean
from merganser.merging.parents import Parent
from merganser.merging.recipe import Recipe

_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj|logits_proj|qa_outputs)\.(weight|bias)$")
_BODY = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")


@dataclass(frozen=True)
class Rows:
    """The rows of one merged tensor.

    Attributes:
        size: how many rows the result has.
        own: for each contributor, for each row of the result, the row of its own tensor, or -1.
    """

    size: int
    own: tuple[tuple[int, ...], ...]

    def groups(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(rows of the result, contributors that vote on them), each row once; rows that nobody owns go to all.

        Raises:
            ValueError: a row that exists in no contributor.
        """
        by_owners: dict[tuple[int, ...], list[int]] = {}
        for row in range(self.size):
            owners = tuple(i for i, own in enumerate(self.own) if own[row] >= 0)
            by_owners.setdefault(owners, []).append(row)
        if () in by_owners:
            raise ValueError(f"row {by_owners[()][0]} exists in no contributor")
        return [(tuple(rows), owners) for owners, rows in by_owners.items()]


@dataclass(frozen=True)
class LabelPlan:
    """How the heads' rows are matched: the result's labels, the rows of each head tensor, what to tell the user."""

    labels: tuple[str, ...]
    rows: dict[str, Rows]
    notes: tuple[str, ...] = ()


def match_labels(
    recipe: Recipe, parents: Sequence[Parent], names: Sequence[str], problems: list[UserError]
) -> LabelPlan | None:
    """Match the rows of the heads by the names of their labels; None where all heads agree anyway.

    Args:
        recipe: for ``labels`` and the contributors' own lists.
        parents: the open contributors.
        names: tensors to be merged; those kept separate are not among them.
        problems: receives what cannot be matched.
    """
    known = [_plain(parent.label_names, parents) for parent in parents]
    heads = [name for name in names if _is_head(name, parents)]
    restricted = any(parent.contributor.labels is not None for parent in parents)
    if not heads or (all(labels == known[0] for labels in known) and not restricted):
        return None
    if any(set(labels) != set(known[0]) for labels in known) and recipe.labels == "same":
        listing = "; ".join(f"{p.title}: {', '.join(k)}" for p, k in zip(parents, known, strict=True))
        problems.append(
            RecipeError(
                f"the heads have different label spaces ({listing}; tensors {', '.join(heads)})",
                mend="--labels union for one head that knows every label, or "
                f"--keep-separate '{heads[0].rsplit('.', 1)[0]}*' so that each contributor keeps its own",
            )
        )
        return None
    union = list(dict.fromkeys(label for labels in known for label in labels))
    own, voted = [], []
    for parent, labels in zip(parents, known, strict=True):
        chosen = set(labels) if parent.contributor.labels is None else set(parent.contributor.labels)
        for label in sorted(chosen - set(labels)):
            problems.append(
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
    rows = Rows(len(union), tuple(final))
    return LabelPlan(tuple(union), dict.fromkeys(heads, rows), tuple(notes))


def match_vocabulary(parents: Sequence[Parent], name: str) -> Rows:
    """Rows of a tensor whose contributors differ in length: the first rows are common, the rest are appended."""
    sizes = [info.shape[0] for parent in parents if (info := parent.info(name)) is not None]
    size = max(sizes)
    return Rows(size, tuple(tuple(row if row < own else -1 for row in range(size)) for own in sizes))


def _is_head(name: str, parents: Sequence[Parent]) -> bool:
    if not _HEAD.search(name) or _BODY.search(name):
        return False
    infos = [parent.info(name) for parent in parents]
    return all(
        info is not None and info.shape and info.shape[0] == len(parent.label_names)
        for info, parent in zip(infos, parents, strict=True)
    )


def _plain(labels: list[str], parents: Sequence[Parent]) -> list[str]:
    """Unnamed labels (LABEL_0, …) take the names that a contributor with as many labels gives them."""
    if labels and all(label == f"LABEL_{i}" for i, label in enumerate(labels)):
        for parent in parents:
            if len(parent.label_names) == len(labels):
                named = parent.label_names
                if any(label != f"LABEL_{i}" for i, label in enumerate(named)):
                    return named
    return labels
