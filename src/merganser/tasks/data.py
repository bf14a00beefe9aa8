"""Rows of text from a file, a folder, a data set of the ``datasets`` library or memory; each row knows its place.

read_rows("reviews.jsonl")                       read_rows("glue:sst2", split="validation")
read_rows("corpora/sst2", split="train")         read_rows("glue:sst2[validation]")
read_rows(["a text", "another"])                 read_rows([{"text": "a text", "label": 1}])
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from merganser.errors import DataError, UserError, did_you_mean, require
from merganser.paths import described, expanded, is_name, path_text
from merganser.tasks.files import READERS, Row, read_file

_SPLIT_SUFFIX = re.compile(r"(?P<source>.+)\[(?P<split>[\w.-]+)\]")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+")
_IN_MEMORY = "give a list of texts, or of dictionaries by column such as {'text': …, 'label': …}, or a file"


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows and the places they were read from.

    Attributes:
        source: what was read, with its split where it has several: ``reviews.jsonl``,
            ``glue:sst2[validation]``.
        rows: the rows.
        places: for each row, its file (or data set) and its line there (or number, from 1).
        class_names: names of the classes of integer columns, where the data set declares them.
    """

    source: str
    rows: tuple[Row, ...] = field(repr=False)
    places: tuple[tuple[str, int], ...] = field(repr=False)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_line: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that any row has, in the order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def where(self, index: int) -> str:
        """The place of a row, for messages: ``file:line``, or ``data set, row number``."""
        source, number = self.places[index]
        return f"{source}:{number}" if self.by_line else f"{source}, row {number}"

    def value(self, index: int, column: str, option: str = "") -> Any:
        """A field that must be there.

        Raises:
            DataError: the row lacks it, or it is null.
        """
        value = self.rows[index].get(column)
        if value is None:
            mend = "fill it in, or remove the row" + (f", or choose another column with {option}" if option else "")
            raise DataError(f"the row has no {column!r}", where=self.where(index), mend=mend)
        return value


#: What :func:`read_rows` takes.
DataSource: TypeAlias = "str | os.PathLike[str] | Rows | Iterable[str | Mapping[str, Any]]"


def joined(parts: Sequence[Rows], source: str) -> Rows:
    """Rows of several sources, one after the other."""
    return Rows(
        source,
        tuple(row for part in parts for row in part.rows),
        tuple(place for part in parts for place in part.places),
        {column: names for part in parts for column, names in part.class_names.items()},
        by_line=all(part.by_line for part in parts),
    )


def selected(rows: Rows, indices: Sequence[int]) -> Rows:
    """Some of the rows, in the given order."""
    return replace(rows, rows=tuple(rows.rows[i] for i in indices), places=tuple(rows.places[i] for i in indices))


def sample(rows: Rows, limit: int | None, seed: int) -> Rows:
    """At most ``limit`` rows, drawn without replacement and kept in the order of the data; seeded."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).permutation(len(rows))[:limit]
    return selected(rows, sorted(chosen.tolist()))


def read_rows(
    source: DataSource,
    *,
    split: str | None = None,
    limit: int | None = None,
    prefer: Sequence[str] = (),
    called: str = "data",
) -> Rows:
    """Read rows of data.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt`` (a text a line) file; a folder of
            such files named by split, or written by ``datasets``' ``save_to_disk``; or the name of a data set (``name``
            or ``name:config``) for ``datasets.load_dataset``. ``source[split]`` chooses a split, too. In memory: rows,
            a ``Dataset`` or ``DatasetDict``, or an iterable of texts or of dictionaries by column.
        split: which split of a source that has several.
        limit: read at most this many rows, the first ones.
        prefer: splits to take, the first that exists, when none was asked for.
        called: what to call data in memory that have no name.

    Raises:
        DataError: nothing there, an unreadable row (with file and line), no rows, several splits and none
            chosen, a data set that is neither on this machine nor to be had, or an object that is no data.
        UserError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}", where="limit", mend="give a limit of at least 1, or none")
    if isinstance(source, str | os.PathLike):
        rows = _from_place(source, split, limit, prefer)
    else:
        rows = _from_memory(source, _Request(called, split, limit, prefer))
    if not rows.rows:
        raise DataError("no data: not a single row", where=rows.source, mend="give data with at least one row")
    return rows


