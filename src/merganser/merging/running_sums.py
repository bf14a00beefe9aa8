"""Sums of earlier merges, kept in a folder: a merge of n + 1 contributors goes on where the merge of n ended.

One safetensors file a unit (and set of rows, where contributors vote on different ones) holds the sums of the last
merge, with the list of what went into them, in order. A merge whose first contributors are exactly these reads the
sums instead of their Gram matrices; any other merge starts anew and replaces them. The result is the same bytes
either way. The folder is a cache: a file that is damaged or not of this kind is ignored and replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from merganser.checkpoints import hash_tensor
from merganser.errors import CheckpointError, FileError, UserError
from merganser.files import new_file, space_error
from merganser.merging.plan import Step
from merganser.methods import GramSums, Method, Unit
from merganser.methods.base import elements, input_width
from merganser.paths import real

FORMAT = 4
_SUFFIX = ".sums.safetensors"


@dataclass(frozen=True)
class RunningSums:
    """The sums that a folder keeps, as one merge sees them; made on the first write.

    Attributes:
        folder: where they lie.
    """

    folder: Path

    def keys(self, method: Method, unit: Unit, shares: Sequence[list[object]]) -> tuple[str, ...]:
        """For each contributor, the hash of everything that its part of the sums depends on.

        Args:
            method: of the merge.
            unit: the tensors.
            shares: what each contributor brings, as plain values, in order.
        """
        layers = [(fact.layer.kind, bool(fact.layer.bias)) for fact in unit.facts if fact.layer]
        common = [FORMAT, torch.__version__, method.name, method.options.model_dump(mode="json"), layers]
        texts = (json.dumps([*common, *share], sort_keys=True) for share in shares)
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)

    def load(self, unit: Unit, rows: Sequence[int] | None, keys: Sequence[str]) -> tuple[GramSums | None, int]:
        """The sums of the first contributors, and how many these are; None and 0 where none are kept.

        Args:
            unit: the tensors.
            rows: the rows of the result that are meant; None for all.
            keys: of the contributors, see :meth:`keys`.
        """
        try:
            with safe_open(self._place(unit, rows), framework="pt") as file:
                metadata = file.metadata() or {}
                kept = json.loads(metadata["contributors"])
                if not kept or kept != list(keys[: len(kept)]):
                    return None, 0
                tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
            if _digest(tensors) != metadata["sha256"]:
                return None, 0
            return GramSums.from_tensors(tensors), len(kept)
        except Exception:  # whatever a damaged or foreign file provokes: it is not needed
            return None, 0

    def save(self, unit: Unit, rows: Sequence[int] | None, keys: Sequence[str], sums: GramSums) -> None:
        """Put the sums in the place of older ones, whole or not at all.

        Raises:
            FileError: they cannot be written.
        """
        place, tensors = self._place(unit, rows), sums.tensors()
        metadata = {"contributors": json.dumps(list(keys)), "sha256": _digest(tensors)}
        try:
            with new_file(place) as work:
                save_file(tensors, work, metadata)
        except FileError as error:
            mend = "make room, choose another folder, or merge without keeping sums"
            what = f"the running sums cannot be written: {error.what}"
            raise FileError(what, where=place, mend=mend) from None

    def _place(self, unit: Unit, rows: Sequence[int] | None) -> Path:
        value = json.dumps([*unit.names, rows if rows is None else list(rows)])
        return self.folder / f"{hashlib.sha256(value.encode()).hexdigest()[:32]}{_SUFFIX}"


def check_sums(folder: Path, steps: Sequence[Step], models: Iterable[Path], output: Path) -> list[UserError]:
    """Why ``folder`` cannot keep the running sums of a merge of ``models`` into ``output``, if it cannot.

    Args:
        folder: of the sums.
        steps: of the plan.
        models: folders of the contributors.
        output: folder of the merge.
    """
    place = real(folder)
    if any(place == real(model) for model in (output, *models)) or real(output) in place.parents:
        what = "the folder of running sums is a model folder"
        return [CheckpointError(what, where=folder, mend="give it a place of its own")]
    if folder.exists() and not folder.is_dir():
        return [CheckpointError("the place of the running sums is no folder", where=folder, mend="give a folder")]
    treated = [(step.unit, step.treatment) for step in steps]
    problem = space_error(
        folder,
        sums_bytes(unit for unit, method in treated if method is not None and method.additive(unit)),
        "running sums take",
        "free some space, give a folder on another disk, or merge without keeping sums",
    )
    return [] if problem is None else [problem]


def sums_bytes(units: Iterable[Unit]) -> int:
    """The size of the sums of a merge, float64 at most: a system and three sums of weights for each additive unit."""
    return sum(8 * (input_width(unit.facts[0]) ** 2 + 3 * elements(unit)) for unit in units)


def _digest(tensors: dict[str, Tensor]) -> str:
    hashes = [[name, hash_tensor(tensors[name], "F64", "sha256")] for name in sorted(tensors)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
