"""The same configurations carried out by mergekit and by merganser, on tiny models, compared number by number.

    python benchmarks/mergekit_parity.py SCRATCH
    python benchmarks/mergekit_parity.py SCRATCH --only ties --models llama bert --cache FOLDER

The models have random float32 weights: a base, three fine-tunes of it and a LoRA adapter, as Llama, Qwen3-MoE, Gemma 3
and BERT. mergekit comes from PyPI into an environment of its own (``peers.py``) and is imported once for all of its
merges. Both results are opened with transformers, and compared as the models that open. A difference above 1e-6 needs
a cause, which ``mergekit_cases.py`` names; the command ends with 1 where one has none.

``--output FILE`` writes the table as Markdown, between the lines that mark it in docs/mergekit.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_cases import CASES, EXPERTS, LAYERS, MODELS, Case

WIDTH, VOCABULARY = 32, 64
CLOSE = 1e-6
TOKENS = "the tokens"  # among the parameters of a model
EXPERT = ".experts."  # in the names of what the experts' cause explains, and nothing else
BEGIN, END = "<!-- made by benchmarks/mergekit_parity.py -->", "<!-- end -->"


def main() -> int:
    """Merge everything twice and print the table; 1 where a difference has no cause."""
    options = _options()
    if options.mergekit_jobs is not None:
        return _run_mergekit(options.mergekit_jobs)
    import peers

    wanted = {n: c for n, c in CASES.items() if not options.only or any(one in n for one in options.only)}
    jobs = []
    for kind in options.models:
        for plain in {not case.tokenizers for case in wanted.values() if kind in case.models}:
            make_family(options.scratch / kind / ("plain" if plain else "tokens"), kind, plain=plain)
        jobs += [_job(options.scratch, kind, name, case) for name, case in wanted.items() if kind in case.models]
    file = options.scratch / "jobs.json"
    file.write_text(json.dumps(jobs))
    programs = peers.mergekit(options.cache)
    subprocess.check_call([programs / "python", __file__, str(options.scratch), "--mergekit-jobs", str(file)])
    rows, good = [], True
    for name, case in wanted.items():
        cells = []
        for kind in MODELS:
            job = next((one for one in jobs if (one["name"], one["kind"]) == (name, kind)), None)
            found = None if job is None else _compared(job, case.cause, tokens=case.tokenizers)
            good &= found is None or found.good
            cells.append(found)
            if found is not None:
                print(f"{name} / {kind}: {found.text}", file=sys.stderr)
        rows.append((name, cells))
    table = _table(rows, programs)
    print(table)
    if options.output:
        _put(options.output, table)
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder for models and results")
    parser.add_argument("--only", nargs="*", help="parts of the names of configurations")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--cache", type=Path, help="folder of the environments of other tools")
    parser.add_argument("--output", type=Path, help="the Markdown file that has the table")
    parser.add_argument("--mergekit-jobs", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# ── models ──


def make_family(folder: Path, kind: str, *, plain: bool) -> None:
    """A base, three fine-tunes and an adapter; without ``plain`` they have tokenizers, and tokens of their own."""
    import torch

    if (folder / "done").exists():
        return
    torch.manual_seed(sum(map(ord, kind)))
    base = _model(kind)
    states = {"base": {name: value.clone() for name, value in base.state_dict().items()}}
    for name in "abc":
        states[name] = {
            key: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value
            for key, value in states["base"].items()
        }
    words = ["[UNK]", "[PAD]", "[EOS]", *(f"w{number}" for number in range(VOCABULARY - 3))]
    added = {"base": [], "a": ["<a>", "<ab>"], "b": ["<b>", "<ab>", "<more>"], "c": ["<c>"]}
    for name, state in states.items():
        model = _model(kind)
        model.load_state_dict(state)
        if not plain:
            model.resize_token_embeddings(VOCABULARY + len(added[name]), mean_resizing=False)
            with torch.no_grad():
                rows = model.get_input_embeddings().weight[VOCABULARY:]
                rows.copy_(torch.randn_like(rows) * 0.1)
        model.save_pretrained(folder / name)
        if not plain:
            _tokenizer(folder / name, words, added[name])
    _adapter(folder / "lora", folder / "base", base)
    (folder / "done").touch()


def _model(kind: str) -> Any:
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
             "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2}  # fmt: skip
    few = {"num_key_value_heads": 2, "head_dim": 8}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **few))
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **few, **experts))
    if kind == "gemma3":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **few))
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def _tokenizer(folder: Path, words: Sequence[str], added: Sequence[str]) -> None:
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({token: number for number, token in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_tokens([AddedToken(token, normalized=False) for token in added])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def _adapter(folder: Path, base: Path, model: Any) -> None:
    """A LoRA adapter of the attention's matrices, rank 4."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    modules = [n for n, m in model.named_modules() if n.rpartition(".")[2] in ("q_proj", "v_proj", "query", "value")]
    tensors = {}
    for name in modules:
        height, width = model.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, width) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(height, 4) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted({n.rpartition(".")[2] for n in modules}),
        "base_model_name_or_path": str(base), "bias": "none", "task_type": None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


