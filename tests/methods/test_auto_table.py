"""The table that ``method: auto`` looks up: what is chosen for every situation, and what is advised."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import merganser.methods.auto as methods_auto
from merganser.methods import METHODS
from merganser.methods.auto import ROWS, Measured, Row, Situation, choose

ROOT = Path(__file__).resolve().parents[2]


def test_every_situation_has_a_line_and_every_line_a_situation() -> None:
    kinds = [frozenset(some) for n in range(4) for some in itertools.combinations(("gram", "kfac", "fisher"), n)]
    flags = (True, False)
    everything = [
        Situation(published, base, tasks, adapters, models)  # type: ignore[arg-type]
        for published, base, tasks, adapters, models in itertools.product(
            kinds, flags, ("same", "different", None), flags, (1, 2, 3)
        )
    ]
    assert {id(choose(situation)) for situation in everything} == {id(row) for row in ROWS}
    for row in ROWS:
        method = METHODS[row.method]
        method.options_type.model_validate(row.options)
        assert not method.needs.base or row.base
        assert method.needs.statistics in (None, row.published)
        assert (method.needs.models or 1) == 1 and method.needs.at_least <= row.at_least
        assert not (method.needs.data or method.needs.package)
        for one in row.measured:
            text = (ROOT / one.source).read_text(encoding="utf-8")
            assert all(f"{number:.1f}" in text for number in (one.merged, one.alone, one.average)), one


def test_nothing_worse_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(value: float) -> tuple[Measured, ...]:
        return (Measured("a suite", "same", value, 60.0, 40.0, "results/README.md"),)

    def advised(more: float) -> list[str]:
        better = Row(method="actmat", base=True, why="", cost="", measured=measured(more))
        rest = Row(method="simple", why="", cost="", measured=measured(50.0))
        monkeypatch.setattr(methods_auto, "ROWS", (better, rest))
        situation = Situation(tasks="same")
        return [row.method for _, row in methods_auto.better_rows(situation, [Situation(base=True, tasks="same")])]

    assert advised(51.0) == ["actmat"] and advised(49.0) == []
