"""Jobs of distributed merges, for workers that find this file on their path."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def watched(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Write a weight file; on the doomed machine, leave a mark half-way and wait for the end."""
    import ray

    from merganser.merging.distributed import write_file

    marks, doomed = (Path(line) for line in (Path(payload["place"]).parents[1] / "watch").read_text().splitlines())
    node = ray.get_runtime_context().get_node_id()
    (marks / f"{payload['file']}.{node}.started").touch()
    if node == str(doomed):
        (Path(payload["place"]) / ".worker-half").mkdir(exist_ok=True)
        (Path(payload["place"]) / ".worker-half" / payload["file"]).write_bytes(b"half of it")
        (marks / f"blocked.{payload['file']}").touch()
        time.sleep(600)
    return write_file(payload)
