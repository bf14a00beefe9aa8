"""Jobs, their outcomes, and what every engine does alike.

Nothing but JSON and the name of a function goes to where a job runs, and nothing but JSON comes back, so that
serial and distributed runs of a grid see the same values.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tqdm import tqdm

from merganser.errors import UserError
from merganser.progress import bar

_FRAMES = 5  # of a traceback, the innermost ones
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Job:
    """One independent part of a grid.

    Attributes:
        id: unlike every other job's.
        description: shown while it runs.
        payload: what its function is called with; JSON values only.
        cost: expected seconds; only their proportions matter.
        cpus, gpus: how many of each it takes; fractions are allowed.
        memory: bytes that it takes; 0 where that is not known.
    """

    id: str
    description: str
    payload: Mapping[str, Any]
    cost: float
    cpus: float = 1
    memory: int = 0
    gpus: float = 0


@dataclass(frozen=True)
class Outcome:
    """How a job has ended.

    Attributes:
        job: the job.
        result: what its function returned; None where it failed.
        error: the message of a :class:`UserError`, or a short traceback; None where it did not fail.
        seconds: wall time of the job itself, without waiting; 0 where it was lost with the machine it ran on.
    """

    job: Job
    result: Mapping[str, Any] | None
    error: str | None
    seconds: float


class Engine(ABC):
    """Runs independent jobs and hands out each outcome as soon as it is there."""

    name: ClassVar[str]

    def run(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        """Run all jobs. One that fails is an outcome with an error, and the others go on.

        Stopping the iteration, as an interrupt does, stops what is running.

        Args:
            jobs: what to run, in the order in which they are started.
            function: ``package.module:name`` of a function that takes a payload and returns a JSON mapping.
                It is imported where the job runs.

        Returns:
            The outcomes, in the order in which the jobs end.

        Raises:
            UserError: two jobs of one id, a malformed function name, or a job that this engine cannot run.
        """
        if len({job.id for job in jobs}) < len(jobs):
            raise UserError("two jobs have one id", mend="give every job an id of its own")
        if not _FUNCTION.fullmatch(function):
            raise UserError(f"{function!r} names no function", mend="write it as package.module:name")
        return self._outcomes(jobs, function)

    @abstractmethod
    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        """What :meth:`run` returns, for jobs and a function name that have been checked."""


def call(function: str, payload: str) -> str:
    """Call a function by name where the job runs.

    Args:
        function: ``package.module:name``.
        payload: its argument as JSON.

    Returns:
        JSON of ``result`` (None where it failed), ``error`` (None where it did not) and ``seconds``.
    """
    start = time.perf_counter()
    ended: dict[str, Any] = {"result": None, "error": None}
    try:
        result = _load(function)(json.loads(payload))
        if not isinstance(result, Mapping):
            raise TypeError(f"{function} returned {type(result).__name__}, not a mapping")
        ended["result"] = json.loads(json.dumps(dict(result)))  # what is no JSON fails here
    except UserError as error:
        ended["error"] = str(error)
    except Exception as error:
        ended["error"] = "".join(traceback.format_exception(error, limit=-_FRAMES)).strip()
    ended["seconds"] = round(time.perf_counter() - start, 3)
    return json.dumps(ended)


def outcome_of(job: Job, ended: str) -> Outcome:
    """The outcome of a job, from what :func:`call` returned."""
    content = json.loads(ended)
    return Outcome(job, content["result"], content["error"], content["seconds"])


def payload_of(job: Job) -> str:
    """A job's payload as JSON."""
    return json.dumps(dict(job.payload))


def job_bar(jobs: Sequence[Job], description: str) -> tqdm[Any]:
    """One bar for all jobs, to be advanced by the cost of each that has ended."""
    shown = bar(math.ceil(sum(job.cost for job in jobs)), description)
    shown.smoothing = 0  # the mean rate since the start: jobs differ too much for a recent one
    shown.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} to go"
    return shown


def describe(shown: tqdm[Any], description: str) -> None:
    """Change what a bar says; one that is not up yet stays hidden."""
    shown.set_description_str(description, refresh=shown.format_dict["elapsed"] > shown.delay)


def _load(function: str) -> Callable[[Any], Any]:
    module, name = function.split(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found
