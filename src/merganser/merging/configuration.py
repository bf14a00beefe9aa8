"""What the configurations and tokenizers of contributors say of the function that the same weights compute.

Configurations are compared as transformers resolves them: absent keys take the class's defaults, old spellings become
new ones, and sub-configurations are compared alike. What never changes the function of a model in use (settings of
training and of generation, names, versions) is ignored; keys that the class does not know are noted; any other
difference is an error, unless one model's configuration is taken on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.layers import BadConfiguration, build_empty, check_config, load_config
from merganser.checkpoints.reader import read_json
from merganser.errors import CheckpointError, ErrorCollector, RecipeError, UserError, did_you_mean
from merganser.merging.inputs import Inputs, Parent, same_configurations
from merganser.merging.layer_stacking import StackedCheckpoint
from merganser.merging.recipe import Recipe
from merganser.text import shortened

BASE = "base"  # what recipes call the base model where they choose a model
_ABSENT = "absent"
_TIES = "tie_word_embeddings"
#: Keys that say nothing of the function that a model in evaluation mode computes: whole names.
_SILENT = re.compile(
    r"_name_or_path|_commit_hash|_?\w*implementation\w*|transformers_version|architectures|auto_map|custom_pipelines"
    r"|(torch_)?dtype|(tokenizer|\w*processor|feature_extractor)_class|quantization_config"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"  # heads are matched by label
    r"|(decoder_)?vocab_size\w*|\w+_token_ids?|\w+_token_index"  # vocabularies are matched by token
    r"|use_cache|return_dict\w*|output_(hidden_states|attentions|\w*logits|past|scores)|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|onnx_export"
    r"|\w*(dropout|layerdrop|pdrop|drop_rate|drop_path)\w*|init_\w+|\w*init(ializer|ial)?_(range|std|factor|value|scale)"
    r"|\w*initializer_\w+|\w*_noise|\w*(loss|_cost)(_\w+)?|\w*coef(f|ficient)?|label_smoothing|auxiliary_\w+"
    r"|mask_(time|feature)_\w+|apply_spec_augment"
    r"|num_beams|early_stopping|length_penalty|forced_\w+|(begin_)?suppress_tokens|\w*no_repeat_ngram_size"
)
#: What a configuration says of a model's head, tokens and storage, whoever's configuration the rest is.
_OWN = re.compile(
    r"architectures|auto_map|id2label|label2id|num_labels|problem_type|(torch_)?dtype|(decoder_)?vocab_size\w*"
    rf"|{_TIES}"  # as the tensors are
)
_TOKEN_IDS = re.compile(r"\w+_token_ids?|\w+_token_index")
_MOST_LISTED, _LONGEST_PATH = 20, 100  # keys that differ and are named, and characters of each


@dataclass(frozen=True)
class _Resolved:
    """A configuration flattened: values by path, and the paths that its class does not know."""

    values: Mapping[str, Any]
    unknown: frozenset[str]


def choose_model(name: str, option: str, parents: Sequence[Parent], base: Parent | None) -> Parent:
    """The model that an option of a recipe names: ``base``, or a contributor by its title or as the recipe has it.

    Raises:
        RecipeError: there is no such model.
    """
    if name == BASE and base is not None:
        return base
    for parent in parents:
        if name in (parent.title, parent.contributor.model):
            return parent
    titles = [parent.title for parent in parents]
    if name == BASE:
        raise RecipeError("there is no base model", where=option, mend="add --base MODEL, or name a contributor")
    mend = did_you_mean(name, [*titles, *([BASE] if base else [])])
    raise RecipeError(f"no model of this merge is called {name!r}", where=option, mend=mend)


def match_configurations(
    recipe: Recipe,
    parents: Sequence[Parent],
    base: Parent | None,
    problems: ErrorCollector,
    *,
    adapter: bool = False,
    per_layer: frozenset[str] = frozenset(),
) -> list[str]:
    """Compare the configurations of contributors and base; one error names all keys that change the function.

    Args:
        recipe: for ``config_from``.
        parents: the open contributors.
        base: the base model, where there is one.
        problems: receives the error.
        adapter: the result is an adapter, which is opened with the base's configuration.
        per_layer: keys that say something of the layers, which the result has others of.

    Returns:
        what to tell the user.
    """
    chosen = problems.catch(_chosen, recipe.config_from, "config_from", parents, base)
    below = [] if base is None or any(base is one for one in parents) else [base]
    people = [one for one in [*parents, *below] if one.checkpoint.config]
    if not all(same_configurations(people[0].checkpoint, one.checkpoint) for one in people):
        sound = [problems.catch(check_config, one.checkpoint) for one in people]
        if not all(sound):
            return []
    audible = [_audible(one.checkpoint.config) for one in people]
    if not people or all(one == audible[0] for one in audible):
        return []
    resolved = [_resolve(one.checkpoint) for one in people]
    unknown = frozenset[str]().union(*(one.unknown for one in resolved))
    flat = [one.values for one in resolved]
    paths = list(dict.fromkeys(path for values in flat for path in values))
    differing = [path for path in paths if any(v.get(path) != flat[0].get(path) for v in flat)]
    differing = [path for path in differing if path not in per_layer]
    if not differing:
        return []
    harmless = [path for path in differing if path in unknown or _unused(path, flat)]
    said = flat[: len(people) - len([one for one in below if one.checkpoint.config])]
    serious = [path for path in differing if path not in harmless and not _is_the_base_s_tie(path, said)]
    writer = chosen or parents[0]
    notes = []
    if harmless:
        listing = _listings(harmless, people, flat)
        what = f"the configurations differ in what these weights do not depend on ({listing})"
        notes.append(f"{what}: {writer.title}'s is written")
    if not serious:
        return notes
    listing = _listings(serious, people, flat)
    if recipe.config_from is None:
        names = " or ".join(f"--config-from {name}" for name in _names(people, base))
        mend = f"merge models of one configuration, or take one's on purpose: {names}"
        if not _same_shapes(people):
            mend = "merge models of one configuration"
        problems.add(CheckpointError(f"the configurations compute different functions: {listing}", mend=mend))
    elif adapter and chosen is not None and base is not None:
        ours, theirs = (flat[people.index(one)] if one in people else {} for one in (chosen, base))
        if any(ours.get(path) != theirs.get(path) for path in serious):
            what = f"an adapter is opened with its base's configuration, not {chosen.title}'s ({listing})"
            problems.add(
                RecipeError(what, where="config_from", mend=f"--config-from {BASE}, or write a full checkpoint")
            )
    else:
        notes.append(f"the configuration is {writer.title}'s, as asked for, where they differ: {listing}")
    return notes


def compare_tokenizers(parents: Sequence[Parent], taken: Parent, *, template: bool = True) -> list[str]:
    """What to tell the user where chat templates, special tokens or generation configurations differ.

    Args:
        parents: the open contributors.
        taken: whose are written.
        template: whether its chat template is.
    """
    kinds: dict[str, Callable[[Checkpoint], Any]] = {
        "chat templates": own_chat_template,
        "special tokens": _special_tokens,
        "generation configurations": _generation,
    }
    differing = []
    if not template:
        del kinds["chat templates"]
    for kind, read in kinds.items():
        said = [read(parent.checkpoint) for parent in parents]
        if any(one != said[0] for one in said):
            differing.append(kind)
    if not differing:
        return []
    return [f"{' and '.join(differing)} differ: {taken.title}'s are written (tokenizer_from takes another model's)"]


def merged_config(recipe: Recipe, inputs: Inputs, own: Parent, tokens: Parent | None) -> dict[str, Any]:
    """The configuration of a merged model, but for sizes and labels that the merge changes.

    Args:
        recipe: for ``config_from``.
        inputs: the open files.
        own: whose head it is.
        tokens: whose token ids the vocabulary has; None: the model's own.
    """
    config = dict(own.checkpoint.config)
    if recipe.config_from is not None:
        chosen = choose_model(recipe.config_from, "config_from", inputs.parents, inputs.base)
        config = _overlaid(_overlaid(chosen.checkpoint.config, config, _OWN), config, _TOKEN_IDS)
    if isinstance(inputs.reference.checkpoint, StackedCheckpoint):
        config = inputs.reference.checkpoint.restacked(config)
    if tokens is not None and tokens is not own:
        config = _overlaid(config, tokens.checkpoint.config, _TOKEN_IDS)
    return config


def check_written(recipe: Recipe, inputs: Inputs) -> None:
    """Refuse a configuration of transformers' own that it cannot build a model from: the result would not open.

    Args:
        recipe: for ``config_from``.
        inputs: the open files.

    Raises:
        CheckpointError: the configuration that would be written cannot be used.
    """
    reference = inputs.reference.checkpoint
    config = merged_config(recipe, inputs, inputs.reference, None)
    if config == reference.config and inputs.reference.view.model is not None:
        return
    asked, people = recipe.config_from, (inputs.parents, inputs.base)
    writer = choose_model(asked, "config_from", *people).checkpoint if asked else reference
    check_opens(config, writer.model_path, len(reference.tensors))


def check_opens(config: Mapping[str, Any], folder: Path, tensors: int) -> None:
    """Refuse a configuration whose class is transformers' own and that it cannot build a model from.

    Args:
        config: the values.
        folder: that they come from.
        tensors: how many the model has, which bounds what a configuration may ask for.

    Raises:
        CheckpointError: what is written with this configuration would not open.
    """
    try:
        build_empty(config, folder, tensors)
    except BadConfiguration as error:
        mend = "correct the configuration, or take another model's with --config-from"
        where = folder / "config.json"
        raise CheckpointError(f"{error.what} (the result would not open)", where=where, mend=mend) from None
    except CheckpointError:  # an architecture that transformers does not know
        pass


def _is_the_base_s_tie(path: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all contributors agree on their ties, and only the base differs: its head is its embedding, as it opens.

    Args:
        path: of a key that differs.
        flat: the contributors' configurations.
    """
    return path.endswith(_TIES) and all(values.get(path) == flat[0].get(path) for values in flat)


