"""What ``--method auto`` chooses: one table, from what is at hand to the method that does best with it.

The table is :data:`ROWS`, and everything that is said of ``auto`` (the command, the model card, docs/choosing.md, the
demo) is made from it. Whoever measures a better method changes a row here, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

AUTO = "auto"
#: Kinds of statistics, as :class:`merganser.methods.base.Needs` has them.
Published: TypeAlias = Literal["gram", "kfac", "fisher"]
#: One head answers for all contributors, or each has labels or a head of its own.
Tasks: TypeAlias = Literal["same", "different"]

PUBLISHED: dict[Published, str] = {
    "gram": "Gram matrices",
    "kfac": "Gram matrices and output gradients",
    "fisher": "Fisher information",
}


@dataclass(frozen=True)
class Situation:
    """What is at hand, as far as the choice depends on it.

    Attributes:
        published: the statistics that every contributor publishes.
        base: the base model is known.
        tasks: of the contributors; None where no labels tell it, as with language models.
        low_rank: every contributor is a LoRA adapter, or a whole model into which such were merged: its changes are of
            low rank.
        models: how many there are.
    """

    published: frozenset[Published] = frozenset()
    base: bool = False
    tasks: Tasks | None = None
    low_rank: bool = False
    models: int = 2


@dataclass(frozen=True)
class Measured:
    """What a method gave on one suite: mean scores × 100 over its tests and seeds.

    Attributes:
        suite: in a few words.
        tasks: of its contributors; None of language models.
        merged: of the merge.
        alone: of each model on its own test, which needs all models and to know which text is whose.
        average: of the plain average of the weights.
        source: the file of the repository that holds it.
        seconds: that the merge took there; None where this was not measured.
    """

    suite: str
    tasks: Tasks | None
    merged: float
    alone: float
    average: float
    source: str
    seconds: float | None = None

    @property
    def recovery(self) -> float:
        """Merged over alone."""
        return self.merged / self.alone

    def __str__(self) -> str:
        beside = "" if self.merged == self.average else f"; the plain average {self.average:.1f}"
        return (
            f"{self.suite}: {self.merged:.1f}, {self.recovery:.0%} of what each model reaches on its own test "
            f"({self.alone:.1f}{beside}; {self.source})"
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: where it applies, what is chosen there, and what is known of that.

    Attributes:
        method: one of :data:`merganser.methods.METHODS`.
        options: of it, where they are not its defaults.
        why: what speaks for it there, a clause.
        cost: what it takes, in words: of the owners of the data, and of who merges.
        measured: what it gave, as far as rows of results say it.
        published: statistics that every contributor has to publish; None: none are needed.
        base: whether the base model is needed.
        tasks: of the contributors; None: whatever they are.
        low_rank: for changes of low rank alone.
        at_least: so many models, or more; a model alone is not to be changed.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str
    cost: str
    measured: tuple[Measured, ...] = ()
    published: Published | None = None
    base: bool = False
    tasks: Tasks | None = None
    low_rank: bool = False
    at_least: int = 2

    def fits(self, situation: Situation) -> bool:
        """Whether what the row asks for is there."""
        return (
            (self.published is None or self.published in situation.published)
            and (situation.base or not self.base)
            and self.tasks in (None, situation.tasks)
            and (situation.low_rank or not self.low_rank)
            and situation.models >= self.at_least
        )

    @property
    def title(self) -> str:
        """The method with the options that are not its defaults."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.method} ({options})" if options else self.method

    @property
    def have(self) -> str:
        """What it asks for, in words."""
        parts = ["LoRA adapters, or whole models of such and their base"] if self.low_rank else []
        parts += [f"{PUBLISHED[self.published]} of every model"] if self.published else []
        parts += ["the base model"] if self.base and not self.low_rank else []
        parts += [f"{self.tasks} tasks" if self.tasks == "different" else "one task"] if self.tasks else []
        parts += [f"at least {self.at_least} models"] if self.at_least > 2 else []
        return ", ".join(parts) or "the models alone"

    @property
    def price(self) -> str:
        """What it costs, with the seconds that were measured."""
        took = [f"{one.seconds:.0f} s ({one.suite})" for one in self.measured if one.seconds is not None]
        return f"{self.cost}; the merge took {', '.join(took)}" if took else self.cost

    def on(self, tasks: Tasks | None) -> list[Measured]:
        """What was measured for such tasks; where they are not known and nothing was measured there, everything."""
        found = [one for one in self.measured if one.tasks == tasks]
        return found or ([*self.measured] if tasks is None else [])

    def expectation(self, tasks: Tasks | None = None) -> str | None:
        """That, in words; None where nothing was."""
        return "; ".join(map(str, self.on(tasks))) or None

    def scores(self, tasks: Tasks | None) -> str:
        """What was measured for such tasks alone, in figures."""
        found = (one for one in self.measured if one.tasks == tasks)
        return "; ".join(f"{one.merged:.1f} of {one.alone:.1f} ({one.recovery:.0%})" for one in found) or "not measured"


