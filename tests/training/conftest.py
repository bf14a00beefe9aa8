"""Small data for training tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from merganser.tasks.data import Rows
from merganser.training.settings import TrainingSettings

TEXTS = ("the movie was good", "the movie was bad", "I liked it", "it is not good", "very good food", "bad food")


def _rows(rows: Sequence[dict[str, Any]], source: str = "toy") -> Rows:
    return Rows(source, tuple(rows), tuple((source, number) for number in range(1, len(rows) + 1)))


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., Rows]:
    """``make_rows([{"text": …}, …], source)``: rows that know their places."""
    return _rows


@pytest.fixture(scope="session")
def quick() -> TrainingSettings:
    """Few steps at a high learning rate: enough for a tiny model to learn six examples by heart."""
    return TrainingSettings(learning_rate=1e-2, epochs=15, batch_size=4)


@pytest.fixture(scope="session")
def sentiment() -> Rows:
    """Six texts of two classes."""
    labels = ("good", "bad", "good", "bad", "good", "bad")
    return _rows([{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)])
