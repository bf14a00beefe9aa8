"""Statistics of strangers before they are merged: each can be what it says, and none decides alone without a word.

Every statistic that a plan uses is read once, before any weight is merged. What cannot be statistics of any data is an
error. What could be, but of data that have nothing to do with the others', shows beside them: the mean square of a
layer's inputs is of one size in all fine-tunes of one model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, prod
from typing import Any

from merganser.errors import StatisticsError, UserError
from merganser.merging.influence import Influence
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.memory import Budget
from merganser.merging.plan import Plan, Step
from merganser.progress import track
from merganser.statistics.format import AGAIN, MOST_NAMED
from merganser.statistics.judging import Judgement
from merganser.tensors import one_thread

#: How many times as large as the others' a contributor's statistic may be, or as small. Beyond the first a note says
#: so. Beyond the second it decides alone, or counts for nothing, which only the user can want. Fisher information of
#: models that are sure of their answers is honestly smaller by orders of magnitude; the inputs of layers are not.
_NOTED = 100.0
REFUSED = {"gram": 1e4, "fisher": 1e8, "kfac": 1e8}
_DECISIVE = 0.9  # share of a layer
_NOISE = 1e-8  # of a model's largest Fisher information: what float32 gradients leave where there is none
_FEW = 3  # layers that are named
_BYTES = 10  # for each number of a dense matrix: its packed triangle as read, and the triangle that is factored
_WORDS = {
    "gram": "Gram matrices",
    "fisher": "Fisher information",
    "kfac": "covariances of output gradients",
    "count": "token counts",
}


@dataclass(frozen=True)
class Use:
    """A statistic that a merge uses.

    Attributes:
        label: of the layer, or of the tensor where it is Fisher information.
        numbers: how many are merged by it.
        names: what each contributor has there, as its file names it (see
            :class:`~merganser.statistics.judging.Judgement`), by the contributor's number.
    """

    label: str
    numbers: int
    names: Mapping[int, str]

    @property
    def kind(self) -> str:
        """``gram``, ``kfac`` (of gradients of outputs), ``count`` or ``fisher``."""
        name = next(iter(self.names.values()))
        return "kfac" if ":" in name and name.startswith("gram.") else name.partition(".")[0]


@dataclass(frozen=True)
class Verdict:
    """What was found of all statistics of a merge.

    Attributes:
        problems: why they cannot be used.
        notes: what the user should know.
        influence: who decides how much; None where no statistic weighs anything.
    """

    problems: tuple[UserError, ...] = ()
    notes: tuple[str, ...] = ()
    influence: Influence | None = None

    def section(self) -> str:
        """What a model card says of it, in Markdown."""
        return "" if self.influence is None else self.influence.section()

    def record(self) -> dict[str, Any]:
        """What provenance says of it; nothing where no statistics were used."""
        told = {"influence": self.influence and self.influence.to_json(), "judged": list(self.notes)}
        return {key: value for key, value in told.items() if value}


#: Of a merge that uses no statistics.
NOTHING_JUDGED = Verdict()


def judge_statistics(plan: Plan, inputs: Inputs, threads: int, budget: int) -> Verdict:
    """Read and judge every statistic that a plan uses.

    Args:
        plan: of the merge.
        inputs: its open files; hashes of statistics are known.
        threads: how many are judged at once.
        budget: bytes that these may take together.
    """
    uses = list(_uses(plan, inputs))
    if not uses:
        return NOTHING_JUDGED
    found = _judged(uses, inputs.parents, threads, budget)
    problems = [
        problem for number, parent in enumerate(inputs.parents) for problem in _problems(parent, found.get(number, {}))
    ]
    if problems:
        return Verdict(tuple(problems))
    sizes = [{number: found[number][name].size for number, name in use.names.items()} for use in uses]
    rounding = _rounding(uses, sizes)
    told = [number for number, use in enumerate(uses) if use.label not in rounding]
    compared = [uses[number] for number in told]
    outliers = _outliers(compared, [sizes[number] for number in told])
    problems, notes = _scale_findings(plan, inputs.parents, outliers)
    notes += _copied(uses, inputs.parents, found)
    influence = _influence(plan, inputs.parents, uses, sizes)
    if influence is not None:
        named = {(number, use.label) for number, use, _ in outliers}
        notes += _decisive(plan, influence, compared, named)
    return Verdict(tuple(problems), tuple(notes), influence)


def _uses(plan: Plan, inputs: Inputs) -> Iterator[Use]:
    for step in plan.steps:
        kind = None if step.treatment is None else step.treatment.needs.statistics
        if kind == "fisher":
            yield from _fisher_uses(step)
        if kind in ("gram", "kfac") or plan.rank is not None:
            yield from _gram_uses(step, inputs.parents)
        if kind == "kfac":
            yield from _output_uses(step, inputs.parents)


def _fisher_uses(step: Step) -> Iterator[Use]:
    for fact in step.unit.facts:
        names = {n: f"fisher.{s[fact.name].tensor}" for n, s in enumerate(step.sources) if fact.name in s}
        yield Use(fact.name, prod(fact.shape) * (step.stack or 1), names)


def _gram_uses(step: Step, parents: Sequence[Parent]) -> Iterator[Use]:
    """Gram matrices, or token counts of embeddings: once for each layer of a unit, though they may be the same."""
    for fact in step.unit.facts:
        if fact.layer is None:
            continue
        for place in range(step.stack or 1):
            names = {}
            for number, (parent, sources) in enumerate(zip(parents, step.sources, strict=True)):
                source = sources.get(fact.name)
                if source is None or parent.statistics is None:
                    continue
                leaf = (source if step.stack is None else source.one_of(place)).leaf
                entry = parent.statistics.layer(leaf.tensor, leaf.index)
                if entry is not None and entry.input is not None:
                    names[number] = f"gram.{entry.input}"
                elif entry is not None and parent.statistics.has_count(entry.module):
                    names[number] = f"count.{entry.module}"
            if names:
                label = fact.layer.module or fact.name
                yield Use(label if step.stack is None else f"{label}[{place}]", prod(fact.shape), names)


def _output_uses(step: Step, parents: Sequence[Parent]) -> Iterator[Use]:
    """Covariances of output gradients, where every contributor has one and so they are used."""
    for fact in step.unit.facts:
        if fact.layer is None or step.stack is not None:
            continue
        names = {}
        for number, (parent, sources) in enumerate(zip(parents, step.sources, strict=True)):
            leaf = sources[fact.name].leaf if fact.name in sources else None
            entry = parent.statistics.layer(leaf.tensor, leaf.index) if leaf and parent.statistics else None
            if entry is not None and entry.output is not None:
                names[number] = f"gram.{entry.output}"
        if names and len(names) == len(step.takers):
            yield Use(fact.layer.module or fact.name, prod(fact.shape), names)


def _judged(
    uses: Sequence[Use], parents: Sequence[Parent], threads: int, budget: int
) -> dict[int, dict[str, Judgement]]:
    """What was found of each statistic, by contributor and name; the largest first, so that threads end together."""
    work = {(number, name): _bytes(parents[number], name) for use in uses for number, name in use.names.items()}
    order = sorted(work, key=lambda one: (-work[one], one))
    room = Budget(budget)

    def judge(one: tuple[int, str]) -> Judgement:
        number, name = one
        statistics = parents[number].statistics
        if statistics is None:
            raise RuntimeError("the plan promised statistics")
        room.draw(work[one])
        with room.returning(work[one]):
            return statistics.judge(name)

    found: dict[int, dict[str, Judgement]] = defaultdict(dict)
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        judgements = track(pool.map(judge, order), "judging statistics", "statistics", len(order))
        for (number, name), judgement in zip(order, judgements, strict=True):
            found[number][name] = judgement
    return found


def _bytes(parent: Parent, name: str) -> int:
    kind, _, key = name.partition(".")
    if parent.statistics is None:
        return 0
    return _BYTES * parent.statistics.width(key) ** 2 if kind == "gram" else parent.statistics.tensors[name].nbytes


def _problems(parent: Parent, judgements: Mapping[str, Judgement]) -> list[UserError]:
    """What cannot be statistics of any data; of many, some are spelt out."""
    texts = [text for name in sorted(judgements) for text in judgements[name].problems]
    if len(texts) > MOST_NAMED:
        texts = [*texts[:MOST_NAMED], f"{len(texts) - MOST_NAMED} more statistics cannot be what they are said to be"]
    where = parent.statistics.path if parent.statistics else parent.title
    return [StatisticsError(text, where=where, mend=AGAIN) for text in texts]


#: A contributor's number, what it is far off in, and its size beside the others'.
Outlier = tuple[int, Use, float]


def _outliers(uses: Sequence[Use], sizes: Sequence[Mapping[int, float]]) -> list[Outlier]:
    """Statistics of another size than the others'. Of two, the larger one is named: which is wrong nobody can say."""
    found = []
    for use, by_number in zip(uses, sizes, strict=True):
        if use.kind not in REFUSED or len(by_number) < 2:
            continue
        for number, size in by_number.items():
            factor = _beside(size, [other for one, other in by_number.items() if one != number])
            alone = len(by_number) == 2
            if factor > _NOTED or (factor < 1 / _NOTED and not alone):
                found.append((number, use, factor))
    return found


