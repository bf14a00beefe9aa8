"""Vocabularies compared token by token: which row of whose embedding answers to which row of the result's.

A row belongs to a token, wherever it stands. Rows beyond a tokenizer's last token are padding and answer to each other
by their place, and so do all rows of models without a tokenizer. Which tensors have a row for each token is asked of
the model class: its input and output embeddings, what is tied to them, and their biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.layers import map_parameters
from merganser.checkpoints.model_view import view_of
from merganser.checkpoints.tokenizer_files import Table, add_tokens, has_tokenizer, read_once, vocabulary_digest
from merganser.errors import CheckpointError, ErrorCollector, RecipeError
from merganser.merging.configuration import BASE, choose_model
from merganser.merging.inputs import Parent
from merganser.merging.matching import RowMap
from merganser.merging.recipe import Recipe
from merganser.merging.vocabulary_rows import GivenRow, match_rows
from merganser.text import listed

_SHOWN = 5  # tokens in a message


@dataclass(frozen=True)
class VocabularyChange:
    """What becomes of the contributors' vocabularies.

    Attributes:
        size: rows of the result's embedding.
        heights: rows of each contributor's.
        added: tokens that the written tokenizer has beside its own, in the order in which they are added.
    """

    size: int
    heights: tuple[int, ...]
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class VocabularyPlan:
    """How vocabularies are matched.

    Attributes:
        rows: of each tensor whose rows are not simply those of every model.
        tokenizer: whose tokenizer fits the rows: the number of a contributor, -1 for the base.
        change: what becomes of the vocabulary, where any rows are matched.
        uses_base: whether rows are read from the base, or its tokenizer.
        separate: each contributor keeps an embedding and a vocabulary of its own.
        notes: what to tell the user.
    """

    rows: Mapping[str, RowMap]
    tokenizer: int = 0
    change: VocabularyChange | None = None
    uses_base: bool = False
    separate: bool = False
    notes: tuple[str, ...] = ()


def match_vocabularies(
    recipe: Recipe,
    people: Sequence[Parent],
    base: Parent | None,
    names: Sequence[str],
    problems: ErrorCollector,
    *,
    needs_base: bool = False,
    adapter: bool = False,
) -> VocabularyPlan:
    """Match the rows of every tensor that has one for each token.

    Args:
        recipe: for ``vocabulary``, ``tokenizer_from`` and ``missing_rows``.
        people: the open contributors, the reference first.
        base: the base model, where there is one.
        names: tensors to be merged; those kept separate are not among them.
        problems: receives what does not fit.
        needs_base: the method reads the base model's rows.
        adapter: the result is an adapter, which has its base's vocabulary.
    """
    taken = problems.catch(_tokenizer_choice, recipe, people, base)
    filler = problems.catch(_filler, recipe, people, base)
    named = (recipe.tokenizer_from, recipe.missing_rows, *(row.take for row in recipe.tokens.values()))
    uses_base = base is not None and BASE in named
    below = base if base is not None and (needs_base or adapter or uses_base) else None
    models = [*people, *([below] if below else [])]
    usual = -1 if taken is base and base is not None else people.index(taken) if taken in people else 0
    if taken is not None and not has_tokenizer(taken.checkpoint) and any(has_tokenizer(m.checkpoint) for m in models):
        text, mend = "has no tokenizer to take", "name a model that has one"
        problems.add(CheckpointError(text, where=taken.checkpoint.name, mend=mend))
    as_it_is = not (recipe.tokens or recipe.pad_to_multiple_of) and _alike(models, names)
    if as_it_is and len({vocabulary_digest(one.checkpoint) for one in models}) == 1:
        return VocabularyPlan({}, usual, uses_base=uses_base)  # a hundred thousand tokens take long to read
    known: dict[str, Table | None] = {}
    tables = [read_once(one.checkpoint, known) for one in models]
    if as_it_is and all(table == tables[0] for table in tables):
        return VocabularyPlan({}, usual, uses_base=uses_base)
    tensors = vocabulary_tensors(people[0].checkpoint)
    merged = [name for name in tensors if name in names]
    if not merged:
        return VocabularyPlan({}, 0 if tensors else usual, uses_base=uses_base, separate=bool(tensors))
    heights = [_height(one, merged[0], tensors[merged[0]]) for one in models]
    tables = [table and _below(table, height) for table, height in zip(tables, heights, strict=True)]
    notes = _unknown(models, tables, heights)
    first = next((table for table in tables[: len(people)] if table is not None), None)
    filled = [first if table is None else table for table in tables]
    found = _order(recipe, models, len(people), filled, heights, usual, problems)
    if found is None:
        return VocabularyPlan({}, usual, uses_base=uses_base, notes=tuple(notes))
    order, tokens = found
    given = _given_rows(recipe, models, len(people), filled, heights, tokens, problems)
    filled = filled if tokens else [None] * len(models)
    added = tuple(token for token in tokens if token not in (filled[order] or {}))
    size = max([heights[order], *(row + 1 for row in tokens.values())])
    if tokens and recipe.pad_to_multiple_of is not None:
        size = -(-(max(tokens.values()) + 1) // recipe.pad_to_multiple_of) * recipe.pad_to_multiple_of
    if not (order == usual or first is None):
        notes.append(f"the tokenizer is that of {models[order].title}, which has every token")
    rows: dict[str, RowMap] = {}
    for name in merged:
        own = [_height(one, name, tensors[name]) for one in models]
        length = size if own[order] in (heights[order], 0) else own[order]
        table = match_rows(recipe, tokens, length, filled, own, len(people), filler, given, needs_base=needs_base)
        if table is not None:
            rows[name] = replace(table, columns=tensors[name])
    kept = [name for name in tensors if name not in names and name not in people[0].copies]
    if rows and kept:
        text = f"{', '.join(kept)} is kept separate, but the rows of {', '.join(merged)} are matched by token"
        mend = " ".join(f"--keep-separate '{name}'" for name in merged)
        problems.add(RecipeError(text, where="keep_separate", mend=f"keep all of them separate: {mend}"))
    if adapter and rows and any(table.fills for table in rows.values()):
        text, mend = "an adapter cannot hold rows of other models", "leave out tokens and pad_to_multiple_of"
        problems.add(RecipeError(text, where="--as-adapter", mend=f"{mend}, or write a full checkpoint"))
    elif adapter and below is not None and (filled[-1] != tokens or heights[-1] != size) and first is not None:
        text = "an adapter has its base's vocabulary, and the result would have other tokens or another order of them"
        problems.add(RecipeError(text, where="--as-adapter", mend="write a full checkpoint"))
    notes += _said(people, filled, heights, rows, added, size, needs_base=needs_base)
    change = VocabularyChange(size, tuple(heights[: len(people)]), added) if rows else None
    return VocabularyPlan(rows, order if order < len(people) else -1, change, uses_base, notes=tuple(notes))


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, bool]:
    """The tensors on disk with a row (True: a column) for each token, the input embedding first.

    Where transformers cannot build the model, those whose first dimension is the configuration's ``vocab_size``.
    """
    model = view_of(checkpoint).model
    if model is None:
        size = checkpoint.config.get("vocab_size")
        found = [name for name, info in checkpoint.tensors.items() if info.shape and info.shape[0] == size]
        return dict.fromkeys(sorted(found, key=lambda name: "embed" not in name), False)
    main = _asked(model, "get_input_embeddings")
    size = getattr(main, "num_embeddings", None)
    if main is None or size is None:
        return {}
    modules = {module: name for name, module in model.named_modules()}
    sizes = {size, *_further_sizes(model.config)}
    embeddings, heads = [main], []
    for module in modules:
        embedding, head = _asked(module, "get_input_embeddings"), _asked(module, "get_output_embeddings")
        embeddings += [embedding] if getattr(embedding, "num_embeddings", None) == size else []
        heads += [head] if head is not None and getattr(head, "weight", None) is not None else []
    stem = modules[main].rpartition(".")
    for module, name in modules.items():  # embeddings beside the first, of the same ids
        beside = name.startswith(f"{stem[0]}{stem[1]}{stem[2]}_") and getattr(module, "num_embeddings", None) in sizes
        embeddings += [module] if beside else []
    heads = [head for head in heads if head.weight.shape[0] == size]
    wanted = {id(one.weight) for one in [*embeddings, *heads]}
    above = {modules[head].rsplit(".", depth)[0] for head in heads for depth in range(modules[head].count(".") + 1)}
    above |= {""} if heads else set()
    named = dict(model.named_parameters(remove_duplicate=False))
    found = [name for name, parameter in named.items() if id(parameter) in wanted]
    found += [n for n, p in named.items() if tuple(p.shape) == (size,) and n.rpartition(".")[0] in above]
    places = map_parameters(model, checkpoint, values=False)
    tensors = dict.fromkeys(
        (place for name in found for place in _on_disk(name, named[name].shape, places, checkpoint)), False
    )
    for name, buffer in model.named_buffers():
        fits = tuple(buffer.shape) in ((size,), (1, size)) and name.rpartition(".")[0] in above
        if fits and name in checkpoint.tensors:
            tensors[name] = buffer.dim() > 1
    return tensors


def _tokenizer_choice(recipe: Recipe, people: Sequence[Parent], base: Parent | None) -> Parent | None:
    name = recipe.tokenizer_from
    return None if name is None else choose_model(name, "tokenizer_from", people, base)


def _filler(recipe: Recipe, people: Sequence[Parent], base: Parent | None) -> int | None:
    """Whose rows stand where not every model has one: a contributor's number, -1 for the base; None: all that do."""
    if recipe.missing_rows == "mean":
        return None
    found = choose_model(recipe.missing_rows, "missing_rows", people, base)
    return people.index(found) if found in people else -1