def _chosen(name: str | None, option: str, parents: Sequence[Parent], base: Parent | None) -> Parent | None:
    return None if name is None else choose_model(name, option, parents, base)


def _names(people: Sequence[Parent], base: Parent | None) -> list[str]:
    return list(dict.fromkeys(BASE if one is base else one.title for one in people))


def _listings(paths: Sequence[str], people: Sequence[Parent], flat: Sequence[Mapping[str, Any]]) -> str:
    """What the models have under each of these keys; of many keys, the first and how many more."""
    shown = "; ".join(_listing(path, people, flat) for path in paths[:_MOST_LISTED])
    more = len(paths) - _MOST_LISTED
    return f"{shown}; and {more} more" if more > 0 else shown


def _listing(path: str, people: Sequence[Parent], flat: Sequence[Mapping[str, Any]]) -> str:
    said = (f"{one.title} {_shown(values.get(path, _ABSENT))}" for one, values in zip(people, flat, strict=True))
    return f"{shortened(path, _LONGEST_PATH)}: {', '.join(said)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _audible(value: Any) -> Any:
    """A configuration without the keys that say nothing of the function."""
    if not isinstance(value, dict):
        return value
    return {key: _audible(inner) for key, inner in value.items() if not _SILENT.fullmatch(key)}


