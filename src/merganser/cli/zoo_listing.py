"""``merganser zoo ls``: models told apart by what differs between them, in lines that fit the terminal.

What all models have in common stands above the table. Its columns are what differs: first what it takes to tell any
two models apart, then what else differs, as far as there is room. What it takes and has no room stands in one last
column, as name=value. Hashes and lists say little to a person; they are shown only where nothing else tells two models
apart.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

from merganser.lab.zoo.keys import flatten, show

#: Columns that are always there, where any key has them; and what comes first above the table.
FIRST, COMMON = ("set", "seed"), ("suite", "model", "kind")
#: Digits that are left of a content's hash.
HASH_DIGITS = 8
#: What lies between two columns.
GAP = 2
#: A column is folded at a third of the terminal's width, and at fewer characters where that does not suffice.
NARROWER = (20, 16, 12)
#: Characters that the last column has at least, where what does not fit is in it.
REST = 24

_HASH = re.compile(r"(?:\w+:)?([0-9a-f]{32,})")


@dataclass(frozen=True)
class Leaf:
    """A value of a key as text; ``opaque`` ones are hashes and lists, ``items`` are those of a list."""

    text: str
    opaque: bool = False
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column of the listing: one text a model."""

    name: str
    texts: tuple[str, ...]

    @property
    def head(self) -> str:
        """The name, with a line for each level of nesting."""
        return self.name.replace(".", ".\n")

    def width(self, most: int) -> int:
        """The width that it needs, where texts are folded at ``most`` characters."""
        return min(most, max(map(cell_len, (*self.head.split("\n"), *self.texts))))


#: A column with the width that it is set at.
Sized = tuple[Column, int]


def leaves(key: Mapping[str, Any]) -> dict[str, Leaf]:
    """The values of a key by dotted name.

    Where the key lists several objects (the parts of a multi-task model), theirs are joined by ``+``, under their own
    name if the key has no such name itself.
    """
    found = {}
    flat = flatten(key)
    for name, value in flat.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            parts = [leaves(one) for one in value]
            for inner in dict.fromkeys(inner for part in parts for inner in part):
                joined = _joined([part.get(inner, Leaf("–")) for part in parts])
                found[f"{name}.{inner}" if inner in flat else inner] = joined
        elif value != {}:
            found[name] = _leaf(value)
    return found


def _leaf(value: Any) -> Leaf:
    if isinstance(value, list):
        items = tuple(map(show, value))
        return Leaf(", ".join(items), True, items)
    text = show(value) or '""'
    found = _HASH.fullmatch(text)
    return Leaf(f"{found[1][:HASH_DIGITS]}…", True) if found else Leaf(text)


def _joined(parts: Sequence[Leaf]) -> Leaf:
    if len(set(parts)) == 1:
        return parts[0]
    return Leaf("+".join(part.text for part in parts), any(part.opaque for part in parts))


def arrange(keys: Sequence[Mapping[str, Any]]) -> tuple[str, list[Column], list[Column]]:
    """What is to be said of models with these keys.

    Returns:
        what they have in common; the columns that tell them apart, the most telling first; and what else differs.
    """
    rows = [leaves(key) for key in keys]
    names = sorted({name for row in rows for name in row})
    columns = {name: Column(name, _texts([row.get(name) for row in rows])) for name in names}
    opaque = [name for name in names if any(row[name].opaque for row in rows if name in row)]
    common = [
        name
        for name in sorted(names, key=lambda name: COMMON.index(name) if name in COMMON else len(COMMON))
        if name not in (*FIRST, *opaque) and all(name in row for row in rows) and len(set(columns[name].texts)) == 1
    ]
    needed = [columns[name] for name in FIRST if name in names]
    plain = [columns[name] for name in names if name not in (*FIRST, *opaque, *common)]
    for some in (plain, [columns[name] for name in opaque]):
        needed += _telling(needed, some)
    kinds = columns["kind"].texts if "kind" in columns else ("",) * len(keys)
    more = [column for column in plain if column not in needed and _adds(column, needed, kinds)]
    more.sort(key=lambda column: (-len(set(column.texts)), column.name))
    return ", ".join(f"{name}={columns[name].texts[0]}" for name in common), needed, more


def _texts(column: Sequence[Leaf | None]) -> tuple[str, ...]:
    """The texts of a column; where it is of lists, without the items that all of them have."""
    texts = tuple(leaf.text if leaf else "" for leaf in column)
    lists = [set(leaf.items) for leaf in column if leaf and leaf.items]
    everywhere = set.intersection(*lists) if len(lists) > 1 else set()
    if not everywhere:
        return texts
    short = tuple(
        ", ".join(["…", *(item for item in leaf.items if item not in everywhere)]) if leaf and leaf.items else text
        for leaf, text in zip(column, texts, strict=True)
    )
    return short if len(set(short)) == len(set(texts)) else texts


