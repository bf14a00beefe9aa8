"""A tiny emotion suite and a tiny base model: a whole grid in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merganser.lab.grid.config import ExperimentConfig

SETS = {"one": ("joy", "anger"), "two": ("joy", "fear"), "three": ("anger", "fear", "sadness"), "far": ("joy", "fear")}
MOODS = {"joy": "good liked yes", "anger": "bad no not", "fear": "movie was", "sadness": "food is"}


def write_suite(root: Path) -> Path:
    """Small corpora whose texts give their labels away."""
    for number, (name, labels) in enumerate(SETS.items()):
        draw = random.Random(number)
        (root / name).mkdir(parents=True)
        for split, count in (("train", 24), ("dev", 12), ("test", 12)):
            lines = []
            for _ in range(count):
                chosen = draw.choice(labels)
                words = [*MOODS[chosen].split(), *draw.choices("the a I it saw in".split(), k=3)]  # noqa: SIM905
                draw.shuffle(words)
                emotions = {label: int(label == chosen) for label in labels}
                record = {"source": name, "text": " ".join(words), "split": split, "emotions": emotions, "VAD": {}}
                lines.append(json.dumps(record))
            (root / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def trial(tmp_path: Path, save_ready: Callable[..., Path]) -> Callable[..., ExperimentConfig]:
    """``trial(**changes)``: the configuration of a tiny emotion experiment."""
    root = write_suite(tmp_path / "emotion_splits")
    base = save_ready("base", "bert")

    def make(**changes: Any) -> ExperimentConfig:
        values: dict[str, Any] = {
            "name": "trial",
            "suite": {"name": "emotion", "root": str(root)},
            "pretrained": {"model": str(base), "title": "tiny"},
            "training": {"epochs": 2, "learning_rate": 5e-3, "max_length": 16},
            "statistics": {"examples": 16, "fisher_examples": 8},
            "contributors": ["one", "two", "three"],
            "layout": "pairs",
            "methods": ["simple", "regmean"],
            "seeds": [1, 2],
            "tests": {"out_of_domain": ["far"], "out_split": "all"},
        }
        return ExperimentConfig.model_validate({**values, **changes})

    return make
