"""``method: auto``: what is at hand, found from headers, configurations and a few rows, and what is chosen for it.

The table that is looked up is :data:`merganser.methods.auto.ROWS`. It is looked up once for the whole recipe, while the
plan is made; the plan has the method that was chosen, and says why.

Whole models into which LoRA adapters were merged want what adapters want, and nothing in their files tells. Of a few
weight matrices some rows are read: the changes of such models have next to nothing beyond the first directions but the
rounding of the weights, whereas training all weights leaves several percent there (docs/method-log.md).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merganser.checkpoints import AdapterCheckpoint, Checkpoint
from merganser.documents import parse_yaml, read_text
from merganser.errors import RecipeError, UserError
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.labels import plain_labels
from merganser.merging.matching import matches
from merganser.merging.recipe import Recipe
from merganser.methods import METHODS
from merganser.methods.auto import PUBLISHED, Published, Row, Situation, Tasks, better_rows, choose
from merganser.tensors import is_floating
from merganser.text import listed

_MOST = 3  # contributors that are named
_CARD, _LARGEST_CARD = "README.md", 2**18
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model on the Hub; a path says nothing here
#: Rows and columns of a matrix that are looked at, so many matrices at most, until so many of a model have changed.
_ROWS, _COLUMNS, _LOOKED_AT, _ENOUGH = 256, 1024, 64, 8
_SMALLEST = 32  # sides of a matrix that tell of a rank
#: Changes are of low rank whose first quarter of directions, or so many, leave no more than this share of the squares.
_QUARTER, _FEWEST, _REST = 4, 8, 0.005
#: The rounding lies in all directions. A change has to be so many times as large (squares) that the few percent which
#: training all weights leaves beyond the first ones would be seen beside it; and to be more than rounding at all.
_CLEAR, _BEYOND = 24, 4
#: Classes of models with a head whose gradients ``collect`` takes: by names, since its tasks import transformers.
_WITH_HEAD = re.compile(r"(ForSequenceClassification|ForTokenClassification|ForCausalLM|LMHeadModel)$")
_COLLECT: dict[Published, str] = {"gram": "", "kfac": " --kfac", "fisher": " --fisher"}


@dataclass(frozen=True)
class Choice:
    """What ``auto`` chose.

    Attributes:
        row: of the table.
        because: what was found that led there, and what speaks for the method: a clause.
    """

    row: Row
    because: str

    def settle(self, recipe: Recipe) -> Recipe:
        """The recipe with the method that was chosen; the user's options stand before those of the table."""
        options = {**self.row.options, **recipe.options}
        return recipe.model_copy(update={"method": self.row.method, "options": options})


def choose_method(recipe: Recipe, inputs: Inputs) -> Choice:
    """What is chosen for these files, whatever method the recipe names.

    Raises:
        RecipeError: the recipe has options that the chosen method has not.
    """
    situation = situation_of(recipe, inputs)
    row = choose(situation)
    _check_options(recipe, row)
    if situation.models < 2:
        return Choice(row, "one model is its own merge")
    return Choice(row, f"{_facts(row, situation, inputs)}; {row.why}")


def advice_on(recipe: Recipe, inputs: Inputs) -> tuple[str, ...]:
    """What to expect of the method that is chosen, and what would lead to a better one; sentences."""
    situation = situation_of(recipe, inputs)
    return (*_advice(choose(situation), situation, inputs),)


def situation_of(recipe: Recipe, inputs: Inputs) -> Situation:
    """What is at hand."""
    published = [_published(parent) for parent in inputs.parents]
    return Situation(
        published=frozenset.intersection(*published),
        base=inputs.base is not None,
        tasks=_tasks(recipe, inputs.parents),
        low_rank=inputs.without_base or all(_changed_in_few_directions(p, inputs.base) for p in inputs.parents),
        models=len(inputs.parents),
    )


def _published(parent: Parent) -> frozenset[Published]:
    """The kinds of statistics that a contributor publishes."""
    if parent.statistics is None:
        return frozenset()
    header = parent.statistics.header
    there: dict[Published, bool] = {
        "gram": any(layer.input is not None for layer in header.layers),
        "kfac": header.kfac is not None,
        "fisher": header.fisher is not None,
    }
    return frozenset(kind for kind, is_there in there.items() if is_there)


