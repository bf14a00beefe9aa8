"""``adapter_config.json`` of a PEFT folder, read as data from a stranger: plain LoRA, or a clear refusal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from merganser.checkpoints.adapters import CONFIG
from merganser.checkpoints.reader import Checkpoint, read_json
from merganser.errors import CheckpointError, ErrorCollector

#: Settings of LoRA's relatives whose effect is not W + s·BA, and what they are.
_OTHER_KINDS = {
    "use_dora": "DoRA, which also scales every column",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "an activated LoRA, which is off until certain tokens have been seen",
    "arrow_config": "a router between several adapters",
    "kasa_config": "KaSA, which changes the base's weights too",
    "monteclora_config": "MonteCLoRA, which samples its factors",
    "layer_replication": "LoRA on layers that are repeated",
}
MERGE_FIRST = "merge it into its base with peft (model.merge_and_unload().save_pretrained(...)) and give that"
_PLAIN = re.compile(r"[\w.-]+")  # patterns that are names
_LONGEST_PATTERN = 500  # characters
_MOST_PATTERNS = 1000  # that are no names: each takes a fraction of a millisecond to be made ready
_MOST_TRIALS = 20_000_000  # of patterns that are names on names, and of other patterns on letters of names
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # any other changes the base's weights


@dataclass(frozen=True)
class AdapterSettings:
    """What matters of ``adapter_config.json``.

    Attributes:
        rank, alpha: of modules that no pattern names.
        ranks, alphas: by pattern of module name.
        stabilised: scale is α/√r.
        transposed: the adapted layers are stored (in, out).
        saved: modules that are replaced as a whole.
        parameters: ends of the names of bare parameters that are adapted, such as packed experts.
        tokens: the tokens that are trained by themselves, by the end of an embedding's name; of the name "", any.
        tied: what the model ties stays tied (``ensure_weight_tying``).
        task: PEFT's word for the task, such as ``SEQ_CLS``.
        model_class: of the model that the adapter was trained in, where it says so.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    stabilised: bool
    transposed: bool
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    tied: bool
    task: str | None
    model_class: str | None

    def rank_of(self, module: str) -> int:
        """The rank that a module should have."""
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of BA."""
        alpha = float(_by_pattern(self.alphas, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def saves(self, module: str) -> bool:
        """Whether a module, or one that holds it, is among those replaced as a whole."""
        parents = [module[: i.start()] for i in re.finditer(r"\.", module)]
        return any(name.endswith(one) for name in [*parents, module] for one in self.saved)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The tokens of an embedding that are trained; one that is tied to another has that one's."""
        named = [rows for name, rows in self.tokens.items() if not name or f".{module}".endswith(f".{name}")]
        return next(iter([*named, *self.tokens.values()]), ())


