"""Which column is the text, which the label: given by the user, or known by its usual name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from merganser.errors import DataError, UserError, did_you_mean
from merganser.tasks.data import Rows


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a task reads; None for what is to be found by its usual name."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None
    target: str | None = None
    image: str | None = None

    @classmethod
    def of(cls, given: Columns | Mapping[str, str | None] | None) -> Columns:
        """Columns from what a caller gave.

        Raises:
            UserError: no mapping, or one with a key that is no column role.
        """
        if isinstance(given, Columns):
            return given
        if given is not None and not isinstance(given, Mapping):
            mend = f"give a dictionary by role, such as {{'text': {str(given)!r}}}"
            raise UserError("columns are named by their roles", where="columns", mend=mend)
        known = [entry.name for entry in fields(cls)]
        for key in given or {}:
            if key not in known:
                raise UserError(f"unknown column role {key!r}", where="columns", mend=did_you_mean(key, known))
        return cls(**dict(given or {}))


def option(role: str) -> str:
    """The command-line option that names the column of ``role``."""
    return f"--{role.replace('_', '-')}-column"


#: Usual names of each role, the first that is present is taken. Tasks may bring their own.
USUAL: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content", "document", "review", "tweet", "comment"),
    "label": ("label", "labels", "class", "category"),
    "tokens": ("tokens", "words"),
    "target": ("target", "output", "summary", "answer", "highlights"),
    "image": ("image", "image_path", "img"),
}

#: Usual names of two texts that belong together. They are tried before single texts.
PAIRS: tuple[tuple[str, str], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("text", "text_pair"),
    ("text1", "text2"),
)


def resolve(
    rows: Rows,
    given: Columns,
    needs: Sequence[str],
    wants: Sequence[str] = (),
    usual: Mapping[str, tuple[str, ...]] | None = None,
) -> Columns:
    """Find the columns of a task.

    Args:
        rows: the data.
        given: what the user named; such a column must be there.
        needs: roles without which the task cannot go on.
        wants: roles that are taken where they are found. ``text_pair`` is looked for only beside its partner.
        usual: other usual names than :data:`USUAL`, by role.

    Returns:
        Columns with a name for every role that was found; roles that the task does not read are None.

    Raises:
        DataError: a column that is not there; the message lists those that are.
    """
    present = rows.columns
    lower = {name.lower(): name for name in reversed(present)}
    usual = {**USUAL, **(usual or {})}
    roles = [*needs, *wants]
    found: dict[str, str] = {}
    for role, name in asdict(given).items():
        if name is None or role not in roles:
            continue
        if name not in present:
            what = f"no column {name!r} ({option(role)}); the columns are {', '.join(present) or 'none'}"
            raise DataError(what, where=rows.source, mend=did_you_mean(name, present))
        found[role] = name
    if "text_pair" in roles and "text" not in found and "text_pair" not in found:
        pair = next((pair for pair in PAIRS if all(name in lower for name in pair)), None)
        if pair is not None:
            found |= {"text": lower[pair[0]], "text_pair": lower[pair[1]]}
    for role in roles:
        if role in found or role == "text_pair":
            continue
        names = (lower[name] for name in usual.get(role, ()) if name in lower)
        name = next((name for name in names if name not in found.values()), None)
        if name is not None:
            found[role] = name
        elif role in needs:
            what = f"no column for the {role} was found; the columns are {', '.join(present) or 'none'}"
            mend = f"name it with {option(role)} (found by themselves: {', '.join(usual.get(role, ()))})"
            if "input_ids" in present:
                mend = f"give the texts, which the model's own tokenizer reads here; or {mend}"
            raise DataError(what, where=rows.source, mend=mend)
    return replace(Columns(), **found)


def another_column(role: str) -> str:
    """How to mend a row whose value in the column of ``role`` cannot be used."""
    return f"correct the row, or choose another column with {option(role)}"


def column_values(rows: Rows, column: str, role: str) -> Iterator[tuple[Any, str]]:
    """Each row's value in the column of ``role``, with the row's place.

    Raises:
        DataError: a row without a value, with its file and line.
    """
    for index in range(len(rows)):
        yield rows.value(index, column, option(role)), rows.where(index)


def texts(rows: Rows, column: str, role: str = "text") -> list[str]:
    """The texts of a column.

    Raises:
        DataError: a row without text, or with something that is not text, with its file and line.
    """
    found = []
    for value, where in column_values(rows, column, role):
        if not isinstance(value, str):
            what = f"{column!r} is {type(value).__name__} {str(value)[:40]!r}, not text"
            raise DataError(what, where=where, mend=another_column(role))
        found.append(value)
    return found
