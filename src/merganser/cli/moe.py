"""``merganser moe``: dense models into a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import print_table, quiet_libraries, tell, warn
from merganser.files import human_bytes

if TYPE_CHECKING:
    from merganser.merging.moe.planning import MoePlan


@click.command("moe")
@click.argument("path", type=click.Path(path_type=Path), metavar="CONFIG.yaml")
@click.option("-o", "--output", metavar="FOLDER|URL", help="Where to write.")
@click.option("--seed", type=click.IntRange(0), help="Of random routers and noise.  [default: the file's, or 0]")
@click.option("--allow-same", is_flag=True, help="All experts may be one model (of use only before training).")
@click.option("--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only).")
@click.option("--threads", type=click.IntRange(1), help="Tensors and prompts at once.  [default: all cores]")
@click.option("--max-memory", metavar="SIZE", help="What the writing may take, such as 2GB; the result is the same.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="cpu",
    show_default=True,
    help="Where the base model runs on the prompts.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier merge has written, and nothing else.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
def moe_command(
    path: Path,
    output: str | None,
    seed: int | None,
    allow_same: bool,
    max_shard_size: str,
    overwrite: bool,
    dry_run: bool,
    **run: Any,
) -> None:
    """Make a mixture of experts of dense models.

    \b
    merganser moe experts.yaml -o mixture

    CONFIG.yaml is what mergekit-moe reads: base_model, experts with source_model, positive_prompts and
    negative_prompts, gate_mode (hidden, cheap_embed, random), experts_per_token, shared_experts. docs/moe.md has the
    keys.
    """
    if output is None and not dry_run:
        raise click.UsageError("where to? Add -o FOLDER (or --dry-run to see the plan)")
    from merganser.merging.memory import RunSettings, keep_freed
    from merganser.merging.moe.build import write_moe
    from merganser.merging.moe.config import load_config, make_config
    from merganser.merging.moe.planning import plan_moe

    quiet_libraries()
    values = load_config(path)
    if seed is not None:
        values = {**values, "seed": seed}
    config = make_config(values, str(path), allow_same=allow_same)
    settings = RunSettings.make(**run)
    made = plan_moe(config, max_shard_size=max_shard_size, allow_pickle=settings.allow_pickle)
    for note in made.plan.notes:
        warn(note)
    if dry_run or output is None:  # without a place only a dry run comes here
        show_moe(made)
        return
    keep_freed()
    result = write_moe(made, output, settings, overwrite=overwrite, reads=[path])
    for note in result.notes[len(made.plan.notes) :]:
        warn(note)
    warn(f"{human_bytes(result.plan.bytes_written)} written in {result.seconds:.1f} s")
    click.echo(output)


def show_moe(made: MoePlan) -> None:
    """The plan on standard output."""
    config, plan = made.config, made.plan
    title = f"{len(config.experts)} experts in a {made.architecture.name} ({config.experts_per_token} a token)"
    rows = [[part.method, str(part.tensors), human_bytes(part.nbytes)] for part in plan.treatments]
    print_table(title, ["what", "tensors", "size"], rows)
    tell(f"routers: {config.gate_mode}; reads {human_bytes(plan.bytes_read)}, writes {human_bytes(plan.bytes_written)}")
