"""Vision towers: against plain hooks with one image at a time, and the command on files of images."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import merganser
from architectures.tiny import TINY
from merganser.checkpoints import open_checkpoint
from merganser.cli import main
from merganser.collection import collect_statistics
from merganser.engines.serial import SerialEngine
from merganser.errors import CheckpointError, DataError, UserError
from merganser.statistics import Statistics, StatisticsHeader
from merganser.tasks import Rows
from merganser.tensors import unpack_upper

Image = pytest.importorskip("PIL.Image")
Batch = dict[str, Tensor]


def hooked(model: nn.Module, examples: list[Batch]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Σ x xᵀ, Σ x in float64 and the rows of linear and convolutional modules, one example after the other."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def see(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(module, nn.Conv2d):
            padding = 0 if module.padding == "valid" else module.padding
            settings = {"padding": padding, "stride": module.stride, "dilation": module.dilation}
            x = nn.functional.unfold(x, module.kernel_size, **settings).transpose(1, 2)
        seen[name].append(x.detach().reshape(-1, x.shape[-1]).double())

    hooks = [
        module.register_forward_pre_hook(partial(see, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    with torch.no_grad():
        for example in examples:
            model(**example)
    for hook in hooks:
        hook.remove()
    joined = {name: torch.cat(rows) for name, rows in seen.items()}
    return {name: (x.T @ x, x.sum(0), len(x)) for name, x in joined.items()}


def check(header: StatisticsHeader, tensors: dict[str, Tensor], truth: dict[str, tuple[Tensor, Tensor, int]]) -> None:
    """Every hooked layer has the statistics that the hooks have seen."""
    layers = {layer.module: layer for layer in header.layers if layer.kind != "embedding"}
    assert layers.keys() == truth.keys()
    for name, (product, total, rows) in truth.items():
        layer = layers[name]
        assert layer.rows == rows, name
        gram = unpack_upper(tensors[f"gram.{layer.input}"]).double()
        assert (gram - product / rows).abs().max() <= 1e-5 * product.abs().max() / rows, name
        size = (product.diagonal() / rows).max().sqrt()
        assert (tensors[f"mean.{layer.input}"] - total / rows).abs().max() <= 1e-5 * size, name


def alone(batch: Batch) -> list[Batch]:
    """Each example without its padding."""
    found = []
    for number in range(len(batch["pixel_values"])):
        example = {key: value[number : number + 1] for key, value in batch.items()}
        if "attention_mask" in example:
            real = example["attention_mask"][0].bool()
            example |= {key: example[key][:, real] for key in ("input_ids", "attention_mask")}
        found.append(example)
    return found


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "ResNetForImageClassification", "SwinForImageClassification", "CLIPModel"]
)
def test_every_row_of_images_counts(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model, checkpoint = tiny.build(), open_checkpoint(tiny.save(tmp_path))
    batch = tiny.batch()
    split = [{key: value[:3] for key, value in batch.items()}, {key: value[3:] for key, value in batch.items()}]
    header, tensors = collect_statistics(model, checkpoint, split)
    check(header, tensors, hooked(model, alone(batch)))
    assert header.examples == 4
    if name.startswith("ViT"):
        inputs = {
            layer.module.rpartition(".")[2]: layer.input for layer in header.layers if ".0.attention" in layer.module
        }
        assert len(set(inputs.values())) == 2  # query, key and value share one
        whole, others = collect_statistics(model, checkpoint, [batch])
        assert whole.layers == header.layers
        assert all(torch.allclose(tensors[key], others[key], rtol=1e-4, atol=1e-6) for key in tensors)


def llava(tmp_path: Path) -> tuple[Any, Any, Batch]:
    """A model with images inside of its text, and examples of different lengths with an image each."""
    tiny = TINY["LlavaForConditionalGeneration"]
    config = tiny.config()
    config.image_token_id = config.image_token_index = 5
    model = t.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    mask = (torch.arange(14)[None] < torch.tensor([14, 9, 11])[:, None]).long()
    ids = torch.randint(10, 48, mask.shape)
    ids[:, 1 : 1 + patches] = 5
    images = torch.randn(3, 3, vision.image_size, vision.image_size)
    return model, open_checkpoint(tmp_path), {"input_ids": ids * mask, "attention_mask": mask, "pixel_values": images}


def test_images_inside_of_text(tmp_path: Path) -> None:
    model, checkpoint, batch = llava(tmp_path)
    header, tensors = collect_statistics(model, checkpoint, [batch])
    truth = hooked(model, alone(batch))
    assert any("vision_tower" in name for name in truth) and any("language_model" in name for name in truth)
    check(header, tensors, truth)

    two = {key: value[:1] for key, value in batch.items()}  # two images in one example
    ids = torch.cat([two["input_ids"], two["input_ids"]], 1)
    two = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"][:2]}
    one = {key: value[2:] for key, value in batch.items()}
    header, tensors = collect_statistics(model, checkpoint, [two, one])
    check(header, tensors, hooked(model, [two, *alone(one)]))

    text = {"input_ids": batch["input_ids"][:1, 5:], "attention_mask": batch["attention_mask"][:1, 5:]}  # no image
    header, tensors = collect_statistics(model, checkpoint, [batch, text])
    check(header, tensors, hooked(model, [*alone(batch), text]))
    places = next(
        layer for layer in header.layers if layer.module.endswith("vision_tower.embeddings.position_embedding")
    )
    assert set(tensors[f"count.{places.module}"].tolist()) == {3}


def test_sounds_are_run_without_their_padding(tmp_path: Path) -> None:
    tiny = TINY["Wav2Vec2ForSequenceClassification"]
    model, checkpoint, batch = tiny.build(), open_checkpoint(tiny.save(tmp_path)), tiny.batch()
    cut = [int(mask.sum()) for mask in batch["attention_mask"]]
    single = [{"input_values": x[None, :length]} for x, length in zip(batch["input_values"], cut, strict=True)]
    header, tensors = collect_statistics(model, checkpoint, [batch])
    truth = hooked(model, single)
    kept = {layer.module for layer in header.layers}
    assert len(kept) >= 12
    header = header.model_copy(update={"layers": tuple(x for x in header.layers if x.module in truth)})
    check(header, tensors, truth)
    with pytest.raises(DataError, match="attention_mask has the shape"):
        collect_statistics(model, checkpoint, [batch | {"attention_mask": batch["attention_mask"][:, ::2]}])


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    model, checkpoint, batch = llava(tmp_path)
    with pytest.raises(DataError, match="pixel_values has 2 rows for 3 examples"):
        collect_statistics(model, checkpoint, [batch | {"pixel_values": batch["pixel_values"][:2]}])
    mask = torch.ones(3, 16, 16)
    mask[0, 8:] = 0
    with pytest.raises(DataError, match="pixel_mask marks padding inside images"):
        collect_statistics(model, checkpoint, [batch | {"pixel_mask": mask}])


def vit(folder: Path) -> Path:
    TINY["ViTForImageClassification"].save(folder)
    t.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def photos(folder: Path, count: int = 5) -> list[str]:
    (folder / "photos").mkdir(parents=True)
    torch.manual_seed(0)
    for number in range(count):
        pixels = torch.randint(0, 256, (20 + number, 30, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number}.png")
    return [f"photos/{number}.png" for number in range(count)]


def test_the_command_reads_images(tmp_path: Path) -> None:
    folder, data = vit(tmp_path / "model"), tmp_path / "data.jsonl"
    paths = photos(tmp_path)
    data.write_text("".join(f"{json.dumps({'image_path': path})}\n" for path in paths))
    with pytest.raises(SystemExit, match="0"):
        main(["collect", str(folder), "--data", str(data), "--batch-size", "2"])
    found = Statistics.open(folder / "merge_statistics.safetensors")
    assert "task: image-features" in found.header.notes and "columns: image 'image_path'" in found.header.notes
    assert found.header.examples == 5
    processor, model = t.ViTImageProcessor.from_pretrained(folder), t.ViTForImageClassification.from_pretrained(folder)
    examples = [processor(Image.open(tmp_path / path).convert("RGB"), return_tensors="pt") for path in paths]
    truth = hooked(model.eval(), examples)
    check(found.header, {name: found.packed(name) for name in found.tensors}, truth)

    images = tuple({"image": Image.open(tmp_path / path)} for path in paths)
    rows = Rows("memory", images, tuple(("memory", number) for number in range(5)), by_line=False)
    again = Statistics.open(merganser.collect(folder, rows, output=tmp_path / "again.safetensors", batch_size=2).path)
    assert all(torch.equal(found.packed(name), again.packed(name)) for name in found.tensors)

    jobs = {"engine": SerialEngine(), "output": tmp_path / "jobs.safetensors", "batch_size": 2}
    assert merganser.collect(folder, data, **jobs).path.read_bytes() == found.path.read_bytes()


def test_images_of_different_sizes_go_one_by_one(tmp_path: Path) -> None:
    folder, data = TINY["ResNetForImageClassification"].save(tmp_path / "model"), tmp_path / "data.jsonl"
    t.CLIPImageProcessor(size={"shortest_edge": 16}, do_center_crop=False).save_pretrained(folder)
    paths = photos(tmp_path)
    data.write_text("".join(f"{json.dumps({'image': path})}\n" for path in paths))
    with pytest.raises(DataError, match=r"tensors of different sizes(?s:.*)--batch-size 1"):
        merganser.collect(folder, data)
    found = Statistics.open(merganser.collect(folder, data, batch_size=1).path)
    processor, model = (
        t.CLIPImageProcessor.from_pretrained(folder),
        t.ResNetForImageClassification.from_pretrained(folder),
    )
    examples = [processor(Image.open(tmp_path / path), return_tensors="pt") for path in paths]
    assert len({example["pixel_values"].shape for example in examples}) > 1
    check(found.header, {name: found.packed(name) for name in found.tensors}, hooked(model.eval(), examples))


def test_images_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder, paths = vit(tmp_path / "model"), photos(tmp_path)
    columns = {"image": [str(tmp_path / path) for path in paths]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    result = merganser.collect(folder, tmp_path / "set")
    assert result.header.examples == 5 and "columns: image 'image'" in result.header.notes


def words(special: list[str]) -> Any:
    """A tokenizer of a few words; the sixth is <image>."""
    known = ["<pad>", "<s>", "</s>", "<unk>", "w0", "<image>", *(f"w{number}" for number in range(1, 43))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special, extra_special_tokens={"image_token": "<image>"} if special else {},
        model_max_length=64,
    )  # fmt: skip


def test_images_with_text(tmp_path: Path) -> None:
    fast = words([])
    folder, paths = TINY["CLIPModel"].save(tmp_path / "model"), photos(tmp_path)
    size = {"height": 16, "width": 16}
    images = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    t.CLIPProcessor(images, fast).save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    rows = [{"image": path, "caption": "w1 w2 w3" + " w4" * number} for number, path in enumerate(paths)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = merganser.collect(folder, data, task="image-text-features")
    assert "columns: text 'caption', image 'image'" in result.header.notes
    processor, model = t.AutoProcessor.from_pretrained(folder), t.CLIPModel.from_pretrained(folder)
    examples = [
        processor(images=Image.open(tmp_path / row["image"]), text=row["caption"], return_tensors="pt") for row in rows
    ]
    found = Statistics.open(result.path)
    check(found.header, {name: found.packed(name) for name in found.tensors}, hooked(model.eval(), examples))
    cut = merganser.collect(folder, data, task="image-text-features", max_length=4, output=tmp_path / "cut.safetensors")
    assert cut.header.tokens == 3 + 4 * 4 and "texts cut at 4 tokens" in cut.header.notes
    with pytest.raises(CheckpointError, match="takes image and text, and image-features gives it image"):
        merganser.collect(folder, data, task="image-features", overwrite=True)


TEMPLATE = "w1 {% for part in messages[0].content %}{{ part.text or '<image>' }} {% endfor %}"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_with_places_for_the_image(template: str | None, tmp_path: Path) -> None:
    model, _, _ = llava(tmp_path / "model")
    fast, vision = words(["<image>"]), model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=side), fast,
        patch_size=vision.patch_size, num_additional_image_tokens=1, image_token="<image>", chat_template=template,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    data = tmp_path / "data.jsonl"
    rows = [{"image": path, "text": "w3" + " w4" * number} for number, path in enumerate(photos(tmp_path, 3))]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    header = merganser.collect(tmp_path / "model", data, task="image-text-features").header
    patches = (vision.image_size // vision.patch_size) ** 2
    assert header.tokens == 3 * (patches + 1 + (template is not None)) + 0 + 1 + 2
    assert any("vision_tower" in layer.module for layer in header.layers)
    assert not any(note.startswith("texts cut") for note in header.notes)


def test_mistakes_are_found_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = vit(tmp_path / "model"), tmp_path / "inner" / "data.csv"
    photos(tmp_path)
    photos(tmp_path / "inner", 1)
    (tmp_path / "inner" / "photos" / "broken.png").write_bytes(b"no image")
    (tmp_path / "inner" / "link.png").symlink_to(tmp_path / "photos" / "0.png")
    wrong = {
        "../photos/0.png": "does not lie in the folder",
        str(tmp_path / "photos" / "0.png"): "does not lie in the folder",
        "link.png": "does not lie in the folder", "photos/9.png": "no image", "photos/broken.png": "not an image",
    }  # fmt: skip
    for path, message in wrong.items():
        data.write_text(f"image\nphotos/0.png\n{path}\n")
        with pytest.raises(DataError, match=message) as error:
            merganser.collect(folder, data)
        assert f"{data}:3" in str(error.value)
    data.write_text("image\nphotos/0.png\n")
    (folder / "preprocessor_config.json").rename(folder / "other.json")
    with pytest.raises(CheckpointError, match="no processor for images"):
        merganser.collect(folder, data)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"images need Pillow.*\n.*pip install pillow"):
        merganser.collect(folder, data)
