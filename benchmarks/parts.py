"""What parts of merganser buy that could be left out: each beside what would take its place.

    OMP_NUM_THREADS=1 python benchmarks/parts.py --repeats 3
    python benchmarks/parts.py --only blas

One line of the table for each comparison; where time is measured, variants take turns within one run:

blas       the solver of RegMean (four contributors added, then solved) with ``merganser.blas``, and with the torch
           operations that it uses itself on other devices; one thread each
selection  TIES' threshold of a tall tensor and three contributors, piece by piece, and from whole tensors by
           ``torch.kthvalue`` (no slower than ``torch.topk``) and by NumPy's ``partition``; each run in a process of its
           own, with the memory that it takes beside its inputs, which are bfloat16 and in memory
storage    statistics in bfloat16 and as 64 eigenpairs: bytes of the files, and how far RegMean's weights move, relative
           to how far they are from the plain average; nothing random in it, so once
zoo        a small trained model, got from a zoo at ``memory://`` into an empty cache, and trained again

The exit status is 1 where two variants that have to agree do not. Memory is read from ``/proc`` (Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor

import measure
from checkpoints import Encoder, generator
from grams import encoder_family, gram_and_mean
from measure import Run
from merganser.lab.zoo import Entry, Zoo
from merganser.merging import Contributor, merge
from merganser.methods import sums
from merganser.methods.selection import kth_largest
from merganser.statistics import FILE_NAME, Statistics, write_statistics
from merganser.statistics.storage import compress
from merganser.tasks import Rows
from merganser.tasks.classification import TextClassification
from merganser.tensors import one_thread
from merganser.training import TrainingSettings, train

PARTS = ("blas", "selection", "storage", "zoo")
SYSTEMS = ((768, 3072), (3072, 768))  # inputs and outputs of the layers that are solved for
ALPHA = 0.9
SAME = 1e-4  # largest difference of two solutions in float32 that counts as equal, of the largest weight
TALL = (20_000, 4096)
DENSITY = 0.2
ENCODER = Encoder(layers=2, hidden=384, intermediate=1536, vocabulary=1000)
STORAGES = ("float32", "bfloat16", "lowrank:64")
WORDS = 2000  # of the vocabulary of the model that is trained
LENGTH = 32  # words in a text


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        part: which part.
        variant: what is compared.
        figure: what was measured.
        results: how the results of the variants compare.
        agrees: whether they are as they have to be.
    """

    part: str
    variant: str
    figure: str
    results: str
    agrees: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; exit 1 if results differ that must not."""
    options = _options(arguments)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        parts: dict[str, Callable[[], list[Line]]] = {
            "blas": lambda: blas(options.repeats),
            "selection": lambda: selection(options.repeats),
            "storage": lambda: storage(Path(folder)),
            "zoo": lambda: zoo(options.repeats, Path(folder)),
        }
        for name in [options.only] if options.only else PARTS:
            lines += parts[name]()
    print(f"\n{measure.machine_line(measure.machine('transformers', 'numpy'))}")
    print(f"{options.repeats} rounds, medians.\n")
    rows = ([line.part, line.variant, line.figure, line.results] for line in lines)
    print(measure.markdown(["part", "variant", "figure", "results"], rows))
    return 0 if all(line.agrees for line in lines) else 1


def blas(repeats: int, systems: Sequence[tuple[int, int]] = SYSTEMS, contributors: int = 4) -> list[Line]:
    """The solver with merganser's OpenBLAS, and with torch's operations in its place."""
    lines = []
    for width, height in systems:
        grams = [gram_and_mean(f"inputs of {width}", width, number)[0] for number in range(contributors)]
        weights = _family((height, width), contributors, torch.float32)[1:]
        found: dict[bool, Tensor] = {}
        solve = partial(_solve, weights, grams, found)
        with one_thread():
            variants = {"OpenBLAS": measure.timed(solve), "torch": measure.timed(partial(solve, by_torch=True))}
            runs = measure.take_turns(variants, repeats)
        distance = float((found[False] - found[True]).abs().max() / found[True].abs().max())
        what = f"solver of RegMean, {width} inputs, {height} outputs: torch's operations in place of OpenBLAS"
        results = f"differ by at most {distance:.1e} of the largest weight"
        lines.append(Line("blas", what, _times(runs, "torch", "OpenBLAS"), results, distance < SAME))
    return lines


def _solve(
    weights: Sequence[Tensor], grams: Sequence[Tensor], found: dict[bool, Tensor], *, by_torch: bool = False
) -> None:
    """Solve as RegMean does, and keep the solution in ``found``."""
    patched = mock.patch.multiple(sums, add_product_=add_product_, cholesky_=cholesky_, solve_cholesky_=solve_cholesky_)
    with patched if by_torch else nullcontext():
        system = sums.GramSums(dtype=None)
        for weight, gram in zip(weights, grams, strict=True):
            system.add(weight, gram, 1.0, ALPHA)
        found[by_torch] = system.solve(0.0).value


def add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`merganser.blas.add_product_` by torch."""
    return out.addmm_(left, right, alpha=scale)


