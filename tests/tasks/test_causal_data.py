"""Data for decoders as people have them: chats, prompts with completions, lines of text; models that see images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as t

from conftest import SMALL, make_model, save_tokenizer
from merganser import collect
from merganser.errors import CheckpointError, DataError
from merganser.tasks import TASKS, task_for
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, read_rows
from merganser.tasks.models import LONGEST, open_model, usual_length

TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
CHAT = [{"role": "user", "content": "is the movie good ?"}, {"role": "assistant", "content": "yes , very"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path, "llama")
    loaded = t.AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = TEMPLATE
    return loaded


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows("d.jsonl", rows, tuple(("d.jsonl", n) for n in range(1, len(rows) + 1)))


def tokens(rows: Rows, tokenizer: Any, given: Columns | None = None) -> list[list[int]]:
    task = TASKS["causal-lm"]
    columns = task.columns(rows, given or Columns())
    return [feature.input_ids for feature in task.encode(rows, tokenizer, {}, columns, 64).features]


def test_chats_become_what_the_chat_template_makes_of_them(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert tokens(rows_of({"messages": CHAT}), tokenizer) == [expected]
    assert tokens(rows_of({"conversation": CHAT}), tokenizer, Columns(text="conversation")) == [expected]
    assert tokens(rows_of({"prompt": CHAT[:1], "completion": CHAT[1:]}), tokenizer) == [expected]
    assert tokens(rows_of({"prompt": CHAT[:1], "completion": "yes , very"}), tokenizer) == [expected]
    assert expected.count(tokenizer.bos_token_id) == 2  # the template's own, and no other


def test_a_prompt_and_its_completion_are_one_text(tokenizer: Any) -> None:
    rows = rows_of({"prompt": "is it good ?", "completion": " yes"}, {"prompt": "Anna", "completion": " no"})
    assert tokens(rows, tokenizer) == [tokenizer(text)["input_ids"] for text in ("is it good ? yes", "Anna no")]
    both = rows_of({"prompt": "is it good ?", "text": "the movie"})
    assert tokens(both, tokenizer) == [tokenizer("the movie")["input_ids"]]


def test_what_chats_cannot_be(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: some rows hold a chat, this one does not"):
        tokens(rows_of({"messages": CHAT}, {"messages": "yes"}), tokenizer)
    with pytest.raises(DataError, match=r"d\.jsonl:1: a message of a chat is 'yes', which has not a role"):
        tokens(rows_of({"messages": ["yes"]}), tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses this chat: no system role"):
        tokens(rows_of({"messages": CHAT}), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        tokens(rows_of({"messages": CHAT}), tokenizer)


def test_a_text_file_has_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffthe movie\r\n\n  was\u2028good \n".encode())
    rows = read_rows(path)
    assert [row["text"] for row in rows] == ["the movie", "  was\u2028good "]
    assert rows.where(1) == f"{path}:3"


def test_the_header_says_which_columns_were_read_and_the_length_is_the_models(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "llama")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "is it", "completion": " good ?"}) + "\n")
    notes = collect(tmp_path, tmp_path / "d.jsonl").header.notes
    assert "columns: text 'prompt', target 'completion'" in notes
    assert any("texts cut at 32 tokens" in note for note in notes)


def test_lengths_follow_the_model(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "bert")
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path)
    assert usual_length(open_model(tmp_path), tokenizer) == 32
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert usual_length(open_model(tmp_path), tokenizer) == 20
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": null}')
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert usual_length(open_model(tmp_path), tokenizer) == LONGEST


def test_the_text_part_of_a_model_that_sees_images(tmp_path: Path) -> None:
    config = t.Gemma3Config(
        text_config={**SMALL, "vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 24},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
        image_token_index=39,
    )
    t.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "llama")
    opened = open_model(tmp_path)
    assert task_for("auto", opened.config).name == "causal-lm"
    (tmp_path / "d.txt").write_text("the movie was good\nnot a bad movie , Anna\n")
    written = collect(tmp_path, tmp_path / "d.txt")
    weights = {layer.weight for layer in written.header.layers}
    language = {name for name in opened.checkpoint.tensors if "language_model" in name and name.endswith("proj.weight")}
    assert len(language) == 14 and language <= weights
    assert not any("vision" in weight for weight in weights)
    uncalled = [note for note in written.header.notes if "not called by the model" in note]
    assert len(uncalled) == 1 and "vision_tower" in uncalled[0]
    assert any("texts cut at 24 tokens" in note for note in written.header.notes)
