"""Merged folders whose record or parents somebody has changed: what verify finds by these, and by merging again.

A naive tamperer changes a word of provenance. A thorough one also writes the right hashes of everything into
provenance, and provenance's hash of itself. What only a signature finds is listed at the end, and is nothing that
changes what the model computes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import UserError
from merganser.merging import reproduce, verify
from merganser.merging.provenance import FILE_NAME, own_hash, read_provenance
from merganser.merging.verification.record_checks import check_itself
from merganser.signing import check_signature, new_key, sign
from tampering_examples import KINDS, Copy, Record

# ── what provenance says ──


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values that hold no others, of long lists and tables the first two alone."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not items:
        yield place
    for key, inner in items if place in ((), ("recipe",), ("plan",)) else items[:2]:
        yield from leaves(inner, (*place, key))


def put(record: Record, place: tuple[Any, ...], value: Any) -> Record:
    found = copy.deepcopy(record)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_covered_by_the_hash(copied: Callable[..., Copy], kind: str) -> None:
    one = copied(kind)
    places = [place for place in leaves(one.record) if place != ("sha256",)]
    assert len(places) > 45 and {place[0] for place in places} == set(one.record) - {"sha256"}
    for place in places:
        changed = put(one.record, place, 3 if place == ("format",) else "changed")
        assert "was changed after the merge" in str(check_itself(changed, one.folder)[0]), place
    assert check_itself({**one.record, "sha256": "0" * 64}, one.folder)
    assert check_itself({key: value for key, value in one.record.items() if key != "sha256"}, one.folder)


def method_is(name: str) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        record["recipe"]["method"] = name

    return change


def options_are(**options: Any) -> Callable[[Record], None]:
    """As if the recipe and every step had said so."""

    def change(record: Record) -> None:
        record["recipe"]["options"] |= options
        for step in record["plan"]["steps"]:
            if step.get("options"):
                step["options"] |= options

    return change


def coefficients_are(*values: float) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for number, value in enumerate(values):
            record["recipe"]["contributors"][number]["coefficient"] = value
            record["parents"][number]["coefficient"] = value
        for step in record["plan"]["steps"]:
            if step["method"] != "kept separate":
                step["coefficients"] = list(values)

    return change


def value_is(*place: Any, value: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        record.update(put(record, place, value))

    return change


def both(*changes: Callable[[Record], None]) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for one in changes:
            one(record)

    return change


def swap_parents(record: Record) -> None:
    record["parents"].reverse()
    record["recipe"]["contributors"].reverse()


def forget_a_parent(record: Record) -> None:
    del record["parents"][1], record["recipe"]["contributors"][1]


def without(*keys: str) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for key in keys:
            record.pop(key, None)

    return change


WEIGHT = "bert.encoder.layer.0.output.dense.weight"
FAST, DEEP = "fast", "deep"
TAMPERED: list[tuple[str, str, str, Callable[[Record], None]]] = [
    # what follows from the recipe and the parents' headers
    ("a tensor's method", "regmean", FAST, value_is("tensors", WEIGHT, "method", value="average")),
    ("a tensor's reason", "regmean", FAST, value_is("tensors", WEIGHT, "reason", value="excluded by '*'")),
    ("a tensor's hash", "regmean", FAST, value_is("tensors", WEIGHT, "blake3", value="0" * 64)),
    ("a tensor that is not there", "ties", FAST, value_is("tensors", "x", value={
        "blake3": "0" * 64, "method": "ties", "reason": None, "note": None})),
    ("a file's hash", "regmean", FAST, value_is("files", "config.json", value="0" * 64)),
    ("a file that is not there", "regmean", FAST, value_is("files", "x.json", value="0" * 64)),
    ("the method", "regmean", FAST, method_is("simple")),
    ("the method for another with the same options", "ties", FAST, method_is("dare_ties")),
    ("a method that there is none of", "ties", FAST, method_is("magic")),
    ("a step's method", "regmean", FAST, value_is("plan", "steps", 0, "method", value="ties")),
    ("a step's reason", "regmean", FAST, value_is("plan", "steps", 0, "reason", value="as I like")),
    ("a step's coefficients", "regmean", FAST, value_is("plan", "steps", 5, "coefficients", value=[1.0, 0.0])),
    ("a step's source", "ties", FAST, value_is("plan", "steps", 0, "sources", 0, value={})),
    ("a step less", "ties", FAST, lambda record: record["plan"]["steps"].pop()),
    ("no steps", "ties", FAST, value_is("plan", "steps", value=[])),
    ("an output's dtype", "ties", FAST, value_is("plan", "outputs", 0, "dtype", value="F16")),
    ("the plan's base", "ties", FAST, value_is("plan", "base", value="tuned-0")),
    ("bytes read", "ties", FAST, value_is("plan", "bytes_read", value=1)),
    ("a label", "regmean", FAST, value_is("plan", "labels", value=["good", "bad"])),
    ("folders", "heads", FAST, value_is("plan", "folders", value={})),
    ("the rank", "adapter", FAST, value_is("as_adapter", value=8)),
    ("no rank", "adapter", FAST, without("as_adapter")),
    ("an adapter's notes", "adapter", DEEP, lambda record: [
        part["notes"].append("lost: nothing") for part in (record, record["plan"])]),
    ("an adapter's error", "adapter", DEEP, lambda record: next(
        entry.update(note="rank 4: relative error 0.00e+00") for entry in record["tensors"].values() if entry["note"])),
    ("coverage", "regmean", FAST, value_is("coverage", "share", value=0.5)),
    ("coverage's numbers", "ties", FAST, value_is("coverage", "reached", value=1)),
    ("coverage's reasons", "regmean", FAST, value_is("coverage", "others", value={"quantised": 4})),
    ("a note", "regmean", FAST, lambda record: [
        part.setdefault("notes", []).append("all is well") for part in (record, record["plan"])]),
    ("the choice", "regmean", FAST, lambda record: [
        record.update(method_chosen_because="it is best"), record["plan"].update(choice="it is best")]),
    ("the choice in one place", "regmean", FAST, value_is("method_chosen_because", value=None)),
    ("who decided how much", "regmean", DEEP, value_is("influence", "overall", value=[0.5, 0.5])),
    ("no word of who decided", "regmean", DEEP, without("influence")),
    ("influence where there was none", "ties", DEEP, value_is("influence", value={"of": "gram"})),
    ("what was found of the statistics", "regmean", DEEP, value_is("judged", value=["all is well"])),
    # what the recipe says, and the files do not
    ("excluded tensors", "regmean", FAST, value_is("recipe", "exclude", value=["*.layer.1.*"])),
    ("heads kept separate", "regmean", FAST, value_is("recipe", "keep_separate", value=["classifier.*"])),
    ("heads not kept separate", "heads", FAST, value_is("recipe", "keep_separate", value=[])),
    ("the dtype", "ties", FAST, value_is("recipe", "dtype", value="BF16")),
    ("the shards", "regmean", FAST, value_is("recipe", "max_shard_size", value="4kB")),
    ("whose configuration", "ties", FAST, value_is("recipe", "config_from", value="nobody")),
    ("pickles allowed", "ties", FAST, value_is("recipe", "allow_pickle", value=True)),
    ("an unknown option", "ties", FAST, value_is("recipe", "options", "magic", value=1)),
    ("an unknown key of the recipe", "ties", FAST, value_is("recipe", "magic", value=1)),
    ("an unknown key", "ties", FAST, value_is("magic", value=1)),
    ("alpha in the recipe alone", "regmean", FAST, value_is("recipe", "options", "alpha", value=0.1)),
    ("alpha everywhere", "regmean", DEEP, options_are(alpha=0.1)),
    ("density everywhere", "ties", DEEP, options_are(density=0.9)),
    ("density of an adapter", "adapter", DEEP, options_are(density=0.9)),
    ("a coefficient of the recipe", "regmean", FAST, value_is("recipe", "contributors", 0, "coefficient", value=9)),
    ("coefficients everywhere", "regmean", DEEP, coefficients_are(3.0, 1.0)),
    ("coefficients of heads", "heads", DEEP, coefficients_are(3.0, 1.0)),
    ("coefficients of sentences", "sentences", DEEP, coefficients_are(1.0, 0.5)),
    # the parents
    ("a parent's hash", "regmean", FAST, value_is("parents", 0, "manifest_blake3", value="0" * 64)),
    ("a parent's name", "regmean", FAST, value_is("parents", 0, "name", value="llama")),
    ("a parent's place", "regmean", FAST, value_is("parents", 0, "model", value="tuned-1")),
    ("a parent's coefficient", "regmean", FAST, value_is("parents", 0, "coefficient", value=2.0)),
    ("a parent's revision", "regmean", DEEP, value_is("parents", 0, "revision", value="0" * 40)),
    ("a parent's statistics", "regmean", FAST, value_is("parents", 0, "statistics", "sha256", value="0" * 64)),
    ("no statistics of a parent", "regmean", FAST, value_is("parents", 0, "statistics", value=None)),
    ("the examples of a parent", "regmean", FAST, value_is("parents", 0, "statistics", "examples", value=10**6)),
    ("the tokens of a parent", "regmean", FAST, value_is("parents", 0, "statistics", "tokens", value=1)),
    ("the label of a parent", "regmean", FAST, value_is("parents", 0, "statistics", "label", value="gold")),
    ("parents in another order", "regmean", FAST, swap_parents),
    ("a parent forgotten", "ties", FAST, forget_a_parent),
    ("all parents forgotten", "ties", FAST, value_is("parents", value=[])),
    ("one parent twice", "ties", FAST, lambda record: record["parents"].append(record["parents"][0])),
    ("the base's hash", "ties", FAST, value_is("base", "manifest_blake3", value="0" * 64)),
    ("the base's place", "ties", FAST, value_is("base", "model", value="tuned-0")),
    ("no base", "ties", FAST, value_is("base", value=None)),
    ("a base where there was none", "regmean", FAST, lambda record: record.update(base=record["parents"][0])),
    # what would have verify look at less
    ("an older format", "ties", FAST, both(value_is("format", value=3), without("sha256"), value_is(
        "tensors", WEIGHT, "method", value="average"))),
    ("the first format", "regmean", FAST, both(value_is("format", value=1), without("sha256", "plan"), value_is(
        "recipe", "exclude", value=["*.layer.1.*"]))),
    ("an older format and another plan", "regmean", DEEP, both(
        value_is("format", value=2), without("sha256", "plan"), value_is(
            "recipe", "options", "alpha", value=0.1))),
    ("no plan", "ties", FAST, without("plan")),
    ("a ledger's", "regmean", DEEP, value_is("ledger", value={"generation": 1})),
    ("another version and another method", "regmean", FAST, both(
        value_is("versions", "merganser", value="9"), value_is("tensors", WEIGHT, "method", value="average"))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "level", "change"), [row[1:] for row in TAMPERED], ids=[row[0] for row in TAMPERED])
def test_a_record_that_agrees_with_itself(
    copied: Callable[..., Copy], kind: str, level: str, change: Callable[[Record], None]
) -> None:
    """Somebody has changed provenance, and its hash with it."""
    one = copied(kind)
    change(one.record)
    one.write(thorough="sha256" in one.record)
    if level == DEEP:
        verify(one.folder)
    with pytest.raises(UserError):
        verify(one.folder, deep="all" if level == DEEP else None)


def test_another_merge_by_the_same_words(copied: Callable[..., Copy], trees: dict[str, Path]) -> None:
    """Weights of TIES with the whole record of RegMean, hashes made right; and the other way round."""
    for kind, other in (("ties", "heads"), ("heads", "ties")):
        one, record = copied(kind), read_provenance(trees[other])
        one.record = {**record, "tensors": {}}
        one.hash_files()
        one.write(thorough=True)
        with pytest.raises(UserError):
            verify(one.folder, deep="all")


# ── parents ──


def change_json(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "changed": True}))


def change_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


PARENTS: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("regmean", "tuned-0/model.safetensors", change_last_byte, "other weights than were merged"),
    ("regmean", "tuned-1/model.safetensors", change_last_byte, "other weights than were merged"),
    ("regmean", "tuned-1/merge_statistics.safetensors", change_last_byte, "other statistics than were merged"),
    ("adapter", "tuned-1/merge_statistics.safetensors", change_last_byte, "other statistics than were merged"),
    ("regmean", "tuned-0/config.json", change_json, "config.json"),
    ("regmean", "tuned-0/chat_template.jinja", change_last_byte, "chat_template.jinja"),
    ("regmean", "tuned-0/vocab.txt", change_last_byte, "vocabular"),
    ("heads", "tuned-1/config.json", change_json, "config.json"),
    ("ties", "base/model.safetensors", change_last_byte, "other weights than were merged"),
    ("sentences", "sentence-1/modules.json", lambda path: path.write_text(path.read_text() + " "), "modules.json"),
    ("sentences", "sentence-2/model.safetensors", change_last_byte, "other weights than were merged"),
]


@pytest.mark.parametrize(("kind", "file", "change", "said"), PARENTS, ids=[f"{row[0]}-{row[1]}" for row in PARENTS])
def test_a_parent_that_is_changed(
    copied: Callable[..., Copy], kind: str, file: str, change: Callable[[Path], None], said: str
) -> None:
    one = copied(kind, parents=True)
    verify(one.folder)
    change(one.tree / file)
    with pytest.raises(UserError, match=said):
        verify(one.folder)
    with pytest.raises(UserError, match=said):
        reproduce(one.folder)


def test_parents_that_are_not_there(copied: Callable[..., Copy]) -> None:
    """What needs them is said; what the record shows by itself is found all the same."""
    for name in ("tuned-1", "tuned-1/merge_statistics.safetensors"):
        one = copied("regmean", parents=True)
        path = one.tree / name
        path.rename(path.with_name("gone"))
        found = verify(one.folder)
        assert len(found.absent) == 1 and "not made anew" in found.notes[0]
        assert found.parents == (1 if name == "tuned-1" else 2)
        with pytest.raises(UserError, match=r"cannot be merged again: .* not made anew"):
            verify(one.folder, deep=1)
        with pytest.raises(UserError, match="cannot be had"):
            reproduce(one.folder)
        for _, _, level, change in [row for row in TAMPERED if row[0] in _BY_ITSELF]:
            changed = copied("regmean", parents=True)
            (changed.tree / name).rename((changed.tree / name).with_name("gone"))
            change(changed.record)
            changed.write(thorough=True)
            with pytest.raises(UserError):
                verify(changed.folder)
            assert level == FAST


_BY_ITSELF = {
    "a tensor's method",
    "a tensor's hash",
    "coverage",
    "a parent's name",
    "a parent's coefficient",
    "an unknown key",
}


def test_more_in_a_parents_folder_is_no_difference(copied: Callable[..., Copy]) -> None:
    """Its owner collects statistics later, or writes a thesis."""
    one = copied("ties", parents=True)
    shutil.copyfile(one.tree / "base/config.json", one.tree / "tuned-0/thesis.txt")
    found = verify(one.folder, deep="all")
    assert all("worded otherwise today" in note and "left behind" in note for note in found.notes) and found.notes


# ── what only a signature finds ──

UNSEEN: list[tuple[str, str, Callable[[Record], None]]] = [
    ("versions", "regmean", value_is("versions", "torch", value="9.9")),
    ("versions of merganser", "regmean", value_is("versions", "merganser", value="9.9")),
    ("the card's hash", "ties", value_is("card", value="0" * 64)),
    ("a contributor's name", "ties", both(
        value_is("recipe", "contributors", 0, "name", value="mine"), value_is("parents", 0, "name", value="mine"))),
    ("coefficients of the same ratio", "regmean", coefficients_are(2.0, 4.0)),
    ("a larger shard size that changes no shard", "ties", value_is("recipe", "max_shard_size", value="9GB")),
    ("a coverage that is reached", "regmean", value_is("recipe", "require_coverage", value=0.5)),
    ("that the method was chosen", "regmean", lambda record: [
        record.update(method_chosen_because=None), record["plan"].pop("choice")]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), [row[1:] for row in UNSEEN], ids=[row[0] for row in UNSEEN])
def test_what_a_thorough_tamperer_may_change_unseen(
    copied: Callable[..., Copy], kind: str, change: Callable[[Record], None]
) -> None:
    """Nothing of it changes what the model computes; the hash alone gives a naive tamperer away."""
    one = copied(kind)
    change(one.record)
    one.write(thorough=False)
    with pytest.raises(UserError, match="hash of itself"):
        verify(one.folder)
    one.write(thorough=True)
    verify(one.folder, deep="all")


def test_a_signature_finds_it_all_the_same(copied: Callable[..., Copy], tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra merganser[sign] is not installed")
    private, public = new_key(tmp_path / "my.key")
    signed = {kind: copied(kind) for kind in ("regmean", "ties")}
    for one in signed.values():
        sign(one.folder, private)
        check_signature(one.folder, public)
        verify(one.folder, deep="all")
    for _, kind, change in UNSEEN:
        one = signed[kind]
        kept = (one.folder / FILE_NAME).read_bytes()
        one.record = read_provenance(one.folder)
        change(one.record)
        one.write(thorough=True)
        with pytest.raises(UserError, match=r"changed since: provenance\.json"):
            check_signature(one.folder, public)
        (one.folder / FILE_NAME).write_bytes(kept)


# ── malformed records ──

VALUES: list[Any] = [None, 1, -1.5, True, "x", [], {}, [[]], {"": None}, 10**400, "\ud800", "\x00", "../../etc"]


def test_malformed_records_are_refused(copied: Callable[..., Copy]) -> None:
    one = copied("regmean")
    path = one.folder / FILE_NAME
    places = list(leaves(one.record))
    tops = [place[:depth] for place in places for depth in (1, 2) if len(place) >= depth]
    for number, place in enumerate(dict.fromkeys([*tops, *places])):
        value = VALUES[number % len(VALUES)]
        changed = put(one.record, place, value)
        if changed == one.record or place[0] == "sha256":
            continue
        changed["sha256"] = own_hash(changed)
        path.write_text(json.dumps(changed))
        try:
            verify(one.folder)
        except UserError:
            continue
        harmless = place[0] in ("versions", "card", "influence", "judged") or place[-1] in ("require_coverage", "name")
        assert harmless, (place, value)
    for text in ("", "[]", "{", '{"format": 4}', '{"format": true}', "[" * 10**5, '{"format": 1e400}', "\x00"):
        path.write_text(text)
        with pytest.raises(UserError):
            verify(one.folder)
        with pytest.raises(UserError):
            reproduce(one.folder)
