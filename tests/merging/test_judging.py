"""Statistics that no data gave, or other data than the others', and who decides a merge: found, said, recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from merganser.cli import main
from merganser.errors import UserError
from merganser.merging import ledger, make_recipe, merge, prepare, reproduce, verify
from merganser.merging.influence import Influence
from merganser.statistics import FILE_NAME, Statistics, write_statistics
from merganser.tensors import pack_upper, unpack_upper

Family = Callable[..., tuple[Path, list[Path]]]
Change = Callable[[dict[str, Tensor]], None]
LAYER = "bert.encoder.layer.1.output.dense"


def amend(folder: Path, change: Change) -> None:
    """Change the numbers of a statistics file; its header stays true of the weights."""
    statistics = Statistics.open(folder)
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
    change(tensors)
    write_statistics(folder / FILE_NAME, statistics.header, tensors)


def input_of(folder: Path, module: str = LAYER) -> str:
    layer = Statistics.open(folder).layer(f"{module}.weight")
    assert layer is not None and layer.input is not None
    return layer.input


def times(factor: float, only: str | None = None, kinds: tuple[str, ...] = ("gram", "mean")) -> Change:
    """All Gram matrices (or one) as of inputs that are as much larger: means go with the root."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kind, _, key = name.partition(".")
            if kind in kinds and only in (None, key):
                tensor.mul_(factor**0.5 if kind == "mean" else factor)

    return change


def refused(models: list[Path], out: Path, message: str, method: str = "regmean", **settings: Any) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        merge(models, out, method=method, **settings)
    assert sorted(out.parent.iterdir()) == before and "to mend" in str(caught.value)
    assert len(str(caught.value)) < 5000
    return str(caught.value)


def run(*arguments: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == status


def test_off_diagonals_times_a_tenth_more(family: Family, tmp_path: Path) -> None:
    """Whatever alpha the merge has, before any weight is merged, and in the ledger likewise."""
    base, models = family("bert", 2)
    key = input_of(models[1])

    def stretch(tensors: dict[str, Tensor]) -> None:
        gram = unpack_upper(tensors[f"gram.{key}"])
        diagonal = gram.diagonal().clone()
        gram.mul_(1.1).diagonal().copy_(diagonal)
        tensors[f"gram.{key}"] = pack_upper(gram)

    ledger.init(tmp_path / "ledger", base)
    ledger.add(tmp_path / "ledger", models[0])
    amend(models[1], stretch)
    for alpha in (0.0, 0.5, 0.9, 1.0):
        text = refused(models, tmp_path / "out", "positive semi-definite", options={"alpha": alpha})
        assert key in text and str(models[1] / FILE_NAME) in text
    with pytest.raises(UserError, match="positive semi-definite"):
        ledger.add(tmp_path / "ledger", models[1])
    with pytest.raises(UserError, match="positive semi-definite"):
        prepare(make_recipe({"contributors": [str(m) for m in models], "method": "regmean"}), None)


def test_statistics_that_the_method_does_not_use_are_not_read(family: Family, tmp_path: Path) -> None:
    _, models = family("bert", 2, fisher="expected")
    amend(models[0], times(-1.0, kinds=("gram",)))
    merge(models, tmp_path / "fisher", method="fisher")
    merge(models, tmp_path / "simple", method="simple")
    merge(models, tmp_path / "embeddings", method="regmean", exclude=["*dense*", "*attention*", "classifier*"])
    refused(models, tmp_path / "out", "diagonal|semi-definite")


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("factor", [1e30, 1e5])
def test_one_that_would_decide_everything(family: Family, tmp_path: Path, factor: float, count: int) -> None:
    _, models = family("bert", count)
    amend(models[1], times(factor))
    text = refused(models, tmp_path / "out", "decides nearly alone")
    assert "tuned-1" in text and "--accept-scales" in text and "tuned-0:" not in text
    result = merge(models, tmp_path / "out", method="regmean", accept_scales=True)
    assert any("tuned-1" in note and "nearly alone" in note for note in result.notes)
    assert result.influence is not None and result.influence.overall[1] > 0.999
    verify(tmp_path / "out")
    assert reproduce(tmp_path / "out") == []  # the recipe has the key, and the notes are not told twice


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 0.0])
def test_one_that_would_count_for_nothing(family: Family, tmp_path: Path, factor: float) -> None:
    _, models = family("bert", 3)
    key = input_of(models[2])
    amend(models[2], times(factor, key))
    text = refused(models, tmp_path / "out", "counts for n")
    assert "tuned-2" in text and LAYER in text
    merge(models, tmp_path / "out", method="regmean", accept_scales=True)


