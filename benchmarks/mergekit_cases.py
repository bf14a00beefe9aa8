"""The configurations that ``mergekit_parity.py`` carries out: mergekit's examples in short, and each common kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LAYERS = 4
MODELS = {"llama": "Llama", "qwen3_moe": "Qwen3-MoE", "gemma3": "Gemma 3", "bert": "BERT"}
DECODERS = ("llama", "qwen3_moe", "gemma3")


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        text: of the YAML, with ``$base``, ``$a``, ``$b``, ``$c``, ``$lora`` and ``$out`` for folders.
        models: the kinds of models that it is tried on.
        tokenizers: the fine-tunes have tokens of their own.
        cause: why the results differ where they do, by the kind of model; ``""`` for all others.
    """

    text: str
    models: Sequence[str] = tuple(MODELS)
    tokenizers: bool = False
    cause: Mapping[str, str] = field(default_factory=dict)


RANDOM = {"": "both drop at random, each with its own numbers"}

EXPERTS = {
    "qwen3_moe": "mergekit takes all experts of a layer for one tensor, merganser each expert's matrix for its own, as "
    "the files have them"
}

DEPTH = {"gemma3": "mergekit fails: the configuration that it writes has the old depth's layer_types"}

FLOAT32 = {
    "": "mergekit computes importances in float32, where that of small changes is rounding; merganser in float64",
    "qwen3_moe": "both: importances in float32, and all experts of a layer as one tensor",
}


def models(*settings: str, base: bool = False) -> str:
    """``models:`` with the fine-tunes and the parameters of each."""
    lines = ["models:", *(["  - model: $base"] if base else [])]
    for name, setting in zip("abc", settings, strict=False):
        lines.append(f"  - model: ${name}")
        lines += [f"    parameters: {setting}"] if setting else []
    return "\n".join(lines) + "\n"


def method(name: str, more: str = "", base: bool = True) -> str:
    """The other keys that every configuration has."""
    return f"merge_method: {name}\n" + ("base_model: $base\n" if base else "") + f"{more}\ndtype: float32\n"


def sliced(first: Sequence[int], second: Sequence[int] | None = None, *, together: bool = False) -> str:
    """``slices:`` of the first and the second fine-tune: merged with each other, or behind each other."""
    one = f"{{model: $a, layer_range: {list(first)}}}"
    if second is None:
        return f"slices:\n  - sources: [{one}]\n"
    other = f"{{model: $b, layer_range: {list(second)}}}"
    inner = [f"[{one}, {other}]"] if together else [f"[{one}]", f"[{other}]"]
    return "slices:\n" + "".join(f"  - sources: {sources}\n" for sources in inner)


T = (
    "parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0]}, "
    "{value: 0.5}]}"
)

NUMBERED = "parameters: {weight: [{filter: layers.1., value: 0.2}, {filter: layers.2.mlp, value: 0.7}, {value: 0.5}]}"

SCALES = "parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}"

ATTENTION = T.replace("self_attn", "attention").replace("mlp", "intermediate")

DENSITY = "{density: 0.5, weight: 0.4}"

LAYERED = [0, LAYERS]

