"""``merganser extract``, and ``merganser merge`` of adapters among themselves, as one types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from merganser.cli import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_extracted_adapters_are_merged(
    save_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, adapter = save_model("base", "llama"), save_model("tuned", "llama", 1), tmp_path / "adapter"
    extraction = ("extract", tuned, "--base", base, "-o", adapter, "--energy", 0.9)
    assert run(*extraction, "--max-rank", 4) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{adapter}\n" and "layers at rank 4" in printed.err
    assert run(*extraction) == 2 and "the output exists" in capsys.readouterr().err
    assert run(*extraction, "--rank", 4) == 2 and "give --rank, or --energy" in capsys.readouterr().err
    assert run("extract", tuned, "--base", base, "--dry-run", "--rank", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["rank"] == 2

    among = ("merge", adapter, adapter, "--method", "simple", "-o")
    assert run(*among, tmp_path / "among", "--without-base") == 0
    assert "is not read" in capsys.readouterr().err
    assert json.loads((tmp_path / "among" / "adapter_config.json").read_text())["r"] == 8
    assert run(*among, tmp_path / "summed", "--as-adapter", "sum") == 2  # its base is named by a path of this machine
    assert "--base" in capsys.readouterr().err
    assert run(*among, tmp_path / "summed", "--as-adapter", "sum", "--base", base) == 0
    assert json.loads((tmp_path / "summed" / "adapter_config.json").read_text())["r"] == 8
    assert run(*among, tmp_path / "no", "--as-adapter", "all") == 2
    assert "no rank, such as 16, nor sum" in capsys.readouterr().err
    for made in ("among", "summed", "adapter"):
        assert run("verify", tmp_path / made) == 0 and run("reproduce", tmp_path / made) == 0
