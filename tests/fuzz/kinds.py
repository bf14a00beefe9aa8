"""The kinds of input that may come from a stranger or by mistake: their files, and the commands that read them."""

from __future__ import annotations

from dataclasses import dataclass

#: Where a command writes; the folder is empty before each run.
OUT = "{out}"


@dataclass(frozen=True)
class Target:
    """A file that is changed.

    Attributes:
        file: in the folder of inputs; empty where the words of the command are changed.
        form: one of :data:`fuzz.mutations.FORMS`, or empty: only its bytes are changed.
        seal: how its hash of itself is computed anew, where it has one; see :mod:`fuzz.seals`.
        commands: those of the kind that read it, as numbers; all where it is empty.
        made: one of :data:`fuzz.recipes.MADE`, which draws the file anew for each run, before it is changed.
    """

    file: str
    form: str = ""
    seal: str = ""
    commands: tuple[int, ...] = ()
    made: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        targets: files of this kind.
        commands: command lines, run in the folder of the inputs.
        own: the user's own file, whose paths may lead anywhere.
        models: folders to which a stranger can add a file.
        writes: a folder of the inputs that commands may change.
    """

    targets: tuple[Target, ...]
    commands: tuple[str, ...]
    own: bool = False
    models: tuple[str, ...] = ()
    writes: str = ""


MERGED = f"merge a b -o {OUT}/model"
COLLECT = f"collect a --data rows/rows.jsonl --batch-size 4 -o {OUT}/statistics.safetensors"
EVALUATE = "evaluate a --data rows/rows.jsonl --device cpu --bootstrap 5"


def _planned_or_made(file: str) -> tuple[str, ...]:
    """What a recipe is given to."""
    return (f"merge {file} -o {OUT}/model", f"merge {file} --dry-run", f"merge {file} --dry-run --json")


KINDS: dict[str, Kind] = {
    "statistics": Kind(
        (
            Target("statistics.safetensors", "safetensors", commands=(0, 1, 2, 3, 4, 5, 6)),
            Target("a/merge_statistics.safetensors", "safetensors", commands=(7, 8, 9, 10)),
        ),
        (
            "inspect statistics.safetensors",
            "inspect statistics.safetensors --validate --json",
            "stats diff statistics.safetensors b",
            f"stats add statistics.safetensors a -o {OUT}/sum.safetensors",
            f"stats compress statistics.safetensors --storage lowrank:4 -o {OUT}/small.safetensors",
            f"stats scale statistics.safetensors 0.5 -o {OUT}/half.safetensors",
            f"merge a b --method regmean --statistics statistics.safetensors --statistics b -o {OUT}/model",
            f"{MERGED} --method regmean",
            f"{MERGED} --method fisher",
            "inspect a",
            "ledger add {out}/ledger a",
        ),
        models=("a",),
    ),
    "weights": Kind(
        (
            Target("a/model.safetensors", "safetensors", commands=(0, 1, 2, 3, 4, 5, 6, 7)),
            Target("sharded/model-00001-of-00003.safetensors", "safetensors", commands=(8,)),
        ),
        (
            "inspect a",
            f"{MERGED} --method simple --keep-separate classifier*",
            f"{MERGED} --method ties --base base",
            f"{MERGED} --method regmean",
            "verify merged",
            EVALUATE,
            COLLECT,
            f"ledger init {OUT}/ledger --base a",
            f"merge sharded b --method simple -o {OUT}/model",
        ),
        models=("a",),
    ),
    "index": Kind(
        (Target("sharded/model.safetensors.index.json", "json"),),
        (
            "inspect sharded",
            f"merge sharded b --method simple -o {OUT}/model",
            f"merge b sharded --method simple --max-shard-size 10KB -o {OUT}/model",
            "evaluate sharded --data rows/rows.jsonl --device cpu --bootstrap 5",
        ),
        models=("sharded",),
    ),
    "config": Kind(
        (
            Target("a/config.json", "json", commands=(0, 1, 2, 3, 4, 5, 6)),
            Target("sentences/modules.json", "json", commands=(7, 8, 9)),
            Target("sentences/1_Pooling/config.json", "json", commands=(7, 8, 9)),
            Target("sentences/config_sentence_transformers.json", "json", commands=(7, 8, 9)),
        ),
        (
            "inspect a --json",
            f"{MERGED} --method simple",
            f"merge b a --method simple --labels union --config-from a -o {OUT}/model",
            EVALUATE,
            COLLECT,
            f"ledger init {OUT}/ledger --base a",
            f"merge b b --base a --method ties -o {OUT}/model",
            "inspect sentences",
            f"merge sentences sentences --method simple -o {OUT}/model",
            f"collect sentences --data rows/rows.txt -o {OUT}/statistics.safetensors",
        ),
        models=("a", "sentences"),
    ),
    "tokenizer": Kind(
        (Target("a/tokenizer.json", "json"), Target("a/tokenizer_config.json", "json")),
        (
            f"{MERGED} --method simple",
            f"{MERGED} --method simple --vocabulary union",
            f"{MERGED} --method simple --tokenizer-from b",
            EVALUATE,
            COLLECT,
        ),
        models=("a",),
    ),
    "recipe": Kind((Target("recipe.yaml", "yaml"),), _planned_or_made("recipe.yaml"), own=True),
    "rules": Kind(
        (Target("rules.yaml", "recipe", made="rules"),),
        (*_planned_or_made("rules.yaml"), "merge rules.yaml --explain"),
        own=True,
    ),
    "mergekit": Kind(
        (Target("mergekit.yaml", "recipe", made="mergekit"),),
        (*_planned_or_made("mergekit.yaml"), "merge mergekit.yaml --explain"),
        own=True,
    ),
    "stages": Kind(
        (Target("stages.yaml", "recipe", made="stages"),),
        (
            f"merge stages.yaml -o {OUT}/model",
            f"merge stages.yaml -o {OUT}/model --intermediate {OUT}/others",
            "merge stages.yaml --dry-run",
            "merge stages.yaml --explain",
        ),
        own=True,
    ),
    "moe": Kind(
        (Target("moe.yaml", "recipe", made="experts"),),
        (f"moe moe.yaml -o {OUT}/model", f"moe moe.yaml -o {OUT}/model --seed 3", "moe moe.yaml --dry-run"),
        own=True,
    ),
    "extract": Kind(
        (
            Target("a/model.safetensors", "safetensors"),
            Target("a/config.json", "json"),
            Target("base/model.safetensors", "safetensors"),
            Target("base/config.json", "json"),
            Target("a/merge_statistics.safetensors", "safetensors", commands=(0, 1, 2)),
        ),
        (
            f"extract a --base base -o {OUT}/model",
            f"extract a --base base --rank 2 --dtype BF16 -o {OUT}/model",
            f"extract a --base base --energy 0.5 --max-rank 3 --embeddings whole -o {OUT}/model",
            f"extract a --base base --others left-out --only *query* -o {OUT}/model",
            "extract a --base base --dry-run",
            f"merge a b --base base --as-adapter 2 -o {OUT}/model",
        ),
        models=("a", "base"),
    ),
    "words": Kind(
        (Target(""),),
        (
            f"merge a b --method ties --base base --option density=0.5 --weights 1,2 -o {OUT}/model",
            f"merge a b --method regmean --alpha 0.9 --exclude *pooler* -o {OUT}/model",
            f"merge dense expert-1 --method slerp --option t=0.5 --vocabulary union -o {OUT}/model",
            f"merge adapter adapter --without-base --method ties -o {OUT}/model",
            f"merge recipe.yaml --dtype F32 -o {OUT}/model",
            f"merge a b --base base --as-adapter 2 -o {OUT}/model",
            f"extract a --base base --energy 0.5 --max-rank 3 -o {OUT}/model",
            f"extract expert-1 --base dense --rank 2 --whole *norm* -o {OUT}/model",
            f"moe moe.yaml --seed 1 --max-shard-size 20kB -o {OUT}/model",
            f"collect a --data rows/rows.jsonl --batch-size 4 -o {OUT}/statistics.safetensors",
        ),
        own=True,
    ),
    "provenance": Kind(
        (Target("merged/provenance.json", "json", seal="provenance"),),
        ("inspect merged", "inspect merged --json", "verify merged", f"reproduce merged -o {OUT}/again"),
        models=("merged",),
    ),
    "ledger": Kind(
        (Target("ledger/ledger.json", "json", seal="ledger"), Target("ledger/sums-000001.safetensors", "safetensors")),
        (
            "ledger show ledger",
            "ledger show ledger --json",
            "ledger add ledger a",
            "ledger remove ledger b",
            f"ledger solve ledger -o {OUT}/model",
            f"ledger sum ledger second -o {OUT}/total",
        ),
        writes="ledger",
    ),
    "adapter": Kind(
        (Target("adapter/adapter_config.json", "json"), Target("adapter/adapter_model.safetensors", "safetensors")),
        (
            "inspect adapter",
            f"merge adapter b --method simple -o {OUT}/model",
            f"merge base adapter --method simple -o {OUT}/model",
            f"merge adapter adapter --base base --method ties -o {OUT}/model",
            "evaluate adapter --data rows/rows.jsonl --device cpu --bootstrap 5",
        ),
        models=("adapter",),
    ),
    "zoo": Kind(
        (
            Target("zoo/{id}/entry.json", "json", seal="entry"),
            Target("zoo/{id}/statistics/ab.safetensors.record.json", "json"),
        ),
        (
            "zoo ls --zoo zoo",
            "zoo ls --zoo zoo --json",
            "zoo ls --zoo zoo --filter seed=1",
            "zoo show --zoo zoo {id} --verify",
            "zoo show --zoo zoo {id} --json",
            "experiment experiment.yaml --dry-run --zoo zoo --results {out}/results",
        ),
    ),
    "experiment": Kind(
        (Target("experiment.yaml", "yaml"), Target("parent.yaml", "yaml")),
        (
            "experiment experiment.yaml --dry-run --zoo {out}/zoo --results {out}/results",
            "experiment experiment.yaml --dry-run --json --zoo zoo --results {out}/results",
            "experiment experiment.yaml --filter-model two one --dry-run --zoo {out}/zoo --results {out}/results",
        ),
        own=True,
    ),
    "rows": Kind(
        (
            Target("rows/rows.jsonl", "jsonl", commands=(0, 1)),
            Target("rows/rows.json", "json", commands=(2,)),
            Target("rows/rows.csv", "table", commands=(3,)),
            Target("rows/rows.tsv", "table", commands=(4,)),
            Target("rows/rows.parquet", "parquet", commands=(5, 6)),
            Target("rows/rows.txt", "", commands=(7,)),
            Target("results.jsonl", "jsonl", commands=(8, 9)),
            Target("sets/one/train.jsonl", "jsonl", commands=(10,)),
        ),
        (
            EVALUATE,
            COLLECT,
            "evaluate a --data rows/rows.json --device cpu --bootstrap 5 --json",
            "evaluate a --data rows/rows.csv --device cpu --bootstrap 5",
            "evaluate a --data rows/rows.tsv --device cpu --bootstrap 5",
            "evaluate a --data rows/rows.parquet --device cpu --bootstrap 5",
            f"collect a --data rows/rows.parquet -o {OUT}/statistics.safetensors",
            f"collect a --data rows/rows.txt -o {OUT}/statistics.safetensors",
            f"report results.jsonl -o {OUT}/report.md",
            f"report results.jsonl -o {OUT}/report.tex --csv {OUT}/numbers.csv --rows {OUT}/rows.jsonl",
            "experiment experiment.yaml --dry-run --zoo {out}/zoo --results {out}/results",
        ),
        own=True,
    ),
}