_NER, _EMOTION = "NER, five models of one task", "emotion, five models of one task"
_SENTIMENT, _LORA = "sentiment, four models of one task", "sentiment, four LoRA adapters of one task"
_PARTS = "parts of two tasks, two models each"
_GLUE, _GLUE_LORA = "GLUE, four models of different tasks", "GLUE, four LoRA adapters of different tasks"
_DECODER = "a small language model, five models of different texts"
_SOURCE = "docs/leaderboard.md"


#: Suite → its tasks, and what the models alone and the average have on its tests.
_TESTS: dict[str, tuple[Tasks | None, float, float]] = {
    _SENTIMENT: ("same", 66.4, 60.6),
    _NER: ("same", 68.4, 49.4),
    _EMOTION: ("same", 43.1, 21.6),
    _PARTS: ("same", 71.6, 76.4),
    _LORA: ("same", 66.3, 59.1),
    _GLUE: ("different", 62.9, 33.8),
    _GLUE_LORA: ("different", 62.6, 47.3),
    _DECODER: (None, 27.2, 17.0),
}


def _on(suite: str, merged: float) -> Measured:
    """A score of the leaderboard."""
    tasks, alone, average = _TESTS[suite]
    return Measured(suite, tasks, merged, alone, average, _SOURCE)


_SOLVED = "the owners nothing; the merge reads the base model, too, and solves one linear system a layer"
_FLATTENED = (
    "the owners nothing; the merge reads the base model, too, solves one linear system a layer, and takes singular "
    "vectors of what that changes"
)
_SPECTRAL = "the owners nothing; the merge reads the base model, too, and takes singular vectors of a layer's changes"
_COLLECT_KFAC = (
    "a run of merganser collect --kfac by every owner, with a backward pass for some of the examples, and publishing "
    "its file; the merge solves a system of two factors a layer"
)
_COLLECT = (
    "a run of merganser collect by every owner, next to the data, and publishing its file; the merge solves one linear "
    "system a layer"
)

