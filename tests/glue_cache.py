"""What ``datasets`` leaves in its cache when it has loaded a task of GLUE, made without the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def save_glue_cache(cache: Path, task: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Load rows as the data set ``glue`` into this ``HF_DATASETS_CACHE``."""
    import datasets

    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "glue"
        (source / task).mkdir(parents=True)
        (source / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {task}\n  data_dir: {task}\n---\n", encoding="utf-8"
        )
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (source / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        datasets.load_dataset(str(source), task, cache_dir=str(cache))
