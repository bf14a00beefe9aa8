"""Sound recipes, configurations of mergekit and of mixtures of experts, each drawn anew from a seeded generator.

Every document that a generator draws is one that the commands accept: a run of the fuzzer that changes nothing sees to
that. What it then changes is therefore a change of something sound, whatever the keys that happen to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fuzz.documents import Draw
from merganser.merging.mergekit.methods import METHODS, REQUIRED, MergekitMethod

Document = dict[str, Any]
#: Folders of the world: a base and two models that were made of it, with two layers each.
FAMILIES = (("base", "a", "b"), ("dense", "expert-1", "expert-2"))
LAYERS = 2

_GRADIENT = [[0.2, 0.8], [0.3, 0.9, 0.5], [0.5]]
_SHARES: list[Any] = [0.5, 1.0, 0.3, 1, "0.5", *_GRADIENT]
_NUMBERS: dict[str, list[Any]] = {
    "weight": _SHARES, "density": _SHARES, "t": _SHARES, "select_topk": _SHARES, "lambda": [1.0, 0.5, [0.5, 1.5]],
    "scale": [1.0, 0.5, [1, 0]], "gamma": [0.01, 0.1], "epsilon": [0.05, 0.1], "max_iter": [3, 10],
    "tol": [1e-5, "1e-7"], "eps": [1e-8], "r": [0.1, 0.5], "alpha": [0.2, 0.4],
}  # fmt: skip
_FILTERS = ("attention", "self_attn", "mlp", "intermediate", "norm", "LayerNorm", "*", "")
_WHOLE_MERGE = ("normalize_weights", "normalize")  # parameters that are one for the whole merge, for some methods
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _some(draw: Draw, share: float = 0.3) -> bool:
    return draw.random() < share


def _family(draw: Draw, folder: Path) -> list[str]:
    return [str(folder / name) for name in draw.choice(FAMILIES)]


# ── mergekit ──


def mergekit(draw: Draw, folder: Path) -> list[Document]:
    """A configuration of mergekit: models, slices or the default module, of any of its methods."""
    base, *others = _family(draw, folder)
    name = draw.choice(list(METHODS))
    return [_merge(draw, name, base, others)]


def stages(draw: Draw, folder: Path) -> list[Document]:
    """Two or three documents, of which each but the last has a name that the next one uses."""
    base, one, two = _family(draw, folder)
    adding = [name for name, method in METHODS.items() if method.base == "origin" and method.inputs == (1, None)]
    key = draw.choice(("name", "out_path"))
    first = {key: "first", **_merge(draw, "linear", base, [one, two], whole=True)}
    found = [first]
    if _some(draw):
        found.append({key: "second", **_merge(draw, draw.choice(adding), base, ["first", two], whole=True)})
    found.append(_merge(draw, draw.choice(adding), base, [found[-1][key], one]))
    if _some(draw, 0.5):
        draw.shuffle(found)
    return found


def _merge(draw: Draw, name: str, base: str, others: Sequence[str], *, whole: bool = False) -> Document:
    """One configuration; ``whole``: its result has the models' own layers and tokens, as another one needs it."""
    method = METHODS[name]
    low, high = method.inputs
    people = list(others[: max(low, min(2, high or 2))])
    based = method.base in ("origin", "first") or (method.base == "origin if given" and _some(draw, 0.5))
    if method.base == "first":
        people = people[:1]
    inputs = [*people, *([base] if based and (method.base == "first" or _some(draw)) else [])]
    made: Document = {"merge_method": name}
    if based:
        made["base_model"] = base
    everywhere, scopes = _some(draw), ("input", "not base")
    shared = _parameters(draw, method, ("method", *(scopes if everywhere else ())))
    entries = [
        {
            "model": _reference(draw, model),
            **_under({} if everywhere and _some(draw, 0.7) else _parameters(draw, method, scopes)),
        }
        for model in inputs
    ]
    if _some(draw, 0.6):
        made["models"] = entries
    else:
        everyone = [*entries, *([{"model": base}] if based and base not in inputs else [])]
        slices = []
        for start in range(LAYERS) if whole or _some(draw, 0.7) else (0,):
            stop = start + 1 if len(slices) or whole or _some(draw, 0.7) else LAYERS
            slices.append({"sources": [{**entry, "layer_range": [start, stop]} for entry in everyone]})
        if not whole and high == 1 and method.base == "input":
            slices += slices[:1] if _some(draw) else []
        made |= {"modules": {"default": {"slices": slices}}} if _some(draw, 0.2) else {"slices": slices}
    made |= _under(shared)
    if _some(draw):
        made["dtype"] = draw.choice(("float32", "bfloat16", "float16", "float64", "torch.float32"))
    if _some(draw, 0.15):
        made["out_dtype"] = draw.choice(("float32", "bfloat16"))
    if _some(draw, 0.2):
        made["chat_template"] = _TEMPLATE
    return (
        made
        if whole
        else made | _tokenizer(draw, [*dict.fromkeys(inputs), *([base] if based and base not in inputs else [])], based)
    )


