"""What a model said of a data set, as a file: an ensemble of any models then costs no forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from merganser.tasks.predict import Prediction


def save_prediction(prediction: Prediction, path: Path) -> None:
    """Write a prediction as an ``.npz`` without pickles: an array, a list of arrays, or a list of texts."""
    aligned = prediction.aligned
    facts = {"truncated": prediction.truncated, "max_length": prediction.max_length}
    arrays: dict[str, np.ndarray] = {}
    if isinstance(aligned, np.ndarray):
        facts["kind"] = "array"  # type: ignore[assignment]
        arrays["values"] = aligned
    elif aligned and isinstance(aligned[0], np.ndarray):
        facts["kind"] = "arrays"  # type: ignore[assignment]
        arrays["values"] = np.concatenate(aligned)
        arrays["lengths"] = np.array([len(one) for one in aligned], np.int64)
    else:
        facts["kind"] = "texts"  # type: ignore[assignment]
        facts["texts"] = list(aligned)  # type: ignore[assignment]
    arrays["facts"] = np.frombuffer(json.dumps(facts, ensure_ascii=False).encode(), np.uint8)
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load_prediction(path: Path) -> Prediction:
    """The prediction of :func:`save_prediction`."""
    with np.load(path, allow_pickle=False) as stored:
        facts: dict[str, Any] = json.loads(stored["facts"].tobytes().decode())
        if facts["kind"] == "array":
            aligned: Any = stored["values"]
        elif facts["kind"] == "arrays":
            ends = np.cumsum(stored["lengths"])[:-1]
            aligned = np.split(stored["values"], ends)
        else:
            aligned = facts["texts"]
    return Prediction(aligned, int(facts["truncated"]), int(facts["max_length"]))
