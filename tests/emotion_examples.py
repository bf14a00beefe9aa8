"""Questions about emotions, and what a task makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merganser.tasks.base import Task
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace

Save = Callable[..., Path]
NONE = LabelSpace(())
TEXTS = ["the movie was good", "bad food !", "I liked it very much . it was not bad", "no"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(*pairs: tuple[str, str, str]) -> Rows:
    rows = tuple({"text": text, "label": label, "target": target} for text, label, target in pairs)
    return Rows("made", rows, tuple(("made.jsonl", n) for n in range(1, len(rows) + 1)))


def encoded(task: Task, rows: Rows, tokenizer: Any, max_length: int = 128, **more: Any) -> Any:
    return task.encode(rows, tokenizer, {}, task.columns(rows, Columns()), max_length, **more)


EXAMPLES = questions(
    (TEXTS[0], "joy", "yes"), (TEXTS[1], "anger", "no"), (TEXTS[2], "joy", "no"), (TEXTS[3], "fear", "yes")
)
