"""The demonstration's story: from its rows and journal to a :class:`~merganser.lab.old_report.Report`.

Sentences and tables only; every number comes from the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merganser.lab.old_report import Report, Row, Section, Table, show
from merganser.lab.sentiment import INNER_SHA256, LABEL_NAMES, PACKAGE, SDIST_SHA256, VERSION, Domain
from merganser.lab.steps import Done

METRIC = "macro-F1 × 100"
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def demo_report(
    rows: Sequence[Row],
    *,
    domains: Sequence[Domain],
    settings: Mapping[str, Any],
    configuration: Mapping[str, Any],
    done: Mapping[str, Done],
) -> Report:
    """The report of a finished demo.

    Args:
        rows: the results; the merges are those of kind ``method``.
        domains: the data, in the order of the columns.
        settings: sizes and hyper-parameters.
        configuration: the journal's, with hashes and versions.
        done: the finished steps with their wall times and facts.
    """
    number = _word(len(domains))
    return Report(
        title=f"{number.capitalize()} specialists, one model",
        eyebrow="merganser demo",
        lead=_lead(rows, number),
        metric=METRIC,
        columns={domain.name: domain.title for domain in domains},
        rows=tuple(rows),
        notes=(_uncertainty(settings["test"], done),),
        sections=(
            _reading(number),
            _making(domains, settings),
            _data(domains, configuration, done),
            _times(done),
            _statistics(domains, done),
            _merges(done),
            _versions(configuration, done),
        ),
        footer=f"Made by merganser {configuration['versions']['merganser']}. "
        "This page loads nothing and runs no script.",
    )


def _lead(rows: Sequence[Row], number: str) -> str:
    """What came out, in two or three sentences."""
    merges = [row for row in rows if row.kind == "method"]
    by_name = {row.name: row for row in rows}
    best = max(merges, key=lambda row: row.average)
    said = [
        f"{number.capitalize()} fine-tunes of one encoder, each trained on another kind of text, were fused "
        "from their weights and statistics alone; the merge reads no text",
        f"The best one, {best.name}, scores {show(best.average)} on average",
    ]
    simple, regmean = by_name.get("Simple"), by_name.get("RegMean")
    if simple and simple is not best:
        gain = _compared(best.average, simple.average)
        said[-1] += f", {gain} the plain average of the weights ({show(simple.average)})"
    if simple and regmean and regmean is not best:
        gain = _compared(regmean.average, simple.average)
        said.append(f"RegMean scores {show(regmean.average)}, {gain} that average")
    return ". ".join(said) + "."


def _compared(score: float, other: float) -> str:
    difference = round(score, 1) - round(other, 1)
    return f"{abs(difference):.1f} points {'above' if difference >= 0 else 'below'}"


def _uncertainty(test: int, done: Mapping[str, Done]) -> str:
    """How sure the scores are, from the bootstrap standard errors of the evaluations."""
    of_models = [
        errors for step in done.values() for errors in step.facts.get("standard_errors", {}).values()
    ]
    single = [error for errors in of_models for error in errors.values()]
    averaged = [math.hypot(*errors.values()) / len(errors) for errors in of_models]
    return (
        f"One seed, {test} test texts a domain. The standard error (bootstrap over the texts) of a score is "
        f"{_range(single)} points, that of an average {_range(averaged)}."
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _reading(number: str) -> Section:
    return Section(
        title="How to read this",
        paragraphs=(
            "A specialist knows one kind of text and is tested on all of them. “Specialists, each on its own "
            "domain” is what you have when you can keep every model and know which text is which. The "
            f"ensemble needs no such knowledge, but runs {number} models on every text. A merged model is "
            "one model: as large and as fast as one specialist.",
            "Simple averages the weights. Fisher weights each parameter by its Fisher information. RegMean "
            "solves, for each linear layer, the regression whose inputs are those that the specialists saw, "
            "from their Gram matrices alone. ACTMat estimates these matrices from how far fine-tuning moved "
            "the weights, and needs only the base model.",
            "Macro-F1 counts the three classes ("
            + ", ".join(LABEL_NAMES)
            + ") equally, however rare one is.",
        ),
    )


def _making(domains: Sequence[Domain], settings: Mapping[str, Any]) -> Section:
    models = " ".join(f"models/{domain.name}" for domain in domains)
    first = domains[0].name
    tests = " ".join(f"--data data/{domain.name}/test.jsonl" for domain in domains)
    return Section(
        title="How the models were made",
        paragraphs=(
            f"All specialists start from one base with one head (seed {settings['seed']}) and are trained on "
            f"{settings['train']} texts each: {settings['epochs']:g} epochs, learning rate "
            f"{settings['learning_rate']:g} with linear decay, batches of {settings['batch_size']}, at most "
            f"{settings['max_length']} tokens, float32. Statistics come from the first "
            f"{settings['statistics_texts']} training texts of each. Every merge uses its method’s default "
            "options.",
            "In the demo’s folder, these commands repeat the steps after the training; the third stands for "
            "every method, and the first for every specialist:",
        ),
        commands=(
            f"merganser collect models/{first} --data data/{first}/train.jsonl --fisher expected "
            f"--fisher-examples {settings['fisher_texts']} --limit {settings['statistics_texts']}",
            f"merganser merge {models} --method actmat --base models/base -o merged-again",
            f"merganser merge {models} --method regmean -o merged-again",
            f"merganser evaluate merged/regmean {tests}",
            "merganser verify merged/regmean",
        ),
    )


def _data(domains: Sequence[Domain], configuration: Mapping[str, Any], done: Mapping[str, Done]) -> Section:
    classes = done["prepare"].facts["classes"]
    counts = tuple(
        (domain.title, split, str(sum(found)), *map(str, found))
        for domain in domains
        for split, found in classes[domain.name].items()
    )
    known = {domain.name for domain in domains} == {"tweets", "movies", "amazon", "nyt"}
    source = (
        (
            "Texts rated by people from −4 to 4 (mean of about twenty ratings): the sets of C.J. Hutto and "
            "E. Gilbert, “VADER”, ICWSM 2014 (MIT licence), as shipped in the source distribution of "
            f"{PACKAGE} {VERSION} on PyPI. Below −0.5 is negative, above 0.5 positive, the rest neutral. No "
            "text is in two splits; snippets of one review or editorial may be.",
        )
        if known
        else ()
    )
    hashes = [("base weights", configuration["base"]), ("base with head", done["prepare"].facts["sha256"])]
    if known:
        hashes += [(f"{PACKAGE} {VERSION} sdist", SDIST_SHA256), ("archive in it", INNER_SHA256)]
    hashes += [(f"texts: {name}", digest) for name, digest in configuration["data"].items()]
    return Section(
        title="Base and data",
        paragraphs=(
            f"The base is an encoder of {done['prepare'].facts['parameters'] / 1e6:.1f} million parameters, "
            "head included; unless another was asked for, all-MiniLM-L6-v2.",
            *source,
        ),
        tables=(
            Table(
                columns=("Domain", "Split", "Texts", *LABEL_NAMES),
                rows=counts,
                numeric=tuple(range(2, 3 + len(LABEL_NAMES))),
            ),
            Table(columns=("", "sha256"), rows=tuple(hashes), code=(1,)),
        ),
    )


def _times(done: Mapping[str, Done]) -> Section:
    rows = [(step.name, _duration(step.seconds)) for step in done.values()]
    rows.append(("all steps", _duration(sum(step.seconds for step in done.values()))))
    return Section(
        title="Time",
        folded=True,
        paragraphs=("Wall time of each step, as it ran, on this machine.",),
        tables=(Table(columns=("Step", "Time"), rows=tuple(rows), numeric=(1,)),),
    )


def _statistics(domains: Sequence[Domain], done: Mapping[str, Done]) -> Section:
    rows = []
    for domain in domains:
        facts = done[f"statistics {domain.name}"].facts
        size = f"{facts['bytes'] / 1e6:.1f} MB"
        rows.append(
            (
                domain.title,
                size,
                f"{facts['examples']:,}",
                f"{facts['tokens']:,}",
                f"{facts['fisher']}, {facts['fisher_examples']:,} texts",
                facts["sha256"],
            )
        )
    return Section(
        title="Statistics",
        folded=True,
        paragraphs=(
            "Gram matrices of the layers’ inputs, token counts and diagonal Fisher information: what a data "
            "owner publishes instead of text. Such a file can still leak something about the texts.",
        ),
        tables=(
            Table(
                columns=("Specialist", "Size", "Texts", "Tokens", "Fisher", "sha256"),
                rows=tuple(rows),
                numeric=(1, 2, 3),
                code=(5,),
            ),
        ),
    )


def _merges(done: Mapping[str, Done]) -> Section:
    rows = []
    for name, step in done.items():
        kind, _, method = name.partition(" ")
        if kind == "merge":
            treated = ", ".join(f"{count} by {how}" for how, count in sorted(step.facts["tensors"].items()))
            rows.append((method, treated, _duration(step.seconds), step.facts["sha256"]))
    return Section(
        title="Provenance of the merges",
        folded=True,
        paragraphs=(
            "The method that was really used for each tensor: what is no plain linear map (norms, and "
            "whatever the statistics do not cover) is averaged. Each merged folder holds its provenance.json "
            "with the reason for every tensor and the hash of every input; merganser verify and merganser "
            "reproduce check it.",
        ),
        tables=(
            Table(
                columns=("Method", "Tensors", "Time", "sha256 of the weights"),
                rows=tuple(rows),
                numeric=(2,),
                code=(3,),
            ),
        ),
    )


def _versions(configuration: Mapping[str, Any], done: Mapping[str, Done]) -> Section:
    specialists = [
        (name.removeprefix("fine-tune "), step.facts["sha256"])
        for name, step in done.items()
        if name.startswith("fine-tune ")
    ]
    return Section(
        title="Versions and weights",
        folded=True,
        tables=(
            Table(columns=("Library", "Version"), rows=tuple(configuration["versions"].items())),
            Table(columns=("Specialist", "sha256 of the weights"), rows=tuple(specialists), code=(1,)),
        ),
    )


def _duration(seconds: float) -> str:
    """``3:05`` for minutes and seconds, ``0.4 s`` below ten seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"


def _word(number: int) -> str:
    return _WORDS[number] if number < len(_WORDS) else str(number)
