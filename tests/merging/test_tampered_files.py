"""Merged folders whose files somebody has changed: what verify finds at a glance, and by merging again.

A naive tamperer changes a file. A thorough one also writes the right hashes of everything into provenance, and
provenance's hash of itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoints.header import read_infos
from merganser.cli import main
from merganser.errors import UserError
from merganser.merging import reproduce, verify
from merganser.merging.provenance import read_provenance
from merganser.merging.verification.folder_checks import check_files
from merganser.merging.verification.record_checks import check_itself
from tampering_examples import KINDS, Copy


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
