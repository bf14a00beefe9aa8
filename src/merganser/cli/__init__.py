"""The command line: data on standard output, progress and warnings on standard error.

Exit status: 0 done, 1 unexpected, 2 something for the user to mend, 128 + n stopped by signal n. Heavy imports happen
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys

import click

from merganser import __version__
from merganser.cli.signals import interrupted_by_signals
from merganser.errors import FileError, UserError

#: Command → module of this package that defines a click command of that name, and the line that --help shows.
COMMANDS = {
    "collect": ("collect", "Compute the statistics of a model next to its data."),
    "merge": ("merge", "Merge models into one."),
    "methods": ("methods", "List the merging methods, or explain one."),
    "moe": ("moe", "Make a mixture of experts of dense models."),
    "extract": ("extract", "Write what a model changed in its base as a LoRA adapter."),
    "ledger": ("ledger", "Keep the sums of a merge: models join and leave one at a time."),
    "evaluate": ("evaluate", "Score models on data sets."),
    "inspect": ("inspect", "Show what a model, statistics file or merge holds."),
    "stats": ("stats", "Add, weight, compress and compare statistics files."),
    "verify": ("verify", "Check a merge against its provenance, and signatures."),
    "reproduce": ("verify", "Repeat a merge and compare byte for byte."),
    "sign": ("verify", "Sign a merge, a checkpoint or a statistics file."),
    "experiment": ("experiment", "Run a grid of merges and comparators from YAML files."),
    "benchmark": ("benchmark", "Run every method on every suite, its options chosen once on development data."),
    "report": ("report", "Make a page of an experiment's results."),
    "zoo": ("zoo", "List, show and remove trained models."),
    "demo": ("demo", "Fine-tune, collect, merge and compare, on real data."),
}

#: What keeps other libraries' banners off the terminal and their reports off the network.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


class LazyGroup(click.Group):
    """A group that imports a command when it is called or asked for help."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All commands, in the order that one uses them."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command, imported now."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"merganser.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, with the nearest valid name for an unknown one."""
        if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
            from merganser.errors import did_you_mean

            context.fail(f"no command {arguments[0]!r}. {did_you_mean(arguments[0], COMMANDS)}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Statistics are computed from private text and can leak some of it: read docs/statistics.md.",
)
@click.version_option(__version__, prog_name="merganser")
def cli() -> None:
    """Fuse fine-tuned language models by merging their weights, without anyone's training data."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    gc.set_threshold(200_000, 20, 50)  # importing torch makes a million objects, none of them garbage
    signals: list[signal.Signals] = []
    try:
        with interrupted_by_signals() as signals:
            cli.main(args=arguments, prog_name="merganser", standalone_mode=False)
    except UserError as error:
        click.echo(f"merganser: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        by = f" by {signals[0].name}" if signals else ""
        click.echo(f"merganser: stopped{by}; nothing half-written is left", err=True)
        sys.exit(128 + signals[0] if signals else 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away
        sys.exit(0)
    except OSError as error:  # a name that no file can have, a folder that may not be read
        if error.filename is None:
            raise
        unusable = FileError(
            f"cannot be used: {error.strerror}", where=os.fsdecode(error.filename), mend="check the path"
        )
        click.echo(f"merganser: {unusable}", err=True)
        sys.exit(2)
    finally:
        gc.freeze()  # nor is there anything to be found in them at the end
    sys.exit(0)
