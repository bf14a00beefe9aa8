"""RegMean of an encoder's contributors: merganser against sum, ``torch.inverse`` and matmul in float32.

    python benchmarks/regmean.py /scratch --rounds 5

Two parts, each in turns. ``solver``: tensors are in memory, as full matrices, and only the linear layers are solved,
in this process. ``command``: files to files, a process each; merganser as installed, and ``naive_regmean.py``, once
with an inverse for every layer, as public code has it, and once with an inverse for every distinct input. Both solve
for weights alone, with the same alpha; a row beside them has merganser's default, which solves biases, too.

Errors are those of the linear layers' weights, ‖W − W*‖/‖W*‖ with W* the float64 solution of the same system.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import measure
import naive_regmean
from checkpoints import Encoder
from grams import encoder_family
from measure import PROGRAM
from merganser.checkpoints.layers import Layer
from merganser.merging.memory import keep_freed
from merganser.methods import METHODS, Facts
from merganser.methods.base import elements
from merganser.methods.regression.regmean import RegMeanOptions
from merganser.statistics import Statistics
from merganser.tensors import one_thread

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class InMemory:
    """A contributor whose tensors are at hand; the :class:`~merganser.methods.Share` of any unit."""

    weights: Mapping[str, Tensor]
    grams: Mapping[str, Tensor]
    inputs: Mapping[str, str]
    number: int = 0
    coefficient: float = 1.0

    def tensor(self, name: str) -> Tensor:
        """Its tensor."""
        return self.weights[name]

    def gram(self, weight: str) -> Tensor:
        """The Gram matrix of the inputs of the layer with this weight."""
        return self.grams[self.inputs[weight]]

    def release(self) -> None:
        """Nothing was read."""


def main() -> int:
    """Measure and write the tables."""
    options = _options()
    keep_freed()  # as the command does, which also has the collector of garbage leave imported modules alone
    gc.freeze()
    encoder = Encoder(layers=options.layers)
    models = encoder_family(options.scratch, encoder, options.contributors)
    inputs = {f"{module}.weight": key for module, (key, _) in encoder.linear().items()}
    for model in models:
        write_naive(model, inputs)
    values, text = {}, ""
    outputs = options.scratch / "outputs-regmean"
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.only in (None, "solver"):
        shares = load(models, inputs)
        variants = solvers(shares, encoder, inputs, options.alpha)
        solved = {name: variant() for name, variant in variants.items()}
        errors = judge(shares, inputs, options.alpha, solved)
        del solved
        runs = measure.take_turns(
            {n: measure.timed(v, cpu=options.cpu_time) for n, v in variants.items()}, options.rounds
        )
        rows = measure.summary(runs, "merganser")
        text += section("Solver alone, tensors in memory", rows, errors)
        values["solver"] = {"rows": rows, "errors": errors}
        del shares, variants
    if options.only in (None, "command"):
        folders = {name: outputs / name for name in commands(outputs, models, options.alpha)}
        runs = measure.take_turns(
            {
                name: measure.command(command, folders[name])
                for name, command in commands(outputs, models, options.alpha).items()
            },
            options.rounds,
            lambda: measure.warm(models, outputs),
        )
        same = {name: load_file(folders[name] / "model.safetensors") for name in runs if name != WITH_BIASES}
        errors = judge(load(models, inputs), inputs, options.alpha, same)
        rows = measure.summary(runs, "merganser")
        text += section("Whole command, files to files", rows, errors)
        values["command"] = {"rows": rows, "errors": errors}
        for folder in folders.values():
            measure.remove(folder)
    found = measure.machine()
    title = f"# RegMean of {len(models)} encoders, {options.layers} layers x {encoder.hidden}, alpha {options.alpha}"
    text = f"{title}\n\n{measure.machine_line(found)}\n{options.rounds} rounds.\n{text}"
    name = f"regmean-{options.only}" if options.only else "regmean"
    measure.save(name, text, {"alpha": options.alpha, "machine": found, **values}, options.results)
    return 0


WITH_BIASES = "merganser, biases solved too"


def solvers(
    shares: Sequence[InMemory], encoder: Encoder, inputs: Mapping[str, str], alpha: float
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The solvers by variant; each returns the merged weights."""
    weights, grams = [share.weights for share in shares], [share.grams for share in shares]
    method = METHODS["regmean"].configured(RegMeanOptions(alpha=alpha, augment_bias=False))
    facts = []
    for module, (key, shape) in encoder.linear().items():
        layer = Layer(module, "linear", f"{module}.weight", f"{module}.bias", False)
        facts.append(Facts(layer.weight, shape, layer, grams=(key,) * len(shares)))
    units, _ = method.units(facts)
    units.sort(key=elements, reverse=True)  # as in the engine, nobody waits for a large one at the end
    threads = torch.get_num_threads()

    def merganser() -> dict[str, Tensor]:
        """As the engine does: as many units at once as torch has threads, each on one thread."""
        found: dict[str, Tensor] = {}
        with one_thread(), ThreadPoolExecutor(threads) as pool:
            for merged in pool.map(lambda unit: method.merge(unit, shares), units):
                found.update({name: tensor.float() for name, tensor in merged.tensors.items()})
        return found

    def naive(shared: bool) -> dict[str, Tensor]:
        return naive_regmean.merge_layers(weights, grams, inputs, alpha, shared)

    return {
        "merganser": merganser,
        "naive, an inverse for every layer": lambda: naive(False),
        "naive, an inverse for every input": lambda: naive(True),
    }


