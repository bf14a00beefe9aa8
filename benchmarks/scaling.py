"""How the time of a merge grows: over 2…16 contributors, and over 20M…1.1B parameters of three contributors.

    python benchmarks/scaling.py /scratch --rounds 3
    python benchmarks/scaling.py /scratch --only contributors --size 50M

Whole commands in turns, warm cache. More than three contributors are further links to the same three checkpoints,
since a family of sixteen would not fit every disk: each is opened, read and hashed on its own, but the page cache
holds it once. A line is fitted to the medians by least squares; its intercept is what a command costs before the
first tensor. The exponent is that of a power law fitted after the intercept is taken off, so that start-up does not
pass for good scaling.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import measure
from measure import PROGRAM, Run

CONTRIBUTORS = (2, 3, 4, 6, 8, 12, 16)
SHOWN = {"simple": "Weighted average", "ties": "TIES"}


def main() -> int:
    """Measure, fit, plot and write the tables."""
    options = _options()
    sizes = [size for size in checkpoints.SIZES if counted(size) <= counted(options.largest)]
    axes: dict[str, tuple[str, dict[float, Command]]] = {}
    if options.only in (None, "contributors"):
        title = f"contributors of {options.size} parameters each"
        axes["contributors"] = (title, by_contributors(options.scratch, options.size))
    if options.only in (None, "parameters"):
        title = "million parameters of each of three contributors"
        axes["parameters"] = (title, by_parameters(options.scratch, sizes))
    methods = [options.method] if options.method else list(SHOWN)
    curves: dict[str, dict[str, Any]] = {}
    for axis, (title, points) in axes.items():
        for method in methods:
            print(f"{method} over {axis}", file=sys.stderr)
            variants = {str(x): _variant(command, method, options.scratch) for x, command in points.items()}
            runs = measure.take_turns(variants, options.rounds)
            seconds = {float(x): statistics.median(r.seconds for r in found) for x, found in runs.items()}
            if len(seconds) > 2:
                memory = {float(x): max(r.anonymous for r in found) for x, found in runs.items()}
                curves[f"{axis}, {method}"] = {
                    "axis": title,
                    "method": method,
                    "seconds": seconds,
                    "peak_anonymous_bytes": memory,
                    **fit(seconds),
                }
    if not curves:
        return 1
    found = measure.machine("matplotlib")
    suffix = "".join(f"-{part}" for part in (options.only, options.method) if part)
    text = f"# Growth of a merge's time\n\n{measure.machine_line(found)}\nMedians of {options.rounds} rounds.\n"
    text += f"\n![time]({plot(curves, options.results, f'scaling{suffix}')})\n"
    for curve in curves.values():
        text += f"\n## {SHOWN[curve['method']]}: {curve['axis']}\n\n{table(curve)}"
    measure.save(f"scaling{suffix}", text, {"machine": found, "curves": curves}, options.results)
    return 0


Command = tuple[list[Path], Path]  # contributors and their base


def by_contributors(scratch: Path, size: str) -> dict[float, Command]:
    """Merges by their number of contributors."""
    base, models = checkpoints.llama_family(scratch, size)
    links = scratch / f"llama-{size}" / "links"
    links.mkdir(exist_ok=True)
    everyone = []
    for number in range(max(CONTRIBUTORS)):
        link = links / f"model-{number}"
        if not link.is_symlink():
            link.symlink_to(models[number % len(models)].resolve())
        everyone.append(link)
    return {float(count): (everyone[:count], base) for count in CONTRIBUTORS}


def by_parameters(scratch: Path, sizes: Sequence[str]) -> dict[float, Command]:
    """Merges by their millions of parameters."""
    points = {}
    for size in sizes:
        base, models = checkpoints.llama_family(scratch, size)
        points[round(counted(size) / 1e6, 1)] = (models, base)
    return points


def counted(size: str) -> int:
    """The number of parameters of a size."""
    return checkpoints.parameters(checkpoints.SIZES[size].shapes())


def _variant(command: Command, method: str, scratch: Path) -> Callable[[], Run]:
    models, base = command
    output = scratch / "outputs-scaling"
    line = [str(PROGRAM), "merge", *map(str, models), "--method", method, "-o", str(output)]
    line += ["--base", str(base), "--option", "density=0.5"] if method == "ties" else []

    merge = measure.command(line, output)

    def run() -> Run:
        measure.warm({model.resolve() for model in [*models, base]})
        return merge()

    return run


def fit(seconds: Mapping[float, float]) -> dict[str, float]:
    """The least-squares line through the points, its R², and the exponent of what lies above its intercept."""
    xs, ys = list(seconds), list(seconds.values())
    slope, intercept = _line(xs, ys)
    mean = statistics.fmean(ys)
    left = sum((y - intercept - slope * x) ** 2 for x, y in seconds.items())
    above = {x: y - intercept for x, y in seconds.items() if y > intercept}
    exponent, _ = _line([math.log(x) for x in above], [math.log(y) for y in above.values()])
    plain, _ = _line([math.log(x) for x in xs], [math.log(y) for y in ys])
    return {
        "slope": slope,
        "intercept": intercept,
        "r_squared": 1 - left / sum((y - mean) ** 2 for y in ys),
        "exponent": exponent,
        "exponent_with_start": plain,
    }


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    found = statistics.linear_regression(xs, ys)
    return found.slope, found.intercept


def table(curve: Mapping[str, Any]) -> str:
    """A curve's points and its fit."""
    memory = curve["peak_anonymous_bytes"]
    cells = [
        [f"{x:g}", f"{y:.2f} s", f"{curve['intercept'] + curve['slope'] * x:.2f} s", f"{memory[x] / 1e9:.2f} GB"]
        for x, y in curve["seconds"].items()
    ]
    line = (
        f"\n{curve['intercept']:.2f} s + {curve['slope']:.4f} s · x, R² {curve['r_squared']:.4f}; "
        f"exponent {curve['exponent']:.2f} above the intercept, {curve['exponent_with_start']:.2f} with it.\n"
    )
    return measure.markdown([curve["axis"], "median", "line", "peak anonymous"], cells) + line


def plot(curves: Mapping[str, Mapping[str, Any]], folder: Path, name: str) -> str:
    """Points and lines, a panel an axis, as SVG; returns the file's name."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "merganser"
    from matplotlib import pyplot

    titles = list(dict.fromkeys(curve["axis"] for curve in curves.values()))
    figure, panels = pyplot.subplots(1, len(titles), figsize=(5.2 * len(titles), 3.6), squeeze=False)
    for panel, title in zip(panels[0], titles, strict=True):
        for curve in (curve for curve in curves.values() if curve["axis"] == title):
            xs = [0.0, *curve["seconds"]]
            label = f"{SHOWN[curve['method']]} (R² {curve['r_squared']:.3f})"
            points = panel.plot(list(curve["seconds"]), list(curve["seconds"].values()), "o", label=label)
            panel.plot(
                xs, [curve["intercept"] + curve["slope"] * x for x in xs], color=points[0].get_color(), linewidth=1
            )
        panel.set_xlabel(title)
        panel.set_ylabel("seconds")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    return f"{name}.svg"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for checkpoints and outputs")
    parser.add_argument("--size", choices=checkpoints.SIZES, default="100M", help="for the contributors")
    parser.add_argument("--largest", choices=checkpoints.SIZES, default="1.1B", help="for the parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["contributors", "parameters"])
    parser.add_argument("--method", choices=SHOWN, help="one of them  [default: both]")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the tables")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
