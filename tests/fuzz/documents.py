"""Changes to the values of a document: any of them, anywhere in it, to what nobody expects there."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Name → text of what can stand in place of any value.

    Args:
        root: the folder of the world.
        style: ``json``, ``yaml``, or ``recipe`` for the YAML of a merge, in which more values mean something.
    """
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
        "NaN": "NaN" if style == "json" else ".nan",
        "infinity": "-Infinity" if style == "json" else "-.inf",
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
    if style != "json":
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
    return {**found, **_of_recipes(root)} if style == "recipe" else found


def _of_recipes(root: Path) -> dict[str, str]:
    """What a recipe, or a configuration of mergekit, may have at another place or in another measure."""
    from merganser.merging.mergekit.methods import METHODS as MERGEKIT
    from merganser.methods import METHODS

    return {
        **{f"method {name}": json.dumps(name) for name in sorted({*METHODS, *MERGEKIT, "auto", "regmean_pp"})},
        **{f"model {name}": json.dumps(str(root / "in" / name)) for name in ("a", "base", "dense", "merged")},
        "model and adapter": json.dumps(f"{root / 'in' / 'base'}+{root / 'in' / 'adapter'}"),
        "its own result": json.dumps(str(root / "out" / "model")),
        "negative range": "[-1, 2]",
        "empty range": "[1, 1]",
        "range backwards": "[2, 0]",
        "range too far": "[0, 1000000000]",
        "range of 2**80": f"[0, {2**80}]",
        "range of three": "[0, 1, 2]",
        "two numbers": "[0, 1]",
        "gradient of texts": '[0.1, "x"]',
        "gradient of NaN": "[0.5, .nan]",
        "gradient of 1e38": "[1e38, -1e38]",
        "gradient of nulls": "[null, null]",
        "gradient of lists": "[[0.5, 1], [0.5]]",
        "gradient of booleans": "[true, false, 0.5]",
        "long gradient": "[" + "0.5, " * 20_000 + "0.5]",
        "filters": '[{filter: "*[", value: 0.5}, {filter: "", value: 2}, {filter: "(a+)+$", value: [.5, 1]}, -1]',
        "filter alone": "[{filter: mlp, value: 0.5}]",
        "many filters": "[" + ", ".join(f'{{filter: "{number}", value: {number}}}' for number in range(3000)) + "]",
        "zero row": "{kind: zero}",
        "row of another": f'{{kind: model_token, model: {json.dumps(str(root / "in" / "b"))}, token_id: 99999}}',
        "reference": f'{{path: {json.dumps(str(root / "in" / "b"))}, revision: "../x"}}',
        "many stars": json.dumps("*a" * 500),
        "all": '"*"',
        "template": json.dumps("{% for x in range(10**9) %}{{ x }}{% endfor %}"),
        "code": json.dumps("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    }  # fmt: skip


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
#: The same of recipes, and of configurations of mergekit.
RECIPE_KEYS = (
    "rules", "layers", "tensors", "role", "take", "optional", "options", "coefficient", "contributors", "sources",
    "range", "stack", "method", "tokens", "token", "id", "zero", "force", "vocabulary", "missing_rows", "computation",
    "keep_separate", "exclude", "labels", "without_base", "config_from", "tokenizer_from", "pad_to_multiple_of",
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "layer_range", "filter", "value", "name",
    "out_path", "out_dtype", "tokenizer_source", "tokenizer", "weight", "density", "lambda", "normalize", "int8_mask",
    "residual_weight", "gate_mode", "experts", "shared_experts", "experts_per_token", "noise_scale", "residual_scale",
    "negative_prompts", "architecture", "seed", "default", "text_decoder", "path", "lora", "override_architecture",
    "data", "max_shard_size", "scale", "t",
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
        keys = RECIPE_KEYS if style == "recipe" and draw.random() < 0.8 else MORE_KEYS
        more, name = draw.choice(keys), draw.choice(list(known))
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