def commands(outputs: Path, models: Sequence[Path], alpha: float) -> dict[str, list[str]]:
    """The commands by variant."""
    folders = [str(model) for model in models]
    merge = [str(PROGRAM), "merge", *folders, "--method", "regmean", "--alpha", str(alpha)]
    script = [sys.executable, str(HERE / "naive_regmean.py")]
    names = ("naive, an inverse for every layer", "naive, an inverse for every input")
    return {
        "merganser": [*merge, "--option", "augment_bias=false", "-o", str(outputs / "merganser")],
        WITH_BIASES: [*merge, "-o", str(outputs / WITH_BIASES)],
        names[0]: [*script, str(outputs / names[0]), *folders, "--alpha", str(alpha)],
        names[1]: [*script, str(outputs / names[1]), *folders, "--alpha", str(alpha), "--shared"],
    }


def judge(
    shares: Sequence[InMemory], inputs: Mapping[str, str], alpha: float, results: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Relative errors of each variant's weights against the float64 solution: median and worst over layers."""
    errors: dict[str, list[float]] = {name: [] for name in results}
    for key in dict.fromkeys(inputs.values()):
        names = [name for name, of in inputs.items() if of == key]
        system, right = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for share in shares:
            gram = naive_regmean.shrink(share.grams[key].double(), alpha)
            system = system + gram
            right = right + gram @ torch.cat([share.weights[name] for name in names]).double().T
        answer = torch.linalg.solve(system, right).T
        for variant, found in results.items():
            stacked = torch.cat([found[name] for name in names]).double()
            heights = [found[name].shape[0] for name in names]
            pieces = zip(stacked.split(heights), answer.split(heights), strict=True)
            errors[variant] += [float((ours - true).norm() / true.norm()) for ours, true in pieces]
    return {name: {"median": statistics.median(e), "worst": max(e)} for name, e in errors.items()}


def load(models: Sequence[Path], inputs: Mapping[str, str]) -> list[InMemory]:
    """The contributors with all their tensors in memory."""
    return [
        InMemory(load_file(m / "model.safetensors"), load_file(m / "naive" / "grams.safetensors"), inputs)
        for m in models
    ]


def write_naive(model: Path, inputs: Mapping[str, str]) -> None:
    """The published Gram matrices as full matrices, as public code keeps them."""
    target = model / "naive" / "grams.safetensors"
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    published = Statistics.open(model)
    partial = target.with_suffix(".partial")
    save_file(
        {key: published.gram(key) for key in dict.fromkeys(inputs.values())},
        partial,
        {"inputs": json.dumps(dict(inputs))},
    )
    partial.rename(target)


def section(title: str, rows: Sequence[Mapping[str, object]], errors: Mapping[str, Mapping[str, float]]) -> str:
    """The tables of one part."""
    text = f"\n## {title}\n\n{measure.summary_table(rows, 'merganser')}\n"
    cells = [[name, f"{e['median']:.1e}", f"{e['worst']:.1e}"] for name, e in errors.items()]
    return text + measure.markdown(["error against float64", "median layer", "worst layer"], cells)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for checkpoints and outputs")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--contributors", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["solver", "command"])
    parser.add_argument("--threads", type=int, help="of the solver alone  [default: as many as torch likes]")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the solver alone, for busy machines")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the tables")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
