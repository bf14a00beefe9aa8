"""Merged folders that somebody has changed: what verify finds at a glance, by the parents, and by merging again.

A naive tamperer changes a file, or a word of provenance. A thorough one also writes the right hashes of everything into
provenance, and provenance's hash of itself. What only a signature finds is listed at the end, and is nothing that
changes what the model computes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoints import hash_tensor, sha256_file
from merganser.checkpoints.header import read_infos
from merganser.cli import main
from merganser.errors import UserError
from merganser.merging import merge, reproduce, verify
from merganser.merging.provenance import FILE_NAME, file_digest, own_hash, read_provenance
from merganser.merging.verification.folder_checks import check_files
from merganser.merging.verification.record_checks import check_itself
from merganser.signing import check_signature, new_key, sign
from merganser.tensors import DTYPE_NAMES
from sentence_examples import save_encoder

Record = dict[str, Any]
Family = Callable[..., tuple[Path, list[Path]]]
KINDS = ("regmean", "ties", "heads", "sentences", "adapter")


@pytest.fixture(scope="module")
def trees(shared_family: Family) -> dict[str, Path]:
    """The folders of a merge of each kind; each lies beside its parents, which it knows by their bare names."""
    base, models = shared_family("bert", 2)
    tree = base.parent
    for model in models:
        (model / "chat_template.jinja").write_text("{{ messages }}")
        (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        (model / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nduck\n")
    for seed in (1, 2):
        save_encoder(tree / f"sentence-{seed}", seed)
    names, here = ["tuned-0", "tuned-1"], Path.cwd()
    os.chdir(tree)
    try:
        merge(names, "regmean", coefficients=[1, 2], max_shard_size="20kB")
        merge(names, "ties", method="ties", base="base")
        merge(names, "heads", method="regmean", keep_separate=["classifier.*"], names="first")
        merge(["sentence-1", "sentence-2"], "sentences", method="simple")
        merge(names, "adapter", method="ties", base="base", as_adapter=4)
    finally:
        os.chdir(here)
    return {kind: tree / kind for kind in KINDS}


class Copy:
    """A merge's folder that may be changed; the parents too, if asked for."""

    def __init__(self, kind: str, original: Path, place: Path, *, parents: bool = False) -> None:
        self.tree = place
        for path in original.parent.iterdir():
            if path.name == kind or (path.name not in KINDS and parents):
                shutil.copytree(path, place / path.name)
            elif path.name not in KINDS:
                (place / path.name).symlink_to(path, target_is_directory=True)
        self.folder = place / kind
        self.record: Record = read_provenance(self.folder)

    def write(self, *, thorough: bool) -> None:
        """Write the record down, with every hash that a thorough tamperer makes right."""
        if thorough:
            self.record["sha256"] = own_hash(self.record)
        (self.folder / FILE_NAME).write_text(json.dumps(self.record))

    def hash_files(self) -> None:
        """Give the record the hashes of the files and tensors that are there."""
        plan = self.record["plan"]
        above = {file: f"{inner}/" for inner, file in plan.get("folders", {}).items()}
        files = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in (FILE_NAME, "README.md"):
                weights = path.suffix == ".safetensors"
                files[name] = file_digest(path, "blake3:") if weights else sha256_file(path)
                for tensor, value in (load_file(path) if weights else {}).items():
                    entry = self.record["tensors"].setdefault(
                        above.get(name, "") + tensor, {"method": "average", "reason": None, "note": None}
                    )
                    entry["blake3"] = hash_tensor(value, DTYPE_NAMES[value.dtype], "blake3")
        self.record["files"] = files


@pytest.fixture
def copied(trees: dict[str, Path], tmp_path: Path) -> Callable[..., Copy]:
    def make(kind: str, *, parents: bool = False) -> Copy:
        place = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        return Copy(kind, trees[kind], place, parents=parents)

    return make


def glance(folder: Path) -> list[str]:
    """What the folder alone shows."""
    record = read_provenance(folder)
    return [str(problem) for problem in (*check_itself(record, folder), *check_files(folder, record))]


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_has_changed_is_sound(trees: dict[str, Path], kind: str) -> None:
    found = verify(trees[kind], deep="all")
    assert not found.absent and not found.notes and found.tensors == len(read_provenance(trees[kind])["tensors"])
    assert reproduce(trees[kind]) == []
    assert verify(trees[kind], deep=3, seed=7) == verify(trees[kind], deep=3, seed=7)