def _reference(draw: Draw, model: str) -> Any:
    return {"model": {"path": model}} if _some(draw, 0.1) and "/" in model else model


def _under(parameters: Document) -> Document:
    return {"parameters": parameters} if parameters else {}


def _parameters(draw: Draw, method: MergekitMethod, scopes: Sequence[str]) -> Document:
    """Parameters of a method, all that it asks for and some others, each as a value, a gradient or by filters."""
    found: Document = {}
    for name, parameter in method.parameters.items():
        if parameter.scope not in scopes or not (parameter.default is REQUIRED or _some(draw, 0.4)):
            continue
        if parameter.kind is bool:
            value = True if name in _WHOLE_MERGE and method.switch else draw.choice((True, False, "yes", 0))
            found[name] = value
            continue
        values = _NUMBERS[name]
        if not _some(draw):
            found[name] = draw.choice(values)
            continue
        conditions = [
            {"filter": draw.choice(_FILTERS), "value": draw.choice(values)} for _ in range(draw.randint(1, 2))
        ]
        found[name] = [*conditions, draw.choice(({"value": draw.choice(values)}, values[0]))]
    return found


def _tokenizer(draw: Draw, models: Sequence[str], based: bool) -> Document:
    source = draw.choice(("union", "base", models[0])) if based else draw.choice(("union", models[0]))
    if _some(draw, 0.2):
        return {"tokenizer_source": source}
    if not _some(draw, 0.3):
        return {}
    sources: list[Any] = [models[0], {"kind": "zero"}, {"kind": "model_token", "model": models[-1], "token": "movie"},
                          {"kind": "model_token", "model": models[-1], "token_id": 3}]  # fmt: skip
    tokens = {
        token: {"source": draw.choice(sources[token == "<new>" :]), "force": draw.choice((True, False))}
        for token in draw.sample(("good", "bad", "<new>"), draw.randint(0, 2))
    }
    multiple = {"pad_to_multiple_of": draw.choice((1, 8, None))} if _some(draw) else {}
    return {"tokenizer": {"source": source, **({"tokens": tokens} if tokens else {}), **multiple}}


# ── our recipes ──

#: Of some methods, the options that may be gradients, and those that contributors may have for themselves.
_OPTIONS: dict[str, tuple[Document, tuple[str, ...]]] = {
    "simple": ({}, ()),
    "slerp": ({"t": [0.5, [0.0, 1.0], [0, 0.5, 0.3, 1]]}, ()),
    "ties": (
        {"density": [0.5, [0.2, 0.9]], "scale": [1.0, [0.5, 1]], "normalize": [True, [True, False]]},
        ("density",),
    ),
    "dare_ties": ({"density": [0.5, [0.2, 0.9]], "seed": [0, 7], "rescale": ["expected", "l1", "none"]}, ("density",)),
    "della": ({"density": [0.5, [0.4, 0.6]], "epsilon": [0.05, 0.1]}, ("density", "epsilon")),
    "breadcrumbs": ({"density": [0.5], "gamma": [0.01, [0.0, 0.1]], "whole": [True, False]}, ("density", "gamma")),
    "sce": ({"density": [0.5, [0.2, 0.9]]}, ()),
    "task_arithmetic": ({"scale": [0.3, [0.1, 1.0]]}, ()),
    "ram_plus": ({"r": [0.1], "alpha": [0.2, [0.1, 0.3]]}, ()),
}
_MATCHES: tuple[Document, ...] = (
    {"role": "norm"}, {"role": ["embedding", "head"]}, {"tensors": "*layer*"}, {"tensors": ["*weight", "*bias"]},
    {"role": "attention", "tensors": "*.weight"}, {"tensors": "nothing.of.the.kind", "optional": True}, {},
)  # fmt: skip


