"""The zoo in a folder and behind fsspec: each model made once, whole or not at all, found by its key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import Problems, UserError
from merganser.experiments.zoo import Zoo, ZooError, default_zoo
from merganser.experiments.zoo.keys import equal, explain, id_of
from merganser.experiments.zoo.record import ENTRY, read_entry

KEY = {"suite": "emotion", "set": "isear", "model": "tiny", "seed": 1, "training": {"epochs": 3, "lr": 0.1}}


def make(folder: Path) -> dict[str, Any]:
    """A model of two files."""
    assert not list(folder.iterdir())
    (folder / "config.json").write_text("{}")
    (folder / "heads").mkdir()
    (folder / "heads" / "a.safetensors").write_bytes(b"weights" * 100)
    return {"score": 0.5}


def never(_: Path) -> Any:
    raise AssertionError("made again")


def key(**more: Any) -> dict[str, Any]:
    return {**KEY, **more}


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


@pytest.fixture
def remote(tmp_path: Path) -> tuple[Zoo, Zoo]:
    """The same place as two machines see it."""
    url = f"memory://{uuid.uuid4().hex}/zoo"
    return Zoo(url, cache=tmp_path / "a"), Zoo(url, cache=tmp_path / "b")


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
    assert (
        equal(0.1, "1e-1")
        and equal(3, "3")
        and equal(3, 3.0)
        and equal("3", 3)
        and equal(2**53 + 1, str(2**53 + 1))
    )
    assert not equal(1, "1x") and not equal(3, "4") and not equal("03", 3) and not equal(2**53 + 1, 2.0**53)
    assert equal(True, "true") and not equal(True, "1") and not equal(1, True) and equal(None, "null")
    assert (
        equal("isear", "is*") and equal("a[1]", "a[1]") and not equal("a1", "a[1]") and not equal("abc", "b*")
    )
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
    assert zoo.build(KEY, never) == entry == zoo.get(KEY) == zoo.build(KEY, never, absent="fail")
    assert (
        entry.id == zoo.id_of(KEY)
        and entry.key == KEY
        and entry.facts == {"score": 0.5}
        and entry.score == 0.5
    )
    assert entry.path == zoo.root / entry.id / "model" and (entry.path / "heads/a.safetensors").is_file()
    assert zoo.size(entry) == 702 and zoo.ls() == [entry] and zoo.verify(entry) == 2
    with pytest.raises(ZooError, match="no model"):
        zoo.build(key(seed=2), never, absent="fail")


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


MAKER = """
import os, sys, time
from pathlib import Path
from merganser.experiments.zoo import Zoo
def make(folder):
    print("making", flush=True)
    (folder / "half").write_text("x" * 10)
    if sys.argv[2] == "hang":
        time.sleep(600)
    sys.stdin.readline()
    (folder / "whole").write_text("y")
    return {"maker": os.getpid()}
