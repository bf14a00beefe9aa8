"""What can go wrong, said so that the reader can mend it.

Every error that a user can cause is a :class:`UserError`: it says what is wrong, where, and how to mend it.
The command line prints it and exits with 2; anything else is a bug and exits with 1.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from merganser.text import printable, shortened

if TYPE_CHECKING:
    from pydantic import BaseModel

T = TypeVar("T")
M = TypeVar("M", bound="BaseModel")

#: What is shown of an error fits on a screen, however long the names and values in it are: characters of what is wrong,
#: of the place, of the mend and of what a program said, and of several errors how many and how many in all.
MOST_OF_WHAT, MOST_OF_WHERE, MOST_OF_MEND, MOST_OF_SAID = 800, 300, 1000, 2000
MOST_PROBLEMS, MOST_OF_PROBLEMS = 15, 4000


class MerganserError(Exception):
    """Base class of every error that merganser raises on purpose."""


class UserError(MerganserError):
    """A mistake that the user can mend.

    As text it fits on a screen and has no character that a terminal acts upon, whoever wrote the names in it: what is
    too long is cut in its middle, and what cannot be seen is written out (``\\x1b``). Only a mend, and what another
    program said, have line breaks.

    Args:
        what: what is wrong, in a sentence, naming tensors, keys and values.
        where: the file (and line) or option it was found in.
        mend: how to mend it, as an instruction.
        said: what another process or program said of it, in as many lines as it has; stands behind ``what``.
    """

    def __init__(
        self, what: str, *, where: str | Path | None = None, mend: str | None = None, said: str | None = None
    ) -> None:
        self.what, self.where, self.mend, self.said = what, None if where is None else str(where), mend, said
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{shortened(printable(self.where), MOST_OF_WHERE)}: " if self.where else ""
        remedy = f"\n    to mend: {shortened(printable(self.mend, lines=True), MOST_OF_MEND)}" if self.mend else ""
        said = f": {shortened(printable(self.said, lines=True), MOST_OF_SAID)}" if self.said else ""
        return f"{place}{shortened(printable(self.what), MOST_OF_WHAT)}{said}{remedy}"


class CheckpointError(UserError):
    """A model folder or a safetensors file that cannot be used."""


class StatisticsError(UserError):
    """A statistics file that cannot be used, or not with these weights."""


class RecipeError(UserError):
    """A recipe, option or combination of contributors that cannot be merged."""


class DataError(UserError):
    """Examples that cannot be read or used."""


class FileError(UserError):
    """A file, a folder or a URL that cannot be read or written, or that has too little space."""


class Problems(UserError):
    """Several mistakes found in one pass, so that they can be mended in one pass.

    Args:
        problems: the mistakes, at least one.
    """

    def __init__(self, problems: Sequence[UserError]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problem.what for problem in self.problems))

    def __str__(self) -> str:
        shown: list[str] = []
        for number, problem in enumerate(self.problems[:MOST_PROBLEMS], 1):
            line = f"  {number}. {problem}"
            if shown and len(line) + sum(map(len, shown)) > MOST_OF_PROBLEMS:
                break
            shown.append(line)
        left = len(self.problems) - len(shown)
        more = [f"  … and {left} more"] if left else []
        return "\n".join([f"{len(self.problems)} problems, nothing was written:", *shown, *more])


def raise_all(problems: Sequence[UserError]) -> None:
    """Raise the only problem as it is, several as one :class:`Problems`; do nothing when there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


