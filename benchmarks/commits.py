"""Two states of merganser against each other: averages and TIES of Llama-shaped checkpoints, RegMean of encoders.

    git worktree add /elsewhere COMMIT
    python benchmarks/commits.py /scratch --other /elsewhere --size 1.1B --rounds 5

Whole commands, files to files, this checkout and the other one in turns within each round. The inputs are made by the
other checkout, which may not read what this one writes. Times are ratios within a round; memory is the peak of
anonymous memory. It exits with 1 where this checkout takes more than ``--most`` times as long, or as much memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import measure

HERE = Path(__file__).resolve().parent
MAKE = """
import sys
from pathlib import Path
from checkpoints import Encoder, llama_family
from grams import encoder_family
scratch, size, layers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
base, models = llama_family(scratch, size)
encoders = encoder_family(scratch, Encoder(layers=layers))
print(*[base, *models], sep="\\n")
print("--", *encoders, sep="\\n")
"""


def main() -> int:
    """Run every merge and write the tables."""
    options = _options()
    sources = {"here": HERE.parent, "other": options.other.resolve()}
    environments = {name: {"PYTHONPATH": str(folder / "src")} for name, folder in sources.items()}
    paths = os.pathsep.join(str(options.other.resolve() / part) for part in ("src", "benchmarks"))
    made = subprocess.run(
        [sys.executable, "-c", MAKE, str(options.scratch), options.size, str(options.layers)],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    llama, encoders = (part.split() for part in made.stdout.split("--"))
    merges = {
        "average": (llama[1:], ["--method", "simple"]),
        "ties": (llama[1:], ["--method", "ties", "--base", llama[0], "--option", "density=0.5"]),
        "regmean": (encoders, ["--method", "regmean"]),
    }
    text, values, good = "", {}, True
    for name, (models, method) in merges.items():
        if options.only not in (None, name):
            continue
        outputs = options.scratch / "outputs-commits"
        outputs.mkdir(parents=True, exist_ok=True)
        variants = {}
        for which, environment in environments.items():
            line = [sys.executable, "-m", "merganser", "merge", *models, *method, "-o", str(outputs / which)]
            variants[which] = partial(_run, line, environment, outputs / which)
        folders = [Path(model) for model in (llama if name == "ties" else models)]
        runs = measure.take_turns(variants, options.rounds, partial(measure.warm, folders, outputs))
        rows = measure.summary(runs, "other")
        text += f"\n## {name}\n\n{measure.summary_table(rows, 'other')}\n"
        values[name] = rows
        memory = [sorted(run.anonymous for run in runs[which])[len(runs[which]) // 2] for which in ("here", "other")]
        ratio = next(row["ratio"] for row in rows if row["variant"] == "here")
        good &= ratio <= options.most and memory[0] <= options.most * memory[1]
        for which in environments:
            measure.remove(outputs / which)
    print(text)
    return 0 if good else 1


def _run(line: list[str], environment: dict[str, str], output: Path) -> measure.Run:
    measure.remove(output)
    return measure.run_command(line, environment)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for inputs and outputs")
    parser.add_argument("--other", type=Path, required=True, help="checkout of the state to compare with")
    parser.add_argument("--size", default="1.1B", help="of the Llama-shaped checkpoints")
    parser.add_argument("--layers", type=int, default=12, help="of the encoders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["average", "ties", "regmean"])
    parser.add_argument("--most", type=float, default=1.05, help="largest ratio that is no failure")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
