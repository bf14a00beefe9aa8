"""Where the jobs of a grid run: one after the other here, several at once in processes, or all over a Ray cluster."""

from __future__ import annotations

from typing import Any

from merganser.engines.base import Engine, Job, Outcome
from merganser.engines.processes import ProcessEngine
from merganser.engines.ray import RayEngine
from merganser.engines.serial import SerialEngine
from merganser.errors import UserError, did_you_mean

__all__ = ["ENGINES", "Engine", "Job", "Outcome", "ProcessEngine", "RayEngine", "SerialEngine", "make_engine"]

#: Every engine by name.
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (SerialEngine, ProcessEngine, RayEngine)}


def make_engine(name: str, **settings: Any) -> Engine:
    """An engine by name.

    Args:
        name: of :data:`ENGINES`.
        settings: the arguments of its class, such as ``address`` of :class:`RayEngine`.

    Raises:
        UserError: an unknown name.
    """
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}", where="--engine", mend=did_you_mean(name, ENGINES))
    return ENGINES[name](**settings)