class ErrorCollector:
    """Finds every mistake before it complains about the first; mistakes of the same words count once."""

    def __init__(self) -> None:
        self._found: dict[str, UserError] = {}

    @property
    def found(self) -> list[UserError]:
        """The mistakes so far, in order."""
        return list(self._found.values())

    def add(self, *errors: UserError | None) -> None:
        """Keep mistakes; several in one are kept apart, and None is none."""
        for error in errors:
            for one in error.problems if isinstance(error, Problems) else [error]:
                if one is not None:
                    self._found.setdefault(str(one), one)

    def catch(self, function: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """What a call of ``function`` returns, or None where it raised a mistake, which is kept."""
        try:
            return function(*args, **options)
        except UserError as error:
            self.add(error)
            return None

    def raise_all(self) -> None:
        """Raise what was found, if anything was (:func:`raise_all`)."""
        raise_all(self.found)


_BRANCH = re.compile(r"tuple\[.*\]|constrained-\w+|float|int|bool|str")  # how pydantic names a branch of a union
_LONGEST_NAME = 200  # that is compared with others: the time grows with its square


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A mend that names the nearest valid name, in whatever case, and all of them when there are few."""
    names = sorted(valid)
    plain = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(name[:_LONGEST_NAME].casefold(), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[near[0]]!r}? " if near else ""
    shown = ", ".join(map(printable, names[:20])) + (", …" if len(names) > 20 else "")
    return f"{hint}Valid: {shown}" if names else hint or "there is no valid name here"


def validated(
    model: type[M],
    values: Any,
    where: str,
    kind: type[UserError] = RecipeError,
    called: Mapping[str, str] | None = None,
) -> M:
    """An instance of a pydantic class, from what a user wrote.

    Args:
        model: the class.
        values: for its fields.
        where: the file or option that they stand in.
        kind: of the errors.
        called: what is called otherwise elsewhere, by its name there: an unknown key that stands here is answered with
            its name here, where that is a key in the place.

    Raises:
        UserError: unknown, missing or wrong values, each with its place; several come as :class:`Problems`.
    """
    from pydantic import ValidationError  # a tenth of a second that not every command needs

    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        entries = _of_one_branch(error.errors())
        inner = [entry["loc"] for entry in entries]
        for entry in entries:
            above = len(entry["loc"])
            if entry["type"] == "too_short" and any(loc[:above] == entry["loc"] for loc in inner if len(loc) > above):
                continue  # what was left out is what is wrong inside
            place, key = ".".join(map(str, entry["loc"])), str(entry["loc"][-1]) if entry["loc"] else ""
            what = entry["msg"].removeprefix("Value error, ")
            mend = f"correct {place if key.isdigit() else key}" if key else "correct the values"
            if entry["type"] == "extra_forbidden":
                known, ours = _fields(model, entry["loc"]), (called or {}).get(key)
                what, mend = f"unknown key {place!r}", did_you_mean(key, known)
                mend = f"{key} is called {ours} here" if ours in known else mend
            elif entry["type"] == "missing":
                what, mend = f"the key {place!r} is missing", f"add {key}"
            elif place:
                given = "" if isinstance(entry["input"], (dict, list)) else f"{entry['input']!r}: "
                what = f"{place}: {given}{what}"
            problems.append(kind(what, where=where, mend=mend))
        raise_all(problems)
        raise  # not reached: there is at least one problem


def _of_one_branch(entries: Sequence[Any]) -> list[Any]:
    """Mistakes of a value that may be one or several, as those of what it is, at the place that a user knows.

    pydantic tries both, and names each branch as a part of the place.
    """
    found = []
    for entry in entries:
        place = tuple(part for n, part in enumerate(entry["loc"]) if not n or not _BRANCH.fullmatch(str(part)))
        several = isinstance(entry["input"], (list, tuple))
        ends = str(entry["loc"][-1]) if entry["loc"] else ""
        if len(place) < len(entry["loc"]) and _BRANCH.fullmatch(ends) and several != ends.startswith("tuple["):
            continue  # of the branch that it was not meant for
        found.append({**entry, "loc": place})
    return found


def _fields(model: Any, place: Sequence[int | str]) -> list[str]:
    """The valid keys at a place inside a pydantic class."""
    for part in place[:-1]:
        field = model.model_fields.get(str(part))
        pending = [field.annotation] if field else []
        while pending:
            annotation = pending.pop(0)
            pending += get_args(annotation)
            if hasattr(annotation, "model_fields"):
                model = annotation
                break
    return list(model.model_fields)


def require(extra: str, what: str, *packages: str, where: str | Path | None = None) -> None:
    """Refuse what an extra is needed for while one of its packages is not installed.

    Args:
        extra: of merganser, such as ``evaluate``.
        what: needs it, as the subject of a sentence.
        packages: that are to be imported.
        where: the option or place that asked for it.

    Raises:
        UserError: says which packages are missing and how to install the extra.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        missing = f"{', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed"
        raise UserError(f"{what} needs {missing}", where=where, mend=f"pip install 'merganser[{extra}]'")