# ── both tools ──


def _job(scratch: Path, kind: str, name: str, case: Case) -> dict[str, str]:
    family = scratch / kind / ("tokens" if case.tokenizers else "plain")
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    folder = scratch / kind / "results" / stem
    text = case.text
    for model in ("lora", "base", "a", "b", "c"):
        text = text.replace(f"${model}", str(family / model))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(text)
    return {"name": name, "kind": kind, "folder": str(folder)}


def _run_mergekit(file: Path) -> int:
    """In mergekit's environment: every job, into ``mergekit`` in its folder; what it says of those it cannot do."""
    import logging

    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from mergekit.scripts import multimerge

    logging.disable(logging.CRITICAL)
    for job in json.loads(file.read_text()):
        folder = Path(job["folder"])
        source = (folder / "recipe.yaml").read_text()
        options = MergeOptions(lora_merge_cache=str(folder / "lora-cache"), quiet=True, random_seed=1)
        torch.manual_seed(1)
        try:
            if "\n---\n" in source:
                configurations, _ = multimerge.load_config(source, str(folder / "between"))
                for name in sorted(configurations, key=lambda name: name is None):
                    out = folder / "mergekit" if name is None else folder / "between" / name
                    run_merge(configurations[name], str(out), options)
            else:
                run_merge(MergeConfiguration.model_validate(yaml.safe_load(source)), str(folder / "mergekit"), options)
        except Exception as error:
            last = traceback.format_exc()
            (folder / "mergekit-error.txt").write_text(f"{type(error).__name__}: {error}\n\n{last}")
    return 0


def _run_merganser(folder: Path) -> None:
    from merganser.merging import RunSettings, carry_out, make_recipe, prepare
    from merganser.merging.mergekit import make_intermediates, read_stages

    settings = RunSettings.make(1)
    stages = read_stages(folder / "recipe.yaml", folder / "merganser-between")
    make_intermediates(stages, {}, settings, overwrite=False, reads=(), tell=lambda _: None)
    recipe = make_recipe(dict(stages[-1].recipe), str(folder / "recipe.yaml"))
    carry_out(prepare(recipe, folder / "merganser", settings), folder / "merganser")


# ── comparison ──


@dataclass(frozen=True)
class Found:
    """What came of one configuration on one kind of model.

    Attributes:
        text: for the table.
        good: it is equal, or there is a cause.
        cause: where it is not equal.
    """

    text: str
    good: bool
    cause: str | None = None