def in_memory(source: DataSource) -> bool:
    """Whether these are data themselves, and not the path or name of some."""
    return not isinstance(source, str | os.PathLike)


def _from_place(source: str | os.PathLike[str], split: str | None, limit: int | None, prefer: Sequence[str]) -> Rows:
    name = path_text(source, DataError, mend="give a file, or texts as a list: [text, …]")
    suffixed = _SPLIT_SUFFIX.fullmatch(name)
    if split is None and suffixed and not Path(name).exists():
        name, split = suffixed["source"], suffixed["split"]
    return _read(_Request(name, split, limit, prefer))


@dataclass(frozen=True)
class _Request:
    """What :func:`read_rows` was asked for."""

    name: str
    split: str | None
    limit: int | None
    prefer: Sequence[str]

    def choose(self, splits: Sequence[str]) -> str:
        """The split to take."""
        if self.split is not None:
            if self.split not in splits:
                mend = did_you_mean(self.split, splits)
                raise DataError(f"there is no split {self.split!r}", where=self.name, mend=mend)
            return self.split
        chosen = splits[0] if len(splits) == 1 else next((name for name in self.prefer if name in splits), None)
        if chosen is None:
            what = f"there are several splits: {', '.join(splits)}"
            raise DataError(what, where=self.name, mend=f"choose one with --split, or as {self.name}[{splits[-1]}]")
        return chosen


def _read(asked: _Request) -> Rows:
    name = asked.name
    path = expanded(name)
    if path.is_file():
        if asked.split is not None:
            mend = "leave the split out, or give the folder that holds a file for each split"
            raise DataError(f"a file has no splits, but split {asked.split!r} was asked for", where=name, mend=mend)
        return _from_files(name, [path], asked.limit)
    if path.is_dir():
        return _from_folder(asked, path)
    base, _, config = name.partition(":")
    folder = expanded(base)
    if config and folder.is_dir():
        inside = folder / config
        return _from_folder(asked, inside) if inside.is_dir() else _from_subfolders(asked, folder, config)
    if path.suffix.lower() in READERS or not _NAME.fullmatch(base) or name.startswith("."):
        what = "no such file or folder"
        raise DataError(what, where=name, mend="check the path; data sets are given as name or name:config")
    return _from_datasets(asked, base, config or None)


def _from_files(source: str, paths: Sequence[Path], limit: int | None) -> Rows:
    rows: list[Row] = []
    places: list[tuple[str, int]] = []
    by_line = all(path.suffix.lower() != ".parquet" for path in paths)
    for path in paths:
        left = None if limit is None else limit - len(rows)
        for number, row in islice(read_file(path), left):
            rows.append(row)
            places.append((str(path), number))
    return Rows(source, tuple(rows), tuple(places), by_line=by_line)


def _from_folder(asked: _Request, folder: Path) -> Rows:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_disk(asked, folder)
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in READERS and path.is_file() and path.name != "dataset_infos.json":
            shard = _SHARD.fullmatch(path.stem)
            files.setdefault(shard["split"] if shard else path.stem, []).append(path)
    if not files:
        return _from_subfolders(asked, folder, None)
    chosen = asked.choose(list(files))
    shown = asked.name if len(files) == 1 and chosen != asked.split else f"{asked.name}[{chosen}]"
    return _from_files(shown, files[chosen], asked.limit)


def _from_subfolders(asked: _Request, folder: Path, config: str | None) -> Rows:
    """A folder without data files of its own, whose layout the ``datasets`` library may know."""
    if not any(path.is_dir() for path in folder.iterdir()):
        mend = f"give files ending in {', '.join(READERS)}"
        raise DataError("no data files in this folder", where=asked.name, mend=mend)
    return _from_datasets(asked, str(folder), config)


