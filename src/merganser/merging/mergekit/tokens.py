"""mergekit's ``tokenizer_source`` and ``tokenizer`` as keys of our recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.mergekit.schema import Configuration, TokenOfModel, TokenSource, Zero


def tokenizer_keys(configuration: Configuration, known: Mapping[str, str], where: str) -> dict[str, Any]:
    """The keys ``vocabulary``, ``missing_rows``, ``fill_missing_rows``, ``tokenizer_from``, ``tokens`` and the like.

    Args:
        configuration: what was read.
        known: what each model is called in the recipe; ``base`` for a base model that is no contributor.
        where: the configuration stands, for errors.

    Raises:
        RecipeError: a model that takes no part in the merge.
    """
    base = configuration.base_model
    donor = known.get(base) if base is not None else None
    found: dict[str, Any] = {} if donor is None else {"tokenizer_from": donor}
    tokenizer = configuration.tokenizer
    source = tokenizer.source if tokenizer is not None else configuration.tokenizer_source
    if source is None:
        return found
    problems = ErrorCollector()

    def name(model: str, key: str) -> str | None:
        if model not in known:
            what = f"{key}: {model} is none of the models that are merged"
            problems.add(RecipeError(what, where=where, mend=f"name one of {', '.join(known)}"))
        return known.get(model)

    found |= {"vocabulary": "union" if source == "union" else "tokenizer", "fill_missing_rows": True}
    if donor is not None:
        found["missing_rows"] = donor
    if source not in ("union", "base"):
        found["tokenizer_from"] = name(source, "tokenizer")
    elif donor is None:
        found["tokenizer_from"] = next(iter(known.values()))
    tokens = {} if tokenizer is None else tokenizer.tokens
    if tokens:
        found["tokens"] = {token: _row(one, token, name) for token, one in tokens.items()}
    multiple = None if tokenizer is None else tokenizer.pad_to_multiple_of
    found["pad_to_multiple_of"] = 1 if multiple is None else multiple  # mergekit drops rows that no token has
    problems.raise_all()
    return found


def _row(one: TokenSource, token: str, name: Any) -> dict[str, Any]:
    """Where a token's row comes from, as our key says it."""
    source, key = one.source, f"tokenizer.tokens.{token}"
    found: dict[str, Any] = {"force": True} if one.force else {}
    if isinstance(source, Zero):
        return {"zero": True, **found}
    if isinstance(source, TokenOfModel):
        place = {"token": source.token} if source.token is not None else {"id": source.token_id}
        return {"take": name(source.model, key), **place, **found}
    return found if source is None else {"take": name(source, key), **found}