zoo = Zoo(sys.argv[1])
(zoo.work({"k": 1}) / "progress").write_text("kept")
print("asking", flush=True)
print(zoo.build({"k": 1}, make).facts["maker"], flush=True)
"""


def start(root: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(root), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_make_a_model_once(zoo: Zoo) -> None:
    first = start(zoo.root, "go")
    assert first.stdout and [first.stdout.readline() for _ in range(2)] == ["asking\n", "making\n"]
    second = start(zoo.root, "go")
    assert second.stderr and "waiting for another process" in second.stderr.readline()
    assert zoo.get({"k": 1}) is None
    with pytest.raises(ZooError):
        zoo.remove(zoo.id_of({"k": 1}))
    out, _ = first.communicate("\n", timeout=60)
    assert out == f"{first.pid}\n"
    out, _ = second.communicate("\n", timeout=60)
    assert out == f"asking\n{first.pid}\n"
    entry = zoo.get({"k": 1})
    assert entry is not None and sorted(entry.files) == ["half", "whole"]


def test_a_killed_maker_leaves_nothing_finished_and_frees_the_waiting(zoo: Zoo) -> None:
    first = start(zoo.root, "hang")
    assert first.stdout and [first.stdout.readline() for _ in range(2)] == ["asking\n", "making\n"]
    second = start(zoo.root, "go")
    assert second.stderr and "waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    assert first.wait(timeout=60) == -signal.SIGKILL
    first.communicate()
    assert zoo.get({"k": 1}) is None and zoo.ls() == []
    assert (zoo.root / ".work" / zoo.id_of({"k": 1}) / "progress").read_text() == "kept"
    out, _ = second.communicate("\n", timeout=60)
    assert out == f"asking\nmaking\n{second.pid}\n"
    entry = zoo.get({"k": 1})
    assert entry is not None and zoo.verify(entry) == 2
    assert not list((zoo.root / ".partial").iterdir()) and not list((zoo.root / ".work").iterdir())


def test_threads_make_a_model_once(tmp_path: Path) -> None:
    made = []

    def slow(folder: Path) -> Any:
        made.append(1)
        time.sleep(0.05)
        return make(folder)

    threads = [threading.Thread(target=lambda: Zoo(tmp_path).build(KEY, slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and Zoo(tmp_path).get(KEY)


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
    "name",
    ["entry.json", "model/x", "../x", "/x", "a//b", "a/../b", "x.record.json", "", ".", "a\\b", "a\nb"],
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


# --- remote


def test_a_remote_zoo_is_shared(remote: tuple[Zoo, Zoo]) -> None:
    here, there = remote
    assert there.get(KEY) is None and there.ls() == []
    made = here.build(KEY, make)
    here.attach(made, "statistics/s.bin", lambda path: path.write_bytes(b"gram") and None)
    (listed,) = there.ls()
    assert listed.id == made.id and not listed.path.exists() and there.size(listed) == 706
    got = there.build(KEY, never)
    assert got == listed and got.path != made.path
    assert (got.path / "heads/a.safetensors").read_bytes() == (made.path / "heads/a.safetensors").read_bytes()
    assert (got.path.parent / ENTRY).read_bytes() == (made.path.parent / ENTRY).read_bytes()
    assert there.attach(got, "statistics/s.bin", never).read_bytes() == b"gram"
    assert there.verify(got) == 3
    assert there.remove(made.id[:6]) == made.id and there.ls() == here.ls() == [] and there.get(KEY) is None


def test_found_models_of_a_remote_zoo_can_be_used(remote: tuple[Zoo, Zoo]) -> None:
    here, there = remote
    here.build(KEY, make)
    (found,) = there.find(seed=1)
    assert (found.path / "config.json").is_file()


def test_an_interrupted_upload_is_not_there_and_is_finished_by_the_next(
    remote: tuple[Zoo, Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = remote
    send = here._remote.send

    def stop(source: Path, name: str) -> None:
        if name.endswith(ENTRY):
            raise KeyboardInterrupt
        send(source, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(here._remote, "send", stop)
        here.build(KEY, make)
    assert there.get(KEY) is None and there.ls() == []
    with pytest.raises(ZooError, match="being uploaded"):
        there.entry(here.id_of(KEY))
    here.build(KEY, never)
    assert there.build(KEY, never).facts == {"score": 0.5}


def test_what_another_machine_uploaded_meanwhile_wins(remote: tuple[Zoo, Zoo]) -> None:
    here, there = remote

    def slow(folder: Path) -> Any:
        there.build(KEY, make)
        make(folder)
        (folder / "config.json").write_text('{"mine": 1}')
        return {"score": 0.1}

    entry = here.build(KEY, slow)
    assert entry.facts == {"score": 0.5} and (entry.path / "config.json").read_text() == "{}"
    assert here.get(KEY) == entry and here.verify(entry) == 2


def test_a_damaged_remote_file_is_named_and_not_kept(remote: tuple[Zoo, Zoo]) -> None:
    import fsspec

    here, there = remote
    made = here.build(KEY, make)
    system, root = fsspec.url_to_fs(here.url)
    name = f"{root}/{made.id}/model/heads/a.safetensors"
    data = system.cat(name)
    for wrong in (data[:-1] + b"X", data[:-1], data + b"X"):
        system.pipe(name, wrong)
        with pytest.raises(ZooError, match=r"heads/a\.safetensors: damaged"):
            there.get(KEY)
        with pytest.raises(ZooError, match=r"heads/a\.safetensors: damaged"):
            there.verify(there.entry(made.id))
        assert not (there.root / made.id).exists()
    system.rm(name)
    with pytest.raises(ZooError, match=r"heads/a\.safetensors: damaged: absent"):
        there.get(KEY)
    system.pipe(name, data)
    assert there.get(KEY) is not None


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Zoo(f"file://{tmp_path}/z").root == tmp_path / "z" == Zoo(str(tmp_path / "z")).root
    for variable, value, expected in (
        ("HOME", str(tmp_path), tmp_path / ".cache/merganser/zoo"),
        ("XDG_CACHE_HOME", str(tmp_path / "c"), tmp_path / "c/merganser/zoo"),
        ("MERGANSER_ZOO", "s3://bucket/zoo", "s3://bucket/zoo"),
    ):
        if variable == "HOME":
            monkeypatch.delenv("MERGANSER_ZOO", raising=False)
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(variable, value)
        assert default_zoo() == str(expected)
    one, two = (Zoo(f"memory://{name}", cache=tmp_path) for name in "ab")
    assert one.root != two.root and one.root.parent == tmp_path
    with pytest.raises(UserError, match="to mend"):
        Zoo("no-such-protocol://x", cache=tmp_path).get(KEY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_zoo_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ZooError, match="cannot be written"):
        Zoo(tmp_path / "zoo").build(KEY, never)
