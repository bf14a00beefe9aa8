"""Where a report is written, and which earlier one it may take the place of.

A page, Markdown and LaTeX end with a comment that holds the hash of what stands before it. So a report that nobody has
edited is recognised: the results give it again, and the next one takes its place. Numbers as CSV and rows as JSON have
no comments. They are recognised by their columns, and are replaced only when the user says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from merganser.errors import UserError
from merganser.files import Output, Refusal, is_within, other_kind
from merganser.lab.report.rows import ResultRow, row_files
from merganser.lab.report.text import CSV_COLUMNS

_COMMENTS = {"html": "<!-- {} -->", "markdown": "<!-- {} -->", "latex": "% {}"}
_MARK = re.compile(r"(?:<!--|%) merganser report, sha256 ([0-9a-f]{64})(?: -->)?\n")


def marked(form: str, text: str) -> str:
    """A report with the comment that it is recognised by, where its form has comments.

    Args:
        form: of the report, see :data:`merganser.lab.report.FORMS`.
        text: which ends with a line break.
    """
    text = text if text.endswith("\n") else text + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text + _COMMENTS[form].format(f"merganser report, sha256 {digest}") + "\n" if form in _COMMENTS else text


def report_output(path: Path, form: str, results: Path, *, overwrite: bool) -> Output:
    """The file of a report.

    Args:
        path: of the file.
        form: what it holds.
        results: what is read; where it is a folder, reports may lie in it.
        overwrite: whether the user said that an earlier one may be replaced.
    """
    recognise = {"csv": _recognise_csv, "rows": _recognise_rows}.get(form, _recognise_report)
    overwrite = overwrite or form in _COMMENTS
    allowed = [] if results.is_file() else [results]
    reads = [results, *(file for file in row_files(results) if file.suffix == path.suffix)]
    return Output(path, recognise, overwrite, reads, allowed, folder=False)


def same_files(paths: list[Path]) -> list[UserError]:
    """An error for each file that is given twice."""
    found = []
    for number, path in enumerate(paths):
        if any(is_within(path, other) for other in paths[:number]):
            found.append(UserError("two forms of the report go to one file", where=path, mend="give each its own"))
    return found


def _recognise_report(path: Path) -> Refusal | None:
    try:
        text, _, mark = path.read_bytes().decode().removesuffix("\n").rpartition("\n")
    except (OSError, UnicodeDecodeError):
        return other_kind("report")
    if not (found := _MARK.fullmatch(f"{mark}\n")):
        return other_kind("report")
    if hashlib.sha256(f"{text}\n".encode()).hexdigest() != found[1]:
        return Refusal("the output is a report that was edited since, so it is not replaced")
    return None


def _recognise_csv(path: Path) -> Refusal | None:
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.readline(1000)
    except (OSError, UnicodeDecodeError):
        first = ""
    return None if first.rstrip("\n") == ",".join(CSV_COLUMNS) else other_kind("report's CSV")


def _recognise_rows(path: Path) -> Refusal | None:
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                ResultRow.model_validate(json.loads(line))
    except (OSError, ValueError, RecursionError):  # pydantic's errors are values' errors
        return other_kind("file of result rows")
    return None