def _telling(columns: Sequence[Column], candidates: Sequence[Column]) -> list[Column]:
    """As few of the candidates as tell the models apart that are alike in ``columns``, the most telling first."""
    chosen: list[Column] = []

    def kinds(*more: Column) -> int:
        texts = [column.texts for column in (*columns, *chosen, *more)]
        return len(set(zip(*texts, strict=True))) if texts else 1

    def worth(column: Column) -> tuple[int, int, int]:
        return kinds(column), sum(map(bool, column.texts)), -column.width(sys.maxsize)

    while candidates:
        best = max(candidates, key=worth)
        if kinds(best) == kinds():
            break
        chosen.append(best)
    return chosen


def _adds(column: Column, others: Sequence[Column], kinds: Sequence[str]) -> bool:
    """Whether a column says more than that some kinds of models have it, and than one of the same last name."""
    last = column.name.rpartition(".")[2]
    alike = [other.texts for other in others if other.name.rpartition(".")[2] == last]
    if any(all(text in ("", texts[row]) for row, text in enumerate(column.texts)) for texts in alike):
        return False
    within = set(zip(kinds, column.texts, strict=True))
    return len({*column.texts} - {""}) > 1 or len(within) > len(set(kinds))


def print_listing(
    keys: Sequence[Mapping[str, Any]], ids: Sequence[str], facts: Mapping[str, Sequence[str]], width: int
) -> None:
    """Print the models on standard output, in lines of at most ``width`` characters.

    Args:
        keys: of the models.
        ids: what each is called.
        facts: more columns (heading → texts), shown where there is room.
        width: of the terminal.
    """
    common, needed, more = arrange(keys)
    console = Console(file=sys.stdout, width=width)
    if common:
        told = f"All: {common}" if len(keys) > 1 else common
        console.print(Text("\n".join(fold(told, width, " "))))
    most, columns = _fitting([Column("id", tuple(ids)), *needed], width)
    for column in (*more, *(Column(name, tuple(texts)) for name, texts in facts.items())):
        if _total([*columns, (column, column.width(most))]) <= width:
            columns.append((column, column.width(most)))
    console.print(_table(columns))


def _fitting(columns: Sequence[Column], width: int) -> tuple[int, list[Sized]]:
    """The characters at which columns are folded, and columns that fit; where folding does not suffice, the last has
    the rest."""
    for most in (max(width // 3, *NARROWER), *NARROWER):
        sized = [(column, column.width(most)) for column in columns]
        if _total(sized) <= width:
            return most, sized
    fit = 1
    while _total(sized[: fit + 1]) + GAP + REST <= width:
        fit += 1
    rest = [
        ", ".join(f"{column.name}={column.texts[row]}" for column in columns[fit:] if column.texts[row])
        for row in range(len(columns[0].texts))
    ]
    last = Column("", tuple(rest))
    return most, [*sized[:fit], (last, last.width(max(1, width - _total(sized[:fit]) - GAP)))]


def _total(columns: Sequence[Sized]) -> int:
    return sum(width for _, width in columns) + GAP * (len(columns) - 1)


def _table(columns: Sequence[Sized]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="bold")
    for column, width in columns:
        head = "\n".join(line for part in column.head.split("\n") for line in fold(part, width))
        numeric = all(re.match(r"[\d.e+-]*( |$)", text) for text in column.texts)
        table.add_column(Text(head), width=width, justify="right" if numeric else "left", overflow="fold")
    for texts in zip(*(column.texts for column, _ in columns), strict=True):
        cells = zip(texts, (width for _, width in columns), strict=True)
        table.add_row(*(Text("\n".join(fold(text, width))) for text, width in cells))
    return table


def fold(text: str, width: int, breaks: str = "+/,._- ") -> list[str]:
    """Lines of at most ``width`` characters, broken behind one of ``breaks`` where that is possible.

    Keys come from strangers, too: what a terminal would act upon is a space.
    """
    lines = [""]
    printable = "".join(character if character.isprintable() else " " for character in text)
    for piece in _pieces(printable, width, breaks):
        if cell_len(lines[-1] + piece.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _pieces(text: str, width: int, breaks: str) -> Iterable[str]:
    """Text in parts of at most ``width`` characters that end in one of ``breaks``, as far as possible."""
    kind = re.escape(breaks)
    for piece in re.findall(rf"[^{kind}]*[{kind}]|[^{kind}]+", text):
        yield from [piece] if cell_len(piece.rstrip()) <= width else chop_cells(piece, width)
