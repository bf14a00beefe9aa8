"""The rows that an experiment trains, chooses and reports on, and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from merganser.lab.grid.config import Partitions, SuiteConfig
from merganser.lab.suites import SUITES
from merganser.lab.suites.base import ALL, DEV, TEST, TRAIN, Suite, with_options
from merganser.lab.suites.partition import partition
from merganser.tasks.columns import Columns, texts
from merganser.tasks.data import Rows, sample, selected
from merganser.tasks.labels import LabelSpace
from merganser.tasks.regression import Regression

#: Which part of a data set: its number from 0, the seed of the cut, and how it is cut.
Cut = tuple[int, int, Partitions]


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
        self._rows: dict[tuple[Any, ...], Rows] = {}
        self._digests: dict[tuple[Any, ...], str] = {}

    def rows(self, set_name: str, split: str, part: Cut | None = None) -> Rows:
        """A split of a data set, or a seeded sample of it where the configuration limits it; or a part of that.

        Raises:
            DataError: see :meth:`Suite.read`.
        """
        place = (set_name, split, part)
        if place not in self._rows:
            if part is not None:
                self._rows[place] = self._cut(set_name, split, *part)
            else:
                limits = self.config.limits
                limit = {TRAIN: limits.train, DEV: limits.dev, TEST: limits.test, ALL: limits.test}[split]
                self._rows[place] = sample(self.suite.read(set_name, split), limit, self.config.sample_seed)
        return self._rows[place]

    def digest(self, set_name: str, split: str, part: Cut | None = None) -> str:
        """The hash of :meth:`rows`."""
        place = (set_name, split, part)
        if place not in self._digests:
            self._digests[place] = digest(self.rows(*place))
        return self._digests[place]

    def space(self, set_name: str, config: Mapping[str, Any] | None = None) -> LabelSpace:
        """The labels that a data set is scored over; those of a model's configuration where it names none."""
        labels = self.suite.labels(set_name)
        return LabelSpace(tuple(labels)) if labels else self.suite.task(set_name).space(config or {})

    def truth(self, set_name: str, split: str) -> Any:
        """What is to be predicted of each row.

        Raises:
            DataError: a row whose label is missing or not known.
        """
        rows, task = self.rows(set_name, split), self.suite.task(set_name)
        return task.references(rows, task.columns(rows, Columns()), self.space(set_name))

    def check(self, set_name: str, split: str) -> None:
        """Read every text of a split and what is to be predicted of it.

        Raises:
            DataError: a row whose text or label is missing, malformed or not known.
        """
        self.truth(set_name, split)
        rows = self.rows(set_name, split)
        columns = self.suite.task(set_name).columns(rows, Columns())
        for role, name in (("text", columns.text), ("text_pair", columns.text_pair)):
            if name is not None:
                texts(rows, name, role)

    def _cut(self, set_name: str, split: str, index: int, seed: int, partitions: Partitions) -> Rows:
        """One part of a data set's rows (PAPER: non-IID partition), of those that the limit leaves."""
        rows = self.rows(set_name, split)
        truth: list[int | float] = np.asarray(self.truth(set_name, split)).tolist()
        total, regression = min(partitions.total, len(rows)), isinstance(self.suite.task(set_name), Regression)
        parts = partition(truth, partitions.parts, total, seed, iid=partitions.iid, regression=regression)
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
