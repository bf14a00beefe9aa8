"""Several merges in one file, of which later ones use what earlier ones made.

A file of mergekit may hold several documents. Each but one has a name (``name:``, or in older files ``out_path:``), by
which others use its result as a model. These intermediate results are folders of their own, written whole or not at
all; one that is there already and was made from the same inputs in the same way is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merganser.checkpoints import Checkpoint, open_checkpoint
from merganser.documents import parse_yaml_documents, read_yaml_text
from merganser.errors import ErrorCollector, RecipeError, UserError
from merganser.files import remove_leftovers_in
from merganser.merging.memory import RunSettings
from merganser.merging.merge import PreparedMerge, carry_out, prepare
from merganser.merging.mergekit.schema import RECOGNISED_BY, is_mergekit, read_configuration
from merganser.merging.mergekit.translation import translate
from merganser.merging.provenance import plan_of_record, read_provenance
from merganser.merging.recipe import Recipe, make_recipe
from merganser.merging.verification import verify
from merganser.text import printable

_REFERENCES = ("model", "base_model", "tokenizer_source", "source", "path", "lora")  # keys under which models stand


@dataclass(frozen=True)
class Stage:
    """One merge of a file.

    Attributes:
        name: by which others use its result; None for the result of the file.
        recipe: the values of our recipe.
        notes: what means something else here.
        where: it stands.
        folder: of an intermediate result.
        uses: the names of the stages whose results it merges.
    """

    name: str | None
    recipe: Mapping[str, Any]
    notes: tuple[str, ...]
    where: str
    folder: Path | None = None
    uses: tuple[str, ...] = ()


def read_stages(path: Path, intermediate: Path | None = None) -> list[Stage]:
    """The merges of a mergekit file as recipes of ours, in the order in which they are made, the result last.

    Args:
        path: of the YAML file.
        intermediate: the folder of intermediate results; where a file has some and None is given, it is an error.

    Returns:
        Nothing where the file is no configuration of mergekit.

    Raises:
        RecipeError: everything in the file that is wrong or cannot be honoured; several as ``Problems``.
    """
    documents = [one for one in parse_yaml_documents(read_yaml_text(path, RecipeError), path, RecipeError) if one]
    if not any(is_mergekit(one) for one in documents):
        return []
    if any(isinstance(one, dict) and "experts" in one for one in documents):
        mend = f"merganser moe {path} -o FOLDER"
        raise RecipeError("this is a mixture of experts, as mergekit-moe makes one", where=path, mend=mend)
    problems = ErrorCollector()
    for number, values in enumerate(documents, 1):
        if not is_mergekit(values):
            what, mend = f"document {number} is no configuration of mergekit", f"give it a {RECOGNISED_BY}"
            problems.add(RecipeError(what, where=path, mend=mend))
    problems.raise_all()
    names = _names(documents, path)
    if len(documents) > 1 and intermediate is None:
        raise RecipeError("the intermediate results need a folder", where=path, mend="add --intermediate FOLDER")
    folders = {name: (intermediate or Path()) / _folder_name(name) for name in names if name is not None}
    stages = {}
    for number, (name, values) in enumerate(zip(names, documents, strict=True), 1):
        where = str(path) if len(documents) == 1 else f"{path}, document {number}"
        used = dict[str, None]()
        stage = problems.catch(_stage, name, values, where, folders, used)
        if stage is not None:
            stages[name] = stage
    problems.raise_all()
    return list(_in_order(stages, path))


def explain_stages(stages: Sequence[Stage]) -> str:
    """The recipes as YAML, with what means something else here as comments above each."""
    texts = []
    for stage in stages:
        comments = [line for note in stage.notes for line in note.splitlines()]
        if stage.folder is not None:
            comments.insert(0, f"{stage.name}: an intermediate result, written to {stage.folder}")
        above = "".join(f"# {printable(line)}\n" for line in comments)  # no name ends a comment
        texts.append(above + yaml.dump(dict(stage.recipe), Dumper=_Dumper, sort_keys=False, width=120))
    return "---\n".join(texts)


class _Dumper(yaml.SafeDumper):
    """YAML with lists of numbers and texts in one line, and nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """No node stands for another."""
        return True


def _list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    plain = not any(isinstance(one, (dict, list)) for one in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _list)


def make_intermediates(
    stages: Sequence[Stage],
    flags: Mapping[str, Any],
    settings: RunSettings,
    *,
    overwrite: bool,
    reads: Sequence[Path],
    tell: Callable[[str], None],
) -> None:
    """Make every intermediate result that is not there already.

    Args:
        stages: of the file, in order; the last one is left to the caller.
        flags: of the command, which win over the file; those of the method are for the result alone.
        settings: how the work is run.
        overwrite: replace an intermediate result that was made from something else.
        reads: what else is read, such as the file itself.
        tell: receives what the user should know.

    Raises:
        UserError: what cannot be merged; the results that are finished stay.
    """
    _check_models(stages, settings)
    for place in {stage.folder.parent for stage in stages if stage.folder is not None}:
        remove_leftovers_in(place)  # of a stage that is not made again, too
    for stage in stages[:-1]:
        if stage.folder is None:
            continue
        recipe = stage_recipe(stage, flags)
        if stage.folder.exists() and _is_up_to_date(stage.folder, prepare(recipe, None, settings)):
            tell(f"{stage.name}: {stage.folder} was made from the same inputs, so it is not made again")
            continue
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        prepared = prepare(recipe, stage.folder, settings, overwrite=overwrite, reads=reads)
        for note in (*stage.notes, *prepared.plan.notes):
            tell(f"{stage.name}: {note}")
        result = carry_out(prepared, stage.folder, overwrite=overwrite)
        tell(f"{stage.name}: merged in {result.seconds:.1f} s into {stage.folder}")