def _resolve(checkpoint: Checkpoint) -> _Resolved:
    """With the class's defaults; as it is written where transformers does not know the class."""
    try:
        config = load_config(checkpoint)
    except Exception:  # a class of remote code, or whatever a stranger's configuration provokes
        return _Resolved(_flat(_audible(checkpoint.config)), frozenset())
    return _of_config(config)


def _of_config(config: Any, prefix: str = "") -> _Resolved:
    import transformers

    values: dict[str, Any] = {}
    unknown: set[str] = set()
    known, generation = _known(type(config)), set(transformers.GenerationConfig().to_dict())
    for key, value in config.to_dict().items():
        if _SILENT.fullmatch(key) or (key in generation and key not in known):
            continue
        inner = getattr(config, key, None)
        if isinstance(inner, transformers.PretrainedConfig):
            found = _of_config(inner, f"{prefix}{key}.")
            values |= found.values
            unknown |= found.unknown
            continue
        if isinstance(value, dict) and key == "rope_parameters":  # "type" is how "rope_type" was spelled before
            value = {name: part for name, part in value.items() if name != "type" or "rope_type" not in value}
        flat = _flat({key: value}, prefix)
        values |= flat
        if key not in known:
            unknown |= flat.keys()
    return _Resolved(values, frozenset(unknown))


