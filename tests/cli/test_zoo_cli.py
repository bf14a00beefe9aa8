"""``merganser zoo``: data on standard output, hints that name what exists."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from merganser.cli.zoo import _age, zoo_command
from merganser.errors import UserError
from merganser.lab.zoo import Entry, Zoo


def run(*arguments: str, **more: Any) -> Result:
    return CliRunner().invoke(zoo_command, arguments, **more)


def fails(*arguments: str) -> str:
    """The message of the error that ``merganser`` prints before it exits with 2."""
    with pytest.raises(UserError) as error:
        CliRunner().invoke(zoo_command, arguments, catch_exceptions=False)
    return str(error.value)


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    monkeypatch.setenv("MERGANSER_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("COLUMNS", "200")
    zoo = Zoo(tmp_path / "zoo")

    def make(folder: Path) -> dict[str, Any]:
        (folder / "model.safetensors").write_bytes(bytes(1500))
        return {"score": 0.412}

    keys = [{"suite": "emotion", "set": name, "seed": 1, "settings": {"epochs": 3}} for name in ("isear", "tec")]
    made = [zoo.build(key, make) for key in keys]
    zoo.attach(made[0], "statistics/x.safetensors", lambda path: path.write_bytes(bytes(500)) and None)
    return made


def test_ls(entries: list[Entry]) -> None:
    out = run("ls").stdout
    for text in ("isear", "tec", "41.2", "2.0 kB", "1.5 kB", "now", *(entry.id[:8] for entry in entries)):
        assert text in out
    assert "model" not in out  # no key has it
    listed = json.loads(run("ls", "--json", "--filter", "set=i*", "--filter", "settings.epochs=3.0").stdout)
    assert [entry["id"] for entry in listed] == [entries[0].id]
    assert listed[0]["statistics"] == 1 and listed[0]["size"] == 2000 and listed[0]["key"] == entries[0].key


def test_ls_of_nothing(entries: list[Entry], tmp_path: Path) -> None:
    assert "nothing has set=ner" in fails("ls", "--filter", "set=ner")
    assert "isear, tec" in fails("ls", "--filter", "set=ner")
    assert "did you mean 'seed'" in fails("ls", "--filter", "sed=1", "--json")
    assert run("ls", "--filter", "sed").exit_code == 2
    empty = run("ls", "--zoo", str(tmp_path / "empty"))
    assert empty.exit_code == 0 and empty.stdout == "" and "no models" in empty.stderr
    assert json.loads(run("ls", "--zoo", str(tmp_path / "empty"), "--json").stdout) == []


def test_ls_shows_what_can_be_read_and_names_the_rest(entries: list[Entry]) -> None:
    (entries[0].path.parent / "entry.json").write_text('{"format": 9}')
    result = run("ls")
    assert entries[1].id[:8] in result.stdout
    assert isinstance(result.exception, UserError)
    assert "format 9" in str(result.exception) and entries[0].id in str(result.exception)


def test_show(entries: list[Entry]) -> None:
    out = run("show", entries[0].id[:10]).stdout
    for text in (entries[0].id, "settings.epochs", "isear", "score", "statistics/x.safetensors", str(entries[0].path)):
        assert text in out
    shown = json.loads(run("show", entries[0].id, "--json").stdout)
    assert shown["files"] == {"model/model.safetensors": 1500, "statistics/x.safetensors": 500}
    assert "no id begins with 'zz'" in fails("show", "zz")


def test_show_verify(entries: list[Entry]) -> None:
    assert "2 files are as recorded" in run("show", entries[0].id, "--verify").stderr
    (entries[0].path / "model.safetensors").write_bytes(b"\x01" + bytes(1499))
    assert "model.safetensors: damaged" in fails("show", entries[0].id, "--verify")


def test_rm(entries: list[Entry], tmp_path: Path) -> None:
    assert "--yes" in fails("rm", entries[0].id)
    assert "no id" in fails("rm", entries[0].id, "zz", "--yes")  # nothing goes when one is wrong
    assert len(Zoo(tmp_path / "zoo").ls()) == 2
    result = run("rm", entries[0].id[:12], entries[0].id, "--yes")
    assert result.exit_code == 0 and result.stdout == f"{entries[0].id}\n"
    assert Zoo(tmp_path / "zoo").ls() == [entries[1]]


@pytest.mark.parametrize("answer, left", [("n\n", 2), ("y\n", 1)])
def test_rm_asks_on_a_terminal(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
) -> None:
    monkeypatch.setattr("merganser.cli.zoo._on_terminal", lambda: True)
    result = run("rm", entries[0].id, input=answer)
    assert "Remove 1 model?" in result.stderr and len(Zoo(tmp_path / "zoo").ls()) == left
    assert (result.exit_code == 0) == (left == 1)


def test_the_group_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, click.testing; from merganser.cli.zoo import zoo_command\n"
        "from merganser.lab.zoo import Zoo\n"
        "assert click.testing.CliRunner().invoke(zoo_command, ['ls', '--zoo', '/nonexistent']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'fsspec', 'pydantic', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_age() -> None:
    assert _age("2020-01-01T00:00:00Z").endswith(" d") and _age("soon") == "unknown"
