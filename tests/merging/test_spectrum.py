"""What options make of the merged change reaches the files: compared with the models that ``from_pretrained`` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from merganser.merging import merge
from merganser.methods import METHODS

OPTION = {
    name: [method for method, known in METHODS.items() if name in known.options_type.model_fields]
    for name in ("spectrum", "scale")
}
#: Of adapters alone, and of one model alone.
LEFT_OUT = {"knots", "core_space", "passthrough"}


def weights(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """The matrices of the encoder's layers, as transformers opens them."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    found = {name: tensor.double().numpy() for name, tensor in model.state_dict().items() if ".layer." in name}
    return {name: tensor for name, tensor in found.items() if tensor.ndim == 2}


def changes(family, tmp_path: Path, method: str, **options: Any):  # type: ignore[no-untyped-def]
    """Of each matrix what the method changes by default and with these options, and what each model changes."""
    base, models = family("bert", 2, kfac="sampled")
    origin, found = weights(base), [weights(model) for model in models]
    for name, given in (("plain", {"scale": 1.0} if "scale" in options else {}), ("other", options)):
        merge(models, tmp_path / name, method=method, base=base, options=given)
        found.append(weights(tmp_path / name))
    for name, matrix in origin.items():
        *tasks, plain, other = (one[name] - matrix for one in found)
        yield plain, other, tasks


@pytest.mark.parametrize("method", sorted(set(OPTION["spectrum"]) - LEFT_OUT))
def test_the_spectrum_is_flatter_in_the_files(family, tmp_path: Path, method: str) -> None:
    found = list(changes(family, tmp_path, method, spectrum=2.0))
    assert len(found) >= 12
    for plain, flat, tasks in found:
        k = sum(np.linalg.norm(task) for task in tasks) / np.linalg.norm(sum(tasks))
        values = np.linalg.svd(plain, compute_uv=False)
        kept = values > 1e-4 * values[0]
        expected = np.where(kept, values, 0) ** min(k, 2**0.5) ** -2.0
        expected *= np.linalg.norm(values) / np.linalg.norm(expected)
        np.testing.assert_allclose(np.linalg.svd(flat, compute_uv=False)[kept], expected[kept], atol=2e-3 * expected[0])
        assert np.vdot(plain, flat) > 0.5 * np.linalg.norm(plain) * np.linalg.norm(flat)


@pytest.mark.parametrize("method", sorted(set(OPTION["scale"]) - LEFT_OUT))
def test_what_layers_change_is_longer_in_the_files(family, tmp_path: Path, method: str) -> None:
    for plain, longer, _ in changes(family, tmp_path, method, scale=1.5):
        np.testing.assert_allclose(longer, 1.5 * plain, atol=1e-5 * np.abs(plain).max() + 1e-6)
