"""What ``merganser merge`` is given: models, a recipe, or a file of mergekit, which may hold several merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merganser.cli.common import warn
from merganser.cli.plans import show_plan

if TYPE_CHECKING:
    from merganser.merging import RunSettings
    from merganser.merging.mergekit import Stage


@dataclass(frozen=True)
class Source:
    """What is to be merged, before the flags that change it.

    Attributes:
        values: of a recipe.
        where: they stand.
        reads: the files that say so.
        stages: of a file of mergekit, the merges in the order in which they are made; ``values`` are the last one's.
    """

    values: Mapping[str, Any]
    where: str = "command line"
    reads: tuple[Path, ...] = ()
    stages: tuple[Stage, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What means something else here than in mergekit."""
        return self.stages[-1].notes if self.stages else ()

    def explained(self, flags: Mapping[str, Any]) -> str:
        """The recipe as YAML, with the flags in it; behind those of the merges whose results it uses."""
        from merganser.merging.mergekit import Stage, explain_stages

        last = Stage(None, {**self.values, **flags}, self.notes, self.where)
        return explain_stages([*self.stages[:-1], last])


def read_source(
    models: Sequence[str], coefficients: Sequence[float] | None, statistics: Sequence[str], intermediate: Path
) -> Source:
    """Read what the command line names.

    Args:
        models: or one YAML file.
        coefficients: of the models.
        statistics: files, one for each of the models.
        intermediate: the folder for the results of a file's earlier merges.

    Raises:
        click.UsageError: coefficients or statistics beside a recipe.
        UserError: what is wrong in a file.
    """
    from merganser.merging.merge import contributors_of

    if len(models) > 1 or Path(models[0]).suffix not in (".yaml", ".yml"):
        return Source({"contributors": contributors_of(models, coefficients, statistics or None)})
    from merganser.merging import load_recipe
    from merganser.merging.mergekit import read_stages

    file = Path(models[0])
    stages = tuple(read_stages(file, intermediate))
    values = stages[-1].recipe if stages else load_recipe(file)
    if coefficients or statistics:
        raise click.UsageError("--weights and --statistics go with models; in a recipe they belong to contributors")
    return Source(values, models[0], (file,), stages)


def check_effect(source: Source, options: Mapping[str, Any]) -> None:
    """Flags win over a file, but not over what it says of single contributors, which would leave them without effect.

    Raises:
        RecipeError: every contributor has an option of its own, or what mergekit takes where its file says nothing.
    """
    from merganser.errors import RecipeError

    people = [one if isinstance(one, Mapping) else {} for one in source.values.get("contributors") or ()]
    for name in options:
        if people and all(name in (one.get("options") or {}) for one in people):
            what = f"every contributor of {source.where} has its own {name}, which counts"
            mend = f"leave the flag out, and change {name} in the file"
            raise RecipeError(what, where=f"--option {name}", mend=mend)


def show_ready_stages(source: Source, flags: Mapping[str, Any], settings: RunSettings, as_json: bool) -> bool:
    """Print the plans of the earlier merges that are not made yet and can be planned; whether there are any.

    Where there are, what uses their results cannot be planned.
    """
    if not source.stages[:-1]:
        return False
    from merganser.merging import prepare
    from merganser.merging.mergekit import ready_stages, stage_recipe

    ready = ready_stages(source.stages)
    for stage in ready:
        warn(f"{stage.name}: the plan of what others need; these are planned once it is there")
        show_plan(prepare(stage_recipe(stage, flags), None, settings, reads=source.reads), as_json)
    return bool(ready)


def make_earlier_stages(source: Source, flags: Mapping[str, Any], settings: RunSettings, *, overwrite: bool) -> None:
    """Make the results that the last merge of a file uses, where it uses any.

    Raises:
        UserError: what cannot be merged; the results that are finished stay.
    """
    if not source.stages[:-1]:
        return
    from merganser.merging.mergekit import make_intermediates

    make_intermediates(source.stages, flags, settings, overwrite=overwrite, reads=source.reads, tell=warn)
