"""What T5 and GPT-2 are asked about emotions, what they learn, and what is counted of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from emotion_examples import EXAMPLES, NONE, Save, encoded, questions, write
from merganser.collection import collect
from merganser.errors import CheckpointError, UserError
from merganser.lab.suites.emotion_generation import SENTINEL, YesNo, YesNoContinuation
from merganser.statistics import Statistics
from merganser.tasks.batches import IGNORED
from merganser.tasks.columns import Columns
from merganser.tasks.predict import predict

# --- T5 ---------------------------------------------------------------------------------------------------


def ready(save_ready: Save, architecture: str, seed: int = 0) -> tuple[Path, Any, Any]:
    folder = save_ready(f"m{seed}", architecture, seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if architecture == "t5":
        tokenizer.add_tokens([SENTINEL], special_tokens=True)
        tokenizer.save_pretrained(folder)
        model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    else:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return folder, model.eval(), tokenizer


def test_t5_is_asked_and_taught_the_papers_texts(save_ready: Save) -> None:
    _, _, tokenizer = ready(save_ready, "t5")
    features = encoded(YesNo(), EXAMPLES, tokenizer).features
    whole = tokenizer(f"does the sentence express joy? {SENTINEL} the movie was good")["input_ids"]
    assert features[0].input_ids == whole and tokenizer.convert_tokens_to_ids(SENTINEL) in whole
    assert features[0].labels == tokenizer(f"{SENTINEL} yes")["input_ids"]
    assert features[1].labels == tokenizer(f"{SENTINEL} no")["input_ids"]
    assert len(features[1].labels) == 3 and YesNo().max_new_tokens == 4
    given = encoded(YesNo(), EXAMPLES, tokenizer, references=[("joy", 0)] * 4).features
    assert given[0].labels == features[1].labels
    batch = YesNo().collation(tokenizer, {"is_encoder_decoder": True})(features)
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1]] * 4


def test_t5_end_to_end(save_ready: Save) -> None:
    _, model, tokenizer = ready(save_ready, "t5")
    task = YesNo()
    columns = task.columns(EXAMPLES, Columns())
    config = model.config.to_dict()
    found = predict(model, tokenizer, config, task, EXAMPLES, columns, batch_size=3, max_length=64)
    for row, text in zip(EXAMPLES, found.aligned, strict=True):
        prompt = f"does the sentence express {row['label']}? {SENTINEL} {row['text']}"
        with torch.inference_mode():
            ids = model.generate(
                **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, do_sample=False
            )
        assert " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).lower().split()) == text
        assert ids.shape[1] <= 5  # the start token, and four
    other = questions(*((row["text"], row["label"], "no") for row in EXAMPLES))
    again = predict(model, tokenizer, config, task, other, columns, batch_size=1, max_length=64)
    assert again.aligned == found.aligned  # truths are not seen
    scores = task.score(task.judge(found.aligned, task.references(EXAMPLES, columns, NONE), NONE))
    assert set(scores) == {"macro_f1", "accuracy", "answered"} and all(0 <= v <= 1 for v in scores.values())


def test_t5_statistics_are_of_teacher_forcing(save_ready: Save, tmp_path: Path) -> None:
    folder, model, tokenizer = ready(save_ready, "t5")
    data = write(tmp_path / "rows.jsonl", [dict(row) for row in EXAMPLES])
    statistics = Statistics.open(collect(folder, data, task=YesNo(), fisher="empirical", batch_size=3))
    sources = [f.input_ids for f in encoded(YesNo(), EXAMPLES, tokenizer).features]
    assert statistics.header.tokens == sum(map(len, sources)) + 3 * len(EXAMPLES)
    name = "decoder.block.1.layer.0.SelfAttention.q"
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, x, __: seen.append(x[0].detach().double()[0]))
    with torch.no_grad():
        for feature in encoded(YesNo(), EXAMPLES, tokenizer).features:
            model(input_ids=torch.tensor([feature.input_ids]), labels=torch.tensor([feature.labels]))
    x = torch.cat(seen)
    entry = statistics.layer(f"{name}.weight")
    assert entry is not None and entry.input is not None and entry.rows == len(x) == 12
    torch.testing.assert_close(statistics.gram(entry.input).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


# --- GPT-2 ------------------------------------------------------------------------------------------------


def test_gpt2_learns_the_answer_only(save_ready: Save) -> None:
    _, model, tokenizer = ready(save_ready, "gpt2")
    task = YesNoContinuation()
    features = encoded(task, EXAMPLES, tokenizer, references=[("joy", 1), ("joy", 0), ("joy", 0), ("joy", 1)])
    assert tokenizer.convert_ids_to_tokens(features.features[0].input_ids)[-2:] == [".", "yes"]
    for feature, row in zip(features.features, EXAMPLES, strict=True):
        text = f"{row['text']} The sentence expresses {row['label']}. {row['target']}"
        assert feature.input_ids == tokenizer(text)["input_ids"]
        assert feature.labels == [IGNORED] * (len(feature.input_ids) - 1) + feature.input_ids[-1:]
    batch = task.collation(tokenizer, {})(features.features)
    assert ((batch["labels"] != IGNORED).sum(1) == 1).all() and "decoder_attention_mask" not in batch
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = model(**batch).loss
    ends = batch["attention_mask"].sum(1) - 1
    by_hand = -torch.log_softmax(logits, -1)[range(4), ends - 1, batch["input_ids"][range(4), ends]].mean()
    torch.testing.assert_close(loss, by_hand)


def test_gpt2_end_to_end(save_ready: Save) -> None:
    _, model, tokenizer = ready(save_ready, "gpt2")
    task = YesNoContinuation()
    columns = task.columns(EXAMPLES, Columns())
    config = model.config.to_dict()
    found = predict(model, tokenizer, config, task, EXAMPLES, columns, batch_size=3)
    assert found.truncated == 0 and found.max_length == 32
    words = tokenizer.convert_tokens_to_ids(["no", "yes"])
    for row, scores in zip(EXAMPLES, found.aligned, strict=True):
        prompt = tokenizer(f"{row['text']} The sentence expresses {row['label']}.", return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=prompt["input_ids"]).logits[0, -1]
        np.testing.assert_allclose(scores, torch.log_softmax(logits.double(), -1)[words], rtol=1e-4)
    other = questions(*((row["text"], row["label"], "no") for row in EXAMPLES))
    again = predict(model, tokenizer, config, task, other, columns, batch_size=1)
    np.testing.assert_allclose(again.aligned, found.aligned, rtol=1e-4)  # neither truths nor padding are seen
    truth = task.references(EXAMPLES, columns, NONE)
    assert list(task.by_label(found.aligned, truth, NONE)) == ["joy", "anger", "fear"]
    judged = task.judge(found.aligned, truth, NONE)
    assert judged[:, 1].tolist() == (found.aligned[:, 1] > found.aligned[:, 0]).astype(int).tolist()


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges, as GPT-2's: every answer has several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@pytest.mark.parametrize("keep", [True, False])
def test_answers_of_several_tokens(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, task = byte_tokenizer(), YesNoContinuation()
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    if not keep:  # an architecture that always gives all logits
        whole = model.forward

        def forward(input_ids: Any, attention_mask: Any) -> Any:
            return whole(input_ids=input_ids, attention_mask=attention_mask)

        monkeypatch.setattr(model, "forward", forward)
    features = encoded(task, EXAMPLES, tokenizer).features
    columns = task.columns(EXAMPLES, Columns())
    found = predict(model, tokenizer, config.to_dict(), task, EXAMPLES, columns, batch_size=3)
    for row, feature, scores in zip(EXAMPLES, features, found.aligned, strict=True):
        prompt = f"{row['text']} The sentence expresses {row['label']}."
        start = len(tokenizer(prompt)["input_ids"])
        assert feature.labels[:start] == [IGNORED] * start and IGNORED not in feature.labels[start:]
        for answer, score in zip(("no", "yes"), scores, strict=True):
            ids = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
            with torch.inference_mode():
                steps = torch.log_softmax(
                    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double(), -1
                )
            places = range(start, ids.shape[1])
            assert score == pytest.approx(sum(steps[p - 1, ids[0, p]].item() for p in places), rel=1e-4)


def test_gpt2_statistics_count_each_text_once(save_ready: Save, tmp_path: Path) -> None:
    folder, _, tokenizer = ready(save_ready, "gpt2")
    data = write(tmp_path / "rows.jsonl", [dict(row) for row in EXAMPLES])
    path = collect(folder, data, task=YesNoContinuation(), fisher="empirical", batch_size=3)
    statistics = Statistics.open(path)
    sizes = [len(feature.input_ids) for feature in encoded(YesNoContinuation(), EXAMPLES, tokenizer).features]
    assert statistics.header.tokens == sum(sizes)  # sentence, question and answer; no padding, no second pass
    alone = collect(
        folder, data, task=YesNoContinuation(), fisher="empirical", batch_size=1, output=tmp_path / "a.safetensors"
    )
    name = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(statistics.fisher(name), Statistics.open(alone).fisher(name), rtol=1e-3, atol=1e-7)


# --- truncation -------------------------------------------------------------------------------------------


def test_t5_cuts_the_sentence_and_counts_it(save_ready: Save) -> None:
    _, _, tokenizer = ready(save_ready, "t5")
    rows = questions(("good bad " * 30, "joy", "yes"), ("good", "joy", "no"), ("movie " * 9, "guilt", "no"))
    found = encoded(YesNo(), rows, tokenizer, 15)
    assert found.truncated == 2 and found.cut == {0, 2}
    question = tokenizer(f"does the sentence express joy? {SENTINEL}", add_special_tokens=False)["input_ids"]
    sentence = tokenizer("good bad " * 4, add_special_tokens=False)["input_ids"]
    assert len(question) == 7
    assert found.features[0].input_ids == [*question, *sentence[:7], tokenizer.eos_token_id]  # not one wasted
    assert found.features[1].input_ids == tokenizer(f"does the sentence express joy? {SENTINEL} good").input_ids
    assert [len(f.labels) for f in found.features] == [3, 3, 3]
    with pytest.raises(UserError, match=r"the question alone has 8 tokens, but only 7 fit \(made.jsonl:1\)"):
        encoded(YesNo(), rows, tokenizer, 7)


@pytest.mark.parametrize("words", [True, False])
def test_gpt2_cuts_the_sentence_and_counts_it(words: bool, save_ready: Save) -> None:
    tokenizer = ready(save_ready, "gpt2")[2] if words else byte_tokenizer()
    task, limit = YesNoContinuation(), 12 if words else 60
    rows = questions(("good bad " * 30, "joy", "yes"), ("good", "joy", "no"), ("movie é " * 30, "love", "no"))
    found = encoded(task, rows, tokenizer, limit)
    assert found.cut == {0, 2} and found.max_length == limit
    for row, feature in zip(rows, found.features, strict=True):
        tail = f" The sentence expresses {row['label']}."
        end = tokenizer(f"{tail} {row['target']}")["input_ids"]
        assert feature.input_ids[-len(end) :] == end  # question and answer are whole
        kept = feature.input_ids[: -len(end)]
        assert kept and kept == tokenizer(row["text"])["input_ids"][: len(kept)]
        assert len(feature.input_ids) <= limit
        learned = len(end) - len(tokenizer(tail)["input_ids"])
        assert feature.labels == [IGNORED] * (len(feature.input_ids) - learned) + end[-learned:]
    if words:
        assert [len(feature.input_ids) for feature in found.features] == [12, 7, 12]
        prediction = predict(
            ready(save_ready, "gpt2", 1)[1], tokenizer, {}, task, rows,
            task.columns(rows, Columns()), max_length=12,
        )  # fmt: skip
        assert prediction.truncated == 2


def test_answers_that_the_tokenizer_confuses_are_refused(save_ready: Save) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<unk>": 0, ".": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for task in (YesNo(), YesNoContinuation()):
        with pytest.raises(CheckpointError, match="the same tokens of yes and no"):
            encoded(task, EXAMPLES, tokenizer)
