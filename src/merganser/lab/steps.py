"""A long job as a list of steps that is taken up again where it was stopped.

The journal, a JSON file, remembers the job's configuration and what each finished step has found out. A step
counts as finished when the journal lists it and all that it makes is still there; the first one that is not,
and everything after it, is done (again).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser import progress
from merganser.errors import DataError, UserError
from merganser.lab.old_report import write_text

#: Tells the display which share of the step is done, from 0 to 1.
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Step:
    """One part of a job.

    Attributes:
        name: shown, and the key in the journal.
        cost: expected seconds; only their proportions matter.
        run: does the work and returns JSON values worth keeping.
        makes: files and folders that the step leaves behind.
    """

    name: str
    cost: float
    run: Callable[[Advance], Mapping[str, Any]]
    makes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Done:
    """What the journal knows of a finished step: wall time in seconds, and what ``run`` returned."""

    name: str
    seconds: float
    facts: Mapping[str, Any]


class Journal:
    """The record of a job in a folder.

    Args:
        path: the JSON file.
        configuration: JSON values that decide the job's results.
        done: the finished steps, in order.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any], done: Sequence[Done] = ()) -> None:
        self.path, self.configuration, self.done = path, dict(configuration), list(done)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Read a journal.

        Raises:
            DataError: it is no journal.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            done = [
                Done(step["name"], float(step["seconds"]), dict(step["facts"])) for step in content["steps"]
            ]
            return cls(path, dict(content["configuration"]), done)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"unreadable journal: {error}", where=path, mend="delete the folder, or choose another"
            ) from error

    def write(self) -> None:
        """Save it, whole or not at all."""
        steps = [{"name": step.name, "seconds": step.seconds, "facts": step.facts} for step in self.done]
        content = {"configuration": self.configuration, "steps": steps}
        write_text(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def differences(self, configuration: Mapping[str, Any]) -> list[str]:
        """The settings that differ, as ``key: recorded → asked``."""
        asked = json.loads(json.dumps(configuration))  # as it would be read back
        keys = sorted(self.configuration.keys() | asked.keys())
        return [
            f"{key}: {_short(self.configuration.get(key))} → {_short(asked.get(key))}"
            for key in keys
            if self.configuration.get(key) != asked.get(key)
        ]


def run_steps(steps: Sequence[Step], journal: Journal, *, description: str) -> dict[str, Done]:
    """Run what is not finished, under one bar with the remaining time of the whole job on standard error.

    Raises:
        UserError: two steps of one name.
    """
    if len({step.name for step in steps}) < len(steps):
        raise UserError("two steps have one name", mend="give every step a name of its own")
    finished = _finished(steps, journal)
    journal.done = journal.done[:finished]
    with progress.bar(math.ceil(sum(step.cost for step in steps[finished:])), description) as shown:
        shown.smoothing = 0  # the mean rate since the start: steps differ too much for a recent one
        shown.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} to go"
        for step in steps[finished:]:
            late = shown.format_dict["elapsed"] > shown.delay  # a bar that is not up yet stays hidden
            shown.set_description_str(f"{description}: {step.name}", refresh=late)
            start, before = time.perf_counter(), shown.n

            def advance(share: float, step: Step = step, before: float = before) -> None:
                shown.update(before + step.cost * min(1.0, share) - shown.n)

            facts = step.run(advance)
            advance(1.0)
            journal.done.append(Done(step.name, round(time.perf_counter() - start, 2), dict(facts)))
            journal.write()
    return {step.name: step for step in journal.done}


def _finished(steps: Sequence[Step], journal: Journal) -> int:
    """How many of the first steps need not be done again."""
    for index, step in enumerate(steps):
        recorded = journal.done[index].name if index < len(journal.done) else None
        if recorded != step.name or not all(path.exists() for path in step.makes):
            return index
    return len(steps)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
