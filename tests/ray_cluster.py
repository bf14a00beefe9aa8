"""Starting and watching a Ray cluster on this machine."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


def processes(folder: str) -> list[psutil.Process]:
    """What runs with this folder on its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(folder in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone in the meantime
            continue
    return found


def wait_until(happened: Any, complaint: str, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, complaint
        time.sleep(0.05)