def _rounding(uses: Sequence[Use], sizes: Sequence[Mapping[int, float]]) -> set[str]:
    """Labels of Fisher information that is next to nothing beside every contributor's other tensors.

    A bias of attention keys has none, for it changes no output: what gradients leave there is rounding.
    """
    fisher = [(use, by_number) for use, by_number in zip(uses, sizes, strict=True) if use.kind == "fisher"]
    most: dict[int, float] = {}
    for _, by_number in fisher:
        most |= {number: max(size, most.get(number, 0.0)) for number, size in by_number.items()}
    return {
        use.label
        for use, by_number in fisher
        if all(size <= _NOISE * most[number] for number, size in by_number.items())
    }


def _beside(size: float, others: Sequence[float]) -> float:
    """A size relative to the median of others; of an even number of these, to the nearer one of the middle two."""
    ordered = sorted(others)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    middle = min(max(size, low), high)
    if middle == 0:
        return inf if size else 1.0
    return size / middle


def _scale_findings(
    plan: Plan, parents: Sequence[Parent], outliers: Sequence[Outlier]
) -> tuple[list[UserError], list[str]]:
    problems: list[UserError] = []
    notes: list[str] = []
    groups: dict[tuple[int, str, bool], list[Outlier]] = defaultdict(list)
    for number, use, factor in outliers:
        groups[number, use.kind, factor > 1].append((number, use, factor))
    for (number, kind, large), members in groups.items():
        parent, worst = parents[number], (max if large else min)(factor for _, _, factor in members)
        text = _scale_text(parent.title, kind, [use.label for _, use, _ in members], worst)
        if plan.recipe.accept_scales or 1 / REFUSED[kind] <= worst <= REFUSED[kind]:
            notes.append(text)
        else:
            mend = f"{AGAIN}; leave {parent.title} out; or if you know why they differ so, --accept-scales"
            where = parent.statistics.path if parent.statistics else parent.title
            problems.append(StatisticsError(text, where=where, mend=mend))
    return problems, notes