#: mergekit's examples in short, and one of each common kind.
CASES: dict[str, Case] = {
    "linear": Case(models("{weight: 1.0}", "{weight: 0.3}", "{weight: 0.5}") + method("linear", base=False)),
    "linear, not normalised": Case(
        models("{weight: 0.7}", "{weight: -0.2}") + method("linear", "parameters: {normalize: false}", base=False)
    ),
    "linear, gradient and base": Case(
        models("{weight: [0, 1]}", "{weight: [1, 0.5, 0.1]}") + method("linear", "parameters: {weight: 0.25}")
    ),
    "slerp, gradient over one slice": Case(
        sliced(LAYERED, LAYERED, together=True) + method("slerp", T).replace("$base", "$a"), DECODERS, cause=EXPERTS
    ),
    "slerp, whole models": Case(
        models("", "") + method("slerp", ATTENTION).replace("$base", "$b"), ("bert", "llama"), cause=EXPERTS
    ),
    "ties, as it comes": Case(models("{weight: 0.5}", "{weight: 0.5}") + method("ties")),
    "ties, three densities": Case(
        models("{density: [1, 0.7, 0.1], weight: 1.0}", "{density: 0.5, weight: [0, 0.3, 0.7, 1]}",
               "{density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}", base=True)
        + method("ties", "parameters: {normalize: true, int8_mask: true}"),
        cause=EXPERTS,
    ),
    "ties, not normalised": Case(
        models("{density: 0.5, weight: 0.5}", "{density: 0.5, weight: 0.5}")
        + method("ties", "parameters: {normalize: false, int8_mask: true}"),
        cause=EXPERTS,
    ),
    "dare_ties, density 1": Case(models("{weight: 0.5}", "{weight: 0.3}") + method("dare_ties")),
    "dare_ties": Case(models(DENSITY, DENSITY) + method("dare_ties"), cause=RANDOM),
    "dare_linear, density 1": Case(models("{weight: 0.5}", "{weight: 0.3}") + method("dare_linear")),
    "dare_linear": Case(models(DENSITY, DENSITY) + method("dare_linear"), cause=RANDOM),
    "della, density 1": Case(models("{weight: 0.5}", "{weight: 0.3}") + method("della", "parameters: {lambda: 1.1}")),
    "della": Case(models(DENSITY, DENSITY) + method("della", "parameters: {epsilon: 0.1}"), cause=RANDOM),
    "della_linear": Case(models(DENSITY, DENSITY) + method("della_linear", "parameters: {epsilon: 0.1}"), cause=RANDOM),
    "breadcrumbs": Case(
        models("{density: 0.9, gamma: 0.02, weight: 0.5}", "{density: 0.7, gamma: 0.1, weight: 0.5}")
        + method("breadcrumbs"),
        cause=EXPERTS,
    ),
    "breadcrumbs_ties": Case(
        models("{density: 0.9, gamma: 0.02, weight: 0.5}", "{density: 0.7, gamma: 0.1, weight: 0.5}")
        + method("breadcrumbs_ties", "parameters: {normalize: true}"),
        cause=EXPERTS,
    ),
    "task_arithmetic, filters": Case(
        models("{weight: [{filter: mlp, value: 0.8}, {filter: at, value: [0.1, 0.9]}, {value: 0.3}]}", "{weight: 0.4}")
        + method("task_arithmetic", "parameters: {lambda: 0.7}")
    ),
    "task_arithmetic, normalised": Case(
        models("{weight: 0.5}", "{weight: 1.5}") + method("task_arithmetic", "parameters: {normalize: true}")
    ),
    "model_stock": Case(models("", "", "") + method("model_stock"), cause=EXPERTS),
    "model_stock, filter_wise": Case(
        models("", "", "") + method("model_stock", "parameters: {filter_wise: true}"), cause=EXPERTS
    ),
    "sce": Case(models("", "", "") + method("sce", "parameters: {select_topk: 0.3}"), cause=EXPERTS),
    "karcher": Case(models("", "", "") + method("karcher", base=False), cause=EXPERTS),
    "nuslerp": Case(models("{weight: 0.6}", "{weight: 0.4}") + method("nuslerp", base=False), cause=EXPERTS),
    "nuslerp, task vectors by rows": Case(
        models("{weight: 0.6}", "{weight: 0.4}") + method("nuslerp", "parameters: {nuslerp_flatten: false}"),
        cause=EXPERTS,
    ),
    "multislerp": Case(
        models("{weight: 0.6}", "{weight: 0.4}", "{weight: 1}") + method("multislerp"), cause=EXPERTS
    ),
    "arcee_fusion": Case(models("") + method("arcee_fusion"), cause=FLOAT32),
    "nearswap": Case(models("") + method("nearswap", "parameters: {t: 0.002}")),
    "ram": Case(models("", "", "") + method("ram", "parameters: {epsilon: 0.01}")),
    "ramplus_tl": Case(models("", "", "") + method("ramplus_tl", "parameters: {epsilon: 0.01}"), cause=EXPERTS),
    "passthrough, a part of one model": Case(sliced([0, 3]) + method("passthrough", base=False), cause=DEPTH),
    "passthrough, two models": Case(sliced([0, 3], [2, 4]) + method("passthrough", base=False), cause=DEPTH),
    "passthrough, repeated and scaled": Case(
        sliced([0, 3], [1, 4]).replace("$b", "$a").replace("[1, 4]}", f"[1, 4], {SCALES}}}")
        + method("passthrough", base=False),
        DECODERS, cause=DEPTH,
    ),
    "linear, two slices": Case(
        sliced([0, 2], [0, 2], together=True) + sliced([1, 4], [1, 4], together=True).removeprefix("slices:\n")
        + method("linear", "parameters: {weight: [0.2, 1.0]}", base=False),
        cause=DEPTH,
    ),
    "linear, filters by layer in slices": Case(
        (sliced([0, 2], [0, 2], together=True) + sliced([1, 4], [0, 3], together=True).removeprefix("slices:\n"))
        .replace("[1, 4]}", f"[1, 4], {NUMBERED}}}").replace("[0, 3]}", f"[0, 3], {NUMBERED}}}")
        + method("linear", "parameters: {weight: 1}", base=False),
        DECODERS, cause=DEPTH,
    ),
    "a base among the models": Case(models("{weight: 0.4}", base=True) + method("task_arithmetic")),
    "lora": Case(
        "models:\n  - {model: $base+$lora, parameters: {weight: 1.0}}\n  - {model: $a, parameters: {weight: 1.0}}\n"
        + method("linear", base=False),
        ("llama", "bert"),
    ),
    "tokenizer: union": Case(
        models("{weight: 0.5}", "{weight: 0.8}", "{weight: 0.2}")
        + method("linear", "tokenizer: {source: union}", base=False),
        ("llama", "gemma3"), tokenizers=True,
    ),
    "tokenizer_source: union, with a base": Case(
        models("{weight: 0.5, density: 0.4}", "{weight: 0.8, density: 0.6}")
        + method("ties", "tokenizer_source: union"),
        ("llama", "bert"), tokenizers=True,
    ),
    "tokenizer_source: base": Case(
        models("{weight: 0.5}", "{weight: 0.8}") + method("task_arithmetic", "tokenizer_source: base"),
        ("llama", "bert"), tokenizers=True,
    ),
    "tokenizer: a model's": Case(
        models("{weight: 0.5}", "{weight: 0.8}") + method("linear", "tokenizer: {source: $b}", base=False),
        ("llama",), tokenizers=True,
    ),
    "tokenizer: tokens and padding": Case(
        models("{weight: 0.5}", "{weight: 0.8}")
        + method(
            "linear",
            "tokenizer:\n  source: union\n  pad_to_multiple_of: 32\n  tokens:\n    <a>: {source: $a, force: true}\n"
            "    w7: {source: {kind: zero}, force: true}\n"
            "    <new>: {source: {kind: model_token, model: $b, token: <b>}}\n",
            base=False,
        ),
        ("llama",), tokenizers=True,
    ),
    "several documents": Case(
        sliced(LAYERED, LAYERED, together=True) + method("slerp", "parameters: {t: 0.3}").replace("$base", "$a")
        + "name: first\n---\n"
        + models(DENSITY, DENSITY).replace("$a", "first").replace("$b", "$c") + method("ties"),
        ("llama", "bert"),
    ),
}  # fmt: skip
