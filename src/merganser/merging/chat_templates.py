"""The chat template of the result: one model's, the most frequent one, or a text of the recipe."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from merganser.checkpoints.reader import read_json
from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.configuration import choose_model, own_chat_template
from merganser.merging.inputs import Parent

_KEY, _FILE = "chat_template", "chat_template.jinja"
_TEMPLATE = re.compile(r"\{[%{#]|\n")  # what no name of a model has in it


def choose_chat_template(
    asked: str, parents: Sequence[Parent], base: Parent | None, problems: ErrorCollector
) -> str | None:
    """The template that is written; None where there is none of that name.

    Args:
        asked: the recipe's ``chat_template``.
        parents: the open contributors.
        base: the base model, where there is one.
        problems: receives a model that has none, and a name that is none.
    """
    if _TEMPLATE.search(asked):
        return asked
    if asked == "auto":
        found = Counter(text for parent in parents if (text := _text_of(parent)) is not None)
        if not found:
            mend = "name a model that has one, or give the template itself"
            problems.add(RecipeError("no contributor has a chat template", where=_KEY, mend=mend))
            return None
        return found.most_common(1)[0][0]
    model = problems.catch(choose_model, asked, _KEY, parents, base)
    text = None if model is None else _text_of(model)
    if model is not None and text is None:
        mend = "name a model that has one, or auto for the contributors' most frequent one"
        problems.add(RecipeError(f"{model.title} has no chat template", where=_KEY, mend=mend))
    return text


def write_chat_template(folder: Path, template: str) -> None:
    """Put a template into a model's folder, in place of whatever it says of chat templates.

    Newer versions of transformers read it from a file of its own, older ones from the tokenizer's configuration.
    """
    (folder / _FILE).write_text(template, encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json"):
        values = read_json(folder / file, missing={})
        if _KEY in values:
            text = json.dumps({**values, _KEY: template}, indent=2, ensure_ascii=False)
            (folder / file).write_text(text + "\n", encoding="utf-8")


def _text_of(parent: Parent) -> str | None:
    """A model's template; of several named ones, the default."""
    found = own_chat_template(parent.checkpoint)
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    elif isinstance(found, Mapping):
        found = found.get("default")
    return found if isinstance(found, str) else None
