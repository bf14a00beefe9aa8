"""``merganser demo``: the whole story on real data."""

from __future__ import annotations

from pathlib import Path

import click

from merganser.cli.common import quiet_libraries, warn


@click.command("demo")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="demo-out", show_default=True, help="Folder.")
@click.option("--fast", is_flag=True, help="A smaller run.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of everything that is random.")
@click.option("--overwrite", is_flag=True, help="Begin anew in the folder of another demo.")
def demo_command(output: Path, fast: bool, seed: int, overwrite: bool) -> None:
    """Fine-tune four specialists of a real encoder, collect their statistics, merge and compare.

    A run that was stopped goes on where it was when the same command is given again.
    """
    quiet_libraries()
    from merganser.cli.report import print_sections
    from merganser.lab.demo import demo_sections, run_demo

    report = run_demo(output, fast=fast, seed=seed, overwrite=overwrite)
    print_sections(demo_sections(output))
    warn(f"the same with plots and provenance: {report}")
    click.echo(str(report))