def _changed_in_few_directions(parent: Parent, base: Parent | None) -> bool:
    """Whether a contributor's changes are of low rank, by most of a few matrices; never where files are not here."""
    if isinstance(parent.checkpoint, AdapterCheckpoint):
        return True
    if base is None or not (parent.checkpoint.is_here and base.checkpoint.is_here):
        return False
    shapes = {name: _matrix(parent, name) for name in sorted(parent.sources)}
    names = [name for name, shape in shapes.items() if shape is not None and shape == _matrix(base, name)]
    found = list[bool]()
    for name in random.Random(0).sample(names, min(_LOOKED_AT, len(names))):
        weight, origin = (one.checkpoint.read(one.sources[name].tensor, 0, _ROWS) for one in (parent, base))
        few = in_few_directions(weight[:, :_COLUMNS], origin[:, :_COLUMNS])
        found += [] if few is None else [few]
        if len(found) == _ENOUGH:
            break
    return 2 * sum(found) > len(found)


def _matrix(parent: Parent, name: str) -> tuple[int, ...] | None:
    """The shape of a matrix of numbers, stored as such, that a model has under this name; None where there is none."""
    info = parent.info(name) if name in parent.sources and parent.sources[name].is_whole else None
    fits = info is not None and is_floating(info.dtype) and len(info.shape) == 2 and min(info.shape) >= _SMALLEST
    return info.shape if info is not None and fits else None


