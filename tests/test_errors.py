"""Mistakes that are found together are told together."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.errors import (
    CheckpointError,
    DataError,
    ErrorCollector,
    Problems,
    RecipeError,
    UserError,
    did_you_mean,
    raise_all,
    validated,
)
from merganser.methods import METHODS


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


SCREEN = 5000  # characters


@given(st.text(), st.text(), st.text())
def test_no_error_has_a_character_that_a_terminal_acts_upon(what: str, where: str, mend: str) -> None:
    shown = str(CheckpointError(what, where=where, mend=mend))
    shown += str(Problems([DataError(what, where=where), CheckpointError(where, mend=what)]))
    assert shown.replace("\n", "").replace("\t", "").replace("\xa0", "").isprintable()
    shown.encode()


@pytest.mark.parametrize(
    "character", ["\x1b", "\r", "\b", "\0", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800", "\u2028"]
)
def test_what_cannot_be_seen_is_written_out(character: str) -> None:
    name = f"a{character}b"
    written = name.encode("unicode_escape").decode()
    for error in (DataError(name), DataError("bad", where=name), DataError("bad", mend=name)):
        assert written in str(error) and character not in str(error)
        assert character not in str(Problems([error, error])) and written in str(Problems([error, error]))


def test_only_a_mend_has_line_breaks() -> None:
    error = DataError("bad\n    to mend: curl it", where="a\nb", mend="expected files:\n  a.txt")
    assert str(error).splitlines() == ["a\\nb: bad\\n    to mend: curl it", "    to mend: expected files:", "  a.txt"]


def test_no_error_fills_more_than_a_screen() -> None:
    long = "x" * 10**6
    error = DataError(f"begin {long} end", where=f"/top/{long}/file.json", mend=f"first {long} last")
    assert len(str(error)) < SCREEN / 2
    assert all(part in str(error) for part in ("begin", "end", "/top", "/file.json", "first", "last", "…"))
    many = [DataError(f"{number} {long}", mend=long) for number in range(1000)]
    assert len(str(Problems(many))) < SCREEN and "… and 99" in str(Problems(many))
    short = Problems([DataError(f"problem {number}") for number in range(1000)])
    assert "15. problem 14\n  … and 985 more" in str(short) and str(short).startswith("1000 problems")
    assert str(Problems([DataError("one"), DataError("two")])).endswith("1. one\n  2. two")
    assert len(short.problems) == 1000  # all of them are there for who asks
    assert len(str(DataError("no", mend=did_you_mean(long, [long[:-1], long])))) < SCREEN
    assert len(str(pickle.loads(pickle.dumps(error)))) < SCREEN  # noqa: S301 (our own, as between processes)


@pytest.mark.parametrize(
    ("density", "place"), [(3, "density"), ("a", "density"), (None, "density"), ([0.5, 3], "density.1")]
)
def test_an_option_for_one_or_several_has_one_mistake(density: object, place: str) -> None:
    """And a place that stands in the recipe, whatever else the option could have been."""
    with pytest.raises(RecipeError) as caught:
        validated(METHODS["ties"].options_type, {"density": density}, "recipe")
    assert str(caught.value).startswith(f"recipe: {place}: ") and f"correct {place}" in str(caught.value)


def test_names_are_near_in_any_case() -> None:
    assert did_you_mean("TIES", ["ties", "slerp"]).startswith("did you mean 'ties'?")
    assert did_you_mean("bf61", ["BF16", "F32"]).startswith("did you mean 'BF16'?")
    assert did_you_mean("x", ["ties"]) == "Valid: ties"