def rules(draw: Draw, folder: Path) -> list[Document]:
    """A recipe with rules, layers, gradients, options of single contributors, tokens and a chat template."""
    base, *others = _family(draw, folder)
    method = draw.choice(list(_OPTIONS))
    people = [_contributor(draw, model, name, method) for model, name in zip(others, ("one", "two"), strict=True)]
    made: Document = {"contributors": people, "method": method, "base": base}
    if options := _chosen(draw, _OPTIONS[method][0]):
        made["options"] = options
    if _some(draw, 0.7):
        made["rules"] = [_rule(draw, ("one", "two", "base")) for _ in range(draw.randint(1, 3))]
    if _some(draw, 0.4):
        made["layers"] = [_block(draw) for _ in range(draw.randint(1, 4))]
        if "rules" in made:  # not every block has every contributor
            made["rules"] = [{**draw.choice(_MATCHES), "take": "base"}]
    made |= _chosen(
        draw,
        {
            "computation": ["F32", "F64"], "dtype": ["F32", "BF16", "F16"], "chat_template": [_TEMPLATE, "one", "auto"],
            "vocabulary": ["same", "union", "tokenizer"], "missing_rows": ["mean", "base", "two"],
            "fill_missing_rows": [True], "tokenizer_from": ["one", "base"], "pad_to_multiple_of": [1, 8],
            "max_shard_size": ["5GB", "20kB"], "require_coverage": [0.0], "names": ["first", "canonical"],
            "tokens": [{"good": {"take": "two", "force": True}}, {"bad": {"zero": True, "force": True}},
                       {"movie": {"take": "one", "token": "food"}, "<new>": {"take": "base", "id": 3}}],
        },
        0.15,
    )  # fmt: skip
    return [made]


def _chosen(draw: Draw, known: Document, share: float = 0.5) -> Document:
    return {key: draw.choice(values) for key, values in known.items() if _some(draw, share)}


def _own(draw: Draw, method: str) -> Document:
    """What a contributor may have for itself."""
    options, own = _OPTIONS[method]
    found = _chosen(draw, {key: options[key] for key in own})
    return ({"coefficient": draw.choice((1, 0.5, [0.2, 0.8], [1]))} if _some(draw) else {}) | (
        {"options": found} if found else {}
    )


def _contributor(draw: Draw, model: str, name: str, method: str) -> Document:
    return {"model": model, "name": name, **_own(draw, method)}


def _rule(draw: Draw, models: Sequence[str]) -> Document:
    made = dict(draw.choice(_MATCHES))
    if _some(draw):
        return made | {"take": draw.choice(models)}
    method = draw.choice(list(_OPTIONS))
    people = {name: own for name in ("one", "two") if name in models and _some(draw) and (own := _own(draw, method))}
    options = _chosen(draw, _OPTIONS[method][0])
    return made | {"method": method, "options": options, **({"contributors": people} if people else {})}


def _block(draw: Draw) -> Document:
    start = draw.randrange(LAYERS)
    layers = [start, draw.randint(start + 1, LAYERS)]
    if _some(draw, 0.5):
        return {"sources": [{"contributor": draw.choice(("one", "two", "base")), "range": layers}]}
    method = draw.choice(list(_OPTIONS))
    sources = [{"contributor": name, "range": layers, **_own(draw, method)} for name in ("one", "two")]
    sources.append({"contributor": "base", "range": layers})
    made: Document = {"sources": sources, "method": method, "options": _chosen(draw, _OPTIONS[method][0])}
    if _some(draw):
        made["rules"] = [{**_rule(draw, ("one", "two")), "optional": True}]
    return made


# ── mixtures of experts ──


def experts(draw: Draw, folder: Path) -> list[Document]:
    """A mixture of experts as mergekit-moe reads it."""
    base, *others = (str(folder / name) for name in FAMILIES[1])
    mode = draw.choice(("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"))
    people = [
        {"source_model": model, "positive_prompts": draw.choice((prompts, prompts[:1]))}
        for model, prompts in zip(others, (["a good movie", "yes"], ["bad food", "Anna saw Paris"]), strict=True)
    ]
    for one in people:
        one |= _chosen(
            draw, {"negative_prompts": [["not good"], [], "no"], "noise_scale": [0.1], "residual_scale": [0.5]}
        )
        if mode.endswith("random") and _some(draw):
            del one["positive_prompts"]
    made: Document = {"base_model": base, "gate_mode": mode, "experts": people}
    if _some(draw):
        made["experts"] = [*people, {"source_model": base, "positive_prompts": ["I liked it"]}]
    return [
        made
        | _chosen(
            draw, {"dtype": ["float32", "bfloat16"], "experts_per_token": [1, 2], "architecture": ["mixtral"]}, 0.3
        )
        | _chosen(draw, {"seed": [0, 17], "shared_experts": [None, []]}, 0.2)
    ]


MADE: dict[str, Callable[[Draw, Path], list[Document]]] = {
    "mergekit": mergekit,
    "stages": stages,
    "rules": rules,
    "experts": experts,
}


def draw_file(made: str, draw: Draw, path: Path) -> None:
    """Write what a generator draws, of models that lie beside the file."""
    path.write_text(yaml.safe_dump_all(MADE[made](draw, path.parent)))
