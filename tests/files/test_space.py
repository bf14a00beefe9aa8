"""Sizes as people write them, and disks without room."""

from __future__ import annotations

from pathlib import Path

import pytest

from merganser.errors import UserError
from merganser.files import human_bytes, parse_size, space, space_error


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "not" / "there" / "yet"
    assert space_error(target, 1) is None
    monkeypatch.setattr(space, "free_bytes", lambda _: 999)
    assert space_error(target, 999) is None
    error = space_error(target, 91_200_000, "running sums take", "make room")
    assert error is not None and error.mend == "make room" and error.where == str(target)
    assert error.what == "too little disk: running sums take 91.2 MB, 999 B are free"
    assert human_bytes(2e12) == "2.00 TB"
