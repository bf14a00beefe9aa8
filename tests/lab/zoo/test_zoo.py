"""The zoo in a folder: each model made once, whole or not at all, found by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import Problems
from merganser.lab.zoo import Zoo, ZooError
from merganser.lab.zoo.keys import equal, explain, id_of
from merganser.lab.zoo.record import ENTRY, read_entry
from zoo_examples import KEY, key, make, never


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


def damage(path: Path, *, same_size: bool) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if same_size else data[:-1])


# --- keys


def test_the_identity_is_of_the_content_alone() -> None:
    shuffled = dict(reversed([*KEY.items()]))
    assert id_of(KEY) == id_of(shuffled) == id_of(json.loads(json.dumps(shuffled)))
    assert len(id_of(KEY)) == 16 and int(id_of(KEY), 16)
    assert id_of({}) == "44136fa355b3678a"  # sha256 of "{}"
    assert len({id_of(key(seed=seed)) for seed in (1, 2, "1", 1.0, True, None)}) == 6
    assert id_of({"a": (1, 2)}) == id_of({"a": [1, 2]})


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"a": {"b": float("nan")}}, "a.b"),
        ({"a": [1, float("inf")]}, r"a\[1\]"),
        ({"a": Path("x")}, "PosixPath"),
        ({1: 2}, "no string"),
        ([1], "list"),
    ],
)
def test_a_key_that_json_cannot_write_is_refused(zoo: Zoo, wrong: Any, named: str) -> None:
    with pytest.raises(ZooError, match=named):
        zoo.build(wrong, never)


def test_values_compare_as_numbers_or_text() -> None:
    assert equal(0.1, "1e-1") and equal(3, "3") and equal(3, 3.0) and equal("3", 3) and equal(2**53 + 1, str(2**53 + 1))
    assert not equal(1, "1x") and not equal(3, "4") and not equal("03", 3) and not equal(2**53 + 1, 2.0**53)
    assert equal(True, "true") and not equal(True, "1") and not equal(1, True) and equal(None, "null")
    assert equal("isear", "is*") and equal("a[1]", "a[1]") and not equal("a1", "a[1]") and not equal("abc", "b*")
    assert equal(12, "1*") and not equal(1, "nan")
    assert equal(["a", "b"], "b") and equal(["a", "b"], ["a", "b"]) and not equal(["a", "b"], "c")


def test_why_nothing_matches() -> None:
    keys = [key(seed=seed) for seed in (10, 9)]
    assert "did you mean 'seed'" in str(explain(keys, {"sed": 1}))
    assert "training.epochs" in str(explain(keys, {"x": 1}))
    why = str(explain(keys, {"seed": 3, "suite": "emotion"}))
    assert "nothing has seed=3" in why and "seed: 9, 10" in why and "suite=" not in why
    mixed = [key(), key(seed=2, suite="ner")]
    assert "nothing has all of seed=2, suite=emotion" in str(explain(mixed, {"seed": 2, "suite": "emotion"}))
    assert "empty" in str(explain([], {"a": 1}))


# --- building


def test_built_once_and_got(zoo: Zoo) -> None:
    assert zoo.get(KEY) is None and zoo.ls() == []
    entry = zoo.build(KEY, make)
    assert zoo.build(KEY, never) == entry == zoo.get(KEY)
    assert entry.id == id_of(KEY) and entry.key == KEY and entry.facts == {"score": 0.5} and entry.score == 0.5
    assert entry.path == zoo.root / entry.id / "model" and (entry.path / "heads/a.safetensors").is_file()
    assert sum(zoo.files(entry).values()) == 702 and zoo.ls() == [entry] and zoo.verify(entry) == 2


def test_a_failing_maker_leaves_nothing_but_its_scratch(zoo: Zoo) -> None:
    def fail(folder: Path) -> Any:
        make(folder)
        (zoo.work(KEY) / "step").write_text("7")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        zoo.build(KEY, fail)
    assert zoo.get(KEY) is None and zoo.ls() == [] and not list((zoo.root / ".partial").iterdir())

    def resume(folder: Path) -> Any:
        assert (zoo.work(KEY) / "step").read_text() == "7"
        return make(folder)

    zoo.build(KEY, resume)
    assert not list((zoo.root / ".work").iterdir())


@pytest.mark.parametrize("problem", ["nothing", "link", "facts", "nan"])
def test_what_a_maker_must_not_do(zoo: Zoo, problem: str) -> None:
    def wrong(folder: Path) -> Any:
        if problem != "nothing":
            make(folder)
        if problem == "link":
            (folder / "link").symlink_to("/etc/passwd")
        return {"facts": None, "nan": {"score": float("nan")}}.get(problem, {})

    with pytest.raises(ZooError):
        zoo.build(KEY, wrong)
    assert zoo.get(KEY) is None


# --- files beside the model


def test_attach(zoo: Zoo) -> None:
    entry = zoo.build(KEY, make)
    path = zoo.attach(entry, "statistics/ab.safetensors", lambda path: path.write_bytes(b"gram") and None)
    assert path == zoo.root / entry.id / "statistics/ab.safetensors" and path.read_bytes() == b"gram"
    assert zoo.attach(entry, "statistics/ab.safetensors", never) == path
    assert zoo.files(entry)["statistics/ab.safetensors"] == 4 and zoo.verify(entry) == 3

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        zoo.attach(entry, "outputs/x.npz", fail)
    with pytest.raises(ZooError, match="was not written"):
        zoo.attach(entry, "outputs/x.npz", lambda path: None)
    assert not (zoo.root / entry.id / "outputs").exists() and not list((zoo.root / ".partial").iterdir())
    (zoo.root / entry.id / "outputs").mkdir()
    (zoo.root / entry.id / "outputs/x.npz").write_text("without a record: interrupted")
    assert zoo.attach(entry, "outputs/x.npz", lambda path: path.write_text("z") and None).read_text() == "z"


@pytest.mark.parametrize(
    "name", ["entry.json", "model/x", "../x", "/x", "a//b", "a/../b", "x.record.json", "", ".", "a\\b", "a\nb"]
)
def test_attach_refuses_names_that_lead_elsewhere(zoo: Zoo, name: str) -> None:
    entry = zoo.build(KEY, make)
    with pytest.raises(ZooError):
        zoo.attach(entry, name, never)


def test_attach_notices_damage_and_removal(zoo: Zoo) -> None:
    entry = zoo.build(KEY, make)
    path = zoo.attach(entry, "a/b", lambda path: path.write_text("text") and None)
    damage(path, same_size=True)
    with pytest.raises(ZooError, match="a/b"):
        zoo.verify(entry)
    damage(path, same_size=False)
    with pytest.raises(ZooError, match="a/b"):
        zoo.attach(entry, "a/b", never)
    zoo.remove(entry.id)
    with pytest.raises(ZooError, match="build it first"):
        zoo.attach(entry, "a/b", never)


# --- finding and removing


def test_find(zoo: Zoo) -> None:
    for seed in (1, 2):
        for name in ("isear", "tec"):
            zoo.build(key(seed=seed, set=name), make)
    assert len(zoo.find()) == 4 and len(zoo.find(set="is*")) == 2 and len(zoo.find(seed="2")) == 2
    (found,) = zoo.find(seed=2, set="tec", **{"training.epochs": "3", "training.lr": 0.1})
    assert found.key["seed"] == 2 and found.key["set"] == "tec"
    assert zoo.find(seed=3) == [] and zoo.find(nothing="*") == []


def test_remove(zoo: Zoo) -> None:
    entries = [zoo.build(key(seed=seed), make) for seed in range(17)]  # two of them begin alike
    starts = [entry.id[0] for entry in entries]
    twice = next(start for start in starts if starts.count(start) > 1)
    for prefix, why in ((twice, "several"), ("", "no id"), ("xyz", "no id")):
        with pytest.raises(ZooError, match=why):
            zoo.remove(prefix)
    assert len(zoo.ls()) == 17
    (zoo.root / entries[3].id / ENTRY).write_text("damaged entries can be removed too")
    assert zoo.remove(entries[3].id[:12]) == entries[3].id
    assert len(zoo.ls()) == 16 and not (zoo.root / entries[3].id).exists()


# --- damage and strangers


def test_a_damaged_file_is_named(zoo: Zoo) -> None:
    entry = zoo.build(KEY, make)
    damage(entry.path / "heads/a.safetensors", same_size=True)
    assert zoo.get(KEY) == entry  # sizes only
    with pytest.raises(ZooError, match=r"heads/a\.safetensors: damaged"):
        zoo.verify(entry)
    damage(entry.path / "heads/a.safetensors", same_size=False)
    with pytest.raises(ZooError, match=r"heads/a\.safetensors: damaged: 699 bytes"):
        zoo.get(KEY)
    (entry.path / "config.json").unlink()
    with pytest.raises(Problems, match=r"config\.json: damaged: absent"):
        zoo.verify(entry)


def test_another_format(zoo: Zoo) -> None:
    entry = zoo.build(KEY, make)
    path = zoo.root / entry.id / ENTRY
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    for call in (lambda: zoo.get(KEY), lambda: zoo.build(KEY, never), zoo.ls, zoo.find):
        with pytest.raises(ZooError, match="format 2, but this version reads format 1"):
            call()
    good = zoo.build(key(seed=2), make)
    entries, problems = zoo.scan()
    assert entries == [good] and len(problems) == 1 and entry.id in str(problems[0])


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../x": {"sha256": "0" * 64, "size": 1}}},
        {"files": {"/etc/x": {"sha256": "0" * 64, "size": 1}}},
        {"files": {"a\\..\\x": {"sha256": "0" * 64, "size": 1}}},
        {"files": {"x": {"sha256": "0" * 63, "size": 1}}},
        {"files": {"x": {"sha256": "0" * 64, "size": -1}}},
        {"files": {"x": {"sha256": "0" * 64, "size": True}}},
        {"files": {"x": 1}},
        {"files": {}},
        {"files": []},
        {"key": {"another": "key"}},
        {"key": []},
        {"facts": 3},
        {"id": "0" * 16},
        {"format": None},
        {"created": 5},
    ],
)
def test_a_strangers_entry_is_data(zoo: Zoo, change: dict[str, Any]) -> None:
    entry = zoo.build(KEY, make)
    fields = json.loads((zoo.root / entry.id / ENTRY).read_bytes())
    for data in (json.dumps({**fields, **change}), "[]", "{}", "no JSON", "[" * 100_000):
        with pytest.raises(ZooError, match="here"):
            read_entry(data.encode(), entry.id, zoo.root / entry.id, "here")
