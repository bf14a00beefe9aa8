"""Merges of Llama-shaped bfloat16 checkpoints by one method after the other: merganser, mergekit, and what is physical.

    python benchmarks/merge.py /scratch --size 1.1B --rounds 5
    python benchmarks/merge.py /scratch --size 50M --only ties,dare_ties
    python benchmarks/merge.py /scratch --size 1.1B --rounds 1 --only ties_16,dare_ties_16 --peers ''

Whole commands, files to files, each a process of its own, in turns over the same inputs, which are read once before
each run so that the page cache holds them. ``floor`` is ``floor.py``, a chunked sum without checks or hashes; ``cp``
copies one checkpoint. mergekit runs in its own environment (``peers.py``), with parameters under which it computes the
same, but for what it draws at random: as it comes, with its fastest options, or in float32 as merganser does, where
otherwise it computes in the bfloat16 that it stores (``--peers``).

Every number of a result is compared with a float64 reference: averages and TIES with ``ties_reference.py``, the others
with ``references.py``; of a random choice, each number must come out of some choice.

The merges of 16 contributors are of the three checkpoints under 16 names (hard links), in at most 2 GB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import measure
import peers
import references
import ties_reference
from measure import PROGRAM

DENSITY = 0.5
HERE = Path(__file__).resolve().parent
FASTEST = ("-j", str(os.cpu_count()), "--async-write", "--write-threads", str(os.cpu_count()))
#: mergekit's variants: in the tables, what its configuration says of dtypes, and more arguments.
PEERS: dict[str, tuple[str, dict[str, str], Sequence[str]]] = {
    "plain": ("mergekit", {"dtype": "bfloat16"}, ()),
    "fastest": ("mergekit, fastest options", {"dtype": "bfloat16"}, FASTEST),
    "float32": ("mergekit in float32", {"dtype": "float32", "out_dtype": "bfloat16"}, ()),
}


@dataclass(frozen=True)
class Case:
    """One merge, for every program.

    Attributes:
        title: in the tables.
        method: merganser's.
        options: of the method; those that it is checked with.
        kit: the rest of mergekit's configuration; None where mergekit takes no part.
        own: parameters of each model in it.
        models: how many contributors.
        base: whether there is a base model.
        floor: beside ``floor.py`` and ``cp``.
        flags: more arguments of merganser's command.
        tolerance: see :func:`references.judge`.
        rows: likewise.
    """

    title: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    kit: dict[str, Any] | None = None
    own: dict[str, Any] = field(default_factory=dict)
    models: int = 3
    base: bool = True
    floor: bool = False
    flags: tuple[str, ...] = ()
    tolerance: float = 0.0
    rows: int | None = None


def _elected(method: str, **parameters: Any) -> dict[str, Any]:
    return {"merge_method": method, "parameters": {"normalize": True, **parameters}}


_TIES = {"density": DENSITY}
_DARE = {"density": DENSITY, "scale": 1.0}
_DELLA = {"density": DENSITY, "epsilon": 0.15, "scale": 1.0}
_CRUMBS = {"density": DENSITY, "gamma": 0.01, "scale": 1.0}
_KARCHER = {"merge_method": "karcher", "parameters": {"max_iter": 10, "tol": 1e-5}}
_SIXTEEN = ("--max-memory", "2GB")

CASES = {
    "linear": Case("Weighted average", "simple", {}, _elected("linear"), base=False, floor=True),
    "passthrough": Case(
        "Passthrough", "passthrough", {}, {"merge_method": "passthrough"}, models=1, base=False, floor=True
    ),
    "ties": Case("TIES", "ties", _TIES, _elected("ties"), {"density": DENSITY}),
    "dare_ties": Case("DARE-TIES", "dare_ties", _DARE, _elected("dare_ties"), {"density": DENSITY}, rows=256),
    "della": Case("DELLA", "della", _DELLA, _elected("della"), {"density": DENSITY, "epsilon": 0.15}, rows=256),
    "breadcrumbs": Case(
        "Breadcrumbs of whole tensors",
        "breadcrumbs",
        {**_CRUMBS, "whole": True},
        {"merge_method": "breadcrumbs"},
        {"density": DENSITY, "gamma": 0.01},
    ),
    "sce": Case(
        "SCE", "sce", {"density": 0.1, "masked": True}, {"merge_method": "sce", "parameters": {"select_topk": 0.1}}
    ),
    "slerp": Case(
        "SLERP", "slerp", {"t": 0.5}, {"merge_method": "slerp", "parameters": {"t": 0.5}}, models=2, base=False
    ),
    "karcher": Case("Karcher mean", "karcher", {}, _KARCHER, base=False, tolerance=1e-5),
    "model_stock": Case("Model Stock", "model_stock", {}, {"merge_method": "model_stock"}, tolerance=1e-6),
    "ties_16": Case("TIES of 16", "ties", _TIES, models=16, flags=_SIXTEEN),
    "dare_ties_16": Case("DARE-TIES of 16", "dare_ties", _DARE, models=16, flags=_SIXTEEN, rows=0),
}


def main() -> int:
    """Run what was asked for and write the tables; exit 1 if a result is not what it should be."""
    options = _options()
    base, family = checkpoints.llama_family(options.scratch, options.size)
    outputs = options.scratch / "outputs-merge"
    kit = peers.mergekit(options.cache) if options.peers else None
    text, values, good = "", {}, True
    for name in options.only:
        case = CASES[name]
        rounds = options.ties_rounds or options.rounds if name == "ties" else options.rounds
        models = named(family, case.models, options.scratch / f"llama-{options.size}-named")
        commands = own_commands(outputs, case, models, base)
        if kit and case.kit is not None:
            for peer in options.peers:
                variant, dtypes, flags = PEERS[peer]
                config = options.scratch / f"mergekit-{name}-{peer}.yaml"
                write_config(config, case, models, base, dtypes)
                commands[variant] = [str(kit / "mergekit-yaml"), str(config), str(outputs / variant), *flags]
        print(f"{name}, {options.size}, {rounds} rounds", file=sys.stderr)
        runs = measure.take_turns(
            {variant: measure.command(line, outputs / variant) for variant, line in commands.items()},
            rounds,
            partial(measure.warm, [base, *family], outputs),
        )
        judged = [] if options.no_check else [variant for variant in runs if variant != "cp"]
        checked = {variant: check(case, outputs / variant, models, base) for variant in judged}
        good &= not checked.get("merganser", {}).get("unexplained")
        reference = "floor" if case.floor else "merganser"
        rows = measure.summary(runs, reference)
        text += section(case, options.size, rounds, rows, reference, checked)
        values[name] = {"rounds": rounds, "rows": rows, "correctness": checked}
        for variant in runs:
            measure.remove(outputs / variant)
    found = measure.machine()
    if kit:
        found["mergekit"] = peers.installed_version(kit, "mergekit")
        found["mergekit_torch"] = peers.installed_version(kit, "torch")
    text = f"# Merging checkpoints of {options.size}\n\n{measure.machine_line(found)}\n{text}"
    chosen = [] if len(options.only) == len(CASES) else options.only
    measure.save(
        "-".join(["merge", options.size, *chosen]),
        text,
        {"size": options.size, "machine": found, **values},
        options.results,
    )
    return 0 if good else 1


def named(family: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """So many contributors; where there are more than checkpoints, these under further names, by hard links."""
    if count <= len(family):
        return list(family[:count])
    models = []
    for number in range(count):
        source, model = family[number % len(family)], folder / f"model-{number}"
        if not model.exists():
            shutil.copytree(source, model, copy_function=os.link)
        models.append(model)
    return models


def own_commands(outputs: Path, case: Case, models: Sequence[Path], base: Path) -> dict[str, list[str]]:
    """merganser's command and what is physical, by variant."""
    inputs = [str(model) for model in models]
    line = [str(PROGRAM), "merge", *inputs, "--method", case.method, *case.flags]
    line += ["--base", str(base)] if case.base else []
    for name, value in case.options.items():
        line += ["--option", f"{name}={str(value).lower()}"]
    commands = {"merganser": [*line, "-o", str(outputs / "merganser")]}
    if case.floor:
        commands["floor"] = [sys.executable, str(HERE / "floor.py"), str(outputs / "floor"), *inputs]
        commands["cp"] = ["cp", "-r", inputs[0], str(outputs / "cp")]
    return commands


