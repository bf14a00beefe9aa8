"""What an evaluation found: a score for each model on each data set, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merganser.text import printable


@dataclass(frozen=True)
class Score:
    """A model on a data set.

    Attributes:
        model: the reference as given, or ``ensemble``.
        data: the data as given, with its split where it has several.
        task: name of the task.
        key_metric: which of the scores stands for the task.
        higher_is_better: whether more of it is better.
        scores: every metric; rates are between 0 and 1.
        standard_error: of the key metric, from bootstrap samples of the examples; None where none were drawn.
        versus_first: the difference of the key metric to the first model's on the same data, with the middle
            95 % of its paired bootstrap samples; None for the first model.
        examples: how many examples were scored.
        truncated: how many of them were longer than ``max_length`` and were cut.
        max_length: in tokens.
    """

    model: str
    data: str
    task: str
    key_metric: str
    higher_is_better: bool
    scores: Mapping[str, float]
    standard_error: float | None = field(default=None, kw_only=True)
    versus_first: Mapping[str, float] | None = field(default=None, kw_only=True)
    examples: int
    truncated: int = 0
    max_length: int = 0

    @property
    def key(self) -> float:
        """The key metric's value."""
        return self.scores[self.key_metric]


@dataclass(frozen=True)
class Evaluation:
    """Scores of models (rows) on data sets (columns).

    Attributes:
        rows: one score for each pair, models in the order given, each on the data in the order given.
        settings: the options that the scores depend on.
    """

    rows: tuple[Score, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, in order."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    @property
    def data(self) -> tuple[str, ...]:
        """Every data set, in order."""
        return tuple(dict.fromkeys(row.data for row in self.rows))

    def score(self, model: str, data: str) -> Score:
        """The score of a model on a data set.

        Raises:
            KeyError: there is no such pair.
        """
        for row in self.rows:
            if (row.model, row.data) == (model, data):
                return row
        raise KeyError((model, data))

    def average(self, model: str) -> float | None:
        """The mean of a model's key metrics over the data sets; None where they are of different metrics."""
        keys = {row.key_metric for row in self.rows}
        return float(np.mean([row.key for row in self.rows if row.model == model])) if len(keys) == 1 else None

    def table(self, *, width: int | None = None, color: bool = False) -> str:
        """The key metrics as a table of text: models in rows, data sets in columns, then their average.

        The best of each column is bold (and starred where there is no colour). ± is one standard error.

        Args:
            width: of the text, in characters; None for what the table needs.
            color: with the terminal's escape codes.
        """
        stream = StringIO()
        wide = width or max(80, 40 + 24 * (len(self.data) + 1) + max(map(len, short_names(self.models).values())))
        console = Console(file=stream, width=wide, force_terminal=color, no_color=not color, highlight=False)
        console.print(self.rich_table(stars=not color))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"

    def rich_table(self, *, stars: bool = False) -> Table:
        """The table of :meth:`table`, to be printed by a rich console."""
        metrics = dict.fromkeys(row.key_metric for row in self.rows)
        title = escape(next(iter(metrics))) if len(metrics) == 1 else None
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("model", overflow="fold")
        shown_data = short_names(self.data)
        for data in self.data:
            table.add_column(escape(printable(shown_data[data])), justify="right", overflow="fold")
        averages = {model: self.average(model) for model in self.models}
        with_average = len(self.data) > 1 and None not in averages.values()
        if with_average:
            table.add_column("average", justify="right")
        shown_models = short_names(self.models)
        for model in self.models:
            cells = [self._cell(self.score(model, data), title is None, stars) for data in self.data]
            if with_average:
                best = self._best([value for value in averages.values() if value is not None])
                cells.append(_mark(f"{averages[model]:.4f}", averages[model] == best, stars))
            table.add_row(escape(printable(shown_models[model])), *cells)
        return table

    def _repr_html_(self) -> str:
        return str(self.rich_table()._repr_mimebundle_(["text/html"], [])["text/html"])

    def _cell(self, score: Score, named: bool, stars: bool) -> str:
        peers = [row.key for row in self.rows if row.data == score.data and row.key_metric == score.key_metric]
        best = len(peers) > 1 and score.key == self._best(peers)
        text = _mark(f"{score.key:.4f}", best, stars)
        if score.standard_error is not None:
            text += f" ± {score.standard_error:.4f}"
        return f"{escape(score.key_metric)} {text}" if named else text

    def _best(self, values: list[float]) -> float:
        return max(values) if all(row.higher_is_better for row in self.rows) else min(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, at full precision; numbers that are not finite become None."""
        return {
            "rows": [
                {
                    **vars(row),
                    "scores": {name: _finite(value) for name, value in row.scores.items()},
                    "standard_error": _finite(row.standard_error),
                    "versus_first": dict(row.versus_first) if row.versus_first else None,
                }
                for row in self.rows
            ],
            "averages": {model: _finite(self.average(model)) for model in self.models},
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def short_names(names: tuple[str, ...]) -> dict[str, str]:
    """The last part of each path, as long as these tell the names apart; else the names themselves."""
    short = {name: name.rstrip("/").rsplit("/", 1)[-1] or name for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _mark(text: str, best: bool, stars: bool) -> str:
    if not best:
        return text
    return f"{text}*" if stars else f"[bold]{text}[/bold]"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
