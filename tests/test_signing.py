"""Signatures: what they cover, whom they name, and what is said when they are not good."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from merganser.cli import main
from merganser.errors import UserError
from merganser.signing import SIGNATURE, check_signature, new_key, sign, signature_of

pytest.importorskip("model_signing", reason="the extra merganser[sign] is not installed")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return new_key(tmp_path / "my.key")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md", "1_Pooling/config.json", ".hidden"):
        (place / name).write_text(f"what {name} says")
    return place


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_keys_are_made_once_and_the_private_one_is_private(keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert private.stat().st_mode & 0o077 == 0 and "PRIVATE" in private.read_text()
    assert public.name == "my.key.pub" and "PUBLIC" in public.read_text()
    for taken in keys:
        with pytest.raises(UserError, match="is there already"):
            new_key(taken if taken == private else private)
        taken.unlink()


def edited(folder: Path) -> None:
    (folder / "README.md").write_text("other words")


def added(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text("")


def added_below(folder: Path) -> None:
    (folder / "1_Pooling" / "x.py").write_text("")


def removed(folder: Path) -> None:
    (folder / ".hidden").unlink()


def renamed(folder: Path) -> None:
    (folder / "config.json").rename(folder / "config2.json")


def linked(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited, "changed since: README.md"), (added, "added since: pytorch_model.bin"),
        (added_below, "added since: 1_Pooling/x.py"), (removed, "removed since: .hidden"),
        (renamed, "added since: config2.json; removed since: config.json"), (linked, "it is a symlink"),
    ],
)  # fmt: skip
def test_whatever_is_changed_in_a_folder_is_found(
    keys: tuple[Path, Path], folder: Path, change: Callable[[Path], None], said: str
) -> None:
    signature = sign(folder, keys[0])
    assert signature == folder / SIGNATURE
    check_signature(folder, keys[1])
    shutil.copytree(folder, moved := folder.with_name("elsewhere"))
    check_signature(moved, keys[1])
    change(folder)
    with pytest.raises(UserError, match=f"signature is not good: .*{re.escape(said)}"):
        check_signature(folder, keys[1])
    if change is not linked:
        sign(folder, keys[0])  # by its owner
        check_signature(folder, keys[1])


def test_what_a_clone_or_a_download_adds_is_let_be(keys: tuple[Path, Path], folder: Path) -> None:
    sign(folder, keys[0])
    for name in (".git/HEAD", ".gitattributes", ".cache/huggingface/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    check_signature(folder, keys[1])


def test_a_snapshot_in_the_cache_of_the_hub(keys: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    """There, every file is a link to a blob."""
    sign(folder, keys[0])
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        shutil.copyfile(path, blobs / str(number))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    check_signature(snapshot, keys[1])
    (snapshot / "config.json").resolve().write_text("changed")
    with pytest.raises(UserError, match=r"changed since: config\.json"):
        check_signature(snapshot, keys[1])


def test_a_file_is_signed_beside_it(keys: tuple[Path, Path], folder: Path) -> None:
    file = folder / "model.safetensors"
    assert sign(file, keys[0]) == folder / "model.safetensors.sig" == signature_of(file)
    check_signature(file, keys[1])
    file.write_text("changed")
    with pytest.raises(UserError, match="signature is not good"):
        check_signature(file, keys[1])


def test_signatures_of_others_and_of_nobody(keys: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not signed: there is no model\.sig"):
        check_signature(folder, keys[1])
    sign(folder, new_key(tmp_path / "other.key")[0])
    with pytest.raises(UserError, match="public key"):
        check_signature(folder, keys[1])
    sign(folder, keys[0])
    good = json.loads((folder / SIGNATURE).read_text())
    forged = json.loads(json.dumps(good))
    forged["dsseEnvelope"]["signatures"][0]["sig"] = good["dsseEnvelope"]["signatures"][0]["sig"][:-8] + "AAAAAAA="
    texts = [json.dumps(forged), "", "{}", "[]", "null", "x", json.dumps({**good, "dsseEnvelope": {}}), "[" * 10**5]
    for text in texts:
        (folder / SIGNATURE).write_text(text)
        with pytest.raises(UserError, match="signature is not"):
            check_signature(folder, keys[1])


def test_a_signature_that_leaves_something_out(keys: tuple[Path, Path], folder: Path) -> None:
    """Made with other tools by the owner of the key; who checks it would not know."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE, "model.safetensors"]))
    config.sign(folder, folder / SIGNATURE)
    with pytest.raises(UserError, match=r"leaves out model\.safetensors"):
        check_signature(folder, keys[1])


def test_keys_that_cannot_be_used(keys: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    private, public = keys
    inside = folder / "my.key"
    shutil.copyfile(private, inside)
    with pytest.raises(UserError, match="lies in the folder"):
        sign(folder, inside)
    inside.unlink()
    with pytest.raises(UserError, match="is no private key"):
        sign(folder, public)
    sign(folder, private)
    (tmp_path / "text").write_text("no key")
    for wrong in (private, tmp_path / "text"):
        with pytest.raises(UserError, match="is no public key"):
            check_signature(folder, wrong)
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="is no key's file"):
            check_signature(folder, wrong)
    with pytest.raises(UserError, match="no such file"):
        sign(tmp_path / "nowhere", private)


def test_the_libraries_own_command_checks_it_too(keys: tuple[Path, Path], folder: Path) -> None:
    sign(folder, keys[0])
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), "--signature",
               str(folder / SIGNATURE), "--public_key", str(keys[1])]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    edited(folder)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, public = tmp_path / "k", tmp_path / "k.pub"
    assert run("sign", "--new-key", key) == 0
    assert capsys.readouterr().out == f"{public}\n"
    assert run("sign", folder, "--key", key) == 0
    assert run("verify", folder, "--key", public) == 0
    assert "signed by" in capsys.readouterr().out
    statistics = folder / "model.safetensors"
    assert run("verify", statistics) == 2
    assert run("verify", statistics, "--key", public) == 2
    assert "is not signed" in capsys.readouterr().err
    (folder / SIGNATURE).unlink()
    assert run("sign", statistics, "--key", key) == 0 and run("verify", statistics, "--key", public) == 0
    assert run("verify", folder) == 2
    for arguments in (["sign"], ["sign", folder], ["sign", "--key", key], ["verify"], ["verify", folder, "--deep=0"]):
        assert run(*arguments) == 2


def test_a_key_with_a_password(
    keys: tuple[Path, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives import serialization

    private, locked = serialization.load_pem_private_key(keys[0].read_bytes(), None), tmp_path / "locked"
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(private.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    for password in (None, b"wrong"):
        with pytest.raises(UserError, match="is no private key that can be used"):
            sign(folder, locked, password=password)
    sign(folder, locked, password=b"secret")
    check_signature(folder, keys[1])
    (folder / SIGNATURE).unlink()
    monkeypatch.setattr("click.prompt", lambda *_, **__: "secret")
    assert run("sign", folder, "--key", locked) == 0
    check_signature(folder, keys[1])


def test_what_is_missing_is_said(keys: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UserError, match=r"pip install 'merganser\[sign\]'"):
        sign(folder, keys[0])
