"""Changes to a file, each drawn from a seeded generator: of its structure, of its bytes, and of the file itself.

A change is known by a class such as ``json replace architectures=null`` or ``file fifo``, which says what was done
without the particular place or bytes, so that what the commands accept can be named class by class.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fuzz.documents import Draw, Nested, change_document, render, values


def _json(draw: Draw, path: Path, root: Path) -> str:
    document, name = change_document(draw, json.loads(path.read_text()), root, "json")
    path.write_text(render(document), encoding="utf-8", errors="surrogatepass")
    return f"json {name}"


def _yaml(draw: Draw, path: Path, root: Path) -> str:
    document, name = change_document(draw, yaml.safe_load(path.read_text()), root, "yaml")
    path.write_text(render(document), encoding="utf-8", errors="surrogatepass")
    return f"yaml {name}"


def _recipe(draw: Draw, path: Path, root: Path) -> str:
    """A value of one of a file's documents, or the documents themselves."""
    documents = list(yaml.safe_load_all(path.read_text()))
    at = draw.randrange(len(documents))
    kind = draw.choices(("value", "twice", "drop", "swap", "null"), (30, 1, 1, 1, 1))[0]
    name = f"document {kind}"
    if kind == "value":
        documents[at], name = change_document(draw, documents[at], root, "recipe")
    elif kind == "drop":
        del documents[at]
    elif kind == "swap":
        documents.reverse()
    else:
        documents.insert(at, documents[at] if kind == "twice" else None)
    path.write_text("\n---\n".join(map(render, documents)), encoding="utf-8", errors="surrogatepass")
    return f"yaml {name}"


def _json_lines(draw: Draw, path: Path, root: Path) -> str:
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    document, name = change_document(draw, json.loads(lines[at]), root, "json")
    lines[at] = render(document)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"json {name}"