def stage_recipe(stage: Stage, flags: Mapping[str, Any]) -> Recipe:
    """The recipe of an intermediate result; flags of the method are for the result of the file alone."""
    shared = {key: value for key, value in flags.items() if key not in ("method", "options")}
    return make_recipe({**stage.recipe, **shared}, stage.where)


def ready_stages(stages: Sequence[Stage]) -> list[Stage]:
    """The intermediate results that are not there and need none that is not: those that can be planned."""
    folders = {stage.name: stage.folder for stage in stages if stage.folder is not None}
    missing = {name for name, folder in folders.items() if not folder.exists()}
    return [stage for stage in stages if stage.name in missing and not missing & set(stage.uses)]


def _check_models(stages: Sequence[Stage], settings: RunSettings) -> None:
    """Every model that a later stage reads can be opened, before the first stage is merged.

    Raises:
        UserError: all that cannot.
    """
    problems, known = ErrorCollector(), dict[str, Checkpoint]()
    made = {str(stage.folder) for stage in stages if stage.folder is not None}
    for stage in stages:
        base = stage.recipe.get("base")
        for model in [*(one["model"] for one in stage.recipe["contributors"]), *([base] if base else [])]:
            if model.partition("+")[0] not in made:
                problems.catch(open_checkpoint, model, allow_pickle=settings.allow_pickle, known=known, base=base)
    problems.raise_all()


def _is_up_to_date(folder: Path, prepared: PreparedMerge) -> bool:
    """Whether a folder holds the whole result of a plan, of the very inputs that are there now."""
    try:
        found = plan_of_record(read_provenance(folder), folder)
        same = found is not None and found.to_json() == prepared.plan.to_json()
        return same and not verify(folder, allow_pickle=prepared.settings.allow_pickle).absent
    except UserError:
        return False


def _names(documents: Sequence[Mapping[str, Any]], path: Path) -> list[str | None]:
    """The name of every document; None for the one that makes the result: the only one without, or else the last."""
    names: list[str | None] = []
    for values in documents:
        name = values.get("name", values.get("out_path"))
        names.append(None if name is None else str(name))
    if len(documents) == 1:
        return [None]
    if names.count(None) > 1:
        what, mend = f"{names.count(None)} documents have no name", "give every document a name but the result's"
        raise RecipeError(what, where=path, mend=mend)
    if None not in names:
        names[-1] = None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"two documents are called {twice!r}", where=path, mend="give each a name of its own")
    stems = [_folder_name(name) for name in names if name is not None]
    if any(not stem or stems.count(stem) > 1 for stem in stems):
        what = f"the folders of {', '.join(name for name in names if name)} would have one name, or no name"
        raise RecipeError(what, where=path, mend="give each a name with another last part")
    return names


def _folder_name(name: str) -> str:
    """The last part of a name that may be a path; never one that leads out of a folder."""
    last = Path(name).name
    return "" if last == ".." else last


def _stage(
    name: str | None, values: Mapping[str, Any], where: str, folders: Mapping[str, Path], used: dict[str, None]
) -> Stage:
    placed = _placed(values, folders, used)
    configuration = read_configuration(placed, where)
    translation = translate(configuration, where)
    folder = None if name is None else folders[name]
    return Stage(name, translation.recipe, translation.notes, where, folder, tuple(used))


def _placed(values: Any, folders: Mapping[str, Path], used: dict[str, None]) -> Any:
    """Values with the folder of a stage wherever its name stands for a model; the names are added to ``used``."""
    if isinstance(values, list):
        return [_placed(one, folders, used) for one in values]
    if not isinstance(values, Mapping):
        return values
    found = {}
    for key, value in values.items():
        if key in _REFERENCES and isinstance(value, str):
            stem, plus, adapter = value.partition("+")
            if stem in folders:
                used.setdefault(stem)
                value = f"{folders[stem]}{plus}{adapter}"
        found[key] = _placed(value, folders, used)
    return found


def _in_order(stages: Mapping[str | None, Stage], path: Path) -> Iterator[Stage]:
    """Every stage after those that it uses, the result last.

    Raises:
        RecipeError: stages that use each other.
    """
    done = set[str]()
    waiting = [stage for stage in stages.values() if stage.name is not None]
    while waiting:
        ready = [stage for stage in waiting if done.issuperset(stage.uses)]
        if not ready:
            named = ", ".join(str(stage.name) for stage in waiting)
            raise RecipeError(f"{named} use each other", where=path, mend="let a document use only others' results")
        yield from ready
        done.update(str(stage.name) for stage in ready)
        waiting = [stage for stage in waiting if stage not in ready]
    yield stages[None]