def test_on_the_command_line(copied: Callable[..., Copy], capsys: pytest.CaptureFixture[str]) -> None:
    """The folder may stand before --deep or behind it; the sample that was drawn can be drawn again."""
    one = copied("ties")

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return int(end.value.code or 0)

    for arguments in (["--deep", one.folder], [one.folder, "--deep"], [one.folder, "--deep", "3", "--seed", "7"]):
        assert run("verify", *arguments) == 0
    assert "3 tensors merged again are the same (sample --seed 7)" in " ".join(capsys.readouterr().out.split())
    assert run("verify", one.folder, "--deep", "some") == 2 and run("verify", one.folder, "--deep", "0") == 2
    path = one.folder / "model.safetensors"
    state = load_file(path)
    save_file(state | {"classifier.bias": state["classifier.bias"] + 1}, path, {"format": "pt"})
    one.hash_files()
    one.write(thorough=True)
    assert run("verify", one.folder) == 0
    assert run("verify", one.folder, "--deep=all") == 2
    assert "1 of 41 recomputed tensors are not what the plan gives: classifier.bias" in capsys.readouterr().err
    assert run("reproduce", one.folder) == 2


# ── files ──

ADDED = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json.json", "adapter_model.bin",
    "adapter_model.safetensors", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.json",
    "added_tokens.json", "special_tokens_map.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "chat_template.json", "modeling_x.py", "configuration_x.py", "x.tiktoken", "vocab.bpe",
    "x.spm", "tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "model.gguf", "model.onnx", "x.pkl", "x.pt",
    "model.pth", "training_args.bin", "additional_chat_templates/tool_use.jinja", "2_Dense/config.json",
    "2_Dense/pytorch_model.bin", "heads/other/config.json", "heads/other/head.safetensors", "no-ending", "thesis.pdf",
    "sub/README.md", "sub/.hidden", "sub/LICENSE",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["regmean", "adapter"])
