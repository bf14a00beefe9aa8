"""Mistakes that are found together are told together."""

from __future__ import annotations

import pytest

from merganser.errors import DataError, ErrorCollector, Problems, RecipeError, UserError, raise_all


def test_mistakes_are_collected_and_raised_at_once() -> None:
    def half(number: int) -> int:
        if number % 2:
            raise DataError(f"{number} is odd", mend="give an even number")
        return number // 2

    errors = ErrorCollector()
    errors.raise_all()  # there are none yet
    assert [errors.catch(half, number) for number in (4, 3, 3, 5)] == [2, None, None, None]
    errors.add(None)
    errors.add(RecipeError("no method"))
    errors.catch(raise_all, [UserError("no method"), UserError("no models")])
    assert [error.what for error in errors.found] == ["3 is odd", "5 is odd", "no method", "no models"]
    with pytest.raises(Problems, match=r"(?s)4 problems.* 1\. 3 is odd.* 4\. no models") as caught:
        errors.raise_all()
    assert caught.value.problems == errors.found


def test_one_mistake_is_raised_as_it_is_and_bugs_are_not_caught() -> None:
    errors = ErrorCollector()
    with pytest.raises(ZeroDivisionError):
        errors.catch(lambda: 1 / 0)
    errors.add(DataError("empty"))
    with pytest.raises(DataError, match=r"^empty$"):
        errors.raise_all()
