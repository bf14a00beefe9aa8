"""``make kill``, or ``PYTHONPATH=tests python -m kill [--kills N] [--seed N] [--only NAME…]``.

Kills merganser's commands at least so often, spread over all of them, and ends with a table; exit status 1 where
anything was lost, half there, left lying about, or did not run again.
"""

from __future__ import annotations

import own_home as own_home  # before all that reads the environment when it is imported

# isort: split
import argparse
import gc
import importlib
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from kill.cases import CASES
from kill.harness import Findings, Harness, table
from kill.store import register


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME", help="cases; all by default")
    chosen = parser.parse_args()
    cases = [case for case in CASES if chosen.only is None or case.name in chosen.only]
    shares = sum(case.share for case in cases)
    register()
    tqdm.monitor_interval = 0  # its thread may hold a lock while this process forks
    torch.set_num_threads(1)  # a fork has no other threads than the one that forked
    warm_up()
    findings: dict[str, Findings] = {}
    started = time.monotonic()
    place = Path(tempfile.mkdtemp())  # a TemporaryDirectory would be removed by each fork that ends
    try:
        harness = Harness(place, chosen.seed)
        for case in cases:
            found = harness.run_case(case, math.ceil(chosen.kills * case.share / shares))
            findings[case.name] = found
            counted = f"{found.kills} kills, {len(found.faults)} faults"
            print(f"{time.monotonic() - started:6.0f} s  {case.name}: {counted}", flush=True)
            for kind, what in found.faults:
                print(f"    {kind}: {what}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"\n{table(findings)}")
    return int(any(found.faults for found in findings.values()))


def warm_up() -> None:
    """Import once what the commands would import in each fork."""
    commands = [f"merganser.cli.{name}" for name in ("collect", "merge", "ledger", "stats", "experiment")]
    used = ["collection", "merging.ledger", "merging.running_sums", "lab.grid.run", "lab.grid.loading", "training"]
    model = "transformers.models.bert.modeling_bert"
    for name in [*commands, *(f"merganser.{one}" for one in used), model, "accelerate", "sklearn.metrics"]:
        importlib.import_module(name)
    gc.freeze()  # a fork that counts references copies less


sys.exit(main())
