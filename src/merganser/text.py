"""Text that strangers wrote, to be shown: it steers no terminal, is no markup, and does not fill the screen."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKDOWN = re.compile(
    r"[\\|*<>`\[\]~$]|(?<!\w)_|_(?!\w)"  # tables, emphasis, tags, code, links, formulas
    r"|&(?=#?\w+;)|(?<=:)//|(?<=\bwww)\."  # entities, addresses
    r"|^\s*[-+=#](?=[-+=#\s]|$)|^\s*\d+(?=[.)](?:\s|$))",  # lists, headings, rules
    re.IGNORECASE,
)


def printable(text: object, *, lines: bool = False) -> str:
    """A text in which every character that cannot be seen is written out, such as ``\\x1b``.

    These are a terminal's control characters, those that change the direction of what follows, those of no width,
    halves of surrogate pairs, and line breaks.

    Args:
        text: anything that has a text.
        lines: whether line breaks and tabs stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    kept = "\n\t\xa0" if lines else "\xa0"
    return "".join(one if one.isprintable() or one in kept else _escape(one) for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, limit: int) -> str:
    """A text of at most ``limit`` characters: its beginning and a part of its end, with … between them."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 1]}…{text[-end:]}"


def listed(names: Sequence[str], most: int) -> str:
    """Names in a row, at most so many of them, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def markdown(text: object) -> str:
    """A text for a place within a line of Markdown, where it comes out as it is: no table, link, tag or list."""
    return _MARKDOWN.sub(_backslash, printable(text))


def _backslash(match: re.Match[str]) -> str:
    """The first character that means something, behind a backslash; of a number in a list, what follows it."""
    found = match[0]
    if found.strip().isdigit():
        return f"{found}\\"
    return f"{found[:-1]}\\{found[-1]}" if found != "//" else "\\//"


def code(text: str) -> str:
    """A text as code within a line of Markdown, between more backticks than it has one after the other."""
    text = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
