"""Which files beside the weights belong to a model: what a result takes over from the folder of its first contributor.

A file belongs if something that opens the model reads it: a configuration, the tokenizer and the processor, chat
templates, the modules of sentence-transformers, code that a configuration names (``auto_map``), and the licence with
them. All else stays behind: weights in any format, training state, logs, data, cards. Names that transformers gives
anew to every tokenizer are asked of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from merganser.checkpoints.json_files import read_json
from merganser.checkpoints.modules import has_weights, is_model, main_folder, read_modules
from merganser.documents import read_text
from merganser.errors import CheckpointError
from merganser.paths import COPY, is_inside, is_name
from merganser.text import listed

_BELONGS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "chat_template.json", "*.jinja",
    # of tokenizers, those of sentence-transformers' word embeddings and of audio models, too
    "tokenizer*.json", "*tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json",
    "vocab*.txt", "vocab*.bpe", "merges.txt", "*.model", "*.tiktoken", "*.spm", "tekken.json",
    # of sentence-transformers
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "router_config.json",
    "cnn_config.json", "lstm_config.json", "wordembedding_config.json",
)  # fmt: skip
#: What is read of a folder though it is no part of a result.
_READ = (
    *_BELONGS, "model*.safetensors*", "pytorch_model*", "adapter_config.json", "adapter_model.*", "provenance.json",
    "merge_statistics.safetensors",
)  # fmt: skip
_LICENCE = re.compile(r"(?i)(.*[-_ .])?(licen[cs]es?|notices?|copying|use_policy)([-_ .].*)?")
_LICENCE_ENDINGS = ("", ".txt", ".md", ".rst")
_TEMPLATES = "additional_chat_templates"
#: What is usual in a model's folder and no part of the model: not worth a word.
_USUAL = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt*", "*.h5",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.pb", "*.gguf", "*.pkl", "*.pickle", ".*",
    "README*", "modelcard.json", "provenance.json", "trainer_state.json", "*_results.json", "events.out.*",
    "checkpoint-*", "runs", "logs", "onnx", "openvino", "heads", "__pycache__",
)  # fmt: skip
_IMPORT = re.compile(r"[ \t]*(?:from[ \t]+|import[ \t]+)\.(\w+)(?:[ \t]|$)")
_LONGEST_PROGRAM = 2**20  # bytes
_NAMED = 6  # files left behind that a note names


def belonging(folder: Path) -> list[str]:
    """The files that belong to a model beside its weights, relative to its folder, sorted.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder (the Hub cache's own blobs are no outside).
    """
    found = sorted(_belonging(folder))
    _refuse(folder, [file for file in found if not is_inside(folder, folder / file)])
    return found


def check_links(folder: Path) -> None:
    """Refuse a folder in which a file that is read with a model is a link to something outside of it.

    Raises:
        CheckpointError: names these files.
    """
    links = sorted(path.name for path in folder.iterdir() if path.is_symlink() and _matches(path.name, _READ))
    _refuse(folder, [name for name in links if not is_inside(folder, folder / name)])


def _refuse(folder: Path, outside: list[str]) -> None:
    if outside:
        what = f"links that lead out of the folder are not followed: {', '.join(outside)}"
        raise CheckpointError(what, where=folder, mend=COPY)


def left_behind(folder: Path) -> str | None:
    """A sentence about what stays behind though it is nothing usual; None where there is no such thing."""
    taken = _belonging(folder)
    known = {PurePosixPath(file).parts[0] for file in taken} | {
        module.path.split("/", 1)[0] for module in read_modules(folder)
    }
    names = sorted(
        path.name + "/" * path.is_dir()
        for path in folder.iterdir()
        if path.name not in known and not _matches(path.name, _USUAL)
    )
    if not names:
        return None
    return f"left behind, being no part of the model: {listed(names, _NAMED)}"


def _belonging(folder: Path) -> set[str]:
    places = dict.fromkeys(["", main_folder(folder), *(module.path for module in read_modules(folder))])
    found: set[str] = set()
    for place in places:
        inner = bool(place) and not is_model(folder / place)  # a module whose configuration may have any name
        found |= {_joined(place, name) for name in _of_folder(folder / place, everything=inner)}
    for path in folder.iterdir():
        if path.name == _TEMPLATES or _is_tokenizer(path):
            found |= {_joined(path.name, name) for name in _of_folder(path)}
    return found | _code(folder, found)


def _of_folder(place: Path, everything: bool = False) -> set[str]:
    """The names of what belongs to the model in one of its folders.

    Args:
        place: the folder.
        everything: every JSON file counts as a configuration, but for an index of weights.
    """
    files = [path.name for path in place.iterdir() if path.is_file() or path.is_symlink()] if place.is_dir() else []
    named = {file for file in files if _matches(file, _BELONGS) or is_licence(file)}
    if everything:
        named |= {file for file in files if file.endswith(".json") and not file.endswith(".index.json")}
    others = [file for file in files if file not in named and not _matches(file, _USUAL)]
    settings = _settings(place / "tokenizer_config.json")
    if others and (settings or "config.json" in files):
        named |= {*others} & {*_named_files(settings), *_vocabulary_files(place, settings)}
    return named


def _named_files(settings: dict[str, Any]) -> Iterator[str]:
    """The files that a tokenizer's configuration names."""
    return (value for key, value in settings.items() if key.endswith("_file") and isinstance(value, str))


def _vocabulary_files(place: Path, settings: dict[str, Any]) -> set[str]:
    """The names that transformers gives the files of this folder's tokenizer; none where it knows no such class."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    config = _settings(place / "config.json")
    names = [one.get("tokenizer_class") for one in (settings, config)]
    mapped = TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type")))
    names += [mapped] if isinstance(mapped, str) else list(mapped or ())
    found: set[str] = set()
    for name in {str(name).removesuffix(ending) for name in names if name for ending in ("", "Fast")}:
        table = getattr(getattr(transformers, name, None), "vocab_files_names", None)
        found |= set(table.values()) if isinstance(table, dict) else set()
    return found


def _code(folder: Path, files: Iterable[str]) -> set[str]:
    """The Python files that configurations name, with those that they import from beside them."""
    modules = [(place, module.type.split(".")[0]) for module in read_modules(folder) for place in ("", module.path)]
    for file in files:
        if file.endswith("config.json"):
            modules += [(file.rpartition("/")[0], name) for name in _auto_map(_settings(folder / file))]
    named = [(place, name) for place, name in modules if name and _is_module(name)]
    todo, found = [folder / place / f"{name}.py" for place, name in named], set[str]()
    while todo:
        path = todo.pop()
        name = path.relative_to(folder).as_posix()
        if name not in found and path.is_file():
            found.add(name)
            todo += [path.parent / f"{imported}.py" for imported in _imports(path)]
    return found


def _imports(path: Path) -> list[str]:
    """The modules that a Python file imports from beside itself; a file that no program is has none."""
    try:
        lines = read_text(path, CheckpointError, limit=_LONGEST_PROGRAM).splitlines()
    except CheckpointError:
        return []
    return [match[1] for line in lines if (match := _IMPORT.match(line))]


def _auto_map(settings: dict[str, Any]) -> Iterator[str]:
    """The modules of code that a configuration names and that lie beside it, not in another repository."""
    table = settings.get("auto_map")
    values = table.values() if isinstance(table, dict) else [table]
    for value in values:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference and "/" not in reference:
                yield reference.split(".")[0]


def _is_module(name: str) -> bool:
    """Whether this is a name of a module of code, and no path."""
    return name.isidentifier() and is_name(name)


def _is_tokenizer(path: Path) -> bool:
    """Whether a folder holds a tokenizer alone, as one of several of a processor."""
    if not (path / "tokenizer_config.json").is_file() or (path / "adapter_config.json").exists():
        return False
    return not has_weights(path) and not is_model(path)


def _settings(path: Path) -> dict[str, Any]:
    """A configuration, or an empty dictionary where there is none that can be read."""
    try:
        found = read_json(path, missing={})
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}


def is_licence(name: str) -> bool:
    """Whether a file is called as licences and notices are."""
    return bool(_LICENCE.fullmatch(name)) and Path(name).suffix.lower() in _LICENCE_ENDINGS


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _joined(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name
