"""The rows that an experiment trains, chooses and reports on, and their hashes."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import numpy as np

from merganser.lab.grid.config import Partitions, SuiteConfig
from merganser.lab.suites import SUITES
from merganser.lab.suites.base import ALL, DEV, TEST, TRAIN, Suite, with_options
from merganser.lab.suites.partition import partition
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, sample, selected
from merganser.tasks.labels import LabelSpace
from merganser.tasks.regression import Regression


class Data:
    """The data of an experiment: a suite, seen through the configuration's limits. Rows are read once.

    Args:
        config: of the suite.
    """

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config
        self.suite: Suite = with_options(SUITES[config.name], config.root, config.options)
        #: What models are trained by: options that only change the scores do not change the models.
        kept = {name: value for name, value in config.options.items() if name not in self.suite.scoring}
        self.training_suite: Suite = with_options(SUITES[config.name], config.root, kept)
        self._rows: dict[tuple[str, str], Rows] = {}
        self._digests: dict[tuple[str, str], str] = {}

    def rows(self, set_name: str, split: str) -> Rows:
        """A split of a data set, or a seeded sample of it where the configuration limits it.

        Raises:
            DataError: see :meth:`Suite.read`.
        """
        if (set_name, split) not in self._rows:
            limits = self.config.limits
            limit = {TRAIN: limits.train, DEV: limits.dev, TEST: limits.test, ALL: limits.test}[split]
            rows = self.suite.read(set_name, split)
            self._rows[set_name, split] = sample(rows, limit, self.config.sample_seed)
        return self._rows[set_name, split]

    def digest(self, set_name: str, split: str) -> str:
        """The hash of :meth:`rows`."""
        if (set_name, split) not in self._digests:
            self._digests[set_name, split] = digest(self.rows(set_name, split))
        return self._digests[set_name, split]

    def part(self, set_name: str, index: int, seed: int, partitions: Partitions) -> Rows:
        """One part of a data set's training rows (PAPER: non-IID partition), of those that the limit leaves."""
        rows = self.rows(set_name, TRAIN)
        task = self.suite.task(set_name)
        space = LabelSpace(self.suite.labels(set_name))
        truth = task.references(rows, task.columns(rows, Columns()), space)
        parts = partition(
            list(np.asarray(truth).tolist()),
            partitions.parts,
            min(partitions.total, len(rows)),
            seed,
            iid=partitions.iid,
            regression=isinstance(task, Regression),
        )
        return selected(rows, parts[index])


@lru_cache(maxsize=4)
def data_of(config: str) -> Data:
    """The data of a suite's configuration (its JSON), read once in each process."""
    return Data(SuiteConfig.model_validate_json(config))


def digest(rows: Rows) -> str:
    """The sha256 of the rows' content, whatever file they came from."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(f"{_CANONICAL.encode(row)}\n".encode())
    return hashed.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=_plain)
