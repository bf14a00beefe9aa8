"""``merganser experiment``: a whole grid from YAML files."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from merganser.cli.common import make_cluster, print_table, quiet_libraries, split_pairs, warn
from merganser.errors import UserError, raise_all

if TYPE_CHECKING:
    from merganser.lab.grid.planning import Plan, Planned

Command = TypeVar("Command", bound=Callable[..., Any])

#: Options of experiments and benchmarks that take every word up to the next option or YAML file.
_LISTS = {"--templates", "--filter-model", "--only", "--seeds"}
#: What is made beside models and cells.
MADE = ("multi-task models", "gram matrices", "fisher information", "kronecker factors")
#: The original's word before the files.
_CONFIGS = {"--config", "--configs", "--config-file", "--config-files"}


class ListOptions(click.Command):
    """``--templates a=1 b=2`` and ``--filter-model a b`` take every word up to the next option or YAML file."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Spread the lists, and accept the original's spelling (``--config_files``, ``--filter_model``)."""
        spread: list[str] = []
        current = ""
        for word in arguments:
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                option = name.replace("_", "-") + equals + value
                current = option if option in _LISTS else ""
                if option not in _LISTS | _CONFIGS:
                    spread.append(option)
            elif current and not word.endswith((".yaml", ".yml")):
                spread += [current, word]
            else:
                current = ""
                spread.append(word)
        return super().parse_args(context, spread)


def run_options(command: Command) -> Command:
    """What experiments and benchmarks alike are told of how they run."""
    for option in reversed(
        (
            click.option(
                "--allow-pickle",
                is_flag=True,
                help="Accept models that are published as pickles (read with weights_only).",
            ),
            click.option("--engine", type=click.Choice(["serial", "ray"]), default="serial", show_default=True),
            click.option(
                "--workers",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Jobs at once, in processes.",
            ),
            click.option("--ray-address", help="Of a running cluster.  [default: $RAY_ADDRESS or auto]"),
            click.option(
                "--dry-run",
                is_flag=True,
                help="Check every input, show what is there, what is left and how long it takes.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command("experiment", cls=ListOptions)
@click.argument("configs", nargs=-1, metavar="CONFIG…")
@click.option("--templates", multiple=True, metavar="NAME=VALUE…", help="Values of {name} in the files.")
@click.option("--filter-model", multiple=True, metavar="NAME…", help="Keep these contributors only.")
@click.option("--results", default="results", show_default=True, help="Folder of the results.")
@click.option(
    "--zoo",
    help="Folder or URL of the zoo.  [default: local_zoo_dir of the files, $MERGANSER_ZOO or ~/.cache/merganser/zoo]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto, a GPU where there is one]")
@run_options
@click.option("--prepare", is_flag=True, help="Stop when the zoo holds the models and statistics that are needed.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run or --list: as JSON.")
@click.option("--list", "listing", is_flag=True, help="Name the experiments that come with merganser.")
def experiment_command(
    configs: tuple[str, ...],
    templates: tuple[str, ...],
    filter_model: tuple[str, ...],
    results: str,
    zoo: str | None,
    device: str | None,
    allow_pickle: bool,
    engine: str,
    workers: int,
    ray_address: str | None,
    dry_run: bool,
    prepare: bool,
    as_json: bool,
    listing: bool,
) -> None:
    """Run every cell of a grid: models are taken from the zoo or trained, then merged, compared and scored.

    \b
    merganser experiment --list
    merganser experiment emotion-pairwise-roberta-base --templates resources=my-corpora --dry-run
    merganser experiment defaults.yaml datasets/emotion.yaml mine.yaml --filter-model model0 model1

    CONFIG is a YAML file, or the name of one that comes with merganser. Several are merged left to right. Killed at
    any point, the same command goes on.
    """
    from merganser.lab.grid.loading import load_config, named_configurations

    if listing:
        _show_names(named_configurations(), as_json)
        return
    if not configs:
        raise click.UsageError("Missing argument 'CONFIG…': a YAML file or a name of --list.")
    quiet_libraries()
    from merganser.lab.grid.run import run_experiment
    from merganser.lab.zoo import default_zoo

    config = load_config(configs, templates=split_pairs(templates, "--templates", "NAME=VALUE"), keep=filter_model)
    if device is not None:
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"device": device})})
    place = zoo or config.local_zoo_dir or str(default_zoo())
    if dry_run:
        from merganser.lab.grid.planning import plan_experiment

        _show_plan(config.name, plan_experiment(config, results=results, zoo=place, allow_pickle=allow_pickle), as_json)
        return
    cluster = make_cluster(engine, ray_address, "experiment", workers)
    options = {"allow_pickle": allow_pickle, "only_prepare": prepare}
    done = run_experiment(config, results=results, zoo=place, engine=cluster, **options)
    for failure in done.failures:
        more = f"\n    left out for it: {failure.cells} cells" if failure.cells else ""
        warn(f"{failure.job}: {failure.error}{more}", lines=True)
    warn(f"{done.done} cells done, {done.cells} in all; next: merganser report {done.folder}")
    click.echo(str(done.folder))
    if done.failures:
        what = f"{len(done.failures)} jobs could not be done; finished cells are kept"
        raise UserError(what, where=config.name, mend="mend what is said above and give the same command again")


