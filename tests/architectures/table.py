"""docs/architectures.md from what the tests found, one row a class. ``make architectures`` runs it:

PYTHONPATH=tests python -m architectures.table FOLDER_OF_ROWS docs/architectures.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from architectures.examine import Row
from architectures.tiny import TINY

_HEAD = """# Architectures

Every model class below is built tiny with transformers {version}, a base and two fine-tunes of it, and taken through
merging and collecting by `make architectures`; this page is written by it. Expected values come from an oracle that
opens the models with `from_pretrained`, merges in memory in float64, and compares with what opens from the result.

- **Average**, **task arithmetic**, **TIES**, **ACTMat**: whether the merge is that of the oracle.
- **ACTMat reaches**, **RegMean reaches**: the share of the numbers of linear maps (experts, routers and convolutions
  are some) that the method itself merged; the rest is averaged. Models of pictures among text are run on text alone.
- **Statistics**: whether Gram matrices and token counts of padded batches are those of the examples run one by one.

{summary}

| class | average | task arithmetic | TIES | ACTMat | ACTMat reaches | RegMean reaches | statistics |
|---|---|---|---|---|---|---|---|
"""


def table(rows: Sequence[Row]) -> str:
    """The page."""
    return _HEAD.format(version=version("transformers"), summary=_summary(rows)) + "".join(map(_line, rows))


def _line(row: Row) -> str:
    merges = [_mark(row.faults.get(method)) for method in ("simple", "task_arithmetic", "ties", "actmat")]
    statistics = f"refused: {row.refused}" if row.refused else _mark(row.faults.get("collect"))
    cells = [row.name, *merges, _percent(row.actmat), _percent(row.regmean), statistics]
    return f"| {' | '.join(cells)} |\n"


def _summary(rows: Sequence[Row]) -> str:
    merges = ("simple", "task_arithmetic", "ties", "actmat")
    right = sum(not any(row.faults.get(method) for method in merges) for row in rows)
    actmat, regmean = (_reached(getattr(row, method) for row in rows) for method in ("actmat", "regmean"))
    collected = sum(row.refused is None and not row.faults.get("collect") for row in rows)
    return (
        f"{len(rows)} classes: {right} are merged right by all four methods. ACTMat reaches 98 % of the linear maps of "
        f"{actmat},\nRegMean of {regmean}. Statistics are right for {collected} and refused for "
        f"{sum(row.refused is not None for row in rows)}."
    )


def _reached(shares: Iterable[float | None]) -> int:
    return sum(share is not None and share >= 0.98 for share in shares)


def _mark(fault: str | None) -> str:
    return "right" if not fault else f"**{fault}**"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


if __name__ == "__main__":
    found = {path.stem: Row(**json.loads(path.read_text())) for path in Path(sys.argv[1]).glob("*.json")}
    Path(sys.argv[2]).write_text(table([found[name] for name in TINY if name in found]))
