"""What a result takes over from its first contributor's folder: all that opening the model reads, and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import transformers

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.side_files import left_behind
from merganser.errors import UserError
from merganser.merging import merge


def write(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_weights_cards_data_and_training_state_stay(save_model) -> None:
    folder = save_model("full")
    write(folder, "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "2_Own/settings.json")
    write(folder, "modules.json", text='[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Own"}]')
    write(
        folder, "README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "merge_statistics.safetensors"
    )
    write(folder, "train.json", "train.jsonl", "predictions.txt", "adapter_config.json", "logo.png", "train.log")
    write(folder, "checkpoint-12/config.json", "data/train.csv", ".git/config", "1_Pooling/train.csv", "2_Own/x.bin")
    write(folder, "params.json", "LICENSE", "NOTICE.txt", "THIRD_PARTY_LICENSES.md", "generation_config.json")
    assert open_checkpoint(folder).side_files() == [
        "1_Pooling/config.json", "2_Own/settings.json", "LICENSE", "NOTICE.txt", "THIRD_PARTY_LICENSES.md",
        "config.json", "generation_config.json", "modules.json", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip


def test_a_note_says_what_is_odd(save_model, tmp_path: Path) -> None:
    models = [save_model(f"m{seed}", seed=seed) for seed in (1, 2)]
    write(models[0], "README.md", "training_args.bin", "trainer_state.json")
    assert left_behind(models[0]) is None
    write(models[0], "train.json", "data/x.csv")
    out = merge(models, tmp_path / "out", method="simple")
    assert "left behind, being no part of the model: data/, train.json" in out.notes
    assert not (out / "train.json").exists() and not (out / "data").exists()


def test_files_of_every_tokenizer_of_transformers_belong(tmp_path: Path) -> None:
    """The names are read from the library's source, not through its classes."""
    source = Path(transformers.__file__).parent / "models"
    tables: dict[str, set[str]] = {}
    for file in sorted(source.rglob("tokenization_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES":
                values = node.value.values if isinstance(node.value, ast.Dict) else []
                tables[file.parent.name] = {v.value for v in values if isinstance(v, ast.Constant)}
    assert len(tables) > 40
    for folder, names in tables.items():
        place = tmp_path / folder
        write(place, *names, "config.json", "model.safetensors")
        classes = {
            line.split("(")[0].removeprefix("class ")
            for file in (source / folder).glob("tokenization_*.py")
            for line in file.read_text().splitlines()
            if line.startswith("class ") and "Tokenizer" in line.split("(")[0]
        }
        for name in sorted(name for name in classes if hasattr(transformers, name))[:1]:
            write(place, "tokenizer_config.json", text=json.dumps({"tokenizer_class": name}))
        taken = set(open_side_files(place))
        assert names <= taken, (folder, names - taken)


def open_side_files(folder: Path) -> list[str]:
    from merganser.checkpoints import side_files

    return side_files.belonging(folder)


@pytest.mark.parametrize(
    "name",
    [
        "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.jinja",
        "chat_template.json", "additional_chat_templates/tool_use.jinja", "tekken.json", "qwen.tiktoken",
        "sentencepiece.bpe.model", "added_tokens.json", "special_tokens_map.json", "config_sentence_transformers.json",
        "sentence_xlnet_config.json", "qformer_tokenizer/tokenizer_config.json", "USE_POLICY.md", "LICENCE.txt",
    ],
)  # fmt: skip
def test_belongs(save_model, name: str) -> None:
    folder = save_model("m")
    write(folder, name)
    assert name in open_checkpoint(folder).side_files() and left_behind(folder) is None


def test_code_that_configurations_name(save_model) -> None:
    folder = save_model("m")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoModel": "modeling_own.Own", "AutoConfig": "org/other--configuration_other.Other"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    write(folder, "modeling_own.py", text="from .layers_own import x\nfrom .absent import y\nimport os\n")
    write(folder, "layers_own.py", text="from .modeling_own import z\n")
    write(folder, "tokenization_own.py", "train.py", "configuration_other.py", text="")
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    write(folder, "tokenizer_config.json", text=json.dumps({**auto, "vocab_file": "words.lst"}))
    write(folder, "words.lst", "other.lst")
    found = open_checkpoint(folder).side_files()
    assert found == ["config.json", "layers_own.py", "modeling_own.py", "tokenization_own.py", "tokenizer_config.json",
                     "words.lst"]  # fmt: skip


def test_links_out_of_the_folder_are_not_followed(save_model, tmp_path: Path) -> None:
    models = [save_model(f"m{seed}", seed=seed) for seed in (1, 2)]
    write(tmp_path, "secret.txt", text="private")
    (models[0] / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    (models[0] / "train.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"not followed: vocab.txt") as caught:
        merge(models, tmp_path / "out", method="simple")
    assert "cp -rL" in str(caught.value) and not (tmp_path / "out").exists()
    (models[0] / "vocab.txt").unlink()
    out = merge(models, tmp_path / "out", method="simple")
    assert not (out / "train.txt").exists()


def test_links_of_the_hub_cache_are_followed(save_model, tmp_path: Path) -> None:
    model = save_model("m")
    repo = tmp_path / "models--org--m"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (repo / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number}")
    out = merge([repo / "snapshots" / "abc"], tmp_path / "out", method="simple")
    assert (out / "config.json").is_file() and not (out / "config.json").is_symlink()
