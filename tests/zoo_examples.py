"""What the tests of the zoo make models with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KEY = {"suite": "emotion", "set": "isear", "model": "tiny", "seed": 1, "training": {"epochs": 3, "lr": 0.1}}


def make(folder: Path) -> dict[str, Any]:
    """A model of two files."""
    assert not list(folder.iterdir())
    (folder / "config.json").write_text("{}")
    (folder / "heads").mkdir()
    (folder / "heads" / "a.safetensors").write_bytes(b"weights" * 100)
    return {"score": 0.5}


def never(_: Path) -> Any:
    raise AssertionError("made again")


def key(**more: Any) -> dict[str, Any]:
    return {**KEY, **more}
