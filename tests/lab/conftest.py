"""Pretrained models and corpora for a whole experiment in seconds, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lab.tiny import write_pretrained, write_resources


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``pretrained("roberta", pickled=False, half=False)``: see :func:`lab.tiny.write_pretrained`."""

    @cache
    def make(architecture: str, *, pickled: bool = False, half: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("pretrained") / architecture
        return write_pretrained(folder, architecture, pickled=pickled, half=half)

    return make


@pytest.fixture(scope="session")
def tiny_resources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``emotion_splits``, ``ner`` and ``glue``: see :mod:`lab.tiny_corpora`."""
    return write_resources(tmp_path_factory.mktemp("resources"))