def write_config(path: Path, case: Case, models: Sequence[Path], base: Path, dtypes: Mapping[str, str]) -> None:
    """mergekit's configuration of the same merge."""
    import yaml

    weighted = case.method not in ("slerp", "karcher", "model_stock", "passthrough", "sce")
    own = {**({"weight": 1.0} if weighted else {}), **case.own}
    config: dict[str, Any] = {
        **(case.kit or {}),
        "models": [{"model": str(m), **({"parameters": own} if own else {})} for m in models],
        **dtypes,
    }
    if case.base or case.method == "slerp":
        config["base_model"] = str(base if case.base else models[0])
    path.write_text(yaml.safe_dump(config))


def check(case: Case, result: Path, models: Sequence[Path], base: Path) -> dict[str, Any]:
    """Compare a result with the float64 reference."""
    if case.rows == 0:
        return {}
    if case.method in ("simple", "ties"):
        return dict(
            ties_reference.compare(result, models, base if case.base else None, case.options.get("density", 1.0))
        )
    if case.rows is not None and result.name != "merganser":
        return {}  # other random choices, of which the results are scaled otherwise
    found = references.judge(case.method, result, models, base, case.options, case.tolerance, case.rows)
    kept = {} if found.kept is None else {"changed": round(found.kept, 4)}
    return {"numbers": found.numbers, "differ": found.differ, "unexplained": found.unexplained, **kept}


