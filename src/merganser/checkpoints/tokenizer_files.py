"""Tokenizers as files beside the weights: which files they are, the tokens that they name, and tokens added to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merganser.checkpoints.reader import Checkpoint, read_json
from merganser.documents import MAX_BYTES, read_text
from merganser.errors import CheckpointError, UserError
from merganser.paths import inside, is_inside

Table = Mapping[str, int]  # the id of each token
_RESTORE = "restore the tokenizer's files"
_MOST_TOKENS = 2**31
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("tokenizer.json", "vocab.txt", "vocab.json", "added_tokens.json", "tokenizer_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*vocab.json", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "bpe.codes", "tekken.json", "tokenization_*.py",
    "chat_template.*", "additional_chat_templates/*", "generation_config.json",
)  # fmt: skip


def is_tokenizer_file(path: str) -> bool:
    """Whether a file beside the weights belongs to the tokenizer, its chat template or to how text is generated."""
    spellings = (path, path.rpartition("/")[2])
    return any(fnmatchcase(name, pattern) for name in spellings for pattern in _TOKENIZER_FILES)


def lists_tokens(folder: Path) -> bool:
    """Whether a folder has the tokens of a tokenizer, and not only what a configuration says of one."""
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json")
    return any((folder / file).is_file() for file in files) or any(folder.glob("*.model"))


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there is a tokenizer beside the weights."""
    folder = checkpoint.tokenizer_path
    return any((folder / file).is_file() for file in _LISTS) or any(folder.glob("*.model"))


def read_vocabulary(checkpoint: Checkpoint, known: dict[str, Table | None]) -> Table | None:
    """The id of each token by the files beside the weights; None where they do not tell.

    Args:
        checkpoint: the model.
        known: what was read of ``tokenizer.json`` before, by its hash: fine-tunes often differ in nothing but the
            settings beside it. Receives this one's.

    Raises:
        CheckpointError: a file that is damaged, or a token whose id no vocabulary can have.
    """
    folder = checkpoint.tokenizer_path
    try:
        found = _read_tables(folder, known)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        what = f"the tokenizer's files are malformed: {type(error).__name__}: {error}"
        raise CheckpointError(what, where=folder, mend=_RESTORE) from None
    for token, number in (found or {}).items():
        if type(token) is not str or type(number) is not int or not 0 <= number < _MOST_TOKENS:
            what = f"the token {token!r} has the id {number!r}, which no vocabulary has"
            raise CheckpointError(what, where=folder, mend=_RESTORE)
    return found


def _read_tables(folder: Path, known: dict[str, Table | None]) -> dict[str, int] | None:
    found: dict[str, int] = {}
    key = _digest(folder / "tokenizer.json").hex()
    whole = known[key] if key in known else _in_one_file(read_json(folder / "tokenizer.json"))
    if key:
        known[key] = whole
    if whole is not None:
        found |= whole
    elif len([*folder.glob("*vocab*.json")]) > 1:  # one for each of two languages
        return None
    elif (folder / "vocab.txt").is_file():
        lines = _text(folder / "vocab.txt").split("\n")
        found |= {line: number for number, line in enumerate(lines) if line or number < len(lines) - 1}
    elif (tokens := read_json(folder / "vocab.json")) and all(isinstance(number, int) for number in tokens.values()):
        found |= tokens
    elif any(folder.glob("*.model")):
        return dict(_asked_of_transformers(folder) or {}) or None
    if not found:
        return None
    for token, number in (read_json(folder / "added_tokens.json", missing={})).items():
        found.setdefault(token, number)
    decoder = read_json(folder / "tokenizer_config.json", missing={}).get("added_tokens_decoder") or {}
    for number, entry in decoder.items():
        found.setdefault(entry["content"], int(number))
    return found


def _in_one_file(values: Mapping[str, Any]) -> Table | None:
    """The tokens of a ``tokenizer.json``; None where there is none."""
    if not values:
        return None
    tokens = (values.get("model") or {}).get("vocab") or {}
    if isinstance(tokens, list):  # with their scores
        tokens = {pair[0]: number for number, pair in enumerate(tokens)}
    return tokens | {entry["content"]: entry["id"] for entry in values.get("added_tokens") or []}


def _text(file: Path) -> str:
    inside(file.parent, file.name, CheckpointError, where=file.parent, what="the file")
    return read_text(file, CheckpointError)


def read_once(checkpoint: Checkpoint, known: dict[str, Table | None]) -> Table | None:
    """The same of a folder, None where a file is damaged; folders with the same files are read once.

    Args:
        checkpoint: the model.
        known: the vocabularies that were read before; receives this one.
    """
    if (key := vocabulary_digest(checkpoint)) not in known:
        try:
            known[key] = read_vocabulary(checkpoint, known)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: as if there were none
            known[key] = None
    return known[key]


def vocabulary_digest(checkpoint: Checkpoint) -> str:
    """The hash of the files that name the tokens: where it is the same, so is the vocabulary, whatever is in them."""
    digest, folder = hashlib.sha256(), checkpoint.tokenizer_path
    for file in sorted({*_LISTS, *(path.name for path in folder.glob("*.model"))}):
        digest.update(f"{file} ".encode() + _digest(folder / file))
    return digest.hexdigest()


def _digest(file: Path) -> bytes:
    """The hash of a file, of as many bytes as a tokenizer may have; empty where there is none."""
    if not file.is_file() or not is_inside(file.parent, file):
        return b""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for _ in range(MAX_BYTES >> 20):
            digest.update(stream.read(1 << 20))
        digest.update(str(file.stat().st_size).encode())
    return digest.digest()


def add_tokens(folder: Path, tokens: Sequence[str], others: Sequence[Path]) -> Any:
    """The tokenizer of a folder with more tokens, each as the first of the other folders knows it.

    Raises:
        CheckpointError: transformers cannot open the tokenizer.
    """
    import transformers
    from tokenizers import AddedToken

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known = {entry["content"]: entry for other in reversed(others) for entry in _added_entries(other)}
        for token in tokens:  # a plain one of another tokenizer is found as a whole word, never inside of words
            said = known.get(token, {"normalized": True, "single_word": token.isalnum()})
            flags = {key: said.get(key, False) for key in _FLAGS}
            tokenizer.add_tokens([AddedToken(token, **flags)])
    except Exception as error:  # whatever a stranger's tokenizer provokes
        what = f"tokens cannot be added to its tokenizer: {str(error).splitlines()[0] if str(error) else error!r}"
        raise CheckpointError(what, where=folder, mend="name another model's tokenizer with --tokenizer-from") from None
    return tokenizer


def _asked_of_transformers(folder: Path) -> Table | None:
    import transformers

    try:
        return dict(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception:  # a package that is not installed, or whatever a stranger's file provokes
        return None


def _added_entries(folder: Path) -> list[dict[str, Any]]:
    try:
        whole = read_json(folder / "tokenizer.json", missing={})
        decoder = read_json(folder / "tokenizer_config.json", missing={}).get("added_tokens_decoder") or {}
    except UserError:
        return []
    return [*decoder.values(), *(whole.get("added_tokens") or [])]
