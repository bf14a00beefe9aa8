"""Changes to a file, each drawn from a seeded generator: of its structure, of its bytes, and of the file itself.

A change is known by a class such as ``json replace architectures=null`` or ``file fifo``, which says what was done
without the particular place or bytes, so that what the commands accept can be named class by class.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fuzz.world import RAN

Draw = random.Random


@dataclass(frozen=True)
class Raw:
    """Text that is written into a JSON or YAML file as it is."""

    text: str


@dataclass(frozen=True)
class Nested:
    """A text that is itself JSON, as safetensors' metadata has them."""

    value: Any


def render(value: Any) -> str:
    """JSON with the raw texts in it."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Nested):
        return json.dumps(render(value.value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{render(key)}: {render(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    return json.dumps(value)


def values(root: Path, style: str) -> dict[str, str]:
    """Name → text of what can stand in place of any value; ``root`` is the folder of the world."""
    texts = {
        "empty": "",
        "long": "x" * 100_000,
        "terminal": "\x1b]0;title\x07\x1b[31mred\x9b2J\u202e",
        "surrogate": "\ud800",
        "markup": "[/b][link=file:///etc/passwd]here",
        "markdown": "](javascript:x) <script>x</script>\n\n# Title\n---\nlicense: mit",
        "climbing": "../../outside/secret.txt",
        "absolute": str(root / "outside" / "secret.txt"),
        "passwd": "/etc/passwd",
        "device": "/dev/zero",
        "nul": "a\0b",
        "name too long": "y" * 300,
        "url": "https://localhost:1/x",
        "hub": "org/name",
        "pattern": "(a+)+$" + "(x|xx)*" * 20,
        "format": "{0.__class__} %s {title}",
        "word": "none",
    }
    found = {f"text {name}": json.dumps(text) for name, text in texts.items()}
    found |= {
        "null": "null",
        "true": "true",
        "minus one": "-1",
        "zero": "0",
        "one": "1",
        "half": "0.5",
        "2**63": str(2**63),
        "a billion": "1000000000",
        "5000 digits": "9" * 5000,
        "1e308": "1e308",
        "1e999": "1e999",
        "NaN": ".nan" if style == "yaml" else "NaN",
        "infinity": "-.inf" if style == "yaml" else "-Infinity",
        "empty list": "[]",
        "empty object": "{}",
        "list of numbers": "[1, 2, 3]",
        "list of lists": "[[[1]], {}]",
        "long list": "[" + "9, " * 100_000 + "9]",
        "numbered object": '{"0": 0, "1": "x", "01": 2, "-1": null}',
        "large object": "{" + ", ".join(f'"{number}": {number}' for number in range(20_000)) + "}",
        "deep list": "[" * 100_000 + "]" * 100_000,
        "deep object": '{"a": ' * 5_000 + "1" + "}" * 5_000,
    }
    if style == "yaml":
        found |= {
            "date": "2001-99-99",
            "sound date": "2001-01-01",
            "sixty": "190:20:30",
            "python": f'!!python/object/apply:os.mkdir ["{root / RAN}"]',
            "binary": "!!binary AAAA",
            "set": "!!set {a, b}",
            "aliases": _aliases(),
            "self": "&self [*self]",
            "merge key": "{<<: {a: 1}, b: 2}",
            "number as key": "{1: 2, null: 3, [1]: 4, 2.5: 5, true: 6}",
            "unclosed": '"abc',
        }
    return found


def _aliases() -> str:
    lines = ['&a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x"]']
    for level in range(1, 9):
        lines.append(f"&a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return f"[{', '.join(lines)}]"


#: Keys that a document may not have but that some reader of it would heed.
MORE_KEYS = (
    "auto_map", "num_labels", "num_hidden_layers", "id2label", "quantization_config", "base_model_name_or_path",
    "allow_pickle", "trust_remote_code", "extends", "tokenizer_class", "chat_template", "dtype", "torch_dtype",
    "rank_pattern", "alpha_pattern", "modules_to_save", "tie_word_embeddings", "statistics", "labels", "vocabulary",
    "architectures", "added_tokens_decoder", "model_max_length", "revision", "format", "protocol", "more",
)  # fmt: skip
_CODE = (
    '{"AutoConfig": "configuration_x.X", "AutoTokenizer": ["x.X", "x.X"], '
    '"AutoModel": "modeling_x.X", "AutoModelForSequenceClassification": "modeling_x.X"}'
)


# -- structure ---------------------------------------------------------------------------------------------


def _places(draw: Draw, document: Any) -> Iterator[tuple[Any, Any]]:
    """A random way down: container and key, again and again."""
    while isinstance(document, (dict, list, Nested)) and document:
        if isinstance(document, Nested):
            document = document.value
            continue
        key = draw.choice(list(document) if isinstance(document, dict) else range(len(document)))
        yield document, key
        document = document[key]


def _place(draw: Draw, document: Any) -> tuple[Any, Any, str]:
    """A place that is as likely near the top as far below, and its name without indices."""
    way = list(_places(draw, document))
    if not way:
        return None, None, ""
    depth = draw.randrange(len(way))
    names = [str(key) if isinstance(key, str) else "*" for _, key in way[: depth + 1]]
    return *way[depth], ".".join(names)


def change_document(draw: Draw, document: Any, root: Path, style: str) -> tuple[Any, str]:
    """Change one place of a JSON or YAML document, until it is another one; see :func:`_change_once`."""
    before, name = render(document), "none"
    for _ in range(10):
        document, name = _change_once(draw, document, root, style)
        if isinstance(document, Raw) or render(document) != before:
            break
    return document, name


def _change_once(draw: Draw, document: Any, root: Path, style: str) -> tuple[Any, str]:
    """Change one place, perhaps into what was there.

    Returns:
        the document (changed in place where it is a container) and the class of the change.
    """
    known = values(root, style)
    container, key, place = _place(draw, document)
    if container is None or draw.random() < 0.02:
        name = draw.choice(list(known))
        return Raw(known[name]), f"replace all={name}"
    old = container[key]
    kind = draw.choices(
        ("replace", "other", "delete", "twice", "swap", "rename", "tweak", "insert"), (10, 1.5, 1.5, 0.7, 1, 1, 4, 2)
    )[0]
    if kind == "insert" and isinstance(container, dict):
        more, name = draw.choice(MORE_KEYS), draw.choice(list(known))
        code = more == "auto_map" and draw.random() < 0.7
        container[more] = Raw(_CODE if code else known[name])
        above = place.rpartition(".")[0]
        return document, f"replace {above + '.' if above else ''}{more}={'code' if code else name}"
    if kind == "tweak":
        tweaked = _tweak(draw, old)
        if tweaked is None:
            kind = "replace"
        else:
            container[key], name = tweaked
            return document, f"tweak {place} {name}"
    if kind == "replace":
        name = draw.choice(list(known))
        container[key] = Raw(known[name])
        return document, f"replace {place}={name}"
    if kind == "other":
        other, at, _ = _place(draw, document)
        container[key] = Raw(render(other[at]))
        return document, f"other {place}"
    if kind == "delete":
        del container[key]
        return document, f"delete {place}"
    if kind == "swap":
        at = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
        container[key], container[at] = container[at], old
        return document, f"swap {place}"
    if not isinstance(container, dict):
        container.insert(key, old)
        return document, f"twice {place}"
    if kind == "twice":
        name = draw.choice(list(known))
        container[key] = Raw(f"{render(old)}, {json.dumps(key)}: {known[name]}")
        return document, f"twice {place}={name}"
    name = draw.choice([name for name, text in known.items() if text.startswith('"')])
    items = [(Raw(known[name]) if one == key else one, value) for one, value in container.items()]
    container.clear()
    container.update(items)
    return document, f"rename {place}={name}"


def _tweak(draw: Draw, value: Any) -> tuple[Any, str] | None:
    """A value of the same type that is a little different."""
    if isinstance(value, bool) or value is None:
        return (not value, "not")
    if isinstance(value, (int, float)):
        name, new = draw.choice(
            [
                ("+1", value + 1),
                ("-1", value - 1),
                ("times 2", value * 2),
                ("minus", -value),
                ("times 1e9", value * 10**9),
            ]
        )
        return new, name
    if isinstance(value, str):
        name, new = draw.choice(
            [("end", value + "x"), ("begin", "../" + value), ("upper", value.upper()), ("cut", value[:-1]),
             ("dot", "./" + value), ("blank", f" {value} ")]
        )  # fmt: skip
        return new, name
    if isinstance(value, list) and value:
        name, new = draw.choice([("reverse", value[::-1]), ("repeat", value + value), ("drop", value[:-1])])
        return new, name
    return None


# -- files of each form ------------------------------------------------------------------------------------


def _json(draw: Draw, path: Path, root: Path) -> str:
    document, name = change_document(draw, json.loads(path.read_text()), root, "json")
    path.write_text(render(document), encoding="utf-8", errors="surrogatepass")
    return f"json {name}"


def _yaml(draw: Draw, path: Path, root: Path) -> str:
    document, name = change_document(draw, yaml.safe_load(path.read_text()), root, "yaml")
    path.write_text(render(document), encoding="utf-8", errors="surrogatepass")
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
    "jsonl": _json_lines,
    "table": _table,
    "parquet": _parquet,
    "safetensors": _safetensors,
}


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
