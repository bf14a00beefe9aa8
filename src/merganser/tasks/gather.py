"""Finding every mistake before complaining about the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from merganser.errors import Problems, UserError, raise_all

T = TypeVar("T")


class Gather:
    """Calls functions and keeps the mistakes that they raise; :meth:`settle` raises them together."""

    def __init__(self) -> None:
        self.problems: dict[str, UserError] = {}  # by message: two models can stumble over the same row

    def __call__(self, function: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """What ``function`` returns, or None where it raised a mistake of the user's."""
        try:
            return function(*args, **options)
        except Problems as several:
            self.problems.update((str(error), error) for error in several.problems)
        except UserError as error:
            self.problems[str(error)] = error
        return None

    def settle(self) -> None:
        """Raise what was gathered, if anything was."""
        raise_all(list(self.problems.values()))