def cholesky_(matrix: Tensor) -> bool:
    """:func:`merganser.blas.cholesky_` by torch."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    matrix.copy_(factor)
    return not int(info) and bool(matrix.diagonal().isfinite().all())


def solve_cholesky_(right: Tensor, lower: Tensor) -> Tensor:
    """:func:`merganser.blas.solve_cholesky_` by torch."""
    lower = lower.tril()
    half = torch.linalg.solve_triangular(lower.T, right, upper=True, left=False)
    return right.copy_(torch.linalg.solve_triangular(lower, half, upper=False, left=False))


def selection(repeats: int, shape: tuple[int, int] = TALL, contributors: int = 3) -> list[Line]:
    """Thresholds piece by piece, and of whole tensors."""
    found: dict[str, list[float]] = {}

    def apart(name: str) -> Callable[[], Run]:
        def run() -> Run:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                result, found[name] = pool.submit(thresholds, name, shape, contributors).result()
            return result

        return run

    runs = measure.take_turns({name: apart(name) for name in SELECTIONS}, repeats)
    lines = []
    for name in list(SELECTIONS)[1:]:
        memory = [f"{statistics.median(run.resident for run in runs[of]) / 1e9:.2f} GB" for of in ("pieces", name)]
        figure = f"{_times(runs, name, 'pieces')}; {memory[1]} of memory beside {memory[0]}"
        agrees = found[name] == found["pieces"]
        what = f"threshold of {shape[0]:,} x {shape[1]:,}, {contributors} contributors: {name} in place of pieces"
        lines.append(Line("selection", what, figure, "the same thresholds" if agrees else "DIFFERENT", agrees))
    return lines


def thresholds(name: str, shape: tuple[int, int], contributors: int) -> tuple[Run, list[float]]:
    """Time, peak of memory beside the inputs, and thresholds of a variant; meant for a process of its own."""
    torch.set_num_threads(1)
    base, *tuned = _family(shape, contributors, torch.bfloat16)
    before = _reset_peak()
    start = time.perf_counter()
    found = SELECTIONS[name](base, tuned, int(DENSITY * base.numel()))
    return Run(time.perf_counter() - start, resident=max(_memory("VmHWM") - before, 0)), found


def _in_pieces(base: Tensor, tuned: list[Tensor], k: int) -> list[float]:
    def magnitudes(start: int, stop: int) -> list[Tensor]:
        return [_magnitudes(base[start:stop], one[start:stop]) for one in tuned]

    return kth_largest(magnitudes, base.shape[0], base.shape[1], [k] * len(tuned))


def _by_torch(base: Tensor, tuned: list[Tensor], k: int) -> list[float]:
    return [float(numbers.kthvalue(len(numbers) - k + 1).values) for numbers in _whole(base, tuned)]


def _by_numpy(base: Tensor, tuned: list[Tensor], k: int) -> list[float]:
    found = []
    for numbers in _whole(base, tuned):
        place = len(numbers) - k
        numbers.numpy().partition(place)  # in place, without a copy
        found.append(float(numbers[place]))
    return found


def _whole(base: Tensor, tuned: list[Tensor]) -> Iterator[Tensor]:
    """All magnitudes of each contributor, one after the other in the same memory."""
    buffer = torch.empty(base.shape)
    for one in tuned:
        for start in range(0, len(base), 100):  # so that nothing else is as large
            rows = slice(start, start + 100)
            buffer[rows] = _magnitudes(base[rows], one[rows])
        yield buffer.flatten()


SELECTIONS: Mapping[str, Callable[[Tensor, list[Tensor], int], list[float]]] = {
    "pieces": _in_pieces,
    "`torch.kthvalue`": _by_torch,
    "NumPy's `partition`": _by_numpy,
}


def _magnitudes(base: Tensor, one: Tensor) -> Tensor:
    return one.to(torch.float32).sub_(base).abs_()


def _family(shape: tuple[int, int], contributors: int, dtype: torch.dtype) -> list[Tensor]:
    """A base's tensor and the contributors', as ``checkpoints.py`` draws them; by rows, to take little memory."""
    height, width = shape
    found = [torch.empty(shape, dtype=dtype) for _ in range(contributors + 1)]
    draw = generator("a family of tensors")
    for start in range(0, height, 100):
        rows = slice(start, min(start + 100, height))
        origin = torch.randn(rows.stop - start, width, generator=draw).mul_(0.02)
        found[0][rows] = origin
        for one in found[1:]:
            one[rows] = torch.randn(origin.shape, generator=draw).mul_(0.0005).add_(origin)
    return found


def _reset_peak() -> int:
    """Let the peak of this process's resident memory begin anew, and say what is resident now.

    ``ru_maxrss`` will not do: it cannot be reset, and begins with that of the process which started this one.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def storage(
    scratch: Path, encoder: Encoder = ENCODER, contributors: int = 3, storages: Sequence[str] = STORAGES
) -> list[Line]:
    """Bytes of statistics by storage, the first of which is float32, and what the merge loses."""
    models = encoder_family(scratch, encoder, contributors)
    average = _numbers(merge(models, scratch / "average", method="simple").path)
    merged, sizes = {}, {}
    for name in storages:
        files = []
        for number, model in enumerate(models):
            copy = scratch / f"{name.replace(':', '-')}-{number}.safetensors"
            files.append(write_statistics(copy, *compress(Statistics.open(model / FILE_NAME), name)))
        given = [Contributor(model=str(m), statistics=str(f)) for m, f in zip(models, files, strict=True)]
        output = scratch / f"regmean-{name.replace(':', '-')}"
        merged[name] = _numbers(merge(given, output, method="regmean", options={"alpha": ALPHA}).path)
        sizes[name] = sum(file.stat().st_size for file in files)
    exact = merged["float32"]
    gain, lines = float((exact - average).norm()), []
    for name in storages[1:]:
        error = float((merged[name] - exact).norm()) / gain
        size = f"{sizes[name] / sizes['float32']:.1%} of the bytes"
        size += f" ({_megabytes(sizes[name])} of {_megabytes(sizes['float32'])})"
        results = f"RegMean's weights move by {error:.1e} of their distance to the average"
        what = f"statistics of {contributors} encoders, {encoder.layers} x {encoder.hidden}: "
        what += f"`{name}` in place of `float32`"
        lines.append(Line("storage", what, size, results, error < 1))
    return lines


