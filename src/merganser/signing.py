"""Signatures of folders and statistics files, so that whoever has a public key can tell who made them.

    merganser sign --new-key my.key                   # my.key, and my.key.pub to publish
    merganser sign merged --key my.key                # writes merged/model.sig
    merganser verify merged --key my.key.pub

They are those of OpenSSF Model Signing, made and checked by the ``model-signing`` library of sigstore with keys in
files: no network, no account. So its own command checks them too. Everything in a folder is signed, the card included;
only version control and downloaders' notes are not. Hashes in a record show that nothing was changed by who did not
change the record too; a signature shows it of everyone without the private key.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from merganser.errors import FileError, UserError, require
from merganser.files import scratch_folder, write_bytes
from merganser.paths import expanded, real
from merganser.text import listed

#: What a folder's signature is called in it, and how a file's, which lies beside it, ends.
SIGNATURE, SIGNATURE_ENDING = "model.sig", ".sig"
#: What is no part of a published folder; whatever else a signature leaves out is an error.
_BESIDE = (".git", ".gitattributes", ".gitignore", ".github", ".cache", ".DS_Store")
_LARGEST_KEY = 100_000  # bytes
_FEW = 5  # files that a message names
_INSTALL = "pip install 'merganser[sign]'"


def signature_of(path: Path) -> Path:
    """Where the signature of a folder or of a file lies."""
    return path / SIGNATURE if path.is_dir() else path.with_name(f"{path.name}{SIGNATURE_ENDING}")


def sign(path: str | Path, key: str | Path, *, password: bytes | None = None) -> Path:
    """Sign a folder or a file with a private key; an earlier signature of it is replaced.

    Args:
        path: a folder, such as a merge or a checkpoint with its statistics, or a file, such as statistics alone.
        key: the private key, a PEM file of a curve NIST P-256, P-384 or P-521; not in the folder.
        password: of the key, where it has one.

    Returns:
        The signature's file.

    Raises:
        FileError: the key cannot be used, or lies in what is signed; or there are links or special files, which cannot
            be signed.
        UserError: the extra ``sign`` is not installed.
    """
    path, key = _existing(expanded(path)), _key(expanded(key))
    if path.is_dir() and real(key).is_relative_to(real(path)):
        what = "the private key lies in the folder that is to be signed, and would be published with it"
        raise FileError(what, where=key, mend="move it elsewhere")
    _require(path)
    from model_signing import hashing, signing

    target, config = signature_of(path), signing.Config()
    try:
        config.use_elliptic_key_signer(private_key=key, password=password)
    except (TypeError, ValueError, AttributeError) as error:
        what, mend = f"is no private key that can be used: {error}", "make one: merganser sign --new-key FILE"
        raise FileError(what, where=key, mend=mend) from None
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE, *_BESIDE]))
    with scratch_folder() as scratch:
        work = scratch / SIGNATURE
        try:
            config.sign(path, work)
        except (OSError, ValueError) as error:
            mend = "put files in the places of links and special files"
            raise FileError(f"cannot be signed: {error}", where=path, mend=mend) from None
        return write_bytes(target, work.read_bytes())


def check_signature(path: str | Path, key: str | Path) -> None:
    """Check that a folder or a file is, to the byte, what the owner of a key has signed.

    Args:
        path: the folder or file.
        key: the public key, a PEM file that its owner has given to you.

    Raises:
        FileError: there is no signature, it is of another key, or anything was changed, added or removed since.
        UserError: the extra ``sign`` is not installed.
    """
    path, key = _existing(expanded(path)), _key(expanded(key))
    signature = signature_of(path)
    if not signature.is_file():
        mend = "ask its owner for a signed one, or leave --key out and know that anyone may have made it"
        raise FileError(f"is not signed: there is no {signature.name}", where=path, mend=mend)
    _require(path)
    from cryptography.exceptions import InvalidSignature
    from model_signing import hashing, verifying

    config = verifying.Config()
    try:
        config.use_elliptic_key_verifier(public_key=key)
    except (TypeError, ValueError, AttributeError) as error:
        mend = "give the public key, such as my.key.pub"
        raise FileError(f"is no public key that can be used: {error}", where=key, mend=mend) from None
    if path.is_dir() and _links_to_blobs(path):
        config.set_hashing_config(hashing.Config().set_allow_symlinks(True))
    refused, mend = "", "get it from its owner again, with the key that belongs to it"
    try:
        with redirect_stdout(sys.stderr):  # the library prints its warnings
            config.verify(path, signature)
        if left_out := set(_predicate(signature)["serialization"].get("ignore_paths", ())) - {*_BESIDE, SIGNATURE}:
            refused = f"the signature leaves out {', '.join(sorted(left_out))}"
    except InvalidSignature:
        refused = f"the signature is not by this key ({key}), or was changed"
    except Exception as error:  # whatever a stranger's file provokes, it is no good signature
        changed = _changed(path, signature) if str(error).startswith("Signature mismatch") else ""
        refused = f"the signature is not good: {changed or f'{type(error).__name__}: {error}'}"
    if refused:
        raise FileError(refused, where=path, mend=mend)


def new_key(path: str | Path) -> tuple[Path, Path]:
    """Make a pair of keys: the private one at a path, for its owner's eyes alone, the public one beside it.

    Returns:
        The private key and the public one, whose name ends in ``.pub``.

    Raises:
        FileError: one of them is there already, or cannot be written.
        UserError: the extra ``sign`` is not installed.
    """
    private = Path(path)
    public = private.with_name(f"{private.name}.pub")
    for one in (private, public):
        if os.path.lexists(one):
            raise FileError("is there already", where=one, mend="give another name: a lost key cannot be made again")
    _require(private)
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise FileError(f"cannot be written: {error}", where=private, mend="check the path") from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secret)
    write_bytes(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def has_password(key: Path) -> bool:
    """Whether a private key can be read with a password alone."""
    return b"ENCRYPTED" in _key(key).read_bytes()


def _require(path: Path) -> None:
    require("sign", "a signature", "model_signing", where=path)
    try:
        importlib.import_module("model_signing")
    except ImportError as error:  # of what it imports in its turn
        raise UserError(f"a signature needs a package: {error}", where=path, mend=_INSTALL) from None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileError("no such file or folder", where=path, mend="check the path")
    return path


def _key(key: Path) -> Path:
    if not key.is_file() or key.stat().st_size > _LARGEST_KEY:
        raise FileError("is no key's file", where=key, mend="give a PEM file, such as of merganser sign --new-key")
    return key


def _predicate(signature: Path) -> dict[str, Any]:
    """What a signature that was checked says: how files were hashed, and their hashes."""
    envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
    found: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    return found


def _changed(path: Path, signature: Path) -> str:
    """Which files are not as they were signed; empty where it was signed in another way than ours."""
    signed = {one["name"]: one["digest"] for one in _predicate(signature)["resources"]}
    if path.is_file():
        return "the file was changed"
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    names = {name for name in names if name != SIGNATURE and name.split("/")[0] not in _BESIDE}
    changed = {name for name in names & set(signed) if _sha256(path / name) != signed[name]}
    parts = {"changed": changed, "added": names - set(signed), "removed": set(signed) - names}
    return "; ".join(f"{what} since: {listed(sorted(files), _FEW)}" for what, files in parts.items() if files)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _links_to_blobs(folder: Path) -> bool:
    """Whether there are links in a folder, and all lead to the blobs of the Hub's cache that the folder is in."""
    root = real(folder)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    blobs = root.parent.parent / "blobs"
    return bool(links) and root.parent.name == "snapshots" and all(real(p).is_relative_to(blobs) for p in links)
