"""Weighted average and TIES of three Llama-shaped bfloat16 checkpoints: merganser, mergekit, and what is physical.

    python benchmarks/merge.py /scratch --size 1.1B --rounds 5
    python benchmarks/merge.py /scratch --size 50M --only ties

Whole commands, files to files, each a process of its own, in turns over the same inputs, which are read once before
each run so that the page cache holds them. ``floor`` is ``floor.py``, a chunked sum without checks or hashes; ``cp``
copies one checkpoint. mergekit runs in its own environment (``peers.py``), as it comes and with its fastest options.

The results of TIES are compared with a float64 reference, tensor by tensor (``ties_reference.py``), and the averages
with a float64 mean.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import measure
import peers
import ties_reference
from measure import PROGRAM

DENSITY = 0.5
HERE = Path(__file__).resolve().parent
FASTEST = ("-j", str(os.cpu_count()), "--async-write", "--write-threads", str(os.cpu_count()))


def main() -> int:
    """Run what was asked for and write the tables; exit 1 if a result is not what it should be."""
    options = _options()
    base, models = checkpoints.llama_family(options.scratch, options.size)
    outputs = options.scratch / "outputs-merge"
    merges = {
        "average": (average_commands(outputs, models), options.rounds, "floor"),
        "ties": (ties_commands(outputs, models, base), options.ties_rounds or options.rounds, "merganser"),
    }
    kit = None if options.no_peers else peers.mergekit(options.cache)
    text, values, good = "", {}, True
    for name, (commands, rounds, reference) in merges.items():
        if options.only not in (None, name):
            continue
        if kit:
            config = write_config(options.scratch / f"mergekit-{name}.yaml", name, models, base)
            commands.update(mergekit_commands(outputs, kit, config))
        print(f"{name}, {options.size}, {rounds} rounds", file=sys.stderr)
        runs = measure.take_turns(
            {variant: measure.command(line, outputs / variant) for variant, line in commands.items()},
            rounds,
            partial(measure.warm, [base, *models] if name == "ties" else models, outputs),
        )
        checked = check(name, outputs, list(runs), models, base)
        good &= all(found["unexplained"] == 0 for v, found in checked.items() if v == "merganser")
        rows = measure.summary(runs, reference)
        text += section(name, options.size, rounds, rows, reference, checked)
        values[name] = {"rounds": rounds, "rows": rows, "correctness": checked}
        for variant in runs:
            measure.remove(outputs / variant)
    found = measure.machine()
    if kit:
        found["mergekit"] = peers.installed_version(kit, "mergekit")
        found["mergekit_torch"] = peers.installed_version(kit, "torch")
    text = f"# Merging three checkpoints of {options.size}\n\n{measure.machine_line(found)}\n{text}"
    name = "-".join(["merge", options.size, *([options.only] if options.only else [])])
    measure.save(name, text, {"size": options.size, "machine": found, **values}, options.results)
    return 0 if good else 1


def average_commands(outputs: Path, models: Sequence[Path]) -> dict[str, list[str]]:
    """The commands of the weighted average, by variant."""
    inputs = [str(model) for model in models]
    floor = outputs / "floor"
    return {
        "merganser": [str(PROGRAM), "merge", *inputs, "--method", "simple", "-o", str(outputs / "merganser")],
        "floor": [sys.executable, str(HERE / "floor.py"), str(floor), *inputs],
        "cp": ["cp", "-r", inputs[0], str(outputs / "cp")],
    }


def ties_commands(outputs: Path, models: Sequence[Path], base: Path) -> dict[str, list[str]]:
    """The commands of TIES, by variant."""
    inputs = [str(model) for model in models]
    method = ["--method", "ties", "--base", str(base), "--option", f"density={DENSITY}"]
    return {"merganser": [str(PROGRAM), "merge", *inputs, *method, "-o", str(outputs / "merganser")]}


def mergekit_commands(outputs: Path, programs: Path, config: Path) -> dict[str, list[str]]:
    """mergekit as it comes, and with the options that make it fastest on a processor."""
    command = [str(programs / "mergekit-yaml"), str(config)]
    plain, fast = "mergekit", "mergekit, fastest options"
    return {plain: [*command, str(outputs / plain)], fast: [*command, str(outputs / fast), *FASTEST]}


def write_config(path: Path, name: str, models: Sequence[Path], base: Path) -> Path:
    """mergekit's configuration of the same merge."""
    import yaml

    density = {"density": DENSITY} if name == "ties" else {}
    config: dict[str, Any] = {
        "merge_method": "ties" if name == "ties" else "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1.0, **density}} for m in models],
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    if name == "ties":
        config["base_model"] = str(base)
    path.write_text(yaml.safe_dump(config))
    return path


def check(
    name: str, outputs: Path, variants: Sequence[str], models: Sequence[Path], base: Path
) -> dict[str, dict[str, int]]:
    """Compare each variant's last result with the float64 reference."""
    origin, density = (base, DENSITY) if name == "ties" else (None, 1.0)
    return {
        variant: ties_reference.compare(outputs / variant, models, origin, density)
        for variant in variants
        if variant != "cp"
    }


def section(
    name: str,
    size: str,
    rounds: int,
    rows: Sequence[Mapping[str, Any]],
    reference: str,
    checked: Mapping[str, Mapping[str, int]],
) -> str:
    """One merge's tables."""
    title = f"TIES, density {DENSITY}" if name == "ties" else "Weighted average"
    text = f"\n## {title}\n\n3 × {size} bfloat16, {rounds} rounds, warm cache.\n\n"
    text += measure.summary_table(rows, reference)
    columns = ("numbers", "differ", "ties", "boundary", "unexplained")
    cells = [[variant, *(f"{found[column]:,}" for column in columns)] for variant, found in checked.items()]
    head = ["against float64", "numbers", "other bfloat16", "tied magnitudes", "rounding boundary", "unexplained"]
    return f"{text}\n{measure.markdown(head, cells)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for checkpoints and outputs")
    parser.add_argument("--size", choices=checkpoints.SIZES, default="1.1B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ties-rounds", type=int, help="rounds of TIES  [default: as --rounds]")
    parser.add_argument("--only", choices=["average", "ties"])
    parser.add_argument("--no-peers", action="store_true", help="without mergekit")
    parser.add_argument("--cache", type=Path, help="folder of the peers' environments")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the tables")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"a peer cannot be installed: {error}")
