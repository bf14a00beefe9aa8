"""The name of a cell: a hash of all that its row depends on, so that a row is found by content."""

from __future__ import annotations

import hashlib
import json

from merganser.lab.grid.cells import Cell
from merganser.lab.grid.compute import FORMAT, scored_on, statistics_of
from merganser.lab.grid.models import Models
from merganser.lab.zoo import id_of


def cell_id(models: Models, cell: Cell) -> str:
    """16 hexadecimal digits of the hash of a cell's models, method, statistics, tests and way of scoring."""
    config = models.config
    method = config.method(cell.method) if cell.kind == "merge" else None
    kind = statistics_of(config, cell)
    made = (
        [id_of(models.multitask_key(cell))]
        if cell.kind == "multitask"
        else [models.address(spec) for spec in cell.contributors]
    )
    content = {
        "format": FORMAT,
        "experiment": config.name,
        "layout": config.layout,
        "cell": cell.to_json(),
        "models": made,
        "method": method.model_dump(mode="json") if method else None,
        "statistics": [models.statistics_key(spec, kind) for spec in cell.contributors] if kind else None,
        "scoring": config.suite.options,
        "max_length": models.settings().max_length,
        **({"bootstrap": config.bootstrap} if config.bootstrap else {}),
        "tests": [
            (name, split, domain, models.data.digest(name, split)) for name, split, domain in scored_on(config, cell)
        ],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
