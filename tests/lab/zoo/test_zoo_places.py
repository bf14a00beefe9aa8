"""Where the zoo lies: folders, and places behind fsspec that several machines share."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import UserError
from merganser.lab.zoo import Zoo, ZooError, default_zoo, id_of
from merganser.lab.zoo.places import Remote
from merganser.lab.zoo.record import ENTRY
from zoo_examples import KEY, make, never


@pytest.fixture
def remote(tmp_path: Path) -> tuple[Zoo, Zoo]:
    """The same place as two machines see it."""
    url = f"memory://{uuid.uuid4().hex}/zoo"
    return Zoo(url, cache=tmp_path / "a"), Zoo(url, cache=tmp_path / "b")


def test_a_remote_zoo_is_shared(remote: tuple[Zoo, Zoo]) -> None:
    here, there = remote
    assert there.get(KEY) is None and there.ls() == []
    made = here.build(KEY, make)
    here.attach(made, "statistics/s.bin", lambda path: path.write_bytes(b"gram") and None)
    (listed,) = there.ls()
    assert listed.id == made.id and not listed.path.exists() and sum(there.files(listed).values()) == 706
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
    put = here._remote.put

    def stop(source: Path, name: str) -> None:
        if name.endswith(ENTRY):
            raise KeyboardInterrupt
        put(source, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(here._remote, "put", stop)
        here.build(KEY, make)
    assert there.get(KEY) is None and there.ls() == []
    with pytest.raises(ZooError, match="being uploaded"):
        there.entry(id_of(KEY))
    here.build(KEY, never)
    assert there.build(KEY, never).facts == {"score": 0.5}


@pytest.mark.parametrize("puts", range(8))
def test_what_is_here_is_there_after_the_next_look(
    remote: tuple[Zoo, Zoo], monkeypatch: pytest.MonkeyPatch, puts: int
) -> None:
    """A maker that is stopped after so many uploads: the next one that only looks finishes them."""
    here, there = remote
    left = iter(range(puts))
    original = Remote.put

    def put(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        original(*arguments)

    def gram(path: Path) -> None:
        path.write_bytes(b"gram")

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Remote, "put", put)
        here.attach(here.build(KEY, make), "statistics/s.bin", gram)
    found = here.get(KEY)
    assert (found is not None) == (puts > 0) == (there.get(KEY) is not None)  # the first is a probe
    if found is not None:
        if here.has(found, "statistics/s.bin"):
            assert there.attach(found, "statistics/s.bin", never).read_bytes() == b"gram"
        here.attach(found, "statistics/s.bin", gram)
        assert there.attach(found, "statistics/s.bin", never).read_bytes() == b"gram"
        assert not list((here.root / ".unshared").iterdir())


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
    with pytest.raises(UserError, match="cannot be written"):
        Zoo(tmp_path / "zoo").build(KEY, never)


def test_what_a_killed_maker_left_goes_with_the_next_use_though_nothing_is_made(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    made = zoo.build(KEY, make)
    zoo.attach(made, "statistics/s.bin", lambda path: path.write_bytes(b"gram") and None)
    for use in (lambda: zoo.build(KEY, never), lambda: zoo.attach(made, "statistics/s.bin", never)):
        left = zoo.root / ".partial" / "merganser-0123abcd"
        (left / "new").mkdir(parents=True)
        (left / "lock").write_text("")
        use()
        assert not left.exists()