def _known(kind: Any) -> set[str]:
    """The keys that a class of configurations gives a meaning to."""
    names = {*getattr(kind, "__dataclass_fields__", ()), *kind.attribute_map}
    try:
        return names | set(kind().to_dict())
    except Exception:  # some cannot be made without their parts
        return names


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = None if inner in ({}, []) else inner
    return found


def _unused(path: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    """Plain rotary positions do not depend on how many there may be."""
    if path.rpartition(".")[2] != "max_position_embeddings":
        return False
    place = path.removesuffix("max_position_embeddings")
    rotary = re.compile(rf"{re.escape(place)}(.*\.)?rope_type")
    return {value for values in flat for key, value in values.items() if rotary.fullmatch(key)} == {"default"}


def _same_shapes(people: Sequence[Parent]) -> bool:
    """Whether the models have the same layers, and tensors of one name one shape but for their first dimension."""
    shapes = [{name: info.shape[1:] for name in one.sources if (info := one.info(name))} for one in people]
    used = [{stored for source in one.sources.values() for stored in source.tensors()} for one in people]
    left = [name for one, own in zip(people, used, strict=True) for name in one.checkpoint.tensors.keys() - own]
    left += [name for one in shapes for name in shapes[0].keys() - one.keys()]
    return not any(re.search(r"\.\d+\.", name) for name in left) and all(
        one[name] == shapes[0][name] for one in shapes for name in one.keys() & shapes[0].keys()
    )


def _overlaid(config: Mapping[str, Any], other: Mapping[str, Any], taken: re.Pattern[str]) -> dict[str, Any]:
    """A configuration with those keys that are ``taken`` as ``other`` has them, in sub-configurations likewise."""
    found = {key: value for key, value in config.items() if not taken.fullmatch(key)}
    found |= {key: value for key, value in other.items() if taken.fullmatch(key)}
    for key, value in found.items():
        theirs = other.get(key)
        if isinstance(value, dict) and isinstance(theirs, dict) and not taken.fullmatch(key):
            found[key] = _overlaid(value, theirs, taken)
    return found


def _read(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    try:
        own = checkpoint.tokenizer_path / file
        found = read_json(own if own.is_file() else checkpoint.path / file, missing={})
    except UserError:  # a damaged file is its tokenizer's affair: nothing is compared
        return {}
    return dict(found)


def own_chat_template(checkpoint: Checkpoint) -> Any:
    """A model's chat template, as its files have it: a text, several by name, or None."""
    place = checkpoint.tokenizer_path / "chat_template.jinja"
    if place.is_file():
        return place.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    found = _read(checkpoint, "tokenizer_config.json").get("chat_template")
    return found.rstrip("\n") if isinstance(found, str) else found


def _special_tokens(checkpoint: Checkpoint) -> Any:
    settings = {**_read(checkpoint, "special_tokens_map.json"), **_read(checkpoint, "tokenizer_config.json")}
    named = {key: value for key, value in settings.items() if key.endswith("_token") and value is not None}
    return {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in named.items()
    }


def _generation(checkpoint: Checkpoint) -> Any:
    said = _read(checkpoint, "generation_config.json")
    return {key: value for key, value in said.items() if key not in ("transformers_version", "_from_model_config")}
