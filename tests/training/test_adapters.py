"""Training of LoRA adapters: what is saved opens with PEFT and with us, and is the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser.errors import UserError
from merganser.tasks import TASKS, Rows
from merganser.tasks.models import load_model, load_tokenizer, open_model
from merganser.training import TrainingSettings, train
from merganser.training.multitask import train_multitask
from merganser.training.outputs import MARK
from merganser.training.prepare import TrainingPart
from merganser.training.settings import LoraSettings

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'merganser[train]'")

LABELS = ("good", "bad")
QUICK = TrainingSettings(learning_rate=2e-2, epochs=8, batch_size=4, lora=LoraSettings(rank=2, alpha=4))
SaveReady = Callable[..., Path]


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    return dict(
        load_tokenizer(open_model(folder))(["the movie was good", "bad food"], padding=True, return_tensors="pt")
    )


@pytest.fixture
def base(save_ready: SaveReady) -> Path:
    """A base without a head, as an encoder is published."""
    return save_ready("base", "bert", model_class=transformers.BertModel)


def test_what_is_saved_is_the_same_model_to_peft_and_to_us(base: Path, sentiment: Rows, tmp_path: Path) -> None:
    task = TASKS["text-classification"]
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    settings = QUICK.model_copy(update={"best_epoch": True, "epochs": 30})
    trained = train(base, task, sentiment, labels=LABELS, output=tmp_path / "out", settings=settings, dev=sentiment)
    assert max(trained.dev_scores) == 1 and before == {path.name: path.read_bytes() for path in base.iterdir()}
    names = {path.name for path in trained.path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "config.json", MARK} | {
        "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    saved = load_file(trained.path / "adapter_model.safetensors")
    assert {name for name in saved if "lora" not in name} == {
        "base_model.model.classifier.weight", "base_model.model.classifier.bias"
    }  # fmt: skip
    adapted = [name for name in saved if "lora_A" in name]
    assert len(adapted) == 2 * 6 + 1  # six linear maps a layer, and the pooler
    below = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(below, str(trained.path)).eval()
    opened = open_model(f"{base}+{trained.path}")
    ours = load_model(opened, "AutoModelForSequenceClassification")
    with torch.inference_mode():
        asked = inputs(base)
        torch.testing.assert_close(ours(**asked).logits, theirs(**asked).logits)
    assert opened.config["id2label"] == {"0": "good", "1": "bad"}


def test_the_same_seed_gives_the_same_bytes_and_a_killed_training_goes_on(
    base: Path, sentiment: Rows, tmp_path: Path
) -> None:
    def run(name: str, **more: object) -> dict[str, bytes]:
        options = {"labels": LABELS, "settings": QUICK, "dev": sentiment, **more}
        train(base, TASKS["text-classification"], sentiment, output=tmp_path / name, **options)  # type: ignore[arg-type]
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = run("a")
    assert run("b") == first

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == total // 2 + 1:
            raise Killed

    with pytest.raises(Killed):
        run("c", work=tmp_path / "work", on_step=kill)
    assert list((tmp_path / "work").glob("checkpoint-*/adapter_model.safetensors"))
    assert run("c", work=tmp_path / "work") == first


def test_one_encoder_below_several_heads(
    base: Path, sentiment: Rows, make_rows: Callable[..., Rows], tmp_path: Path
) -> None:
    task, other = TASKS["text-classification"], make_rows([dict(row) for row in sentiment], "other")
    parts = [TrainingPart("one", task, sentiment, LABELS), TrainingPart("two", task, other, LABELS[::-1])]
    trained = train_multitask(base, parts, shared=False, output=tmp_path / "out", settings=QUICK, separate=["*pooler*"])
    one, two = (load_file(trained.paths[name] / "adapter_model.safetensors") for name in ("one", "two"))
    apart = {name for name in one if not torch.equal(one[name], two[name])}
    assert apart and all("classifier" in name or "pooler" in name for name in apart)
    assert any("pooler" in name for name in apart)


def test_layers_by_name(base: Path, sentiment: Rows, tmp_path: Path) -> None:
    def run(name: str, *targets: str) -> Path:
        lora = LoraSettings(targets=targets)
        settings = QUICK.model_copy(update={"lora": lora, "epochs": 1})
        output = tmp_path / name
        return train(
            base, TASKS["text-classification"], sentiment, labels=LABELS, output=output, settings=settings
        ).path

    saved = load_file(run("out", "query", "value") / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved if "lora" in name} == {"query", "value"}
    with pytest.raises(UserError, match=r"(?s)no linear layer .* called 'quary'.*did you mean 'query'"):
        run("none", "quary")


def test_a_decoder_keeps_its_head(save_ready: SaveReady, sentiment: Rows, tmp_path: Path) -> None:
    base = save_ready("llama", "llama")
    trained = train(base, TASKS["causal-lm"], sentiment, output=tmp_path / "out", settings=QUICK, dev=sentiment)
    assert trained.dev_scores[-1] < trained.dev_scores[0]  # the loss of a token
    assert all("lora" in name for name in load_file(trained.path / "adapter_model.safetensors"))
    assert json.loads((trained.path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_settings_without_an_adapter_are_written_as_they_were_before_there_were_any() -> None:
    assert "lora" not in TrainingSettings().model_dump(mode="json")
    assert QUICK.model_dump(mode="json")["lora"] == {"rank": 2, "alpha": 4, "targets": []}
    assert TrainingSettings.model_validate(QUICK.model_dump()) == QUICK


def test_peft_is_asked_for_before_work(
    base: Path, sentiment: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merganser.errors as errors

    real = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    with pytest.raises(UserError, match=r"(?s)peft, which is not installed.*merganser\[train\]"):
        train(base, TASKS["text-classification"], sentiment, labels=LABELS, output=tmp_path / "out", settings=QUICK)
