"""Every mistake that a user can make: a clear message, found before work starts, and no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.cli import main
from merganser.errors import Problems, UserError
from merganser.merging import load_recipe, make_recipe, merge
from merganser.merging import merge as merge_verb

Edit = Callable[[dict[str, torch.Tensor]], None]


def edit(folder: Path, change: Edit) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refused(models: list[Any], out: Path, message: str, **settings: Any) -> str:
    """The merge fails with ``message`` and a mend, and neither the output nor anything beside it appears."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        merge(models, out, **settings)
    assert sorted(out.parent.iterdir()) == before
    assert "to mend:" in str(caught.value)
    return str(caught.value)


def test_truncated_or_missing_weights(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    path = models[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(models, tmp_path / "out", "truncated safetensors file", method="simple")
    path.unlink()
    refused(models, tmp_path / "out", "no weights here", method="simple")
    refused([models[0], tmp_path / "none"], tmp_path / "out", "no such folder", method="simple")


def test_a_tensor_missing_in_one_model(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    edit(models[1], lambda s: s.pop("bert.pooler.dense.bias"))
    text = refused(models, tmp_path / "out", "'bert.pooler.dense.bias' is missing", method="simple")
    assert str(models[1]) in text and "--keep-separate" in text
    text = refused(models[::-1], tmp_path / "out", "would be lost", method="simple")
    assert "bert.pooler.dense.bias" in text


def test_other_label_spaces_name_both_options(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    edit(models[1], lambda s: s.update({"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}))
    configure(models[1], id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    text = refused(models, tmp_path / "out", "different label spaces", method="simple")
    assert "--labels union" in text and "--keep-separate 'classifier*'" in text


def test_equal_shapes_with_other_labels_are_not_merged_silently(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    configure(models[0], id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    configure(models[1], id2label={"0": "left", "1": "right"}, label2id={"left": 0, "right": 1})
    refused(models, tmp_path / "out", "different label spaces", method="simple")


def test_another_shape_inside(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    edit(models[1], lambda s: s.update({"bert.pooler.dense.bias": torch.ones(5)}))
    refused(models, tmp_path / "out", r"differs in shape: tuned-0 \[16\], tuned-1 \[5\]", method="simple")


def test_another_architecture(family, save_model, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    other = save_model("roberta", "roberta")
    text = refused([models[0], other], tmp_path / "out", "another architecture: 'roberta'", method="simple")
    assert "'bert'" in text
    refused(models, tmp_path / "out", "another architecture", method="actmat", base=other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(family, tmp_path: Path, value: float) -> None:
    _, models = family(statistics=False)

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["bert.encoder.layer.1.output.dense.bias"][3] = value

    edit(models[1], spoil)
    text = refused(models, tmp_path / "out", "NaN or Inf", method="simple")
    assert "bert.encoder.layer.1.output.dense.bias" in text and str(models[1]) in text


def test_a_merge_that_overflows_is_named(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    edit(models[0], lambda s: s["bert.pooler.dense.bias"].fill_(1e30))
    text = refused(
        models, tmp_path / "out", "produced NaN or Inf in 'bert.pooler.dense.bias'", method="simple", dtype="F16"
    )
    assert "wider --dtype" in text


def test_statistics_of_other_weights_show_both_hashes(family, tmp_path: Path) -> None:
    _, models = family()
    name = "bert.encoder.layer.0.output.dense.weight"
    from merganser.checkpoints import open_checkpoint

    old = open_checkpoint(models[1]).hash(name, "blake3")
    edit(models[1], lambda s: s[name].mul_(2))
    new = open_checkpoint(models[1]).hash(name, "blake3")
    text = refused(models, tmp_path / "out", "statistics of other weights", method="regmean")
    assert old in text and new in text and name in text and "more like it" not in text
    edit(models[1], lambda s: [tensor.mul_(2) for tensor in s.values() if tensor.is_floating_point()])
    text = refused(models, tmp_path / "out", "more like it", method="regmean")
    assert text.count("statistics of other weights") == 1


def test_statistics_that_are_absent_or_lack_what_the_method_needs(family, tmp_path: Path) -> None:
    _, models = family()
    text = refused(models, tmp_path / "out", "can treat no tensor", method="fisher")
    assert "no Fisher information" in text
    (models[1] / "merge_statistics.safetensors").unlink()
    text = refused(models, tmp_path / "out", "tuned-1 has no statistics", method="regmean")
    assert "merganser collect" in text


def test_truncated_statistics(family, tmp_path: Path) -> None:
    _, models = family()
    path = models[1] / "merge_statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(models, tmp_path / "out", r"(?s)merge_statistics\.safetensors.*", method="regmean")


def test_statistics_that_are_not_finite(family, tmp_path: Path) -> None:
    from safetensors import safe_open

    _, models = family()
    path = models[0] / "merge_statistics.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    key = next(name for name in state if name.startswith("gram."))
    state[key][2] = float("nan")
    save_file(state, path, metadata=metadata)
    assert key in refused(models, tmp_path / "out", "NaN or infinite", method="regmean")


def test_unknown_names_come_with_the_nearest_valid_one(family, tmp_path: Path) -> None:
    _, models = family()
    out = tmp_path / "out"
    assert "did you mean 'regmean'" in refused(models, out, "unknown method 'regmaen'", method="regmaen")
    assert "did you mean 'alpha'" in refused(models, out, "unknown key 'alhpa'", method="regmean", options={"alhpa": 1})
    assert "did you mean 'keep_separate'" in refused(models, out, "unknown key 'keep_seperate'", keep_seperate=["x"])
    refused(models, out, "less than or equal to 1", method="regmean", options={"alpha": 1.5})
    refused(models, out, "no tensor is called 'encodr", exclude=["encodr.*"], method="simple")


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [([1], "1 coefficients for 2 models"), ([1, -1], "sum to zero"), ([1, float("nan")], "not finite")],
)
def test_coefficients(family, tmp_path: Path, coefficients: list[float], message: str) -> None:
    _, models = family()
    refused(models, tmp_path / "out", message, coefficients=coefficients)


def test_negative_coefficients_have_no_meaning_for_a_metric(family, tmp_path: Path) -> None:
    _, models = family()
    refused(models, tmp_path / "out", "negative", coefficients=[2, -1], method="regmean")
    merge(models, tmp_path / "out", coefficients=[2, -1], method="simple")


def test_a_base_is_needed(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    assert "--base" in refused(models, tmp_path / "out", "needs the pre-trained model", method="actmat")


def test_an_output_that_exists(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    merge(models, tmp_path / "out", method="simple")
    assert "--overwrite" in refused(models, tmp_path / "out", "the output exists", method="simple")
    merge(models, tmp_path / "out", method="simple", overwrite=True)
    refused(models, models[0], "one of the inputs", method="simple", overwrite=True)


def test_too_little_disk_is_found_before_work(family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merganser.files.space.free_bytes", lambda target: 1000)
    _, models = family(statistics=False)
    refused(models, tmp_path / "out", "too little disk", method="simple")


def test_a_disk_that_fills_up_leaves_nothing(family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from merganser.checkpoints import writer

    whole = writer._write_at
    calls = []

    def full(descriptor: int, data: bytes, offset: int) -> None:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor, data, offset)

    monkeypatch.setattr(writer, "_write_at", full)
    _, models = family(statistics=False)
    refused(models, tmp_path / "out", "the disk is full", method="simple")


def test_pickles_need_the_flag(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    state = load_file(models[1] / "model.safetensors")
    torch.save(state, models[1] / "pytorch_model.bin")
    (models[1] / "model.safetensors").unlink()
    assert "--allow-pickle" in refused(models, tmp_path / "out", "pickled", method="simple")
    merge(models, tmp_path / "out", method="simple", allow_pickle=True)


def test_integer_tensors_that_differ(family, tmp_path: Path) -> None:
    _, models = family(statistics=False)
    for number, folder in enumerate(models):
        edit(folder, lambda s, n=number: s.update({"bert.embeddings.position_ids": torch.arange(4) + n}))
    refused(models, tmp_path / "out", "not floating point and differs", method="simple")


def test_several_mistakes_are_reported_at_once(family, tmp_path: Path) -> None:
    _, models = family()
    edit(models[1], lambda s: s.update({"bert.pooler.dense.bias": torch.ones(5)}))
    (models[0] / "merge_statistics.safetensors").unlink()
    with pytest.raises(Problems) as caught:
        merge_verb(models, tmp_path / "out", method="regmean", coefficients=[2, -1])
    text = str(caught.value)
    assert "differs in shape" in text and "tuned-0 has no statistics" in text and "negative" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "a recipe is a mapping, this is list"),
        ("just words", "a recipe is a mapping, this is str"),
        ("", "a recipe is a mapping"),
        ("a: [1, 2", "not YAML"),
        ("contributors: [a]\nmethd: simple", "unknown key 'methd'"),
        ("method: simple", "'contributors' is missing"),
        ("contributors: []", "nothing to merge"),
        ("contributors: [{model: a, name: x}, {model: b, name: x}]", "two contributors are called 'x'"),
        ("contributors: [{model: a, coeficient: 2}]", "unknown key 'contributors.0.coeficient'"),
        ("contributors: [{model: a, coefficient: lots}]", "contributors.0.coefficient: 'lots'"),
        ("contributors: [!!python/object/apply:os.system [ls]]", "not YAML"),
    ],
)
def test_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        make_recipe(load_recipe(path), str(path))
    assert "recipe.yaml" in str(caught.value)


def test_the_command_line_exits_with_2_and_writes_nothing(
    family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, models = family()
    with pytest.raises(SystemExit) as stop:
        main(["merge", *map(str, models), "-o", str(tmp_path / "out"), "--method", "regmaen"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "did you mean 'regmean'" in err
    assert not (tmp_path / "out").exists()


def test_a_method_that_could_not_run_is_no_average(save_model, tmp_path: Path) -> None:
    """The paper's own harness passed the Grams under another name, and every RegMean silently was Simple."""
    models = [save_model("a", seed=1), save_model("b", seed=2)]
    for method in ("regmean", "fisher"):
        refused(models, tmp_path / "out", "has no statistics", method=method)