def _below(table: Table, height: int) -> Table:
    """The tokens that have a row."""
    return {token: row for token, row in table.items() if row < height}


def _asked(module: Any, method: str) -> Any:
    try:
        return getattr(module, method)() if hasattr(module, method) else None
    except Exception:  # many towers have no such embedding, and say so in different ways
        return None


def _further_sizes(config: Any) -> list[int]:
    """What a configuration says of the sizes of further embeddings of the same tokens."""
    try:
        said = config.get_text_config().to_dict()
    except Exception:  # several text models: each has its own
        said = config.to_dict()
    return [value for key, value in said.items() if key.startswith("vocab_size") and isinstance(value, int)]


def _on_disk(name: str, shape: Sequence[int], places: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    """Where a parameter lies; where older versions named the modules above it otherwise, by the end of its name."""
    if name in places:
        return [places[name]]
    end = "." + ".".join(name.split(".")[-2:])
    return [own for own, info in checkpoint.tensors.items() if own.endswith(end) and info.shape == tuple(shape)]


def _height(parent: Parent, name: str, columns: bool) -> int:
    info = parent.info(name)
    return 0 if info is None or not info.shape else info.shape[-1 if columns else 0]


def _alike(models: Sequence[Parent], names: Sequence[str]) -> bool:
    """Whether every tensor has one shape wherever it is."""
    return all(len({info.shape for one in models if (info := one.info(name)) is not None}) <= 1 for name in names)


def _unknown(models: Sequence[Parent], tables: Sequence[Table | None], heights: Sequence[int]) -> list[str]:
    """A note where vocabularies cannot be compared."""
    silent = [one.title for one, table in zip(models, tables, strict=True) if table is None]
    if not silent or (len(silent) == len(models) and len(set(heights)) == 1):
        return []
    return [f"no vocabulary can be read of {', '.join(silent)}: rows are matched by their place, not by token"]


def _order(
    recipe: Recipe,
    models: Sequence[Parent],
    count: int,
    tables: Sequence[Table | None],
    heights: Sequence[int],
    usual: int,
    problems: ErrorCollector,
) -> tuple[int, dict[str, int]] | None:
    """Whose order of tokens the result has (an index into ``tables``), and the id of each of its tokens."""
    people = models[:count]
    first = len(tables) - 1 if usual < 0 else usual
    if any(table is None for table in tables[:count]):  # then all of them are: row by row
        if recipe.vocabulary == "same" and len(set(heights[:count])) > 1:
            return None  # an error of shape, with its own mend
        longest = heights.index(max(heights[:count])) if recipe.vocabulary != "same" else first
        if recipe.vocabulary == "union" and len(set(heights[:count])) > 1:
            mend = "put the tokenizers beside the weights; --vocabulary largest if the longer only appended tokens"
            problems.add(RecipeError("there is no tokenizer to compare tokens by", where="vocabulary", mend=mend))
        return longest, {}
    known = [dict(table or {}) for table in tables]
    ours = [known[i] for i in dict.fromkeys([*range(count), first])]
    order = dict.fromkeys([first, *range(count)])
    whole = next((i for i in order if all(known[i].items() >= table.items() for table in ours)), None)
    if recipe.tokenizer_from is not None and whole not in (first, None):
        whole = None
    same = all(table.keys() == ours[0].keys() for table in ours)
    more: list[str] = []
    if same or recipe.vocabulary == "tokenizer":
        chosen = first
    elif recipe.vocabulary != "same" and whole is not None:
        chosen = whole
    elif recipe.vocabulary == "union":
        in_order = (sorted(table, key=table.__getitem__) for table in known[:count])
        chosen, more = first, [token for tokens in in_order for token in tokens]
    else:
        offer = "largest" if whole is not None else "union"
        extra = ", the one with every token is then written" if whole is not None else ", rows by token"
        problems.add(
            CheckpointError(
                f"the vocabularies differ: {_differences(people, known)}", mend=f"--vocabulary {offer}{extra}"
            )
        )
        return None
    more = [token for token in dict.fromkeys([*more, *recipe.tokens]) if token not in known[chosen]]
    return (
        _extended(models, known[chosen], heights[chosen], chosen, more, problems) if more else (chosen, known[chosen])
    )


def _extended(
    models: Sequence[Parent], table: Table, height: int, chosen: int, more: Sequence[str], problems: ErrorCollector
) -> tuple[int, dict[str, int]] | None:
    """The tokens of one model, and more of them where its tokenizer puts them."""
    folders = [one.checkpoint.tokenizer_path for one in models]
    source = folders[chosen]
    tokenizer = problems.catch(add_tokens, source, more, folders)
    if tokenizer is None:
        return None
    written = tokenizer.get_vocab()
    new = {token: written.get(token, -1) for token in more}
    taken = set(table.values())
    gap = set(range(height, max(new.values(), default=0))) - set(new.values())
    if any(row < 0 or row in taken for row in new.values()) or len(set(new.values())) < len(new) or gap:
        mend = "name another model's tokenizer with --tokenizer-from"
        text = f"its tokenizer gives no place of their own to tokens such as {more[0]!r}"
        problems.add(CheckpointError(text, where=source, mend=mend))
        return None
    return chosen, {**table, **new}


def _given_rows(
    recipe: Recipe,
    models: Sequence[Parent],
    count: int,
    tables: Sequence[Table | None],
    heights: Sequence[int],
    tokens: Table,
    problems: ErrorCollector,
) -> dict[int, GivenRow]:
    """What the recipe says of single tokens, by their rows in the result."""
    found: dict[int, GivenRow] = {}
    base = models[count] if len(models) > count else None
    for token, said in recipe.tokens.items():
        where = f"tokens: {token}"
        if token not in tokens:
            if not problems.found:
                text, mend = "there is no tokenizer to find tokens in", "put the tokenizers beside the weights"
                problems.add(RecipeError(text, where=where, mend=mend))
        elif said.zero:
            found[tokens[token]] = GivenRow(None, 0, said.force)
        elif said.take is None:
            if said.force:
                text, mend = "nothing is said of where its row comes from", "add take: NAME, or zero: true"
                problems.add(RecipeError(text, where=where, mend=mend))
        elif (giver := problems.catch(choose_model, said.take, where, models[:count], base)) is not None:
            number, name = models.index(giver), said.token or token
            row = said.id if said.id is not None else (tables[number] or {}).get(name)
            if row is None or row >= heights[number]:
                text = f"{giver.title} has no row " + (f"for {name!r}" if said.id is None else str(said.id))
                mend = "name another model, or its token or id for this one"
                problems.add(RecipeError(text, where=where, mend=mend))
            else:
                found[tokens[token]] = GivenRow(number, row, said.force)
    return found


def _differences(people: Sequence[Parent], tables: Sequence[Table]) -> str:
    """Some of the tokens that not every contributor has in the same place."""
    everyone = set.intersection(*(set(table) for table in tables[: len(people)]))
    parts = []
    for one, table in zip(people, tables, strict=False):
        alone = sorted((token for token in table if token not in everyone), key=table.__getitem__)
        shown = listed([f"{token!r} (id {table[token]})" for token in alone], _SHOWN)
        parts += [f"{one.title} has {shown}"] if alone else []
    return "; ".join(parts) + ", which not every contributor has"


def _said(
    people: Sequence[Parent],
    tables: Sequence[Table | None],
    heights: Sequence[int],
    rows: Mapping[str, RowMap],
    added: Sequence[str],
    size: int,
    *,
    needs_base: bool,
) -> list[str]:
    """What to tell of rows that were matched."""
    notes = []
    known = [table for table in tables[: len(people)] if table is not None]
    if rows and any(table != known[0] for table in known):
        notes.append(f"rows are matched by token in {', '.join(rows)}")
    if added:
        shown = listed([repr(token) for token in added], _SHOWN)
        notes.append(f"the vocabulary grows to {size} rows, with {shown} added to the tokenizer")
    elif rows and known and len(set(heights[: len(people)])) > 1:
        notes.append(f"embeddings have other numbers of rows beyond their tokenizers: the result has {size}")
    table = next(iter(rows.values()), None)
    if needs_base and table is not None and table.base:
        alone = sum(length for first, length in table.base if first < 0)
        if alone:
            notes.append(f"{alone} rows of embeddings are not in the base model: averaged over the contributors")
    return notes
