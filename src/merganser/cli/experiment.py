"""``merganser experiment``: a whole grid from YAML files."""

from __future__ import annotations

import json
from typing import Any

import click

from merganser.cli.common import make_cluster, print_table, quiet_libraries, warn

_LISTS = {"--templates", "--filter-model"}


class _ListOptions(click.Command):
    """``--templates a=1 b=2`` and ``--filter-model a b`` take every word up to the next option or YAML file."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Spread the lists, and accept the original's spelling (``--config``, ``--filter_model``)."""
        spread: list[str] = []
        current = ""
        for word in arguments:
            if word.startswith("--"):
                option = (
                    "--" + word[2:].split("=")[0].replace("_", "-") + word[2:][len(word[2:].split("=")[0]) :]
                )
                current = option if option in _LISTS else ""
                if option not in _LISTS and option != "--config":
                    spread.append(option)
            elif current and not word.endswith((".yaml", ".yml")):
                spread += [current, word]
            else:
                current = ""
                spread.append(word)
        return super().parse_args(context, spread)


@click.command("experiment", cls=_ListOptions)
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG.yaml…")
@click.option("--templates", multiple=True, metavar="NAME=VALUE…", help="Values of {name} in the files.")
@click.option("--filter-model", multiple=True, metavar="NAME…", help="Keep these contributors only.")
@click.option("--results", default="results", show_default=True, help="Folder of the results.")
@click.option("--zoo", help="Folder or URL of the zoo.  [default: $MERGANSER_ZOO or ~/.cache/merganser/zoo]")
@click.option("--engine", type=click.Choice(["serial", "ray"]), default="serial", show_default=True)
@click.option("--ray-address", help="Of a running cluster.  [default: $RAY_ADDRESS or auto]")
@click.option("--dry-run", is_flag=True, help="List the models and cells and what is cached; do nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: as JSON.")
def experiment_command(
    configs: tuple[str, ...],
    templates: tuple[str, ...],
    filter_model: tuple[str, ...],
    results: str,
    zoo: str | None,
    engine: str,
    ray_address: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run every cell of a grid: models are taken from the zoo or trained, then merged, compared and scored.

    Several files are merged left to right. Killed at any point, the same command goes on.
    """
    quiet_libraries()
    from merganser.experiments.grid.loading import load_config
    from merganser.experiments.grid.run import plan_experiment, run_experiment
    from merganser.experiments.zoo import default_zoo

    config = load_config(configs, templates=_pairs(templates), keep=filter_model)
    for remark in config.remarks():
        warn(remark)
    place = zoo or str(default_zoo())
    if dry_run:
        _show_plan(config.name, plan_experiment(config, results=results, zoo=place), as_json)
        return
    done = run_experiment(
        config, results=results, zoo=place, engine=make_cluster(engine, ray_address, "experiment")
    )
    for failure in done.failures:
        warn(f"{failure.job}: {failure.error}")
    warn(f"{done.done} cells done, {done.cells} in all; next: merganser report {done.folder}")
    click.echo(str(done.folder))
    if done.failures:
        from merganser.errors import UserError

        raise UserError(
            f"{len(done.failures)} jobs could not be done; finished cells are kept",
            where=config.name,
            mend="mend what is said above and give the same command again",
        )


def _pairs(templates: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in templates:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--templates")
        found[name] = value
    return found


def _show_plan(name: str, lines: list[Any], as_json: bool) -> None:
    if as_json:
        found = [
            {"what": line.what, "description": line.description, "cached": line.cached} for line in lines
        ]
        click.echo(json.dumps({"experiment": name, "plan": found}, indent=1, ensure_ascii=False))
        return
    rows = [[line.what, line.description, "cached" if line.cached else "to do"] for line in lines]
    print_table(name, ["what", "description", "state"], rows)
    models = [line for line in lines if line.what == "model"]
    cells = [line for line in lines if line.what != "model"]
    click.echo(
        f"{len(models)} models ({sum(not m.cached for m in models)} to train), "
        f"{len(cells)} cells ({sum(not c.cached for c in cells)} to do)"
    )
