"""What adding a contributor to a ledger costs: the 16th against the 2nd, and what adding and removing leave behind.

Contributors are a random base model with noise and random statistics, made one at a time and deleted. First a ledger is
filled, each add timed once. Then the bar: the same contributor is added, as the 2nd to a ledger of one and as the last
to a ledger of all the others, in turns, so that whatever else the machine does falls on both. Beside it a plain copy
of the same bytes, flushed to disk.

    python benchmarks/ledger.py --rounds 9
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
from dataclasses import dataclass
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
    """Run it; exit 1 if the last add costs over 10 % more than the second, or removing leaves over 1e-10."""
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
        print(f"threads      {options.threads or os.cpu_count()}; load average {os.getloadavg()[0]:.2f}", flush=True)
        fill(place, options)
        pairs = take_turns(place, options)
        error = left_behind(place, options)
    return report(pairs, error, options)


@dataclass(frozen=True)
class Add:
    """Seconds of processors and of the clock for one add, and of the clock for a copy of the same bytes after it."""

    cpu: float
    wall: float
    copy: float


def fill(place: Path, options: argparse.Namespace) -> None:
    """Fill a ledger but for the last contributor; kept as it was after the first one, too."""
    folder = ledger.init(place / "full", place / "base")
    for k in range(1, options.contributors):
        model = contributor(place, k)
        add = timed_add(folder, model, 1 + k % 3, options.threads)
        shutil.rmtree(model)
        if k == 1:
            shutil.copytree(folder, place / "one")
            print(f"sums         {sums_of(folder).stat().st_size / 1e6:.0f} MB")
        load = os.getloadavg()[0]
        print(f"add {k:2}       {add.cpu:6.2f} s of processors, {add.wall:6.2f} s; load {load:.1f}", flush=True)


def take_turns(place: Path, options: argparse.Namespace) -> list[tuple[Add, Add]]:
    """The cost of adding one contributor as the second and as the last; who goes first changes."""
    model = contributor(place, 999_999)
    pairs = []
    for turn in range(options.rounds):
        found = {}
        for name in ("one", "full") if turn % 2 else ("full", "one"):
            folder = shutil.copytree(place / name, place / "turn")
            found[name] = timed_add(folder, model, 1.0, options.threads)
            shutil.rmtree(folder)
        second, last = found["one"], found["full"]
        pairs.append((second, last))
        print(
            f"turn {turn + 1:2}      2nd {second.cpu:6.2f} {second.wall:6.2f}   {options.contributors}th "
            f"{last.cpu:6.2f} {last.wall:6.2f}   a copy {second.copy:5.2f}   load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    shutil.rmtree(model)
    return pairs


def left_behind(place: Path, options: argparse.Namespace) -> float:
    """What adding one of coefficient 1000 and removing it changes of the solved model, relative."""
    folder, model = place / "full", contributor(place, 1_000_000)
    before = load_file(ledger.solve(folder, place / "before", dtype="F64") / "model.safetensors")
    ledger.add(folder, model, coefficient=1000, threads=options.threads)
    ledger.remove(folder, model, threads=options.threads)
    after = load_file(ledger.solve(folder, place / "after", dtype="F64") / "model.safetensors")
    floats = [name for name, tensor in before.items() if tensor.is_floating_point()]
    return max(float((after[n] - before[n]).norm() / before[n].norm().clamp_min(1e-300)) for n in floats)


def timed_add(folder: Path, model: Path, coefficient: float, threads: int | None) -> Add:
    """Add and copy."""
    wall, cpu = time.perf_counter(), time.process_time()
    ledger.add(folder, model, coefficient=coefficient, threads=threads)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Add(cpu, wall, copy(folder.parent, [sums_of(folder), model / "model.safetensors", model / FILE_NAME]))


def sums_of(folder: Path) -> Path:
    """The file of a ledger's sums."""
    return folder / str(ledger.show(folder).file)


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
    return {f"gram.{layer.module}": pack_upper((gram + gram.T) / 2), f"mean.{layer.module}": inputs.mean(dim=0)}


def report(pairs: list[tuple[Add, Add]], error: float, options: argparse.Namespace) -> int:
    """Print medians and ratios; 0 if the bars are reached. The verdict goes by the median of the turns' ratios."""
    verdict = 0.0
    print()
    for name in ("cpu", "wall"):
        seconds = [(getattr(second, name), getattr(last, name)) for second, last in pairs]
        ratios = sorted(last / second for second, last in seconds)
        ratio = statistics.median(ratios)
        early, late = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(
            f"{name:5} 2nd {early:.2f} s, {options.contributors}th {late:.2f} s (medians); "
            f"ratio: median {ratio:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )
        if (name == "cpu") == options.cpu_time:
            verdict = ratio
    print(f"a copy of the same bytes: {statistics.median(add.copy for pair in pairs for add in pair):.2f} s")
    print(f"added with coefficient 1000 and removed: the solved model changes by {error:.1e}, relative")
    good = verdict <= 1 + BAR and error <= 1e-10
    print(f"bars: ratio at most {1 + BAR}, change at most 1e-10: {'good' if good else 'NOT REACHED'}")
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--contributors", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; the system's place by default")
    parser.add_argument("--cpu-time", action="store_true", help="judge by processor time: for busy machines")
    options = parser.parse_args()
    if options.contributors < 3 or options.rounds < 1:
        sys.exit("at least 3 contributors and 1 round")
    return options


if __name__ == "__main__":
    sys.exit(main())
