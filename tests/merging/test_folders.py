"""The merged folder: opens, carries what it should, is the same bytes again, and is never half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, VOCABULARY
from merganser.checkpoints import open_checkpoint, sha256_file
from merganser.errors import CheckpointError, UserError
from merganser.merging import Contributor, merge, reproduce, verify
from merganser.merging.provenance import file_digest


def files_of(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 11).remainder(VOCABULARY)[None]
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_pretrained_opens_every_architecture(family, tmp_path: Path, architecture: str) -> None:
    _, models = family(architecture, 2)
    out = merge(models, tmp_path / "out", method="regmean")
    model_class = ARCHITECTURES[architecture][1]
    model, info = model_class.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged = load_file(out / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items() if name in state)
    parents = [logits(model_class.from_pretrained(m).eval()) for m in models]
    found = logits(model.eval())
    assert found.isfinite().all() and not any(torch.equal(found, parent) for parent in parents)


@pytest.mark.parametrize("method", ["simple", "regmean", "fisher", "actmat"])
def test_threads_do_not_change_a_byte(family, tmp_path: Path, method: str) -> None:
    base, models = family("bert", 3, fisher="expected")
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        merge(models, tmp_path / f"out{threads}", method=method, base=base, threads=threads)
    torch.set_num_threads(before)
    first = files_of(tmp_path / "out1")
    assert first == files_of(tmp_path / "out2") == files_of(tmp_path / "out3")


def test_shards_bf16_and_side_files(family, tmp_path: Path) -> None:
    _, models = family("roberta", 2)
    (models[0] / "tokenizer.json").write_bytes(b'{"odd":\t"bytes"}\r\n')
    (models[0] / "1_Pooling").mkdir()
    (models[0] / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    (models[0] / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    out = merge(models, tmp_path / "out", method="regmean", dtype="BF16", max_shard_size="4KB")
    assert (out / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()
    assert (out / "1_Pooling" / "config.json").is_file() and (out / "modules.json").is_file()
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    full = merge(models, tmp_path / "full", method="regmean")
    exact = load_file(full / "model.safetensors")
    checkpoint = open_checkpoint(out)
    assert all(torch.equal(checkpoint.read(n), t.to(torch.bfloat16)) for n, t in exact.items())


def test_the_card_and_the_provenance(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    out = merge(models, tmp_path / "out", method="regmean", exclude=["*.layer.1.*"], coefficients=[1, 3])
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["tuned-0", "tuned-1"]
    assert front["base_model_relation"] == "merge" and "merge" in front["tags"]
    assert str(tmp_path) not in (out / "README.md").read_text()
    found = json.loads((out / "provenance.json").read_text())
    assert found["recipe"]["method"] == "regmean" and found["method_chosen_because"] is None
    assert [p["coefficient"] for p in found["parents"]] == [1, 3]
    assert found["parents"][0]["manifest_blake3"] == open_checkpoint(models[0]).manifest_hash("blake3")
    assert found["parents"][1]["statistics"]["sha256"] == sha256_file(models[1] / "merge_statistics.safetensors")
    excluded = found["tensors"]["bert.encoder.layer.1.output.dense.weight"]
    assert excluded["method"] == "average" and "excluded" in excluded["reason"]
    assert found["tensors"]["bert.encoder.layer.0.output.dense.weight"]["method"] == "regmean"
    assert found["tensors"]["bert.embeddings.LayerNorm.weight"]["reason"] == "not a linear map"
    merged = open_checkpoint(out)
    assert {n: e["blake3"] for n, e in found["tensors"].items()} == {
        n: merged.hash(n, "blake3") for n in merged.tensors
    }


def test_verify_and_reproduce(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    out = merge(models, tmp_path / "out", options={"alpha": 0.5})
    assert verify(out).parents == 2
    assert reproduce(out) == []
    assert reproduce(out, tmp_path / "again") == [] and files_of(tmp_path / "again") == files_of(out)
    (out / "README.md").write_text("my own words")  # a card is there to be edited
    verify(out)
    state = load_file(out / "model.safetensors")
    state["classifier.bias"][0] += 1
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="changed after the merge"):
        verify(out)
    parent = load_file(models[1] / "model.safetensors")
    parent["classifier.bias"][0] += 1
    save_file(parent, models[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other weights than were merged"):
        reproduce(out)


def test_provenance_of_format_1_is_still_checked(family, tmp_path: Path) -> None:
    """It had sha256 everywhere."""
    _, models = family("bert", 2)
    out = merge(models, tmp_path / "out", method="simple")
    found = json.loads((out / "provenance.json").read_text())
    assert found["format"] == 5 and found["files"]["model.safetensors"].startswith("blake3:")
    found["format"] = 1
    for key in ("plan", "card", "sha256"):
        del found[key]
    found["files"]["model.safetensors"] = file_digest(out / "model.safetensors", "tensors:")
    for entry, model in zip(found["parents"], models, strict=True):
        del entry["manifest_blake3"]
        entry["manifest_sha256"] = open_checkpoint(model).manifest_sha256()
    merged = open_checkpoint(out)
    found["tensors"] = {
        name: {"sha256": merged.sha256(name), **{k: v for k, v in entry.items() if k != "blake3"}}
        for name, entry in found["tensors"].items()
    }
    (out / "provenance.json").write_text(json.dumps(found))
    assert verify(out).parents == 2 and reproduce(out) == []
    found["parents"][0]["manifest_sha256"] = "0" * 64
    (out / "provenance.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="other weights than were merged: sha256"):
        verify(out)
    (out / "model.safetensors").write_bytes((models[0] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="changed after the merge: its hash is tensors:"):
        verify(out)


HEADS = {"id2label": {0: "sad", 1: "glad", 2: "mad"}, "label2id": {"sad": 0, "glad": 1, "mad": 2}}


def test_heads_kept_separate_open_with_any_of_them(family, tmp_path: Path) -> None:
    _, models = family("bert", 2, statistics=False)
    _give_head(models[1], HEADS)
    out = merge(models, tmp_path / "out", method="simple", keep_separate=["classifier.*"])
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    for kwargs, parent in (({}, 0), ({"subfolder": "heads/tuned-0"}, 0), ({"subfolder": "heads/tuned-1"}, 1)):
        model, info = load(out, output_loading_info=True, **kwargs)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        own = load_file(models[parent] / "model.safetensors")
        assert torch.equal(model.classifier.weight, own["classifier.weight"])
        encoder = [load_file(m / "model.safetensors")["bert.embeddings.word_embeddings.weight"] for m in models]
        average = (encoder[0] + encoder[1]) / 2
        torch.testing.assert_close(model.bert.embeddings.word_embeddings.weight.detach(), average)
    assert load(out, subfolder="heads/tuned-1").config.id2label == HEADS["id2label"]
    assert verify(out).files > 5 and reproduce(out) == []
    assert open_checkpoint(out / "heads" / "tuned-1").tensors["classifier.weight"].shape[0] == 3
    size = sum(p.stat().st_size for p in out.rglob("*.safetensors"))
    assert size < 1.2 * (models[0] / "model.safetensors").stat().st_size  # the encoder is stored once


def _give_head(folder: Path, labels: dict[str, object], seed: int = 7) -> None:
    """Another label space: a new classifier with a row for each label."""
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    n = len(labels["id2label"])  # type: ignore[arg-type]
    state["classifier.weight"] = torch.randn(n, state["classifier.weight"].shape[1], generator=generator)
    state["classifier.bias"] = torch.randn(n, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.update(json.loads(json.dumps(labels)))
    (folder / "config.json").write_text(json.dumps(config))


def test_label_union_lets_each_vote_on_the_rows_it_knows(family, tmp_path: Path) -> None:
    _, models = family("bert", 2, statistics=False)
    _give_head(models[0], {"id2label": {0: "glad", 1: "afraid"}, "label2id": {"glad": 0, "afraid": 1}})
    _give_head(models[1], HEADS)
    out = merge(models, tmp_path / "out", method="simple", labels="union", coefficients=[1, 3])
    first, second = (load_file(m / "model.safetensors")["classifier.weight"] for m in models)
    merged = load_file(out / "model.safetensors")["classifier.weight"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    rows = {label: merged[row] for row, label in model.config.id2label.items()}
    assert set(rows) == {"glad", "afraid", "sad", "mad"}
    torch.testing.assert_close(rows["glad"], (first[0] + 3 * second[1]) / 4)
    assert torch.equal(rows["afraid"], first[1])
    assert torch.equal(rows["sad"], second[0]) and torch.equal(rows["mad"], second[2])
    assert logits(model.eval()).shape[1] == 4


def test_regmean_on_rows_that_only_some_vote_on(family, tmp_path: Path) -> None:
    """The emotion rule: one head for all, each model votes on the labels that its corpus annotates."""
    _, models = family("bert", 3, num_labels=3, id2label=HEADS["id2label"], label2id=HEADS["label2id"])
    votes = [["sad", "glad"], ["glad"], ["sad"]]
    people = [Contributor.model_validate({"model": str(m), "labels": v}) for m, v in zip(models, votes, strict=True)]
    out = merge(people, tmp_path / "out", method="regmean")
    merged = load_file(out / "model.safetensors")["classifier.weight"]
    pair = merge(models[:2], tmp_path / "pair", method="regmean")
    glad = load_file(pair / "model.safetensors")["classifier.weight"][1]
    torch.testing.assert_close(merged[1], glad)
    other = merge([models[0], models[2]], tmp_path / "other", method="regmean")
    torch.testing.assert_close(merged[0], load_file(other / "model.safetensors")["classifier.weight"][0])
    everyone = merge(models, tmp_path / "all", method="regmean")  # nobody votes on "mad": all do
    torch.testing.assert_close(merged[2], load_file(everyone / "model.safetensors")["classifier.weight"][2])
    used = json.loads((out / "provenance.json").read_text())
    assert used["tensors"]["classifier.weight"]["method"] == "regmean"
    assert any("no contributor votes on mad" in note for note in used["notes"])


def test_heads_in_another_order_are_matched_by_name(family, tmp_path: Path) -> None:
    _, models = family("bert", 2, statistics=False)
    _give_head(models[0], {"id2label": {0: "glad", 1: "sad"}, "label2id": {"glad": 0, "sad": 1}}, seed=1)
    _give_head(models[1], {"id2label": {0: "sad", 1: "glad"}, "label2id": {"sad": 0, "glad": 1}}, seed=2)
    out = merge(models, tmp_path / "out", method="simple")
    first, second = (load_file(m / "model.safetensors")["classifier.weight"] for m in models)
    merged = load_file(out / "model.safetensors")["classifier.weight"]
    torch.testing.assert_close(merged, (first + second[[1, 0]]) / 2)


def test_appended_tokens(family, tmp_path: Path) -> None:
    _, models = family("bert", 2, statistics=False)
    name = "bert.embeddings.word_embeddings.weight"
    state = load_file(models[1] / "model.safetensors")
    state[name] = torch.cat([state[name], torch.full((2, 16), 3.0)])
    save_file(state, models[1] / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((models[1] / "config.json").read_text())
    (models[1] / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY + 2}))
    with pytest.raises(CheckpointError, match="--vocabulary largest"):
        merge(models, tmp_path / "out", method="simple")
    out = merge(models, tmp_path / "out", method="simple", vocabulary="largest")
    merged = load_file(out / "model.safetensors")[name]
    first = load_file(models[0] / "model.safetensors")[name]
    torch.testing.assert_close(merged[:VOCABULARY], (first + state[name][:VOCABULARY]) / 2)
    assert torch.equal(merged[VOCABULARY:], state[name][VOCABULARY:])
    assert transformers.AutoModelForSequenceClassification.from_pretrained(out).config.vocab_size == VOCABULARY + 2


def test_a_killed_merge_leaves_no_folder_that_looks_finished(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    slow = (
        "import sys, time, merganser.merging.execution as e\n"
        "whole = e.Merging.slices\n"
        "def slow(*a):\n    print('step', flush=True); time.sleep(0.2); return whole(*a)\n"
        "e.Merging.slices = slow\n"
        "from merganser.merging import merge\n"
        "merge(sys.argv[1:3], sys.argv[3], method='regmean', threads=1)\n"
    )
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", slow, *map(str, models), str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert all(p.name.startswith(".out.partial-") for p in tmp_path.iterdir() if "out" in p.name)
    merge(models, out, method="regmean")  # and nothing stands in the way of the next one
    verify(out)


def test_ctrl_c_removes_what_was_begun(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    slow = (
        "import signal, sys, time, merganser.merging.execution as e\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
        "whole = e.Merging.slices\n"
        "def slow(*a):\n    print('step', flush=True); time.sleep(0.2); return whole(*a)\n"
        "e.Merging.slices = slow\n"
        "from merganser.cli import main\n"
        "main(['merge', *sys.argv[1:3], '-o', sys.argv[3], '--threads', '1'])\n"
    )
    arguments = [sys.executable, "-c", slow, *map(str, models), str(tmp_path / "out")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by SIGINT; nothing half-written" in errors
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_a_merge_made_with_relative_paths_is_repeated_from_anywhere(family, tmp_path: Path, monkeypatch) -> None:
    family("bert", 2)
    monkeypatch.chdir(tmp_path)
    merge(["tuned-0", "tuned-1"], "results/out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert verify("../results/out").parents == 2
    assert reproduce("../results/out") == []
