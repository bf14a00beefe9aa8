"""JSON and YAML of strangers: bounded before they are read, and refused with a message whatever they hold."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser import documents
from merganser.documents import parse_json, parse_yaml, read_json, read_yaml
from merganser.errors import DataError, UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_honest_documents_are_read_as_their_libraries_read_them(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, "a") == json.loads(text) == value
    written = yaml.safe_dump(value)
    if "\\0" not in written:
        assert parse_yaml(written, "a") == yaml.safe_load(written)


def aliases(shape: str) -> str:
    """Ten values, each of which names the one before nine times."""
    lines = (f"a{n}: &a{n} " + shape.format(", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 11))
    return "\n".join(lines)


BAD_JSON = {
    "no JSON": ("{", "unreadable JSON"),
    "empty": ("", "unreadable JSON"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' comes twice"),
    "5,000 digits": ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
    "1,000 digits": ("[-" + "9" * 1000 + "]", "1001 digits"),
    "deep lists": ("[" * 100_000, "nested more than"),
    "deep objects": ('{"a":' * 100 + "1" + "}" * 100, "nested more than"),
    "half of a pair": ('["\\ud800"]', "surrogate"),
    "half of a pair as a key": ('{"\\uDC00": 1}', "surrogate"),
    "NaN": ("[NaN]", "NaN is no finite number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no finite number"),
    "1e999": ("1e999", "1e999 is no finite number"),
    "many values": ("[" + "[]," * documents.MAX_VALUES + "0]", "more than 5000000 values"),
}
BAD_YAML = {
    "no YAML": ("a: [", "not YAML"),
    "a key twice": ("method: simple\nmethod: ties", "the key 'method' comes twice"),
    "a key twice inside": ("a: {b: 1, b: 2}", "the key 'b' comes twice"),
    "5,000 digits": ("a: " + "9" * 5000, "5000 digits"),
    "digits in hexadecimal": ("a: 0x" + "f" * 5000, "5002 digits"),
    "infinity": ("a: .inf", "no finite number"),
    "NaN": ("a: [.nan]", "no finite number"),
    "1e999": ("a: 1.0e+999", "no finite number"),
    "half of a pair": ('a: "\\ud800"', "surrogate"),
    "a list as a key": ("? [a]\n: b", "unhashable"),
    "a mapping as a key": ("{{a: b}: c}", "unhashable"),
    "Python": ("a: !!python/object/apply:os.system ['true']", "tag"),
    "a tag": ("a: !thing 1", "tag"),
    "a date by tag": ("a: !!timestamp 2001-99-99", "tag"),
    "bytes": ("a: !!binary aGVsbG8=", "tag"),
    "a number that is none": ("a: !!int ten", "not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not YAML"),
    "itself": ("&a [*a]", "itself"),
    "itself merged": ("a: &a\n  <<: *a", "itself"),
    "deep lists": ("[" * 100_000, "nested more than"),
    "deep blocks": ("- " * 5000 + "a", "nested more than"),
    "deep indents": ("\n".join(" " * n + f"k{n}:" for n in range(200)), "nested more than"),
    "NUL": ('a: "b\\0c"', "NUL"),
    "aliases of lists": ("a0: &a0 [1]\n" + aliases("[{}]"), "written out"),
    "aliases that merge": ("a0: &a0 {x: 1}\n" + aliases("{{<<: [{}]}}"), "written out"),
    "aliases of a long text": (f"a: &a {'x' * 100_000}\nb: [{'*a, ' * 20}0]", "written out"),
}  # fmt: skip


@pytest.mark.parametrize("text, said", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_refused(text: str, said: str) -> None:
    begin = time.perf_counter()
    for one in (text, text.encode()):
        with pytest.raises(DataError, match=said) as caught:
            parse_json(one, "file.json", DataError, mend="restore")
        assert len(str(caught.value)) < 300 and caught.value.where == "file.json" and caught.value.mend == "restore"
    assert time.perf_counter() - begin < 3


@pytest.mark.parametrize("text, said", BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml_is_refused(text: str, said: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(DataError, match=said) as caught:
        parse_yaml(text, "file.yaml", DataError, mend="correct")
    assert len(str(caught.value)) < 500 and caught.value.where == "file.yaml" and caught.value.mend == "correct"
    assert time.perf_counter() - begin < 3


def test_yaml_has_the_types_of_json_and_useful_aliases() -> None:
    text = "base: &b {date: 2001-99-99, real: 2001-01-01, eq: =}\nall: [{<<: *b, x: 1}, *b]\nsame: {a: 1, 'b': 1.5}"
    base = {"date": "2001-99-99", "real": "2001-01-01", "eq": "="}
    assert parse_yaml(text, "a") == {"base": base, "all": [{**base, "x": 1}, base], "same": {"a": 1, "b": 1.5}}
    assert parse_yaml("", "a") is None


def test_configurations_may_have_infinite_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "a.json", finite=False) == {"time_step_limit": [0.0, float("inf")]}
    with pytest.raises(UserError, match="Infinity"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_plain_file_is_not_opened(tmp_path: Path, read: Callable[..., object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, said in (
        ("pipe", "a pipe"), ("link", "a pipe"), (".", "a folder"), ("/dev/zero", "a device"), ("none", "No such file"),
        ("a\0b", "unreadable"), ("x" * 300, "too long"), ("\ud800", "unreadable"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            read(tmp_path / name, DataError)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="files of Linux that say that they are empty")
def test_files_that_do_not_tell_their_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_YAML", 100)
    with pytest.raises(UserError, match="101 bytes, 100 are accepted"):
        read_yaml(Path("/proc/cpuinfo"))


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match=f"{2**36} bytes"):
            read(tmp_path / "large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"a": "\xff"}')
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match="unreadable"):
            read(tmp_path / "a")
