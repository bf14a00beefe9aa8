"""The cells of a grid: pure values, expanded from a configuration without touching a file.

A cell ends as one result row. Its contributors are named, with the seed that each was trained from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

from merganser.lab.grid.config import TITLES, ExperimentConfig, Heads
from merganser.methods import METHODS

Kind = Literal["merge", "individual", "ensemble", "multitask"]


@dataclass(frozen=True)
class ModelSpec:
    """A contributor of a cell.

    Attributes:
        name: of the contributor; parts of a data set are ``set/1``, ``set/2``, ….
        set: its data set.
        seed: of its head, its data order and dropout.
        part: which part of the data set it is trained on, from 0; None for all of it.
        part_seed: of the partition.
    """

    name: str
    set: str
    seed: int
    part: int | None = None
    part_seed: int | None = None


@dataclass(frozen=True)
class Cell:
    """One entry of the grid.

    Attributes:
        kind: what the cell scores.
        method: key of the method, or the kind.
        contributors: in the order in which they are merged.
        heads: of the contributors' initialisation.
        seed: of the generator that the contributors' seeds come from.
    """

    kind: Kind
    method: str
    contributors: tuple[ModelSpec, ...]
    heads: Heads
    seed: int

    @property
    def description(self) -> str:
        """For bars and lists: ``method: isear + ssec (seed 1, same heads)``."""
        names = " + ".join(spec.name for spec in self.contributors)
        return f"{self.method}: {names} (seed {self.seed}, {self.heads} heads)"

    def to_json(self) -> dict[str, Any]:
        """Plain values; :func:`cell_from` is the inverse."""
        return asdict(self)


def cell_from(values: dict[str, Any]) -> Cell:
    """The cell of :meth:`Cell.to_json`."""
    people = tuple(ModelSpec(**one) for one in values["contributors"])
    return Cell(**{**values, "contributors": people})


def generator_seed(index: int, generator: int, generators: Sequence[int], heads: Heads) -> int:
    """The seed that contributor ``index`` (from 0) is trained from.

    The same for all with the same head initialisation; else that of PAPER.md: model i takes generator
    ((g + i − 2) mod n) + 1 of n, i and g from 1.
    """
    if heads != "different":
        return generator
    return generators[(generators.index(generator) + index) % len(generators)]


def expand(config: ExperimentConfig, order: Sequence[str] | None = None) -> list[Cell]:
    """Every cell of a grid, in the order in which the serial engine works on them.

    Args:
        config: of the experiment.
        order: of a greedy merge, where the configuration leaves it to be computed; the contributors' own
            order stands in until it is known.
    """
    if config.order != "computed":
        order = config.order
    cells: list[Cell] = []
    for heads, seed in product(config.heads, config.keep_seeds or config.seeds):
        specs = {
            name: ModelSpec(name, config.set_of(name), generator_seed(place, seed, config.seeds, heads))
            for name, place in config.ordered.items()
        }
        for group in _groups(config, specs, list(order or specs), seed):
            cells += _cells(config, group, heads, seed)
    return list(dict.fromkeys(cells))


def models_of(cells: Sequence[Cell]) -> list[ModelSpec]:
    """Every single model that the cells need, each once."""
    return list(dict.fromkeys(spec for cell in cells if cell.kind != "multitask" for spec in cell.contributors))


def _groups(
    config: ExperimentConfig, specs: dict[str, ModelSpec], order: list[str], seed: int
) -> Iterator[tuple[ModelSpec, ...]]:
    """The sets of contributors that are merged."""
    if config.layout == "pairs":
        yield from combinations(specs.values(), 2)
    elif config.layout == "greedy":
        for count in range(2, len(order) + 1):
            yield tuple(specs[name] for name in order[:count])
    elif config.layout == "all":
        yield tuple(specs.values())
    else:
        for spec in specs.values():
            yield tuple(
                replace(spec, name=f"{spec.name}/{part + 1}", part=part, part_seed=seed)
                for part in range(config.partitions.parts)
            )


def _cells(config: ExperimentConfig, group: tuple[ModelSpec, ...], heads: Heads, seed: int) -> Iterator[Cell]:
    if "individual" in config.comparators:
        for spec in group:
            yield Cell("individual", "individual", (spec,), heads, seed)
    if "ensemble" in config.comparators:
        yield Cell("ensemble", "ensemble", group, heads, seed)
    whole = len(group) == len(config.contributors) or config.layout != "greedy"
    if "multitask" in config.comparators and whole:
        yield Cell("multitask", "multitask", group, heads, seed)
    for method in config.methods:
        yield Cell("merge", method.key, group, heads, seed)


def title_of(config: ExperimentConfig, cell: Cell) -> str:
    """What tables call the cell's line."""
    if cell.kind != "merge":
        return TITLES[cell.kind]
    method = config.method(cell.method)
    suffix = ", searched" * bool(method.search) + ", fine-tuned" * bool(method.finetune)
    return method.title or METHODS[method.method].title + suffix
