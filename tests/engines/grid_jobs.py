"""Functions that the engines' tests run, on this machine or on a cluster's."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.errors import UserError


def double(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Twice a number, or the failure that the payload asks for. Leaves a line in ``<folder>/<id>``."""
    with Path(payload["folder"], payload["id"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    match payload.get("fail"):
        case "user":
            raise UserError("no such model", where="model", mend="name another")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "interrupt":
            raise KeyboardInterrupt
        case "crash":
            os._exit(9)
        case "text":
            return "text"  # type: ignore[return-value]
        case "object":
            return {"set": {1, 2}}
        case "stay":
            time.sleep(60)
    return {"twice": 2 * payload["number"], "pair": (1, 2)}


def short(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A short job that says where it ran; on the doomed machine only the first ends, others last for long.

    Elsewhere they wait for that, so that there is something to lose.

    Writes ``<folder>/<id>.<node>.started`` and, where it waits for its machine's end, ``<folder>/blocked.<id>``.
    """
    import ray

    folder, node = Path(payload["folder"]), ray.get_runtime_context().get_node_id()
    Path(folder, f"{payload['id']}.{node}.started").touch(exist_ok=False)
    if node == payload["doomed"]:
        try:
            Path(folder, "first").touch(exist_ok=False)
        except FileExistsError:
            Path(folder, f"blocked.{payload['id']}").touch()
            time.sleep(120)
    else:
        end = time.monotonic() + 60
        while not any(folder.glob("blocked.*")) and time.monotonic() < end:
            time.sleep(0.05)
    return {"node": node}


def crash_for_good(payload: Mapping[str, Any]) -> dict[str, Any]:
    os._exit(3)
