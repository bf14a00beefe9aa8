"""What the collection's tests run on a cluster: the real jobs, held until their machine is killed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.collection.jobs import work


def held(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A shard; on the doomed machine only the first ends, elsewhere they wait until others are held there.

    The output's folder holds ``doomed``, with that machine's name.
    """
    import ray

    signs = next(place for place in Path(payload["folder"]).parents if (place / "doomed").is_file())
    node = ray.get_runtime_context().get_node_id()
    if node == (signs / "doomed").read_text():
        try:
            (signs / "first").touch(exist_ok=False)
        except FileExistsError:
            (signs / f"held.{payload['number']}").touch()
            time.sleep(300)
    else:
        end = time.monotonic() + 120
        while not any(signs.glob("held.*")) and time.monotonic() < end:
            time.sleep(0.05)
    return work(payload)