def _show_names(names: Mapping[str, str], as_json: bool) -> None:
    """Whole experiments with what they are, then the parts that the original's command line combines."""
    if as_json:
        click.echo(json.dumps(names, indent=1, ensure_ascii=False))
        return
    whole = {name: text for name, text in names.items() if text}
    width = max(map(len, whole))
    for name, text in whole.items():
        click.echo(textwrap.fill(f"{name:{width}}  {text}", 100, subsequent_indent=" " * (width + 2)))
    parts = [f"{name}.yaml" for name, text in names.items() if not text]
    click.echo("\nParts, to be combined from left to right (defaults, a data set, an experiment):")
    click.echo(textwrap.fill(", ".join(parts), 100, break_on_hyphens=False, break_long_words=False))


def _show_plan(name: str, plan: Plan, as_json: bool) -> None:
    """A line a group, or as JSON every single one; mistakes come last and make the exit status 2."""
    groups: dict[str, list[Planned]] = {}
    for line in plan.lines:
        groups.setdefault(line.group, []).append(line)
    for remark in plan.remarks:
        warn(remark)
    if as_json:
        values: dict[str, Any] = {"experiment": name, "plan": [], "also": []}
        for line in plan.lines:
            fields = {"what": line.what, "description": line.description, "cached": line.cached, "state": line.state}
            values["also" if line.what in MADE else "plan"].append(fields)
        values["summary"] = {
            group: {"all": len(lines), "cached": sum(line.cached for line in lines)} for group, lines in groups.items()
        }
        values["estimate"] = asdict(plan.estimate)
        values["problems"] = list(map(str, plan.problems))
        click.echo(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        rows = []
        for group, lines in groups.items():
            left = Counter(line.verb for line in lines if not line.cached)
            told = ", ".join(f"{count} {verb}" for verb, count in left.items())
            rows.append([group, str(len(lines)), str(len(lines) - left.total()), told])
        print_table(name, ["what", "all", "there", "left"], rows)
        click.echo(_told(plan))
    raise_all(plan.problems)


def _told(plan: Plan) -> str:
    """The plan in one sentence, with the time that it takes."""
    from merganser.lab.report.sections import duration

    counted = []
    for what, noun in (("model", "models"), ("multi-task models", "multi-task models")):
        states = [line.state for line in plan.lines if line.what == what]
        counted += [f"{len(states)} {noun} ({states.count('to train')} to train)"] if states else []
    cells = [line for line in plan.lines if line.what not in ("model", *MADE)]
    counted.append(f"{len(cells)} cells ({sum(not cell.cached for cell in cells)} to do)")
    seconds, reason = plan.estimate.seconds, plan.estimate.reason
    if seconds is None:
        return f"{', '.join(counted)}; how long it takes cannot be said: {reason}"
    long = duration(seconds) if seconds < 100 * 3600 else f"{seconds / 86400:.0f} days"
    return f"{', '.join(counted)}; about {long} in one process on this machine ({reason})"
