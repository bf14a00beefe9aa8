"""House rules as tests: how far a reader has to go to follow a merge by RegMean from the command to the product."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

#: Before a tensor is read: what the command is given, folders and what they may hold, quantisation, modules, the model
#: view, rules, configurations, tokenizers, labels, and statistics, which are judged.
MODULES, FRAMES = 65, 12

FOLLOW = """
import json, sys, threading

entered, stacks = set(), {}


def watch(frame, event, argument):
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    function = code.co_flags & 1 and not code.co_name.startswith("<") and not code.co_filename.startswith("<")
    if event == "call" and function and module.startswith("merganser"):
        entered.add(module)


def ours():
    frame, found = sys._getframe(2), []
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("merganser"):
            found.insert(0, frame.f_code.co_name)
        frame = frame.f_back
    return found


import torch  # before anything is watched: thousands of calls
from merganser import blas, cli
from merganser.merging import execution

product, run = blas._call, execution.execute


def multiply(routine, *arguments):
    if routine == "gemm":
        stacks.setdefault("thread", ours())
    return product(routine, *arguments)


def execute(*arguments, **options):
    stacks["main"] = ours()
    return run(*arguments, **options)


blas._call = multiply
sys.modules["merganser.merging.merge"].execute = execute
threading.setprofile(watch)
sys.setprofile(watch)
try:
    cli.main(["merge", *sys.argv[1:3], "--method", "regmean", "-o", sys.argv[3]])
except SystemExit as end:
    sys.setprofile(None)
    print(json.dumps({"status": end.code, "modules": sorted(entered), "stacks": stacks}))
"""


def test_a_merge_by_regmean_is_short(family: Callable[..., tuple[Path, list[Path]]], tmp_path: Path) -> None:
    """Modules whose functions are entered, and frames from the command to the product; on both threads together."""
    _, models = family("bert", 2)
    arguments = [sys.executable, "-c", FOLLOW, *map(str, models), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == 0 and "merganser.methods.regression.regmean" in found["modules"]
    assert len(found["modules"]) <= MODULES, found["modules"]
    frames = [*found["stacks"]["main"], "execute", *found["stacks"]["thread"]]
    assert found["stacks"]["thread"][-1] == "add_product_" and len(frames) <= FRAMES, frames
