"""The engine for a cluster: one Ray task a job, on whatever machine has room for it.

    ray start --head --disable-usage-stats --include-dashboard=false        # on one machine
    ray start --address=HOST:6379 --disable-usage-stats                     # on each of the others

A job whose worker or machine is lost runs again elsewhere; a job that fails by itself does not. merganser and
the job's files must be found under the same names on every machine.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from merganser.engines.base import Engine, Job, Outcome, call, job_bar, outcome_of, payload_of
from merganser.errors import UserError, require

_START = "start one with: ray start --head --disable-usage-stats --include-dashboard=false"
_WAIT = 1.0  # seconds between two looks at the bar
_CONNECT = 10.0  # seconds for a cluster's address to answer


class RayEngine(Engine):
    """Runs jobs on an existing Ray cluster, which is left running.

    Args:
        address: ``host:port`` of the cluster; ``auto`` or None: what ``RAY_ADDRESS`` says, else the cluster that
            this machine belongs to.
        retries: how often a job runs again after its worker or machine was lost.
        environment: environment variables for the jobs.
        resources: what each job takes of the resources that the cluster's owner has named, besides cpus,
            memory and gpus.
        description: what the jobs are for, shown in front of the bar.
    """

    name = "ray"

    def __init__(
        self,
        address: str | None = "auto",
        *,
        retries: int = 3,
        environment: Mapping[str, str] | None = None,
        resources: Mapping[str, float] | None = None,
        description: str = "experiment",
    ) -> None:
        self.address, self.retries, self.description = address, retries, description
        self.environment, self.resources = dict(environment or {}), dict(resources or {})

    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        ray = _import_ray()
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, self.address)
        grid = _ClusterJobs(ray, self, function)
        try:
            if problem := grid.too_large(jobs):
                raise UserError(problem, where="--engine ray", mend="ask for less, or add a larger machine")
            with job_bar(jobs, self.description) as shown:
                for job in jobs:
                    grid.submit(job, attempt=1)
                while grid.running:
                    yield from grid.step(shown)
                    _tell(shown, f"{self.description} [{len(jobs) - len(grid.running)}/{len(jobs)}]")
        finally:
            for task in reversed(grid.running):  # after an interrupt; what waits first, lest it start
                ray.cancel(task, force=True)
            if ours:
                ray.shutdown()  # leaves the cluster, which goes on


class _ClusterJobs:
    """The jobs that the cluster has been given and that have not ended.

    Attributes:
        running: task → job, and the how many-th attempt at it this is.
    """

    def __init__(self, ray: Any, engine: RayEngine, function: str) -> None:
        self.ray, self.engine, self.function = ray, engine, function
        self.running: dict[Any, tuple[Job, int]] = {}
        self.warned = False

    def submit(self, job: Job, attempt: int) -> None:
        """Hand a job to the cluster. Ray is not to repeat it: :meth:`step` does, and says so."""
        options: dict[str, Any] = {"num_cpus": job.cpus, "num_gpus": job.gpus, "max_retries": 0}
        if job.memory:
            options["memory"] = job.memory
        if self.engine.resources:
            options["resources"] = self.engine.resources
        if self.engine.environment:
            options["runtime_env"] = {"env_vars": self.engine.environment}
        task = self.ray.remote(call).options(name=job.id, **options).remote(self.function, payload_of(job))
        self.running[task] = (job, attempt)

    def step(self, shown: tqdm[Any]) -> Iterator[Outcome]:
        """Wait a second at most; the outcomes of what has ended, while what was lost is submitted again."""
        ended, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_WAIT)
        for task in ended:
            job, attempt = self.running.pop(task)
            outcome = _result(self.ray, job, task, again=attempt <= self.engine.retries)
            if outcome is None:
                shown.write(f"{job.description}: its worker was lost, so it runs again", file=sys.stderr)
                self.submit(job, attempt + 1)
                continue
            shown.update(job.cost)
            yield outcome
        if not ended and not self.warned:
            problem = self.too_large([job for job, _ in self.running.values()])
            if problem:  # machines have left; they may come back
                shown.write(f"waiting, because {problem}", file=sys.stderr)
                self.warned = True

    def too_large(self, jobs: Sequence[Job]) -> str | None:
        """What is wrong where a job is too large for every machine: Ray would wait without a word."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for job in jobs:
            wanted = {"CPU": job.cpus, "GPU": job.gpus, "memory": job.memory, **self.engine.resources}
            if not any(all(node.get(key, 0) >= value for key, value in wanted.items()) for node in nodes):
                asked = ", ".join(f"{value:g} {key}" for key, value in wanted.items() if value)
                return f"no machine of the cluster has room for {job.description!r}, which takes {asked}"
        return None


def _tell(shown: tqdm[Any], description: str) -> None:
    """Change what the bar says, and show it when the time has come: logs get a line now and then."""
    now = time.time()
    due = now - shown.last_print_t >= shown.mininterval and shown.format_dict["elapsed"] > shown.delay
    shown.set_description_str(description, refresh=due)
    if due:
        shown.last_print_t = now


def _result(ray: Any, job: Job, task: Any, *, again: bool) -> Outcome | None:
    """The outcome of an ended task; None when it was lost and may run ``again``."""
    errors = ray.exceptions
    lost = (
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.LocalRayletDiedError,
        errors.OutOfMemoryError,
        errors.ObjectLostError,
        errors.RaySystemError,
    )
    try:
        return outcome_of(job, ray.get(task))
    except lost as error:
        return None if again else Outcome(job, None, f"its worker was lost: {_first_line(error)}", 0.0)
    except errors.RayError as error:  # such as merganser missing on that machine: the same again next time
        return Outcome(job, None, str(error).strip(), 0.0)


def _import_ray() -> Any:
    require("ray", "this engine", "ray", where="--engine ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return importlib.import_module("ray")


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster as a driver.

    Raises:
        UserError: there is none, or it runs other versions of Python or Ray.
    """
    given = os.environ.get("RAY_ADDRESS", "auto") if address in (None, "auto") else address
    where = f"--ray-address {given}"
    if given != "auto":
        _check_reachable(str(given), where)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=given, log_to_driver=False, logging_level=logging.ERROR)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process with another status
    except ConnectionError as error:
        raise UserError("there is no Ray cluster", where=where, mend=_START) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster cannot be joined: {_first_line(error)}",
            where=where,
            mend="use the same versions of Python and Ray on every machine",
        ) from error


def _check_reachable(address: str, where: str) -> None:
    """Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{address!r} is no address", where=where, mend="write host:port, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers there: {error}", where=where, mend=_START) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