def section(
    case: Case,
    size: str,
    rounds: int,
    rows: Sequence[Mapping[str, Any]],
    reference: str,
    checked: Mapping[str, Mapping[str, Any]],
) -> str:
    """One merge's tables."""
    options = ", ".join(f"{name} {value}" for name, value in case.options.items())
    text = f"\n## {case.title}{f', {options}' if options else ''}\n\n"
    text += f"{case.models} × {size} bfloat16, {rounds} rounds, warm cache.\n\n"
    text += measure.summary_table(rows, reference)
    columns = {
        "numbers": "numbers",
        "differ": "other bfloat16",
        "ties": "tied magnitudes",
        "boundary": "rounding boundary",
        "unexplained": "unexplained",
        "changed": "share that is not the base's",
    }
    known = [column for column in columns if any(column in found for found in checked.values())]
    cells = [[v, *(f"{found[c]:,}" if c in found else "–" for c in known)] for v, found in checked.items() if found]
    table = measure.markdown(["against float64", *(columns[c] for c in known)], cells) if cells else ""
    return f"{text}\n{table}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for checkpoints and outputs")
    parser.add_argument("--size", choices=checkpoints.SIZES, default="1.1B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ties-rounds", type=int, help="rounds of TIES  [default: as --rounds]")
    parser.add_argument("--only", type=partial(_names, known=CASES), default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--peers",
        type=partial(_names, known=PEERS),
        default=["plain", "fastest"],
        help=f"of mergekit's {', '.join(PEERS)}; '' for none  [default: plain,fastest]",
    )
    parser.add_argument("--no-check", action="store_true", help="without the float64 references")
    parser.add_argument("--cache", type=Path, help="folder of the peers' environments")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the tables")
    return parser.parse_args()


def _names(text: str, known: Mapping[str, object]) -> list[str]:
    names = text.split(",") if text else []
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"a peer cannot be installed: {error}")
