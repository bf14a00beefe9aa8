"""What a merge loses when its statistics are collected from fewer examples or tokens.

    merganser demo -o demo-out
    python benchmarks/collect_quality.py demo-out
    python benchmarks/collect_quality.py demo-out --variants exact sample=0.25 tolerance=0.05 --seeds 0 1 2

Takes the specialists and the texts of a finished demo. For each variant the statistics of every specialist are
collected anew from the texts that the demo took, into files of their own; the specialists are merged by RegMean and
the merge is scored on every domain's test. Prints macro-F1 × 100 averaged over the domains, and what it loses against
``exact``: all tokens of all texts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import logging as transformers_logging

from merganser.collection import collect
from merganser.evaluation import evaluate
from merganser.merging import merge
from merganser.statistics import Statistics

OPTIONS = {"sample": "sample_tokens", "tolerance": "until_converged"}
VARIANTS = ("exact", "sample=0.25", "tolerance=0.05", "sample=0.25,tolerance=0.05")


def main() -> int:
    """Run the comparison; exit 1 if a variant loses more than ``--limit`` points on the mean of its seeds."""
    options = _options()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = yaml.safe_load((options.demo / "demo.yaml").read_text("utf-8"))
    domains = sorted(p.name for p in (options.demo / "data").iterdir() if (options.demo / "models" / p.name).is_dir())
    print(f"domains: {', '.join(domains)}")
    print(f"{'variant':30}{'seed':>5}{'macro-F1':>10}{'loss':>8}  texts and tokens used, by domain")
    exact: float | None = None
    worst = 0.0
    for variant in dict.fromkeys(["exact", *options.variants]):
        chosen = parse(variant)
        losses = []
        for seed in options.seeds if chosen else [0]:
            score, used = run(options.demo, domains, settings, {**chosen, "seed": seed})
            exact = score if exact is None else exact
            losses.append(exact - score)
            print(f"{variant:30}{seed:5}{score:10.2f}{losses[-1]:8.2f}  {used}", flush=True)
        mean = statistics.mean(losses)
        worst = max(worst, mean)
        print(f"{variant:30} mean{'':10}{mean:8.2f}", flush=True)
    print(f"\nlargest mean loss {worst:.2f}, limit {options.limit}: {'good' if worst < options.limit else 'NO'}")
    return 0 if worst < options.limit else 1


def parse(variant: str) -> dict[str, Any]:
    """``sample=0.25,tolerance=0.05`` as arguments of ``collect``."""
    pairs = [part.split("=") for part in variant.split(",") if part != "exact"]
    return {OPTIONS[name]: float(value) for name, value in pairs}


def run(demo: Path, domains: list[str], settings: dict[str, Any], chosen: dict[str, Any]) -> tuple[float, str]:
    """The merge's mean score, and how many texts its statistics were collected from."""
    models = [demo / "models" / name for name in domains]
    tests = [demo / "data" / name / "test.jsonl" for name in domains]
    with tempfile.TemporaryDirectory() as folder:
        files = [
            collect(
                model,
                demo / "data" / model.name / "train.jsonl",
                limit=settings["statistics"]["examples"],
                max_length=settings["training"]["max_length"],
                output=Path(folder) / f"{model.name}.safetensors",
                **chosen,
            )
            for model in models
        ]
        headers = [Statistics.open(file).header for file in files]
        used = ", ".join(f"{header.examples} ({header.tokens})" for header in headers)
        merged = merge(models, Path(folder) / "merged", method="regmean", statistics=files)
        found = evaluate([merged], tests, max_length=settings["training"]["max_length"])
        return 100 * statistics.mean(row.scores["macro_f1"] for row in found.rows), used


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--limit", type=float, default=0.2, help="points that a variant may lose")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