def _numbers(model: str | Path) -> Tensor:
    """All of a model's weights in a row."""
    tensors = load_file(Path(model) / "model.safetensors")
    return torch.cat([tensors[name].to(torch.float64).flatten() for name in sorted(tensors)])


def zoo(repeats: int, scratch: Path, examples: int = 320, **sizes: int) -> list[Line]:
    """Getting a trained model from a zoo that another machine shares, and training it."""
    base = _small_bert(scratch / "base", **sizes)
    url = f"memory://{uuid4().hex}/zoo"
    here, there = Zoo(url, cache=scratch / "here"), Zoo(url, cache=scratch / "there")
    keys: list[dict[str, Any]] = []
    agree: list[bool] = []
    nbytes = 0

    def trained() -> Run:
        seconds = 0.0

        def make(folder: Path) -> dict[str, Any]:
            nonlocal seconds
            start = time.perf_counter()
            settings = TrainingSettings(epochs=3, max_length=LENGTH)
            arguments: dict[str, Any] = {"labels": ("even", "odd"), "settings": settings, "seed": len(keys)}
            quietly: dict[str, Any] = {"overwrite": True, "device": "cpu", "on_step": lambda done, of: None}
            train(base, TextClassification(), _texts(examples), output=folder, **arguments, **quietly)
            seconds = time.perf_counter() - start
            return {}

        keys.append({"made for": "a benchmark", "round": len(keys)})
        here.build(keys[-1], make)
        return Run(seconds)

    def got() -> Run:
        nonlocal nbytes
        start = time.perf_counter()
        entry = there.get(keys[-1])
        seconds = time.perf_counter() - start
        made = here.get(keys[-1])
        if entry is None or made is None:
            raise RuntimeError("the zoo has lost a model")
        same = all(_bytes(entry, file) == _bytes(made, file) for file in made.files)
        agree.append(same and entry.path != made.path)
        nbytes = sum(record.size for record in made.files.values())
        return Run(seconds)

    runs = measure.take_turns({"training": trained, "fetching": got}, repeats)
    what = f"BERT of {_megabytes(nbytes)}, 3 epochs of {examples} texts: training again in place of fetching"
    same = all(agree)
    return [Line("zoo", what, _times(runs, "training", "fetching"), "the same bytes" if same else "DIFFERENT", same)]


