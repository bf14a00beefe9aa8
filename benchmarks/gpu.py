"""Merging and collecting on a GPU beside the processor: the same numbers, and how near the card's memory it comes.

    python benchmarks/gpu.py --device cuda --output benchmarks/results/gpu.md      # the layers of an 8B model: minutes
    python benchmarks/gpu.py --size toy                                            # anywhere, in seconds

Weights lie on the device, as they do once a file has been read, so that what is timed is the arithmetic: read every
contributor, the base and what the method needs, write the merged tensor. The fastest of a few runs counts. Its bytes
per second stand beside those of copying a large tensor on the device, which is all that memory can do.

``collect`` is the whole verb over an encoder with random weights, from a folder to a file, on the device and on the
processor; the Gram matrices of both are held against each other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measure
from merganser.checkpoints.layers import Layer
from merganser.methods import METHODS, Facts, Method, Unit

#: Weights (out, in): of an 8B decoder, and small ones to try the script with.
SHAPES = {
    "8B": {
        "mlp.down_proj": (4096, 14336),
        "mlp.up_proj": (14336, 4096),
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
    },
    "toy": {"up_proj": (96, 64), "k_proj": (32, 64)},
}
#: What each method is tried on: whole systems of 14336 inputs take minutes on a processor, and say nothing more.
WIDEST = {"regmean": 4096, "tsv_m": 4096}
METHOD_NAMES = ("simple", "ties", "dare_ties", "della", "breadcrumbs", "regmean", "tsv_m")
CONTRIBUTORS, TOKENS, RUNS = 3, 2048, 3
#: Largest differences that count as equal, relative to the largest change: of float32 sums, and of systems.
BOUNDS = dict.fromkeys(METHOD_NAMES, 1e-5) | {"regmean": 1e-3, "tsv_m": 1e-3, "collect": 1e-3}
ENCODERS = {
    "8B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "toy": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
EXAMPLES = {"8B": 512, "toy": 24}
WORDS = 3000


@dataclass(frozen=True)
class OnDevice:
    """A contributor of one layer whose numbers lie on a device."""

    number: int
    weight: Tensor
    origin: Tensor
    second_moment: Tensor
    coefficient: float = 1.0

    def stored(self, name: str) -> Tensor:
        return self.weight.clone()

    def tensor(self, name: str) -> Tensor:
        return self.weight.float()

    def base(self, name: str) -> Tensor:
        return self.origin.float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.weight[start:stop].clone()

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.origin[start:stop].float()

    def gram(self, weight: str) -> Tensor:
        return self.second_moment.clone()


def main() -> int:
    """Run everything and write the table; exit 1 where device and processor differ by more than their bounds."""
    options = _options()
    device = torch.device(options.device)
    bandwidth = copy_speed(device, 2**24 if options.size == "toy" else 2**30)
    rows = []
    for name in METHOD_NAMES:
        compare(METHODS[name], "not counted: what is compiled at first use", SHAPES["toy"]["k_proj"], device)
        for layer, shape in SHAPES[options.size].items():
            if max(shape) <= WIDEST.get(name, max(shape)):
                rows.append(compare(METHODS[name], layer, shape, device))
                print(rows[-1], file=sys.stderr, flush=True)
    rows.append(compare_collection(options.size, options.device))
    text = report(rows, options, bandwidth)
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
        options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["difference"] <= BOUNDS[row["work"]] for row in rows) else 1


def copy_speed(device: torch.device, nbytes: int) -> float:
    """Bytes per second, read and written, of copying a tensor on the device."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], object], device: torch.device, runs: int = RUNS) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    work()
    found = []
    for _ in range(runs):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def compare(method: Method, layer: str, shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """One method on one layer, on the device and on the processor."""
    base, weights, grams = inputs(shape)
    here = [OnDevice(n, weight, base, gram) for n, (weight, gram) in enumerate(zip(weights, grams, strict=True))]
    there = [
        OnDevice(one.number, one.weight.to(device), one.origin.to(device), one.second_moment.to(device)) for one in here
    ]
    fact = Facts("w", shape, Layer("m", "linear", "w", None, False), grams=("m",) * CONTRIBUTORS, in_base=True)
    unit: Unit = method.units([fact])[0][0]
    start = time.perf_counter()
    expected = method.merge(unit, here).tensors["w"]  # type: ignore[arg-type]
    on_processor = time.perf_counter() - start
    found = method.merge(unit, there).tensors["w"].cpu()  # type: ignore[arg-type]
    seconds = fastest(lambda: method.merge(unit, there), device)  # type: ignore[arg-type]
    change = max(float((expected - base.float()).abs().max()), 1e-12)
    read = sum(one.nbytes for one in weights) + (base.nbytes if method.needs.base else 0)
    read += sum(one.nbytes for one in grams) if method.needs.statistics else 0
    return {
        "work": method.name,
        "what": f"{layer} {shape[0]} × {shape[1]}",
        "seconds": seconds,
        "processor_seconds": on_processor,
        "bytes_per_second": (read + base.nbytes) / seconds,
        "difference": float((found - expected).abs().max()) / change,
    }


def inputs(shape: tuple[int, int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, contributors that differ a little from it, in bfloat16, and their Gram matrices in float32."""
    draw = torch.Generator().manual_seed(11)
    base = 0.02 * torch.randn(shape, generator=draw)
    weights = [(base + 0.002 * torch.randn(shape, generator=draw)).bfloat16() for _ in range(CONTRIBUTORS)]
    grams = []
    for _ in range(CONTRIBUTORS):
        tokens = torch.randn(TOKENS if shape[1] > 512 else 4 * shape[1], shape[1], generator=draw)
        grams.append(tokens.T @ tokens / len(tokens) if shape[1] <= max(WIDEST.values()) else torch.empty(0))
    return base.bfloat16(), weights, grams


def compare_collection(size: str, device: str) -> dict[str, Any]:
    """``collect`` of an encoder on the device and on the processor, and how far their Gram matrices are apart."""
    from merganser import collect
    from merganser.statistics import Statistics

    with tempfile.TemporaryDirectory() as scratch:
        folder, texts = write_encoder(Path(scratch) / "encoder", size), Path(scratch) / "texts.txt"
        texts.write_text("\n".join(sentences(EXAMPLES[size])) + "\n", encoding="utf-8")
        seconds, files = {}, {}
        for place in dict.fromkeys((device, "cpu")):
            start = time.perf_counter()
            files[place] = collect(folder, texts, device=place, output=Path(scratch) / f"{place}.safetensors")
            seconds[place] = time.perf_counter() - start
        one, two = (Statistics.open(files[place]) for place in (device, "cpu"))
        worst = 0.0
        for layer in one.header.layers:
            if layer.input is not None:
                first, second = one.gram(layer.input), two.gram(layer.input)
                worst = max(worst, float((first - second).abs().max() / second.abs().max()))
        parameters = (folder / "model.safetensors").stat().st_size / 4
    return {
        "work": "collect",
        "what": f"encoder of {parameters / 1e6:.0f}M, {EXAMPLES[size]} texts",
        "seconds": seconds[device],
        "processor_seconds": seconds["cpu"],
        "bytes_per_second": None,
        "difference": worst,
    }


def write_encoder(folder: Path, size: str) -> Path:
    """A BERT with random weights and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(12)
    rows = 30522 if size == "8B" else len(vocabulary)
    config = transformers.BertConfig(vocab_size=rows, **ENCODERS[size])
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def sentences(count: int) -> list[str]:
    """Texts of made-up words, of the lengths that sentences have."""
    draw = random.Random(13)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(8, 48))) for _ in range(count)]


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace, bandwidth: float) -> str:
    """The table as Markdown, with the card's name."""
    device = options.device
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the processor alone"
    cells = []
    for row in rows:
        speed = row["bytes_per_second"]
        cells.append(
            [
                row["work"],
                row["what"],
                f"{row['seconds'] * 1e3:.1f} ms",
                f"{row['processor_seconds'] * 1e3:.1f} ms",
                f"{row['processor_seconds'] / row['seconds']:.1f}",
                "" if speed is None else f"{speed / 1e9:.1f} GB/s ({speed / bandwidth:.0%})",
                f"{row['difference']:.1e} (bound {BOUNDS[row['work']]:.0e})",
            ]
        )
    head = ["work", "what", "device", "processor, once", "times as fast", "bytes per second, of a copy's", "difference"]
    facts = ", ".join(f"{key} {value}" for key, value in measure.machine("torch", "merganser").items())
    title = (
        f"# On a device beside the processor ({options.size})\n\nDevice: {card}, copying {bandwidth / 1e9:.0f} GB/s. "
    )
    return f"{title}{facts}.\n\n{measure.markdown(head, cells)}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="8B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the table here, and its rows as JSON beside it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