def test_files_that_are_added(copied: Callable[..., Copy], kind: str) -> None:
    one = copied(kind)
    assert glance(one.folder) == []
    for name in set(ADDED) - set(one.record["files"]):
        path = one.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
        assert [name in problem and "added after the merge" in problem for problem in glance(one.folder)] == [True]
        path.unlink()
    (one.folder / "module").symlink_to(one.tree, target_is_directory=True)
    assert "module was added" in glance(one.folder)[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_x.py", "additional_chat_templates/tool_use.jinja"])
def test_files_that_are_added_to_the_record_too(copied: Callable[..., Copy], name: str) -> None:
    one = copied("regmean")
    (one.folder / name).parent.mkdir(exist_ok=True)
    (one.folder / name).write_text("{}")
    one.hash_files()
    one.write(thorough=True)
    assert glance(one.folder) == []
    with pytest.raises(UserError, match=r"files\.\S+ is .*, where not there follows"):
        verify(one.folder)


def test_what_belongs_to_the_owner_is_let_be(copied: Callable[..., Copy]) -> None:
    one = copied("regmean")
    for name in ("README.md", "LICENSE", "NOTICE.txt", ".gitattributes", ".git/config", ".cache/x", "model.sig"):
        (one.folder / name).parent.mkdir(exist_ok=True)
        (one.folder / name).write_text("my own words")
    assert verify(one.folder).notes == ("README.md was edited after the merge",)
    (one.folder / "README.md").unlink()
    assert verify(one.folder).notes == ("README.md was removed after the merge",)
    assert reproduce(one.folder) == []


def files_of(kind: str) -> Iterator[str]:
    """Every file of a merge of a kind, whose names do not depend on the run."""
    yield from {
        "regmean": ("config.json", "chat_template.jinja", "tokenizer_config.json", "vocab.txt",
                    "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        "ties": ("config.json", "model.safetensors"),
        "heads": ("config.json", "model.safetensors.index.json", "heads/tuned-1/config.json",
                  "heads/tuned-1/head.safetensors", "heads/tuned-1/model.safetensors.index.json"),
        "sentences": ("modules.json", "1_Pooling/config.json", "tokenizer.json", "config.json", "model.safetensors",
                      "sentence_bert_config.json"),
        "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_changed_or_missing(copied: Callable[..., Copy], kind: str) -> None:
    one = copied(kind)
    recorded = one.record["files"]
    assert set(files_of(kind)) <= set(recorded)
    for name in recorded:
        path, data = one.folder / name, (one.folder / name).read_bytes()
        for changed in (data + b" ", data[:-1] + bytes([data[-1] ^ 1]), b""):
            path.write_bytes(changed)
            assert [name.rpartition("/")[2] in problem for problem in glance(one.folder)] == [True], name
        path.unlink()
        assert [f"{name} is missing" in problem for problem in glance(one.folder)] == [True]
        outside = one.tree / "elsewhere"
        outside.write_bytes(data)
        path.symlink_to(outside)
        assert ["link that leads out" in problem for problem in glance(one.folder)] == [True]
        path.unlink()
        path.write_bytes(data)
    assert glance(one.folder) == []


SMALL = [(kind, name) for kind in KINDS for name in files_of(kind) if not name.endswith(".safetensors")]


@pytest.mark.parametrize(("kind", "name"), SMALL)
def test_small_files_that_are_changed_with_the_record(copied: Callable[..., Copy], kind: str, name: str) -> None:
    """A template that says something else, a factor of an adapter: the parents' say otherwise."""
    one = copied(kind)
    path = one.folder / name
    text = path.read_text()
    value = json.loads(text) if name.endswith(".json") else None
    if isinstance(value, dict):
        path.write_text(json.dumps({**value, "lora_alpha": 100, "changed": True}))
    else:
        path.write_text(text.replace("duck", "dog") + "\n")
    one.hash_files()
    one.write(thorough=True)
    assert glance(one.folder) == []
    with pytest.raises(UserError, match="made again, it differs in adapter_config.json" if kind == "adapter" else name):
        verify(one.folder, deep="all")
    with pytest.raises(UserError, match="files") if kind != "adapter" else pytest.raises(AssertionError):
        assert reproduce(one.folder) == []


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_changed_with_the_record(copied: Callable[..., Copy], kind: str) -> None:
    """The last bit of one number of one tensor."""
    one = copied(kind)
    path = next(one.folder / name for name in sorted(one.record["files"]) if name.endswith(".safetensors"))
    info = read_infos(path, "")[-1]
    with path.open("r+b") as stream:
        stream.seek(info.offset)
        first = stream.read(1)
        stream.seek(info.offset)
        stream.write(bytes([first[0] ^ 1]))
    assert f"{path.name} was changed after the merge" in glance(one.folder)[0]
    one.hash_files()
    one.write(thorough=True)
    verify(one.folder)
    with pytest.raises(UserError, match=r"recomputed tensors are not|made again, it differs"):
        verify(one.folder, deep="all")
    assert path.relative_to(one.folder).as_posix() in reproduce(one.folder)


def test_rounding_is_told_from_tampering(copied: Callable[..., Copy]) -> None:
    for amount, rounding in ((1e-7, True), (1e-3, False)):
        one = copied("ties")
        path = one.folder / "model.safetensors"
        state = load_file(path)
        state["classifier.weight"] *= 1 + amount
        save_file(state, path, {"format": "pt"})
        one.hash_files()
        one.write(thorough=True)
        with pytest.raises(UserError, match="allow-rounding" if rounding else "mend: merge"):
            verify(one.folder, deep="all")
        if rounding:
            assert "rounding alone" in verify(one.folder, deep="all", allow_rounding=True).notes[0]
        else:
            with pytest.raises(UserError, match=r"classifier\.weight"):
                verify(one.folder, deep="all", allow_rounding=True)


def test_a_tensor_more_and_a_tensor_less(copied: Callable[..., Copy]) -> None:
    for kind in ("ties", "adapter"):
        for change in (lambda s: s | {"x": torch.ones(2)}, lambda s: dict(list(s.items())[1:])):
            one = copied(kind)
            path = next(one.folder.glob("*.safetensors"))
            save_file(change(load_file(path)), path, {"format": "pt"})
            one.record["tensors"] = {}
            one.hash_files()
            one.write(thorough=True)
            with pytest.raises(UserError):
                verify(one.folder, deep="all")
            with pytest.raises(UserError) if kind == "ties" else pytest.raises(AssertionError):
                assert reproduce(one.folder) == []


def test_the_sample_is_drawn_anew_and_finds_what_it_draws(copied: Callable[..., Copy]) -> None:
    one = copied("ties")
    path = one.folder / "model.safetensors"
    state = load_file(path)
    save_file({name: tensor + 1 for name, tensor in state.items()}, path, {"format": "pt"})
    one.hash_files()
    one.write(thorough=True)
    with pytest.raises(UserError, match="1 of 1 recomputed"):
        verify(one.folder, deep=1)
    clean = copied("ties").folder
    assert len({verify(clean, deep=1).seed for _ in range(3)}) == 3


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
