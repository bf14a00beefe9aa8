"""What adding a contributor to a ledger costs: the 16th against the 2nd, and what adding and removing leave behind.

Contributors are a random base model with noise and random statistics, made one at a time and deleted; each round fills
a ledger of its own. Beside every add: a plain copy of its inputs and of the sums, flushed to disk, in the same minute,
because on a machine that does other things the disk's speed changes more than anything else.

    python benchmarks/ledger.py --rounds 3
    python benchmarks/ledger.py --layers 12 --width 768 --cpu-time
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from transformers import logging as transformers_logging

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import Layer, describe_layers
from merganser.merging import ledger
from merganser.statistics import FILE_NAME, write_statistics
from merganser.statistics.format import LayerStatistics, StatisticsHeader
from merganser.tensors import pack_upper

BAR = 0.10  # how much more the last add may cost than the second


def main() -> int:
    """Run the rounds; exit 1 if the last add costs over 10 % more than the second, or removing leaves over 1e-10."""
    options = _options()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="merganser-ledger-", dir=options.folder) as scratch:
        place = Path(scratch)
        config = BertConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.width // 64),
            intermediate_size=4 * options.width,
        )
        BertModel(config).save_pretrained(place / "base")
        size = (place / "base" / "model.safetensors").stat().st_size
        print(f"model        {options.layers} layers, width {options.width}, {size / 1e6:.0f} MB")
        print(
            f"threads      {options.threads or os.cpu_count()}; load average {os.getloadavg()[0]:.2f}",
            flush=True,
        )
        rounds, error = [], 0.0
        for number in range(options.rounds):
            adds, error = one_round(place, options, number)
            rounds.append(adds)
            line = "  ".join(f"{k}: {add.cpu:.2f} {add.wall:.2f}" for k, add in enumerate(adds, 1))
            load = os.getloadavg()[0]
            print(f"round {number + 1:2}     load {load:.1f}; processor and wall seconds: {line}", flush=True)
    return report(rounds, error, options.cpu_time)


@dataclass(frozen=True)
class Add:
    """Seconds of processors and of the clock for one add, and of the clock for a copy of the same bytes after it."""

    cpu: float
    wall: float
    copy: float


def one_round(place: Path, options: argparse.Namespace, number: int) -> tuple[list[Add], float]:
    """The cost of each add; and what adding and removing one more changes of the model."""
    folder = ledger.init(place / "ledger", place / "base")
    adds = []
    for k in range(options.contributors):
        model = contributor(place, 1000 * number + k)
        wall, cpu = time.perf_counter(), time.process_time()
        ledger.add(folder, model, coefficient=1 + k % 3, threads=options.threads)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        files = [folder / str(ledger.show(folder).file), model / "model.safetensors", model / FILE_NAME]
        adds.append(Add(cpu, wall, copy(place, files)))
        shutil.rmtree(model)
        if not k:
            print(
                f"sums         {(folder / str(ledger.show(folder).file)).stat().st_size / 1e6:.0f} MB",
                flush=True,
            )
    error = 0.0
    if number == options.rounds - 1:
        before = load_file(ledger.solve(folder, place / "before", dtype="F64") / "model.safetensors")
        model = contributor(place, 999_999)
        ledger.add(folder, model, coefficient=1000, threads=options.threads)
        ledger.remove(folder, model, threads=options.threads)
        after = load_file(ledger.solve(folder, place / "after", dtype="F64") / "model.safetensors")
        floats = [name for name, tensor in before.items() if tensor.is_floating_point()]
        error = max(float((after[n] - before[n]).norm() / before[n].norm().clamp_min(1e-300)) for n in floats)
    shutil.rmtree(folder)
    return adds, error


def copy(place: Path, files: list[Path]) -> float:
    """Seconds to copy files and flush them."""
    start = time.perf_counter()
    for file in files:
        shutil.copyfile(file, place / "copy")
        descriptor = os.open(place / "copy", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    (place / "copy").unlink()
    return time.perf_counter() - start


def contributor(place: Path, seed: int) -> Path:
    """The base with noise, and statistics of inputs with a spectrum that falls off as those of real layers do."""
    folder, generator = place / f"tuned-{seed}", torch.Generator().manual_seed(seed)
    folder.mkdir()
    shutil.copyfile(place / "base" / "config.json", folder / "config.json")
    weights = load_file(place / "base" / "model.safetensors")
    for tensor in weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    layers = describe_layers(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        tensors |= statistics_of(layer, weights[layer.weight].shape, generator)
    header = StatisticsHeader(
        layers=tuple(
            LayerStatistics(
                module=layer.module,
                kind=layer.kind,
                weight=layer.weight,
                bias=layer.bias,
                input=None if layer.kind == "embedding" else layer.module,
                rows=4096,
                tied=layer.tied,
            )
            for layer in layers
        ),
        manifest_sha256=checkpoint.manifest_sha256(),
        tensor_sha256={name: checkpoint.sha256(name) for name in checkpoint.tensors},
        examples=256,
        tokens=4096,
        masking="none: random numbers",
    )
    write_statistics(folder / FILE_NAME, header, tensors)
    return folder


def statistics_of(layer: Layer, shape: torch.Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Token counts that fall off as words do, or the Gram matrix of 256 inputs plus a diagonal."""
    if layer.kind == "embedding":
        ranks = torch.randperm(shape[0], generator=generator) + 1
        return {f"count.{layer.module}": 1_000_000 // ranks}
    inputs = torch.randn(256, shape[1], generator=generator) * torch.linspace(0.05, 2, shape[1])
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(1e-3)
    return {
        f"gram.{layer.module}": pack_upper((gram + gram.T) / 2),
        f"mean.{layer.module}": inputs.mean(dim=0),
    }


def report(rounds: list[list[Add]], error: float, cpu_time: bool) -> int:
    """Print medians and ratios; 0 if the bars are reached.

    The verdict goes by the median over rounds of the last add over the second of the same round.
    """
    print(f"\n{'k':>3}{'processor':>12}{'wall':>9}{'a copy of the same bytes':>26}   medians")
    for k, adds in enumerate(zip(*rounds, strict=True), 1):
        cpu, wall, plain = (statistics.median(column) for column in zip(*map(astuple, adds), strict=True))
        print(f"{k:3}{cpu:11.2f}s{wall:8.2f}s{plain:25.2f}s")
    last = len(rounds[0])
    half = last // 2 + 1
    verdict = 0.0
    print()
    for name in ("cpu", "wall"):
        seconds = [[float(getattr(add, name)) for add in adds] for adds in rounds]
        ratios = [adds[-1] / adds[1] for adds in seconds]
        early = statistics.median(s for adds in seconds for s in adds[1:half])
        late = statistics.median(s for adds in seconds for s in adds[half:])
        ratio = statistics.median(ratios)
        print(
            f"{name:5} add {last} over add 2: {ratio:.3f} (rounds {', '.join(f'{r:.3f}' for r in ratios)}); "
            f"median of adds {half + 1}…{last} over that of adds 2…{half}: {late / early:.3f}"
        )
        if (name == "cpu") == cpu_time:
            verdict = ratio
    print(f"added with coefficient 1000 and removed: the solved model changes by {error:.1e}, relative")
    good = verdict <= 1 + BAR and error <= 1e-10
    print(f"bars: ratio at most {1 + BAR}, change at most 1e-10: {'good' if good else 'NOT REACHED'}")
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--contributors", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; the system's place by default"
    )
    parser.add_argument("--cpu-time", action="store_true", help="judge by processor time: for busy machines")
    options = parser.parse_args()
    if options.contributors < 3 or options.rounds < 1:
        sys.exit("at least 3 contributors and 1 round")
    return options


if __name__ == "__main__":
    sys.exit(main())