def _scale_text(title: str, kind: str, labels: Sequence[str], worst: float) -> str:
    what = f"{title}: the {_WORDS[kind]} of {_few(labels)} "
    if worst == 0:
        return what + "are zero and the other contributors' are not: it counts for nothing there"
    if worst == inf:
        return what + "are all that there is, the other contributors' are zero: it decides alone there"
    if worst > 1:
        return what + f"are up to {_factor(worst)} times the other contributors': it decides nearly alone there"
    return what + f"are down to 1/{_factor(1 / worst)} of the other contributors': it counts for next to nothing there"


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _copied(uses: Sequence[Use], parents: Sequence[Parent], found: Mapping[int, Mapping[str, Judgement]]) -> list[str]:
    """Statistics of several contributors that are the same to the last digit, though their weights differ."""
    same: dict[tuple[int, int, str], list[str]] = defaultdict(list)
    manifests = [parent.statistics.header.manifest_hash if parent.statistics else None for parent in parents]
    for use in uses:
        seen: dict[tuple[float, float], int] = {}
        for number, name in use.names.items():
            if not any(sums := found[number][name].sums):
                continue
            first = seen.setdefault(sums, number)
            if manifests[first] != manifests[number]:
                same[first, number, use.kind].append(use.label)
    return [
        f"{parents[second].title}: the {_WORDS[kind]} of {_few(labels)} are those of {parents[first].title}, to the "
        "last digit: unless both saw the same inputs there, one has the other's"
        for (first, second, kind), labels in same.items()
    ]


def _influence(
    plan: Plan, parents: Sequence[Parent], uses: Sequence[Use], sizes: Sequence[Mapping[int, float]]
) -> Influence | None:
    kind = next(iter(sorted(plan.statistics, key=lambda one: one != plan.method.needs.statistics)), None)
    if kind is None:
        return None
    coefficients = [parent.contributor.single_coefficient for parent in parents]
    inner = {
        use.label: by_number
        for use, by_number in zip(uses, sizes, strict=True)
        if kind == "kfac" and use.kind == "gram"  # the other factor of the same layer's metric
    }
    parts = [
        (
            use.label,
            use.numbers,
            [
                c * by_number.get(number, 0.0) * inner.get(use.label, {}).get(number, 1.0)
                for number, c in enumerate(coefficients)
            ],
        )
        for use, by_number in zip(uses, sizes, strict=True)
        if use.kind == kind
    ]
    return Influence.of_parts(kind, [parent.title for parent in parents], parts)


def _decisive(plan: Plan, influence: Influence, uses: Sequence[Use], named: set[tuple[int, str]]) -> Iterator[str]:
    """Contributors that decide layers nearly alone, though all have the same coefficient."""
    if len({person.coefficient for person in plan.recipe.contributors}) > 1:
        return
    several = {use.label for use in uses if len(use.names) > 1}
    for number, title in enumerate(influence.contributors):
        shares = {name: shares[number] for name, shares in influence.layers.items() if name in several}
        over = [name for name, share in shares.items() if share > _DECISIVE and (number, name) not in named]
        if over:
            most = max(shares[name] for name in over)
            yield f"{title} decides {_few(over)} to more than {_DECISIVE:.0%}, at most {most:.1%}, by its statistics"


def _few(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:_FEW])
    if len(labels) == 1:
        return shown
    return f"{len(labels)} layers ({shown}{', …' if len(labels) > _FEW else ''})"
