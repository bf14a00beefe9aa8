"""``merganser zoo ls``: every model is told apart from every other, in lines that fit the terminal."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from merganser.cli.zoo import zoo_command
from merganser.cli.zoo_listing import arrange, fold, print_listing
from merganser.lab.zoo import Zoo, id_of
from merganser.lab.zoo.keys import canonical

Key = dict[str, Any]
TRAINING = {
    "learning_rate": 2e-5,
    "epochs": 3.0,
    "max_steps": None,
    "batch_size": 16,
    "schedule": "linear",
    "best_epoch": True,
}
SETS = ("dailydialog", "crowdflower", "tec", "tales-emotion", "isear")
LONG = "+".join(SETS)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model(own: str = "tec", seed: int = 1, *, base: str = "b", train: str = "", **changes: Any) -> Key:
    """A key as the grid makes it of a single model; ``changes`` are training settings."""
    return {
        "kind": "model",
        "suite": "emotion",
        "options": {},
        "set": own,
        "seed": seed,
        "model": "all-MiniLM-L6-v2",
        "base": sha(base),
        "train": sha(train or own),
        "dev": sha("dev" + own),
        "labels": ["joy", "anger", "fear"],
        "training": {**TRAINING, **changes},
    }


def multitask(*parts: Key, shared: bool = True) -> Key:
    return {
        "kind": "multitask",
        "shared": shared,
        "parts": list(parts),
        "set": "+".join(part["set"] for part in parts),
        "seed": 1,
        "suite": "emotion",
        "model": "all-MiniLM-L6-v2",
    }


def checkpoint(reference: str, weights: str) -> Key:
    return {"kind": "checkpoint", "reference": reference, "weights": sha(weights)}


MIXED = [
    model(),
    model(epochs=20.0),
    {**model(), "part": "1/2"},
    {**model(), "part": "2/2"},
    multitask(*(model(own) for own in SETS)),
    multitask(*(model(own, epochs=20.0) for own in SETS)),
    multitask(*(model(own) for own in SETS), shared=False),
    multitask(*(model(own, seed) for seed, own in enumerate(SETS))),
    checkpoint("org/some-very-long-name-that-goes-on-and-on-and-on@main", "a"),
    checkpoint("/models/y", "b"),
    checkpoint("/models/y", "c"),
]


def told_apart(keys: list[Key]) -> bool:
    _, needed, _ = arrange(keys)
    return len(set(zip(*(column.texts for column in needed), strict=True))) == len(keys)


def names_of(keys: list[Key]) -> list[str]:
    _, needed, _ = arrange(keys)
    return [column.name for column in needed]


def test_what_is_the_same_everywhere_is_said_once_and_hashes_not_at_all() -> None:
    keys = [model(own, seed) for own in SETS for seed in (1, 2)]
    common, needed, more = arrange(keys)
    assert common.startswith("suite=emotion, model=all-MiniLM-L6-v2, kind=model, training.")
    assert "training.epochs=3.0" in common and "training.max_steps=null" in common
    assert not any(word in common for word in ("base", "train=", "dev", "labels", sha("b")[:8]))
    assert [column.name for column in needed] == ["set", "seed"] and not more


@pytest.mark.parametrize(
    "keys, columns",
    [
        ([model(), model(epochs=20.0)], ["training.epochs"]),
        # one column tells these apart already, and the other is not needed
        ([model(), model(epochs=20.0, batch_size=32)], ["training.epochs"]),
        (
            [model(epochs=e, learning_rate=r) for e, r in itertools.product((1.0, 2.0), (1e-5, 1e-4, 1e-3))],
            ["training.learning_rate", "training.epochs"],
        ),
        ([model(), {**model(), "part": "1/2"}], ["part"]),
        ([model(), {**model(), "options": {"threshold": 0.2}}], ["options.threshold"]),
        ([model(), {**model(), "note": ""}], ["note"]),
        ([model(), model(base="other")], ["base"]),
        ([model(), model(train="other", epochs=20.0)], ["training.epochs"]),
        ([model(), {**model(), "labels": ["joy"]}], ["labels"]),
        ([multitask(model(), model("isear")), multitask(model(), model("isear", 2))], ["parts.seed"]),
        ([multitask(model(), model("isear")), multitask(model(), model("isear", epochs=9.0))], ["training.epochs"]),
        ([checkpoint("a", "w"), checkpoint("b", "w")], ["reference"]),
        ([checkpoint("a", "w"), checkpoint("a", "v")], ["weights"]),
    ],
)  # fmt: skip
def test_the_columns_are_what_differs(keys: list[Key], columns: list[str]) -> None:
    assert [name for name in names_of(keys) if name not in ("set", "seed")] == columns
    assert told_apart(keys)


def test_what_else_differs_comes_after() -> None:
    _, needed, more = arrange([model(), model(epochs=20.0, batch_size=32, learning_rate=1e-3)])
    assert [column.name for column in needed] == ["set", "seed", "training.epochs"]
    assert {column.name for column in more} == {"training.batch_size", "training.learning_rate"}


def test_what_a_kind_of_model_does_not_have_is_no_difference() -> None:
    _, needed, more = arrange([model(), {**model("isear"), "part": "1/2"}, checkpoint("a", "w")])
    assert [column.name for column in needed] == ["set", "seed"]
    assert [column.name for column in more] == ["kind", "part"], "and not every setting that a checkpoint lacks"


def test_hashes_and_lists_are_shortened_to_what_differs() -> None:
    _, needed, _ = arrange([model(), model(base="other")])
    assert needed[-1].texts == (f"{sha('b')[:8]}…", f"{sha('other')[:8]}…")
    many = [f"label{number}" for number in range(16)]
    _, needed, _ = arrange([{**model(), "labels": some} for some in (many, many[:14])])
    assert needed[-1].texts == ("…, label14, label15", "…")
    keys = [{**model(), "labels": some} for some in (["a", "b"], ["b", "a"])]
    assert told_apart(keys), "the order of labels tells two models apart"


VALUES = st.one_of(st.sampled_from(["a", "b", "a+b"]), st.integers(0, 2), st.booleans(), st.none(), st.just(sha("x")))
KEYS = st.dictionaries(
    st.sampled_from(["kind", "set", "seed", "part", "model", "base"]),
    VALUES | st.dictionaries(st.sampled_from(["epochs", "seed"]), VALUES, min_size=1),
    min_size=1,
)


@given(st.lists(KEYS, min_size=2, max_size=6, unique_by=canonical))
def test_any_two_keys_are_told_apart(keys: list[Key]) -> None:
    assert told_apart(keys)


def test_all_kinds_of_keys_are_told_apart() -> None:
    assert told_apart(MIXED)
    assert {"part", "shared", "parts.seed", "training.epochs", "reference", "weights"} < set(names_of(MIXED))


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 132, 300])
def test_every_line_fits_and_nothing_that_tells_apart_is_lost(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"{number:08x}" for number in range(len(MIXED))]
    facts = {"score": ["41.2"] * len(ids), "size": ["91.2 MB"] * len(ids)}
    print_listing(MIXED, ids, facts, width)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    starts = [index for index, line in enumerate(lines) if line[:8] in ids]
    assert [lines[index][:8] for index in starts] == ids
    blocks = [lines[first:last] for first, last in zip(starts, [*starts[1:], len(lines)], strict=True)]
    bodies = ["".join("".join(line[8:].split()) for line in block) for block in blocks]
    assert len(set(bodies)) == len(ids)
    for own in SETS:  # folded, not cut
        assert all(piece in bodies[4] for piece in own.split("-"))
    assert ("41.2" in bodies[0]) == (width > 100), "facts are for where there is room"


@pytest.mark.parametrize("columns, most", [(None, 80), ("50", 50), ("0", 80), ("wide", 80)])
def test_the_command_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str | None, most: int
) -> None:
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError("no terminal")))
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    zoo = Zoo(tmp_path)
    keys = [model(LONG, seed, epochs=epochs) for seed in (1, 2) for epochs in (3.0, 20.0)]
    for key in keys:
        zoo.build(key, lambda folder: {"score": (folder / "model.safetensors").write_bytes(b"x") / 2})
    out = CliRunner().invoke(zoo_command, ["ls", "--zoo", str(tmp_path)], catch_exceptions=False).stdout
    assert max(map(cell_len, out.splitlines())) <= most
    assert all(id_of(key)[:8] in out for key in keys)
    assert "suite=emotion" in out and sha("b")[:8] not in out
    if most == 80:
        assert "50.0" in out and "epochs" in out


@given(st.text(st.sampled_from("ab+/-. é日本…")), st.integers(2, 12))
def test_folding_loses_nothing_and_fits(text: str, width: int) -> None:
    lines = fold(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_folding_breaks_behind_separators() -> None:
    assert fold(LONG, 16) == ["dailydialog+", "crowdflower+tec+", "tales-emotion+", "isear"]
    assert fold("abcdefgh", 3) == ["abc", "def", "gh"] and fold("", 3) == [""]


def test_what_a_stranger_wrote_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    escape = "\x1b[31m\x07\n"
    keys = [model(f"a{escape}b [bold]c[/bold] [/x]"), {**model("d"), f"e{escape}": 1}]
    keys += [{**model("d"), "labels": [escape]}, {**model("d"), "labels": ["f"]}]
    print_listing(keys, ["id1", "id2", "id3", "id4"], {}, 80)
    out = capsys.readouterr().out
    assert "[bold]c[/bold]" in out and all(c.isprintable() for line in out.split("\n") for c in line)
    assert [line[:3] for line in out.splitlines() if line[:2] == "id"][1:] == ["id1", "id2", "id3", "id4"]
