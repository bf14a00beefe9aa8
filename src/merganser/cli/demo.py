"""``merganser demo``: the whole story on real data."""

from __future__ import annotations

from pathlib import Path

import click

from merganser.cli.common import quiet_libraries, warn


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="demo-out", show_default=True, help="Folder."
)
@click.option("--fast", is_flag=True, help="A smaller run.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of everything that is random.")
@click.option("--overwrite", is_flag=True, help="Replace a demo of other settings.")
def demo_command(output: Path, fast: bool, seed: int, overwrite: bool) -> None:
    """Fine-tune four specialists of a real encoder, collect their statistics, merge them four ways, compare.

    A run that was stopped goes on where it was when the same command is given again.
    """
    quiet_libraries()
    from rich.console import Console

    from merganser.lab.demo import demo_table, run_demo

    report = run_demo(output, fast=fast, seed=seed, overwrite=overwrite)
    Console().print(demo_table(output))
    warn(f"the same with plots and provenance: {report}")
    click.echo(str(report))