def read_settings(adapter: Checkpoint) -> AdapterSettings:
    """``adapter_config.json``, checked.

    Raises:
        UserError: not there, not LoRA, or malformed; several at once.
    """
    where = adapter.path / CONFIG
    raw = read_json(where)
    if raw is None:
        raise CheckpointError(
            f"this is a PEFT adapter without its {CONFIG}",
            where=adapter.path,
            mend="restore the file: it holds the scale of the factors",
        )
    errors = ErrorCollector()

    def check(sound: bool, what: str, mend: str = "restore the file") -> None:
        if not sound:
            errors.add(CheckpointError(what, where=where, mend=mend))

    kind = raw.get("peft_type")
    check(kind == "LORA", f"peft_type is {kind!r}: only LoRA adapters can be merged", MERGE_FIRST)
    if kind == "LORA":
        for key, meaning in _OTHER_KINDS.items():
            check(not raw.get(key), f"{key} is set: this is {meaning}, not plain LoRA", MERGE_FIRST)
        start = raw.get("init_lora_weights", True)
        check(
            start in _PLAIN_STARTS,
            f"init_lora_weights is {start!r}, which changes the base's weights too",
            "convert it to plain LoRA (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))",
        )
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
        check(_is_rank(raw.get("r")), f"the rank r is {raw.get('r')!r}", "a rank is a whole number, at least 1")
        check(_is_number(raw.get("lora_alpha", 8)), f"lora_alpha is {raw.get('lora_alpha')!r}")
        for key, table, fits in (("rank_pattern", ranks, _is_rank), ("alpha_pattern", alphas, _is_number)):
            sound = isinstance(table, dict) and all(fits(value) for value in table.values())
            check(sound, f"{key} is malformed or holds a rank below 1: {table!r}")
            few = sound and _are_few(table, adapter)
            check(few or not sound, f"{key} has {len(table) if sound else 0} patterns, too many to try on every tensor")
            for pattern in table if few else ():
                check(_is_pattern(pattern), f"{key}: {pattern!r} is no pattern that can be used")
        saved = raw.get("modules_to_save") or []
        check(_are_names(saved), f"modules_to_save is {saved!r}")
        parameters = raw.get("target_parameters") or []
        check(_are_names(parameters), f"target_parameters is {parameters!r}")
        trained = raw.get("trainable_token_indices") or {}
        trained = trained if isinstance(trained, dict) else {"": trained}
        check(all(_are_rows(rows) for rows in trained.values()), f"trainable_token_indices is {trained!r}")
    errors.raise_all()
    mapping = raw.get("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return AdapterSettings(
        rank=raw["r"],
        alpha=raw.get("lora_alpha", 8),
        ranks=ranks,
        alphas=alphas,
        stabilised=bool(raw.get("use_rslora")),
        transposed=bool(raw.get("fan_in_fan_out")),
        saved=tuple(saved),
        parameters=tuple(parameters),
        tokens={name: tuple(rows) for name, rows in trained.items()},
        tied=bool(raw.get("ensure_weight_tying")),
        task=raw.get("task_type") if isinstance(raw.get("task_type"), str) else None,
        model_class=model_class if isinstance(model_class, str) else None,
    )


def _by_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
    """The entry of the first pattern that is the end of the module's name, as PEFT looks it up."""
    return next((value for pattern, value in table.items() if _fits(pattern, module)), default)


def _fits(pattern: str, module: str) -> bool:
    """Whether a pattern is the end of a module's name, and a whole part of it."""
    if not _PLAIN.fullmatch(pattern):
        return _compiled(pattern).match(module) is not None
    before, end = module[: -len(pattern)], module[-len(pattern) :]
    whole = len(end) == len(pattern) and (not before or before.endswith("."))
    return whole and all(one in (".", other) for one, other in zip(pattern, end, strict=True))  # a dot is any character


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    """A pattern as PEFT reads it, in an engine whose time grows with the length of a name and not more.

    Raises:
        re2.error: it is no pattern, or one that cannot be looked for in such time.
    """
    import re2

    options = re2.Options()
    options.log_errors, options.never_capture = False, True
    return re2.compile(rf"(.*\.)?({pattern})$", options)


def _is_pattern(text: object) -> bool:
    """Whether a text is a pattern that can be looked for."""
    import re2

    if not isinstance(text, str) or len(text) > _LONGEST_PATTERN:
        return False
    try:
        return bool(_PLAIN.fullmatch(text) or _compiled(text))
    except re2.error:
        return False


def _are_few(table: Mapping[str, Any], adapter: Checkpoint) -> bool:
    """Whether all patterns of a table can be tried on every name in reasonable time."""
    plain = sum(bool(_PLAIN.fullmatch(pattern)) for pattern in table)
    others, letters = len(table) - plain, sum(map(len, adapter.tensors))
    return (
        plain * len(adapter.tensors) <= _MOST_TRIALS and others * letters <= _MOST_TRIALS and others <= _MOST_PATTERNS
    )


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _are_rows(value: object) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
