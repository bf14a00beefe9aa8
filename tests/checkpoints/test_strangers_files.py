"""Folders of strangers: nothing outside of them is read, headers are bounded, pickles hold what their size says."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_examples import adapt_linears
from merganser.checkpoints import AdapterCheckpoint, open_checkpoint
from merganser.checkpoints.header import MAX_HEADER
from merganser.checkpoints.side_files import belonging
from merganser.errors import UserError
from merganser.merging import merge
from merganser.paths import inside, is_inside

Save = Callable[..., Path]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(folder: Path | str, said: str, **options: bool) -> str:
    begin = time.process_time()
    with pytest.raises(UserError, match=said) as caught:
        open_checkpoint(folder, **options)
    assert time.process_time() - begin < 3 and len(str(caught.value)) < 3000
    return str(caught.value)


# ── paths ──

OUT = ["../x", "/etc/passwd", "a/../../x", "..", "~/x", "C:\\x", "..\\x", "\\\\host\\x", "a\0b", "\ud800", "x" * 300]


@pytest.mark.parametrize("name", [*OUT, None, 5, ["a"]])
def test_paths_that_leave_a_folder_are_errors(tmp_path: Path, name: object) -> None:
    with pytest.raises(UserError, match="the path") as caught:
        inside(tmp_path, name, where="index.json")
    assert str(caught.value).startswith("index.json: ")


def test_paths_that_stay_are_given_back_in_their_usual_form(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "in").symlink_to("a")
    (tmp_path / "out").symlink_to(tmp_path.parent)
    for name, usual in (
        ("a", "a"),
        ("./a//b", "a/b"),
        ("", ""),
        (".", ""),
        ("in/b", "in/b"),
        ("a\\b", "a/b"),
        ("…", "…"),
    ):
        assert inside(tmp_path, name) == usual
    assert inside(tmp_path / "a", "../b", root=tmp_path) == "../b"
    for name in ("out", "out/x", "a/../out"):
        with pytest.raises(UserError):
            inside(tmp_path, name)
    with pytest.raises(UserError, match="outside"):
        inside(tmp_path / "a", "../../b", root=tmp_path)
    assert is_inside(tmp_path, tmp_path / "loop")  # leads nowhere


@pytest.mark.parametrize(
    "name", ["../secret/m.safetensors", "{folder}/secret/m.safetensors", "x" * 100_000, "link/m.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(save_model: Save, tmp_path: Path, name: str) -> None:
    folder, secret = save_model("m"), tmp_path / "secret"
    secret.mkdir()
    (folder / WEIGHTS).rename(secret / "m.safetensors")
    (folder / "link").symlink_to(secret)
    names = load_file(secret / "m.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name.format(folder=tmp_path))}))
    assert "the weight file" in refused(folder, "outside of the folder|link that leads out|no path")
    pickles = folder / "pytorch_model.bin.index.json"
    (folder / INDEX).rename(pickles)
    refused(folder, "outside of the folder|link that leads out|no path", allow_pickle=True)
    for other in ([], {"weight_map": []}, {"weight_map": {"a": 5}}, {}):
        pickles.write_text(json.dumps(other))
        refused(folder, "JSON object|no weight_map", allow_pickle=True)


FILES = (WEIGHTS, "config.json", "tokenizer.json", "vocab.txt", "tokenizer.model", "generation_config.json",
         "merge_statistics.safetensors", "provenance.json", "chat_template.jinja", INDEX)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_links_out_of_a_folder_are_errors_with_a_mend_that_works(save_model: Save, tmp_path: Path, file: str) -> None:
    folder, secret = save_model("m"), tmp_path / "secret"
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    (folder / file).rename(secret)
    (folder / file).symlink_to("../secret")
    assert "cp -rL" in refused(folder, f"links that lead out .*: {file}")
    if file in (WEIGHTS, "config.json"):
        subprocess.run(["cp", "-rL", folder, tmp_path / "copy"], check=True)
        assert open_checkpoint(tmp_path / "copy").tensors


def test_links_within_a_folder_and_to_a_folder_are_followed(save_model: Save, tmp_path: Path) -> None:
    folder = save_model("m")
    (folder / WEIGHTS).rename(folder / "w.bin")
    (folder / WEIGHTS).symlink_to("w.bin")
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(folder).tensors == open_checkpoint(tmp_path / "link").tensors


def test_the_hub_cache_is_no_outside(save_model: Save, tmp_path: Path) -> None:
    model, repo = save_model("m"), tmp_path / "models--org--m"
    (repo / "blobs").mkdir(parents=True)
    place = repo / "snapshots" / "abc"
    (place / "1_Pooling").mkdir(parents=True)
    (repo / "blobs" / "pooling").write_text("{}")
    (place / "1_Pooling" / "config.json").symlink_to("../../../blobs/pooling")
    (place / "modules.json").write_text('[{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.P"}]')
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (place / path.name).symlink_to(f"../../blobs/{number}")
    assert (
        open_checkpoint(place).tensors and open_checkpoint(place).config and "1_Pooling/config.json" in belonging(place)
    )
    (place / "config.json").unlink()
    (place / "config.json").symlink_to("../../../elsewhere")
    refused(place, "lead out of the folder")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
@pytest.mark.parametrize("file", [WEIGHTS, "config.json", INDEX, "adapter_config.json", "modules.json"])
def test_what_is_no_file_is_an_error_and_hangs_nobody(
    save_model: Save, tmp_path: Path, make: Callable[[Path], None], file: str
) -> None:
    folder = save_model("m")
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    if file in (WEIGHTS, "config.json"):
        with pytest.raises(UserError):
            assert open_checkpoint(folder).config
    else:  # no file of that name
        assert open_checkpoint(folder).tensors


def test_code_is_looked_for_beside_a_configuration_alone(save_model: Save, tmp_path: Path) -> None:
    folder = save_model("m")
    (tmp_path / "secret.py").write_text("x = 1")
    config = json.loads((folder / "config.json").read_text())
    for name in ("../secret.A", f"{tmp_path}/secret.A", "..secret.A", "a\0b.A", "/etc/x.A", ".A"):
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": name}}))
        assert not [file for file in belonging(folder) if file.endswith(".py")]
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.A"}}))
    lines = ["from .../../secret import x", "import ./../secret", "from ./x import y", f"from .{'a/' * 9} import b"]
    (folder / "own.py").write_text("\n".join(lines) + "\n" * 500_000 + "from .beside import x")
    (folder / "beside.py").write_text("")
    begin = time.process_time()
    assert [file for file in belonging(folder) if file.endswith(".py")] == ["beside.py", "own.py"]
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("types", [{"": "x.Router"}, {".": "x.Router"}, {"../m": "x.Router"}, {"/": "x.Dense"}])
def test_routers_name_folders_below_their_own(save_model: Save, types: dict[str, str]) -> None:
    folder = save_model("m")
    (folder / "modules.json").write_text('[{"path": "", "type": "x.Router"}]')
    (folder / "router_config.json").write_text(json.dumps({"types": types}))
    refused(folder, "router itself|outside of the folder")


def test_an_absolute_base_needs_the_user_s_word(
    save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = save_model("base", "llama"), save_model("other", "llama")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for name in (str(base), "../base", f"{tmp_path}/inner/../base", "../inner/../base"):
        adapter = adapt_linears(tmp_path / "inner" / "a", base, ("q_proj",), base_model_name_or_path=name)
        mend = refused(str(adapter), "by a path of this machine").partition("say so: ")[2].split(" instead of ")[0]
        assert isinstance(open_checkpoint(mend), AdapterCheckpoint)  # what the mend says to type
    monkeypatch.chdir(tmp_path)
    adapter = adapt_linears(tmp_path / "inner" / "a", base, ("q_proj",), base_model_name_or_path=str(base))
    (tmp_path / "link").symlink_to(base)
    for given in (base, tmp_path / "link"):  # the same place
        assert merge([adapter], tmp_path / f"out-{given.name}", method="simple", base=given)
    with pytest.raises(UserError, match="by a path of this machine"):
        merge([adapter], tmp_path / "out", method="simple", base=other)
    (tmp_path / "inner" / "hidden").symlink_to(base)  # beside the adapter: whoever packed it may have put it there
    adapt_linears(tmp_path / "inner" / "a", base, ("q_proj",), base_model_name_or_path="hidden")
    refused(str(adapter), "link that leads out of the folder")


# ── headers ──


def header(text: bytes, data: bytes = b"0000") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


ENTRY = b'{"%s":{"dtype":%s,"shape":%s,"data_offsets":[0,4]}}'
HEADERS = {
    "a million dimensions": (ENTRY % (b"a", b'"F32"', b"[" + b"9," * 999_999 + b"9]"), "malformed"),
    "dimensions that overflow": (ENTRY % (b"a", b'"F32"', b"[0,%d,%d]" % (2**60, 2**60)), "malformed"),
    "a dimension of 30 digits": (ENTRY % (b"a", b'"F32"', b"[%d]" % 10**30), "malformed"),
    "a dimension of 5000 digits": (ENTRY % (b"a", b'"F32"', b"[" + b"9" * 5000 + b"]"), "5000 digits"),
    "dtype a list": (ENTRY % (b"a", b"[]", b"[1]"), "malformed"),
    "dtype an object": (ENTRY % (b"a", b"{}", b"[1]"), "malformed"),
    "shape an object": (ENTRY % (b"a", b'"F32"', b'{"1":1}'), "malformed"),
    "shape a text": (ENTRY % (b"a", b'"F32"', b'"1"'), "malformed"),
    "shape of fractions": (ENTRY % (b"a", b'"F32"', b"[1.0]"), "malformed"),
    "shape true": (ENTRY % (b"a", b'"F32"', b"[true]"), "malformed"),
    "entry a list": (b'{"a":[]}', "malformed"),
    "a name of a megabyte": (ENTRY % (b"a" * 2**20, b'"F32"', b"[1]"), "too long"),
    "a name with an escape": (ENTRY % (b"\\u001b[31m", b'"F32"', b"[1]"), "cannot be seen"),
    "a name with a line break": (ENTRY % (b"a\\nb", b'"F32"', b"[1]"), "cannot be seen"),
    "a name with NUL": (ENTRY % (b"a\\u0000", b'"F32"', b"[1]"), "cannot be seen"),
    "half of a pair": (ENTRY % (b"\\ud800", b'"F32"', b"[1]"), "surrogate"),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "comes twice"),
    "deep": (b'{"a":' + b"[" * 10**6, "nested"),
    "many values": (b'{"a":[' + b"[]," * 6_000_000 + b"0]}", "values"),
    "too long": (b'{"__metadata__":{"a":"' + b"x" * MAX_HEADER + b'"}}', "too long"),
}


@pytest.mark.parametrize("text, said", HEADERS.values(), ids=HEADERS)
def test_headers_are_bounded(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(header(text))
    assert WEIGHTS in refused(tmp_path, said)


def test_every_byte_belongs_to_a_tensor(save_model: Save) -> None:
    file = save_model("m") / WEIGHTS
    with file.open("ab") as stream:
        stream.truncate(file.stat().st_size + 2**36)
    refused(file.parent, f"{2**36} bytes of the file belong to no tensor")


# ── pickles ──


class Code:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def packed(path: Path) -> None:
    """The same archive, compressed."""
    torch.save({"a": torch.zeros(10**6)}, path.parent / "plain")
    with zipfile.ZipFile(path.parent / "plain") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


PICKLES: dict[str, Callable[[Path], object]] = {
    "code": lambda path: torch.save({"a": torch.zeros(1), "b": Code()}, path),
    "repeated numbers": lambda path: torch.save({"a": torch.zeros(1).expand(10**12)}, path),
    "many views": lambda path: torch.save(dict.fromkeys(map(str, range(1000)), torch.zeros(1000)), path),
    "compressed": packed,
    "a list": lambda path: torch.save([torch.zeros(1)], path),
    "a number": lambda path: torch.save(5, path),
    "names of numbers": lambda path: torch.save({1: torch.zeros(1)}, path),
    "complex numbers": lambda path: torch.save({"a": torch.zeros(1, dtype=torch.complex64)}, path),
    "sparse": lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path),
    "without memory": lambda path: torch.save({"a": torch.empty(2, device="meta")}, path),
    "no archive": lambda path: path.write_bytes(b"\x80\x04" + b"(" * 10_000),
    "empty": lambda path: path.write_bytes(b""),
    "old format": lambda path: torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
def test_pickles_hold_tensors_of_their_size_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    make(tmp_path / "m" / "pytorch_model.bin")
    refused(tmp_path / "m", "cannot be read as plain tensors", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_tensors_that_share_memory_are_read(tmp_path: Path) -> None:
    value = torch.arange(1000.0)
    torch.save({"a": value, "b": value, "c": value[:10], "step": 3}, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path, allow_pickle=True)
    assert sorted(found.tensors) == ["a", "b", "c"] and torch.equal(found.read("c"), value[:10])


# ── tokenizers ──


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 2**40}}}),
        ("tokenizer.json", {"model": {"vocab": {"a": 10**9}}}),
        ("tokenizer.json", {"model": {"vocab": {"a": -1}}}),
        ("tokenizer.json", {"model": {"vocab": {"a": None}}}),
        ("tokenizer.json", {"model": {"vocab": [[]]}}),
        ("tokenizer.json", {"model": {"vocab": 5}}),
        ("tokenizer.json", {"model": 5}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 2**40, "content": "b"}]}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [5]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "b"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("added_tokens.json", {"a": {"b": []}}),
        ("vocab.json", {"a": []}),
    ],
)
def test_tokenizers_of_any_content_are_an_error_or_none(
    save_model: Save, tmp_path: Path, file: str, content: object
) -> None:
    models = [save_model(f"m{seed}", "llama", seed=seed) for seed in (1, 2)]
    for model, tokens in zip(models, (content, {"model": {"vocab": {"a": 0, "b": 1}}}), strict=True):
        (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
        (model / (file if tokens is content else "tokenizer.json")).write_text(json.dumps(tokens))
    for vocabulary in ("same", "union", "largest"):
        try:
            merge(models, tmp_path / vocabulary, method="simple", vocabulary=vocabulary)
        except UserError as error:
            assert len(str(error)) < 5000