def _bytes(entry: Entry, file: str) -> bytes:
    return (entry.path / file).read_bytes()


def _small_bert(
    folder: Path, hidden_size: int = 256, num_hidden_layers: int = 4, intermediate_size: int = 1024, heads: int = 4
) -> Path:
    """A random BERT with a tokenizer that knows the words ``w0``, ``w1``, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokens = [*special.values(), *(f"w{number}" for number in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        max_position_embeddings=2 * LENGTH,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _texts(count: int) -> Rows:
    """Random words, labelled by whether the first one's number is even."""
    draws = torch.randint(WORDS, (count, LENGTH), generator=generator("texts")).tolist()
    texts = [" ".join(f"w{number}" for number in draw) for draw in draws]
    labels = ["odd" if draw[0] % 2 else "even" for draw in draws]
    rows = tuple({"text": text, "label": label} for text, label in zip(texts, labels, strict=True))
    return Rows("random", rows, tuple(("random", number) for number in range(1, count + 1)))


def _times(runs: Mapping[str, Sequence[Run]], slow: str, fast: str) -> str:
    """How many times as long one takes as the other within a round: median, least and largest; and their medians."""
    ratios = [a.seconds / b.seconds for a, b in zip(runs[slow], runs[fast], strict=True)]
    medians = [statistics.median(run.seconds for run in runs[name]) for name in (slow, fast)]
    seconds = " beside ".join(f"{median:.3g} s" for median in medians)
    return f"{statistics.median(ratios):.3g} times the time ({min(ratios):.3g} to {max(ratios):.3g}; {seconds})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which variants take turns")
    parser.add_argument("--scratch", type=Path, help="folder for a temporary one  [default: the system's]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