def test_of_two_the_larger_one_is_named(family: Family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    amend(models[0], times(0.0, input_of(models[0])))
    text = refused(models, tmp_path / "out", "all that there is")
    assert text.startswith(str(models[1])) and LAYER in text


def test_a_hundredfold_is_noted_and_merged(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, models = family("bert", 3)
    assert not merge(models, tmp_path / "before", method="regmean").notes
    amend(models[1], times(1000.0, input_of(models[1])))
    result = merge(models, tmp_path / "out", method="regmean")
    (note,) = result.notes
    assert "tuned-1" in note and LAYER in note and "times" in note
    run("merge", *models, "--method", "regmean", "-o", tmp_path / "again")
    assert note in capsys.readouterr().err


def test_fisher_information_of_another_scale(family: Family, tmp_path: Path) -> None:
    """A model that is sure of its answers has less, by orders of magnitude: that is noted; by thirty it is refused."""
    _, models = family("bert", 3, fisher="expected")
    amend(models[0], times(1e-5, kinds=("fisher",)))
    notes = merge(models, tmp_path / "out", method="fisher").notes
    assert any("tuned-0" in note and "next to nothing" in note for note in notes)
    amend(models[1], times(1e30, kinds=("fisher",)))
    assert "tuned-1" in refused(models, tmp_path / "no", "nearly alone", method="fisher")


def test_fisher_information_that_is_rounding_is_not_compared(family: Family, tmp_path: Path) -> None:
    """A bias of attention keys changes no output; what gradients leave of it may be anything."""
    _, models = family("bert", 3, fisher="expected")
    before = merge(models, tmp_path / "before", method="fisher").notes
    for model, size in zip(models, (1e-20, 1e-32, 0.0), strict=True):

        def change(tensors: dict[str, Tensor], size: float = size) -> None:
            for name, tensor in tensors.items():
                if name.startswith("fisher.") and name.endswith("self.key.bias"):
                    tensor.fill_(size)

        amend(model, change)
    assert not [note for note in merge(models, tmp_path / "out", method="fisher").notes if "key.bias" in note], before
    amend(
        models[0], lambda tensors: [t.fill_(1e20) for n, t in tensors.items() if n.endswith("self.key.bias")] and None
    )
    assert "key.bias" in refused(models, tmp_path / "no", "all that there is|nearly alone", method="fisher")


def test_a_layer_of_another_contributor(family: Family, tmp_path: Path) -> None:
    """It is a Gram matrix of the right size, and is another's to the last digit."""
    _, models = family("bert", 3)
    other, key = Statistics.open(models[0]), input_of(models[1])
    name = input_of(models[0])

    def take(tensors: dict[str, Tensor]) -> None:
        tensors[f"gram.{key}"], tensors[f"mean.{key}"] = other.packed(f"gram.{name}"), other.packed(f"mean.{name}")

    amend(models[1], take)
    (note,) = merge(models, tmp_path / "out", method="regmean").notes
    assert "tuned-1" in note and "tuned-0" in note and LAYER in note and "last digit" in note


def test_honest_contributors_are_not_spoken_of(family: Family, tmp_path: Path) -> None:
    """Merged with itself, with heads kept apart, an adapter of the merge: nothing to say."""
    base, models = family("bert", 2)
    assert not merge([models[0], models[0]], tmp_path / "twice", method="regmean").notes
    assert not merge(models, tmp_path / "heads", method="regmean", keep_separate=["classifier*"]).notes
    assert not [
        n for n in merge(models, tmp_path / "adapter", method="regmean", base=base, as_adapter=2).notes if "tuned" in n
    ]


@pytest.mark.parametrize("coefficients", [(1, 1), (1, 3), (0, 1)])
def test_influence_is_the_share_of_the_summed_traces(
    family: Family, tmp_path: Path, coefficients: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Computed from the files alone, in float64."""
    _, models = family("bert", 2)
    result = merge(models, tmp_path / "out", method="regmean", coefficients=coefficients)
    assert result.influence is not None
    traces = []
    for model, coefficient in zip(models, coefficients, strict=True):
        gram = Statistics.open(model).gram(input_of(model)).double()
        traces.append(coefficient * float(gram.trace()))
    found = result.influence.layers[LAYER]
    assert found == pytest.approx([trace / sum(traces) for trace in traces], rel=1e-5)
    assert sum(result.influence.overall) == pytest.approx(1, rel=1e-5)
    recorded = json.loads((tmp_path / "out" / "provenance.json").read_text())["influence"]
    assert recorded["layers"][LAYER] == list(found) and recorded["of"] == "gram"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Influence" in card and f"| tuned-1 | {result.influence.overall[1]:.1%} |" in card
    assert "influence: tuned-0" in result._repr_html_()
    weights = ",".join(map(str, coefficients))
    run("merge", *models, "--method", "regmean", "--weights", weights, "-o", tmp_path / "cli")
    assert f"influence: {result.influence}" in capsys.readouterr().err


def test_influence_of_fisher_information_and_of_none(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, fisher="expected")
    result = merge(models, tmp_path / "out", method="fisher")
    assert result.influence is not None and result.influence.of == "fisher"
    name = f"{LAYER}.weight"
    sums = [float(Statistics.open(model).fisher(name).double().sum()) for model in models]
    assert result.influence.layers[name] == pytest.approx([one / sum(sums) for one in sums], rel=1e-5)
    for method in ("simple", "actmat", "ties"):
        assert merge(models, tmp_path / method, method=method, base=base).influence is None
        assert "influence" not in json.loads((tmp_path / method / "provenance.json").read_text())


def test_shares_as_a_value() -> None:
    found = Influence.of_parts("gram", ["a", "b"], [("x", 3, [1.0, 1.0]), ("y", 1, [0.0, 2.0]), ("z", 5, [0.0, 0.0])])
    assert found is not None and found.overall == (0.375, 0.625) and set(found.layers) == {"x", "y"}
    assert found.rows[0] == ("a", "37.5%", "0.0% (y)", "50.0% (x)")
    assert Influence.of_parts("gram", ["a"], [("x", 3, [0.0])]) is None


def test_judgements_are_kept_by_the_hash_of_the_file(family: Family, tmp_path: Path) -> None:
    """A file that is changed after it was judged is judged again."""
    _, models = family("bert", 2)
    merge(models, tmp_path / "out", method="regmean")
    amend(models[0], times(-1.0, kinds=("gram",)))
    refused(models, tmp_path / "again", "diagonal|semi-definite")


def test_adding_up_statistics_judges_each(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, models = family("bert", 1)
    whole = (models[0] / FILE_NAME).read_bytes()
    amend(models[0], times(-1.0, kinds=("gram",)))
    (tmp_path / "sound.safetensors").write_bytes(whole)
    files = [tmp_path / "sound.safetensors", models[0] / FILE_NAME]
    run("stats", "add", *files, "-o", tmp_path / "sum.safetensors", status=2)
    assert "tuned-0" in capsys.readouterr().err
    assert not (tmp_path / "sum.safetensors").exists()


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_ledger_refuses_who_would_decide_alone(family: Family, tmp_path: Path, method: str) -> None:
    base, models = family("bert", 3, fisher="expected")
    ledger.init(tmp_path / "ledger", base, method=method)
    for model in models[:2]:
        ledger.add(tmp_path / "ledger", model, coefficient=3)
    whole = {path: path.read_bytes() for path in (tmp_path / "ledger").iterdir()}
    amended = (models[2] / FILE_NAME).read_bytes()
    for factor in (1e12, 1e-12):
        (models[2] / FILE_NAME).write_bytes(amended)
        amend(models[2], times(factor, kinds=("gram", "mean", "fisher")))
        with pytest.raises(UserError, match="decides alone"):
            ledger.add(tmp_path / "ledger", models[2])
        assert {path: path.read_bytes() for path in (tmp_path / "ledger").iterdir()} == whole
    ledger.add(tmp_path / "ledger", models[2], accept_scales=True)
    ledger.remove(tmp_path / "ledger", models[2])
    (models[2] / FILE_NAME).write_bytes(amended)
    ledger.add(tmp_path / "ledger", models[2])