def _table(draw: Draw, path: Path, root: Path) -> str:
    """A field, or a line, of CSV or TSV."""
    mark = "," if path.suffix == ".csv" else "\t"
    rows = [line.split(mark) for line in path.read_text().splitlines()]
    row = rows[draw.choice((0, draw.randrange(len(rows))))]
    column = draw.randrange(len(row))
    known = {name: text for name, text in values(root, "json").items() if name not in ("deep list", "deep object")}
    name = draw.choice([*known, "quote", "more", "fewer"])
    if name == "fewer":
        del row[column]
    elif name == "more":
        row.insert(column, "x")
    else:
        text = '"open' if name == "quote" else known[name]
        row[column] = json.loads(text) if text.startswith('"') and text.endswith('"') else text
    path.write_text("\n".join(mark.join(row) for row in rows) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"table {'head' if row is rows[0] else 'row'}={name}"


def _parquet(draw: Draw, path: Path, root: Path) -> str:
    """Columns of other types."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    key = draw.choice(list(columns))
    options: dict[str, list[Any]] = {
        "nulls": [None] * len(rows), "floats": [0.5] * len(rows), "NaN": [float("nan")] * len(rows),
        "lists": [[1, 2]] * len(rows), "objects": [{"a": 1}] * len(rows), "bytes": [b"\xff\x00"] * len(rows),
        "huge": [2**62] * len(rows), "terminal": ["\x1b[31m"] * len(rows), "bool": [True] * len(rows),
        "negative": [-1] * len(rows), "long": ["x" * 100_000] * len(rows),
    }  # fmt: skip
    name = draw.choice([*options, "dates", "gone", "empty"])
    if name == "gone":
        del columns[key]
    elif name == "empty":
        columns = {key: [] for key in columns}
    elif name == "dates":
        columns[key] = pyarrow.array([2**50] * len(rows), pyarrow.timestamp("us"))
    else:
        columns[key] = options[name]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return f"parquet {key}={name}"


def _safetensors(draw: Draw, path: Path, root: Path) -> str:
    """The header as a document, or numbers of a tensor."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if draw.random() < 0.35:
        name = _change_numbers(draw, header, body)
        path.write_bytes(data[: 8 + length] + bytes(body))
        return f"numbers {name}"
    metadata = header.get("__metadata__", {})
    for key, text in metadata.items():
        if text[:1] in "{[":
            metadata[key] = Nested(json.loads(text))
    if metadata and draw.random() < 0.6:
        changed, name = change_document(draw, metadata, root, "json")
        header["__metadata__"], name = changed, f"metadata {name}"
    else:
        header, name = change_document(draw, header, root, "json")
    text = render(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"header {name}"


def _change_numbers(draw: Draw, header: dict[str, Any], body: bytearray) -> str:
    """Replace some or all numbers of a tensor; the file's form stays sound."""
    import numpy as np

    floats = [name for name, entry in header.items() if name != "__metadata__" and entry["dtype"] in ("F32", "F64")]
    tensor = draw.choice(floats or ["none"])
    if tensor == "none":
        return "none"
    begin, end = header[tensor]["data_offsets"]
    numbers = np.frombuffer(body, np.float32 if header[tensor]["dtype"] == "F32" else np.float64, offset=begin)
    width = numbers.dtype.itemsize
    numbers = numbers[: (end - begin) // width].copy()
    if not len(numbers):
        return "none"
    name = draw.choice(
        ["one NaN", "one infinity", "one 1e38", "zeros", "minus", "times 1e30", "times 1.1", "NaN", "noise"]
    )
    at = draw.randrange(len(numbers))
    with np.errstate(all="ignore"):
        if name.startswith("one"):
            numbers[at] = {"one NaN": np.nan, "one infinity": np.inf, "one 1e38": 1e38}[name]
        elif name == "noise":
            numbers[:] = np.random.default_rng(draw.randrange(2**32)).normal(size=len(numbers))
        else:
            numbers *= {"zeros": 0, "minus": -1, "times 1e30": 1e30, "times 1.1": 1.1, "NaN": np.nan}[name]
    body[begin:end] = numbers.tobytes()
    return f"{tensor.split('.')[0]} {name}"


FORMS: dict[str, Callable[[Draw, Path, Path], str]] = {
    "json": _json,
    "yaml": _yaml,
    "recipe": _recipe,
    "jsonl": _json_lines,
    "table": _table,
    "parquet": _parquet,
    "safetensors": _safetensors,
}


# -- the words of a command --------------------------------------------------------------------------------

#: Options that are left as they are: where results go is the user's own wish, and a cluster takes minutes to start.
_LEFT_ALONE = ("-o", "--output", "--intermediate", "--engine", "--ray-address", "--help")


def change_words(draw: Draw, words: list[str], root: Path) -> tuple[list[str], str]:
    """Another value, an option more, one less or one twice; returns the words and the class of the change."""
    import click

    from merganser.cli import cli

    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    options = [one for one in command.params if one.param_type_name == "option" and one.opts[-1] not in _LEFT_ALONE]
    places = [at for at in range(1, len(words)) if words[at - 1] not in _LEFT_ALONE and words[at] not in _LEFT_ALONE]
    at = draw.choice(places)
    kind = draw.choices(("value", "more", "drop", "twice"), (4, 6, 1, 1))[0]
    place = words[at - 1] if words[at - 1].startswith("-") else words[at] if words[at].startswith("-") else "word"
    if kind == "drop":
        return words[:at] + words[at + 1 :], f"words drop {place}"
    if kind == "twice":
        return [*words[:at], words[at], *words[at:]], f"words twice {place}"
    known = {name: text for name, text in values(root, "recipe").items() if not name.startswith(("text nul", "deep"))}
    name = draw.choice(list(known))
    text = known[name]
    value = json.loads(text) if text.startswith('"') and text.endswith('"') and name != "unclosed" else text
    value = value[:2000]  # more would be the length of what is told of it
    if kind == "value":
        return [*words[:at], value, *words[at + 1 :]], f"words {place}={name}"
    option = draw.choice(options)
    more = [option.opts[-1]] if getattr(option, "is_flag", False) else [option.opts[-1], value]
    if more[-1] is value and more[0] == "--option" and draw.random() < 0.7:
        more[-1] = f"{draw.choice(('density', 'scale', 't', 'steps', 'seed', 'ridge', 'normalize', 'rank'))}={value}"
    return words + more, f"words more {more[0]}" + (f"={name}" if len(more) > 1 else "")


# -- bytes -------------------------------------------------------------------------------------------------


def change_bytes(draw: Draw, path: Path) -> str:
    """Damage of a file that is not looked into; returns its class."""
    data = path.read_bytes()
    at = draw.choice((0, draw.randrange(max(1, min(64, len(data)))), draw.randrange(max(1, len(data)))))
    length = draw.choice((1, 8, 64, 4096))
    noise = draw.randbytes(length)
    kinds: dict[str, Callable[[], bytes]] = {
        "flip": lambda: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :] if data else b"\0",
        "cut": lambda: data[:at],
        "insert": lambda: data[:at] + noise + data[at:],
        "replace": lambda: data[:at] + noise + data[at + length :],
        "remove": lambda: data[:at] + data[at + length :],
        "repeat": lambda: data[: at + length] + data[at:],
        "zeros": lambda: data[:at] + bytes(length) + data[at + length :],
        "more": lambda: data + noise,
        "utf-16": lambda: b"\xff\xfe" + "".join(map(chr, data[:5000])).encode("utf-16-le"),
        "bom": lambda: b"\xef\xbb\xbf" + data,
        "returns": lambda: data.replace(b"\n", b"\r\n"),
        "latin": lambda: data[:at] + b"\xe9\xfc" + data[at:],
        "header length": lambda: (
            struct.pack("<Q", draw.choice((0, 1, 2, 2**63, 2**64 - 1, 10**8, len(data)))) + data[8:]
        ),
        "twice": lambda: data + data,
    }
    name = draw.choice(list(kinds))
    path.write_bytes(kinds[name]())
    return f"bytes {name}"


# -- the file itself ---------------------------------------------------------------------------------------


def change_file(draw: Draw, path: Path, root: Path, others: list[Path]) -> str:
    """Another file, or something that is no file, in its place; returns the class of the change."""
    outside = root / "outside"
    secret = outside / ("secret.json" if path.suffix == ".json" else "secret.txt")
    sound = outside / f"sound{path.suffix}"

    def link(target: Path) -> Callable[[], None]:
        return lambda: path.symlink_to(target)

    def sparse() -> None:
        with path.open("wb") as stream:
            stream.truncate(20 << 30)

    def sparse_end() -> None:
        shutil.copy(sound, path)
        with path.open("r+b") as stream:
            stream.truncate(20 << 30)

    kinds: dict[str, Callable[[], None]] = {
        "missing": lambda: None,
        "empty": lambda: path.write_bytes(b"") and None,
        "folder": path.mkdir,
        "link to a secret": link(secret),
        "link to a copy outside": link(sound),
        "dangling link": link(outside / "nothing"),
        "link to itself": link(path),
        "endless device": link(Path("/dev/zero")),
        "passwd": link(Path("/etc/passwd")),
        "environment": link(Path("/proc/self/environ")),
        "fifo": lambda: os.mkfifo(path),
        "sparse": sparse,
        "sparse end": sparse_end,
        "pickle": lambda: shutil.copy(outside / "marked.bin", path) and None,
        "script": lambda: shutil.copy(outside / "marked.py", path) and None,
        "other file": lambda: shutil.copy(draw.choice([other for other in others if other != path]), path) and None,
    }
    name = draw.choice(list(kinds))
    shutil.copy(path, sound)
    path.unlink()
    kinds[name]()
    return f"file {name}"


def add_file(draw: Draw, folder: Path, root: Path) -> str:
    """A file more in a model's folder, which some loader may trust; returns the class of the change."""
    outside = root / "outside"
    name = draw.choice(
        ["pytorch_model.bin", "modeling_x.py", "configuration_x.py", "chat_template.jinja", "tokenizer.model",
         "added_tokens.json", "special_tokens_map.json", "generation_config.json", "merges.txt", "vocab.txt",
         "README.md", "adapter_config.json", "modules.json", "preprocessor_config.json", "training_args.bin",
         "model.safetensors.index.json", "custom_generate"]
    )  # fmt: skip
    path = folder / name
    if path.is_symlink() or path.exists():
        path.unlink()
    kind = draw.choice(("link to a secret", "script", "pickle", "words", "folder", "null", "terminal"))
    if kind == "link to a secret":
        path.symlink_to(outside / ("secret.json" if path.suffix == ".json" else "secret.txt"))
    elif kind == "folder":
        path.mkdir()
        (path / "generate.py").symlink_to(outside / "marked.py")
    elif kind in ("script", "pickle"):
        shutil.copy(outside / ("marked.py" if kind == "script" else "marked.bin"), path)
    else:
        path.write_text({"words": '{"a": "b"}', "null": "null", "terminal": "\x1b[31m\x9b{{ x }}"}[kind])
    return f"file more {name}={kind}"


def is_plain(path: Path) -> bool:
    """Whether it is a file of its own, which can be read without end."""
    return stat.S_ISREG(path.lstat().st_mode)
