"""The engine that needs nothing: one job after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merganser.engines.base import Engine, Job, Outcome, call, describe, job_bar, outcome_of, payload_of


class SerialEngine(Engine):
    """Runs jobs in their order, here. What they say of cpus, memory and gpus changes nothing.

    Args:
        description: what the jobs are for, shown in front of the bar.
    """

    name = "serial"

    def __init__(self, *, description: str = "experiment") -> None:
        self.description = description

    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        with job_bar(jobs, self.description) as shown:
            for number, job in enumerate(jobs, 1):
                describe(shown, f"{self.description} [{number}/{len(jobs)}]: {job.description}")
                outcome = outcome_of(job, call(function, payload_of(job)))
                shown.update(job.cost)
                yield outcome