def in_few_directions(weight: Tensor, base: Tensor) -> bool | None:
    """Whether a matrix differs from another by one of low rank, but for the rounding of its numbers.

    Args:
        weight: (m, n), as it is stored.
        base: (m, n), likewise.

    Returns:
        None where it cannot be told, since the rounding leaves as much beyond the first directions as training all
        weights does, or where the change is not finite.
    """
    change = weight.double() - base.double()
    if not bool(change.isfinite().all()):
        return None
    squares = torch.linalg.eigvalsh(change @ change.T if len(change) <= change.shape[1] else change.T @ change).flip(0)
    whole, rounding = float(squares.sum()), _rounding(weight)
    rest = float(squares[max(_FEWEST, len(squares) // _QUARTER) :].clamp_min(0).sum())
    if rest <= _REST * whole + rounding:
        return True if whole > _CLEAR * rounding else None
    return False if whole > _BEYOND * rounding else None


def _rounding(weight: Tensor) -> float:
    """The sum of squared errors of so many rounded numbers: they are even within half a last digit to each side."""
    info = torch.finfo(weight.dtype)
    _, exponents = torch.frexp(weight.double().abs().clamp_min(info.tiny))
    return float((2.0 * (exponents - 1)).exp2().sum()) * info.eps**2 / 12


def _tasks(recipe: Recipe, parents: Sequence[Parent]) -> Tasks | None:
    """Whether one head answers for all; None where there are no labels."""
    labels = {frozenset(plain_labels(parent.label_names, parents)) for parent in parents}
    if len(labels) > 1 or any(_keeps_a_head(parent, recipe.keep_separate) for parent in parents):
        return "different"
    return "same" if any(labels) else None


def _keeps_a_head(parent: Parent, patterns: Sequence[str]) -> bool:
    """Whether some of these tensors are of a head, or of what the model does not have, and so may be."""
    kept = [name for name in parent.checkpoint.tensors if matches(name, patterns)]
    return any(name not in parent.view.parts or "head" in parent.view.parts[name].roles for name in kept)


def _facts(row: Row, situation: Situation, inputs: Inputs) -> str:
    """What was found that led to the row: what it asks for is there, and what rows before it ask for is not."""
    found = []
    if row.published is not None:
        found.append(f"every contributor publishes {PUBLISHED[row.published]}")
        found += ["the base model is known"] if row.base else []
    elif inputs.without_base:
        found.append("adapters without their base are changes of it, and have no statistics")
    else:
        lacking = [parent for parent in inputs.parents if "gram" not in _published(parent)]
        found += ["the base model is known"] if row.base else []
        found += [_lack(lacking, inputs.parents)] if lacking else []
        found += [] if situation.base else ["no base model is given"]
    if row.low_rank:
        found.append("the changes are of low rank")
    if row.tasks is not None:
        found.append("their tasks differ" if row.tasks == "different" else "they have one task")
    found = found or ["it needs nothing more"]
    return f"{', '.join(found[:-1])} and {found[-1]}" if len(found) > 1 else found[0]


def _lack(lacking: Sequence[Parent], parents: Sequence[Parent]) -> str:
    """Who publishes no Gram matrices."""
    what = "statistics" if all(parent.statistics is None for parent in lacking) else PUBLISHED["gram"]
    if len(lacking) == len(parents):
        return f"no contributor publishes {what}"
    names = listed([parent.title for parent in lacking], _MOST)
    return f"not every contributor publishes {what} ({names} {'does' if len(lacking) == 1 else 'do'} not)"


def _check_options(recipe: Recipe, row: Row) -> None:
    """Options of a merge by ``auto`` are those of the method that is chosen.

    Raises:
        RecipeError: it does not have one of them.
    """
    having = {name: set(method.options_type.model_fields) for name, method in METHODS.items()}
    for key in recipe.options:
        if key not in having[row.method]:
            able = [name for name, options in having.items() if options.issuperset(recipe.options)]
            known = ", ".join(sorted(having[row.method])) or "none"
            mend = f"leave it out (options of {row.method}: {known})"
            mend += f", or name the method that you mean, such as --method {able[0]}" if able else ""
            what = f"auto chooses {row.method} for what is here, which has no option {key!r}"
            raise RecipeError(what, where="options", mend=mend)


def _advice(row: Row, situation: Situation, inputs: Inputs) -> Iterator[str]:
    """What to expect, and what would lead to a better method."""
    if situation.models < 2:
        return
    known = row.expectation(situation.tasks)
    yield f"measured: {known}" if known else f"nothing has been measured yet of {row.method} on models like these"
    additions = {}
    for kind in _collectable(inputs):
        lacking = [parent for parent in inputs.parents if kind not in _published(parent)]
        if lacking:
            more = replace(situation, published=situation.published | {"gram", kind})
            names = listed([parent.title for parent in lacking], _MOST)
            again = " --overwrite" if any(parent.statistics is not None for parent in lacking) else ""
            command = f"merganser collect MODEL --data FILE{_COLLECT[kind]}{again}"
            additions[more] = f"with {PUBLISHED[kind]} of {names} ({command}, next to the data)"
    if not situation.base:
        name = named_base(inputs.parents)
        where = "the base model (--base MODEL)" if name is None else f"the base that they name (--base {name})"
        additions[replace(situation, base=True)] = f"with {where}"
    told = set[str]()
    for more, better in better_rows(situation, additions):
        if better.title not in told:
            told.add(better.title)
            measured = better.expectation(situation.tasks)
            yield f"{additions[more]} it would be {better.title}" + (f": {measured}" if measured else "")


def _collectable(inputs: Inputs) -> Iterator[Published]:
    """The kinds of statistics that ``collect`` makes of such models: those of gradients need a head that has a loss."""
    if inputs.without_base:
        return
    yield "gram"
    classes = [str((parent.checkpoint.config.get("architectures") or [""])[0]) for parent in inputs.parents]
    if all(_WITH_HEAD.search(one) for one in classes):
        yield from ("kfac", "fisher")


def named_base(parents: Sequence[Parent]) -> str | None:
    """The model that every contributor's card or configuration names as the one it was made from, if it is one.

    It is only proposed: what a stranger's file names is neither fetched nor read unasked.
    """
    names = {_named_base(parent.checkpoint) for parent in parents}
    name = names.pop()
    return name if not names else None


def _named_base(checkpoint: Checkpoint) -> str | None:
    """By the metadata of the card, else as older versions of transformers wrote it into the configuration."""
    try:
        text = read_text(checkpoint.path / _CARD, limit=_LARGEST_CARD)
        front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        said = parse_yaml(front[1], _CARD) if front else None
    except (UserError, OSError):
        said = None
    name = said.get("base_model") if isinstance(said, dict) else None
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    name = checkpoint.config.get("_name_or_path") if name is None else name
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None