def _compared(job: Mapping[str, str], causes: Mapping[str, str], *, tokens: bool) -> Found:
    folder = Path(job["folder"])
    cause = causes.get(job["kind"], causes.get(""))
    try:
        _run_merganser(folder)
    except Exception as error:
        (folder / "merganser-error.txt").write_text(traceback.format_exc())
        return Found(f"merganser fails: {error}".splitlines()[0], good=False)
    if (folder / "mergekit-error.txt").exists():
        said = (folder / "mergekit-error.txt").read_text().splitlines()[0]
        return Found("mergekit fails", good=True, cause=cause or f"mergekit ends with {said!r}")
    try:
        ours, theirs = (_opened(folder / tool, tokens=tokens) for tool in ("merganser", "mergekit"))
        _check_alike(ours, theirs)
        rest = [name for name in ours if name != TOKENS and not (causes is EXPERTS and EXPERT in name)]
        difference, share = _difference(ours, theirs, [name for name in ours if name != TOKENS])
        unexplained, _ = _difference(ours, theirs, rest)
    except Exception as error:
        (folder / "comparison-error.txt").write_text(traceback.format_exc())
        return Found(f"not comparable: {error}".splitlines()[0], good=False)
    text = f"{difference:.1e}" if difference else "0"
    if difference <= CLOSE:
        return Found(text, good=True)
    if cause is None or (causes is EXPERTS and unexplained > CLOSE):
        return Found(text, good=False, cause="no cause is known")
    return Found(f"{text} in {share:.2g} %", good=True, cause=cause)


def _opened(folder: Path, *, tokens: bool) -> dict[str, Any]:
    """Every parameter of the model that opens; with ``tokens``, rows of embeddings in the order of their tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    model, loading = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    if wrong := [key for kind in loading.values() for key in kind]:
        raise ValueError(f"{folder.name} does not open whole: {wrong[:3]}")
    state: dict[str, Any] = {name: value.double() for name, value in model.state_dict().items()}
    if tokens:
        ids = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
        order = [ids[token] for token in sorted(ids)]
        size = model.get_input_embeddings().weight.shape[0]
        rest = sorted(set(range(size)) - set(order))
        tables = [name for name, value in state.items() if value.dim() and value.shape[0] == size]
        state |= {name: state[name][order + rest] for name in tables}
        state[TOKENS] = sorted(ids)
    return state


def _check_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Both have the same parameters, shapes and tokens.

    Raises:
        ValueError: they have not.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"other parameters: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    if ours.get(TOKENS) != theirs.get(TOKENS):
        raise ValueError("other tokens")
    for name, tensor in ours.items():
        if name != TOKENS and tensor.shape != theirs[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, and mergekit's {list(theirs[name].shape)}")


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Sequence[str]) -> tuple[float, float]:
    """The largest difference of any number, and the share of numbers that are not close, in percent."""
    differences = [(ours[name] - theirs[name]).abs() for name in names]
    worst = max(float(one.max()) for one in differences)
    return worst, 100 * sum(int((one > CLOSE).sum()) for one in differences) / sum(one.numel() for one in differences)


def _table(rows: Sequence[tuple[str, Sequence[Found | None]]], programs: Path) -> str:
    import peers

    causes: dict[str, int] = {}
    versions = {name: peers.installed_version(programs, name) for name in ("mergekit", "torch", "transformers")}
    lines = [
        f"The largest difference of any number, {', '.join(f'{k} {v}' for k, v in versions.items())}; models of "
        f"{LAYERS} layers in float32. Where it is above 1e-6, in how many of the numbers it is, and the cause. "
        "`–`: not tried.",
        "",
        f"| configuration | {' | '.join(MODELS.values())} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for name, cells in rows:
        texts = []
        for cell in cells:
            mark = ""
            if cell is not None and cell.cause is not None:
                mark = f" ({causes.setdefault(cell.cause, len(causes) + 1)})"
            texts.append("–" if cell is None else f"{cell.text}{mark}")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines += ["", *(f"{number}. {cause}" for cause, number in causes.items())]
    return "\n".join(lines) + "\n"


def _put(file: Path, table: str) -> None:
    """Replace what stands between the marks."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
