"""The fuzzer by itself, for as long as one likes; see ``make fuzz``.

PYTHONPATH=tests python -m fuzz --minutes 60 --seed 0 [--kind adapter] [--runs 10000] [--only 17]
"""

from __future__ import annotations

import own_home as own_home  # before all that reads the environment when it is imported

# isort: split
import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from fuzz.accepted import TABLE, unnamed
from fuzz.fuzzer import Fuzzer, Run, prepare
from fuzz.kinds import KINDS

FAULTS = ("traceback", "slow", "memory", "killed", "control", "long", "escape", "unusable", "refused")


def main() -> int:
    """Run, keep every failing case and every class of accepted change, and print a table."""
    asked = argparse.ArgumentParser(prog="fuzz")
    asked.add_argument("--minutes", type=float, default=60)
    asked.add_argument("--runs", type=int, default=10**9, help="at most so many")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--kind", choices=[*KINDS], action="append")
    asked.add_argument("--only", type=int, help="the run of this number alone, shown in full")
    asked.add_argument("--log", type=Path, default=Path(".pytest_cache/fuzz"), help="folder of what is kept")
    given = asked.parse_args()
    kinds = given.kind or [*KINDS]
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        if given.only is not None:
            print(json.dumps(asdict(fuzzer.run(kinds[0], given.only)), indent=1))
            return 0
        return _go(fuzzer, kinds, given)


def _go(fuzzer: Fuzzer, kinds: list[str], given: argparse.Namespace) -> int:
    given.log.mkdir(parents=True, exist_ok=True)
    log = given.log / f"seed-{given.seed}.jsonl"
    runs = [Run(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(run.kind, run.number) for run in runs}
    end, number = time.monotonic() + 60 * given.minutes, given.seed * 10**6
    with log.open("a") as stream:
        while time.monotonic() < end and len(runs) < given.runs:
            for kind in kinds:
                if (kind, number) not in done:
                    run = fuzzer.run(kind, number)
                    run.output = run.output[:3000] if run.faults else ""
                    runs.append(run)
                    print(json.dumps(asdict(run)), file=stream, flush=True)
            number += 1
    print(table(runs))
    for one in unnamed((run.kind, run.accepted) for run in runs):
        print(f"accepted, and not named in {TABLE.name}: {one[:160]}")
    print(f"every run: {log}")
    return int(any(run.faults for run in runs))


def table(runs: list[Run]) -> str:
    """A line for each kind: its runs and their faults."""
    lines = [f"{'kind':12}{'runs':>7}" + "".join(f"{name:>11}" for name in (*FAULTS, "accepted", "classes"))]
    for kind in [*KINDS, "all"]:
        some = [run for run in runs if kind in (run.kind, "all")]
        counts = Counter(name for run in some for name in run.faults)
        accepted = [run.accepted for run in some if run.accepted]
        numbers = [*(counts[name] for name in FAULTS), len(accepted), len(set(accepted))]
        lines.append(f"{kind:12}{len(some):7}" + "".join(f"{number:11}" for number in numbers))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