#: From the most to the least that can be at hand: the first row that fits counts. A row for some tasks stands before
#: the one for all.
ROWS: tuple[Row, ...] = (
    Row(
        method="mats",
        options={"steps": 30, "damping": 0.1},
        published="kfac",
        low_rank=True,
        base=True,
        tasks="different",
        why="its regression on the inputs of every layer and the gradients of its outputs was the best on development "
        "data of adapters for different tasks",
        cost=_COLLECT_KFAC,
        measured=(_on(_GLUE_LORA, 58.9),),
    ),
    Row(
        method="dual_basis",
        options={"scale": 0.4},
        low_rank=True,
        base=True,
        tasks="different",
        why="changes are kept apart where tasks differ; on development data of adapters for different tasks it was the "
        "best without output gradients, at less than half of its usual size",
        cost=_SPECTRAL,
        measured=(_on(_GLUE_LORA, 51.9),),
    ),
    Row(
        method="kfac",
        options={"spectrum": 0.7},
        published="kfac",
        low_rank=True,
        base=True,
        why="its regression on the inputs of every layer and the gradients of its outputs, with singular values made "
        "more alike, was the best on development data of adapters",
        cost=_COLLECT_KFAC,
        measured=(_on(_LORA, 63.9),),
    ),
    Row(
        method="regmean",
        options={"alpha": 1.0},
        published="gram",
        low_rank=True,
        base=True,
        why="on development data of adapters its regression on the inputs of every layer was the best without "
        "gradients",
        cost=_COLLECT,
        measured=(_on(_LORA, 62.9),),
    ),
    Row(
        method="tsv_m",
        options={"keep": 0.5, "scale": 0.8, "spectrum": 0.7},
        low_rank=True,
        base=True,
        why="on development data of adapters it was the best without statistics; methods that take changes for inputs "
        "were worse than the average there, since changes of low rank stand for few of the inputs",
        cost=_SPECTRAL,
        measured=(_on(_LORA, 62.2),),
    ),
    Row(
        method="balanced",
        options={"ridge": 0.3, "spectrum": 0.7},
        base=True,
        tasks="same",
        why="how far training moved the weights stands in for the inputs of every layer, and with singular values made "
        "more alike no method was better on average on development data of one task, with statistics or without",
        cost=_FLATTENED,
        measured=(_on(_SENTIMENT, 65.5), _on(_NER, 56.3), _on(_EMOTION, 38.2), _on(_PARTS, 77.5)),
    ),
    Row(
        method="dual_basis",
        base=True,
        tasks="different",
        why="changes are kept apart where tasks differ and shared where they are alike, and on development data of "
        "different tasks no method was better, with statistics or without",
        cost=_SPECTRAL,
        measured=(_on(_GLUE, 55.8),),
    ),
    Row(
        method="kfac",
        published="kfac",
        why="its regression on the inputs of every layer and the gradients of its outputs was the best with statistics "
        "alone, and on development data of a language model the best of all",
        cost=_COLLECT_KFAC,
        measured=(
            _on(_SENTIMENT, 64.5),
            _on(_NER, 53.7),
            _on(_EMOTION, 32.0),
            _on(_PARTS, 77.9),
            _on(_GLUE, 49.6),
            _on(_DECODER, 18.5),
        ),
    ),
    Row(
        method="regmean",
        options={"alpha": 1.0},
        published="gram",
        why="its regression on the inputs of every layer was the best that needs neither gradients nor a base",
        cost=_COLLECT,
        measured=(
            _on(_SENTIMENT, 63.6),
            _on(_NER, 53.1),
            _on(_EMOTION, 34.3),
            _on(_PARTS, 77.3),
            _on(_GLUE, 42.6),
            _on(_DECODER, 17.9),
        ),
    ),
    Row(
        method="fisher",
        published="fisher",
        why="parameters that matter more to a model's predictions count more",
        cost="a run of merganser collect --fisher --no-grams by every owner, with a backward pass for each example, "
        "and publishing a file as large as the model; the merge is as cheap as an average",
        measured=(
            _on(_SENTIMENT, 61.9),
            _on(_NER, 51.0),
            _on(_EMOTION, 33.2),
            _on(_PARTS, 73.9),
            _on(_GLUE, 41.3),
            _on(_DECODER, 18.7),
        ),
    ),
    Row(
        method="balanced",
        options={"ridge": 0.3},
        base=True,
        why="how far training moved the weights stands in for the inputs of every layer; on development data of a "
        "small language model it was level with the average",
        cost=_SOLVED,
        measured=(_on(_DECODER, 16.8),),
    ),
    Row(
        method="simple",
        why="no other method that needs nothing was measured to be better",
        cost="the owners nothing; the merge reads and writes the weights",
        at_least=1,
        measured=(
            _on(_SENTIMENT, 60.6),
            _on(_NER, 49.4),
            _on(_EMOTION, 21.6),
            _on(_PARTS, 76.4),
            _on(_GLUE, 33.8),
            _on(_DECODER, 17.0),
        ),
    ),
)


def choose(situation: Situation) -> Row:
    """The row for what is at hand."""
    return next(row for row in ROWS if row.fits(situation))


def better_rows(situation: Situation, additions: Iterable[Situation]) -> Iterator[tuple[Situation, Row]]:
    """What could be had with more at hand: each addition that leads to another choice, which was not measured to be
    worse, with its row."""
    now = choose(situation)
    for more in additions:
        row = choose(more)
        if (row.method, row.options) != (now.method, now.options) and not _worse(row, now, situation.tasks):
            yield more, row


def _worse(row: Row, other: Row, tasks: Tasks | None) -> bool:
    """Whether a row's method gave less than another's on the suites of such tasks that both were measured on."""
    scores = [{one.suite: one.merged for one in each.on(tasks)} for each in (row, other)]
    shared = scores[0].keys() & scores[1].keys()
    return sum(scores[0][suite] - scores[1][suite] for suite in sorted(shared)) < 0


def table() -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [{"have": row.have, **asdict(row)} for row in ROWS]


def markdown_table(rows: Sequence[Row] = ROWS) -> str:
    """The table for docs/choosing.md."""
    heads = ("you have", "`auto` takes", "one task", "different tasks", "language models", "what it costs")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        scores = [row.scores(tasks) for tasks in get_args(Tasks)] + [row.scores(None)]
        cells = [row.have, f"`{row.title}`", *scores, row.price]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