def _from_memory(source: Any, asked: _Request) -> Rows:
    if isinstance(source, Rows):
        return source if asked.limit is None else selected(source, range(min(asked.limit, len(source))))
    library = sys.modules.get("datasets")  # who has a data set of it has imported it
    if library is not None and isinstance(source, library.Dataset | library.DatasetDict):
        return _from_loaded(asked, source)
    if isinstance(source, bytes | Mapping | Set) or not isinstance(source, Iterable):
        raise DataError(f"data are expected, and this is {described(source)}", where=asked.name, mend=_IN_MEMORY)
    if asked.split is not None:
        what = f"rows in memory have no splits, but split {asked.split!r} was asked for"
        raise DataError(what, where=asked.name, mend="leave the split out")
    given = list(islice(source, asked.limit))
    for number, row in enumerate(given, 1):
        if not isinstance(row, str) and not (isinstance(row, Mapping) and all(isinstance(key, str) for key in row)):
            what = f"a text or a dictionary by column is expected, and this is {described(row)}"
            raise DataError(what, where=f"{asked.name}, row {number}", mend=_IN_MEMORY)
    if given and all(isinstance(row, str) and is_name(row) and Path(row).is_file() for row in given):
        what = f"these are no texts but names of files, such as {given[0]}"
        raise DataError(what, where=asked.name, mend="give one file, or a folder that has one for each split")
    rows = tuple({"text": row} if isinstance(row, str) else dict(row) for row in given)
    places = tuple((asked.name, number) for number in range(1, len(rows) + 1))
    return Rows(asked.name, rows, places, by_line=False)


def _from_disk(asked: _Request, folder: Path) -> Rows:
    require("data", "a folder written by datasets", "datasets", where=asked.name)
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any damage to the folder; the library raises many kinds
        what = f"cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        raise DataError(what, where=asked.name, mend="write the folder again with save_to_disk") from None
    return _from_loaded(asked, loaded)


def _from_datasets(asked: _Request, path: str, config: str | None) -> Rows:
    require("data", "a named data set", "datasets", where=asked.name)
    import datasets

    try:
        loaded = datasets.load_dataset(path, config)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise _absent(asked.name, path, config, error) from None
    except Exception as error:  # unknown configurations, broken files, …: all the user's to mend
        what = f"datasets cannot load it: {type(error).__name__}: {_first_line(error)}"
        mend = "check the name and, after a colon, the configuration"
        raise DataError(what, where=asked.name, mend=mend) from None
    return _from_loaded(asked, loaded)


def _absent(name: str, path: str, config: str | None, error: Exception) -> DataError:
    import datasets

    call = ", ".join(repr(argument) for argument in (path, config) if argument)
    copy = name.replace("/", "-").replace(":", "-")
    offline = datasets.config.HF_HUB_OFFLINE
    state = "offline mode is set" if offline else _first_line(error)
    return DataError(
        f"no such file or folder, and data set {name!r} is not on this machine and cannot be had ({state})",
        where=name,
        mend="check the name; where there is a network, run "
        f"datasets.load_dataset({call}).save_to_disk({copy!r}) in Python, copy that folder to this machine "
        f"and give its path (or copy the cache of the other machine to {datasets.config.HF_DATASETS_CACHE})",
    )


def _from_loaded(asked: _Request, loaded: Any) -> Rows:
    import datasets

    name, split, limit = asked.name, asked.split, asked.limit
    shown = name
    if isinstance(loaded, dict):  # a DatasetDict
        chosen = asked.choose(list(loaded))
        shown = f"{name}[{chosen}]" if len(loaded) > 1 or split else name
        loaded = loaded[chosen]
    elif split is not None and str(loaded.split or "") != split:
        mend = "leave the split out"
        raise DataError(f"this data set has no splits, but split {split!r} was asked for", where=name, mend=mend)
    class_names: dict[str, tuple[str, ...]] = {}
    for column, feature in loaded.features.items():
        inner = getattr(feature, "feature", feature)  # of a list of classes
        if isinstance(inner, datasets.ClassLabel):
            class_names[column] = tuple(inner.names)
        if isinstance(feature, datasets.Image):  # files' own bytes take less memory than pixels
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    if limit is not None:
        loaded = loaded.select(range(min(limit, len(loaded))))
    rows = tuple(dict(row) for row in loaded.with_format(None))
    places = tuple((shown, number) for number in range(1, len(rows) + 1))
    return Rows(shown, rows, places, class_names, by_line=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
