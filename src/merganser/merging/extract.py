"""The verb extract: a LoRA adapter of what a fine-tuned model has changed in its base.

It is the merge of one model, written as an adapter (see :mod:`merganser.merging.targets.adapter`), and has the same
provenance, which ``merganser verify`` checks and ``merganser reproduce`` repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from merganser.checkpoints.opening import model_reference
from merganser.errors import RecipeError
from merganser.merging.memory import RunSettings
from merganser.merging.merge import MergeResult, PreparedMerge, carry_out, prepare
from merganser.merging.plan import AdapterForm
from merganser.merging.recipe import make_recipe
from merganser.methods.averages.simple import SIMPLE

ENERGY, MOST = 0.95, 128  # where neither a rank nor an energy is given


def extract(
    model: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    embeddings: Literal["factors", "whole", "left out"] = "factors",
    others: Literal["whole", "left out"] = "whole",
    whole: Sequence[str] = (),
    left_out: Sequence[str] = (),
    only: Sequence[str] = (),
    statistics: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    max_memory: str | int | None = None,
    allow_pickle: bool = False,
) -> MergeResult:
    """Write the LoRA adapter that is nearest to the difference of a model from its base.

    Each weight's change is the best of its rank: in the norm of the inputs' Gram matrix where the model publishes
    statistics, else in the Frobenius norm.

    Args:
        model: the fine-tuned checkpoint.
        output: the folder to write.
        base: the pre-trained model.
        rank: of every module's factors; what is smaller than that is kept whole.
        energy: instead, the share of ‖ΔW‖² that each module's factors keep at least: their ranks differ.
        max_rank: the largest rank that ``energy`` may ask for. With neither rank nor energy they are 0.95 and 128.
        embeddings: ``factors``, ``whole`` (in ``modules_to_save``), or ``left out``.
        others: norms, biases and whatever else is no matrix: ``whole`` or ``left out``.
        whole: name patterns of tensors that are kept whole.
        left_out: name patterns of tensors that stay as they are in the base.
        only: name patterns of tensors beside which nothing is changed; all by default.
        statistics: the model's statistics file; by default the one in its folder.
        dtype: of the adapter, such as ``BF16``; float32 by default.
        overwrite: replace what an earlier merge has written.
        threads: how many tensors are worked on at once; the bytes do not depend on it.
        max_memory: what the process may take, in bytes or as ``"2GB"``.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only``).

    Returns:
        What was written; its notes say what was lost.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    form = make_form(
        rank, energy, max_rank, embeddings=embeddings, others=others, whole=whole, left_out=left_out, only=only
    )
    settings = RunSettings.make(threads, max_memory, allow_pickle=allow_pickle)
    prepared = prepare_extraction(model, output, base, form, settings, statistics, dtype, overwrite=overwrite)
    return carry_out(prepared, output, overwrite=overwrite)


def make_form(rank: int | None, energy: float | None, max_rank: int | None, **kept: Any) -> AdapterForm:
    """The form that these ranks mean; ``kept`` are the other values of :class:`AdapterForm`.

    Raises:
        RecipeError: a rank beside an energy.
    """
    if rank is not None and (energy is not None or max_rank is not None):
        what = "a rank is the same for all modules, and an energy finds one for each"
        raise RecipeError(what, where="rank", mend="give --rank, or --energy and --max-rank")
    if rank is None and energy is None:
        energy, max_rank = ENERGY, MOST if max_rank is None else max_rank
    patterns: dict[str, Any] = {key: value if isinstance(value, str) else tuple(value) for key, value in kept.items()}
    return AdapterForm(max_rank if rank is None else rank, energy, **patterns)


def prepare_extraction(
    model: str | Path,
    output: str | Path | None,
    base: str | Path,
    form: AdapterForm,
    settings: RunSettings,
    statistics: str | Path | None = None,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
) -> PreparedMerge:
    """The plan of an extraction, everything checked; the arguments are those of :func:`extract`."""
    contributor = {"model": model_reference(model), "statistics": None if statistics is None else str(statistics)}
    values: dict[str, Any] = {"contributors": [contributor], "method": SIMPLE.name, "base": model_reference(base)}
    recipe = make_recipe(values if dtype is None else {**values, "dtype": dtype}, "extract()")
    return prepare(recipe, output, settings, overwrite=overwrite, adapter=form)
