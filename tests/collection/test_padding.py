"""Padding never enters, whatever a model does with its inputs: against examples run one by one without any."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.errors import StatisticsError
from merganser.tensors import unpack_upper
from statistics_examples import alone, batched, make_examples

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
FUNNEL = {"vocab_size": 40, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8}

#: name → model, and the window to which its encoder pads by itself.
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "latent attention": (
        lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **SMALL, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
                n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=8,
                first_k_dense_replace=2, num_key_value_heads=2, pad_token_id=0,
            )
        ),
        1,
    ),
    "windows": (
        lambda: t.LongformerForSequenceClassification(
            t.LongformerConfig(**SMALL, attention_window=4, pad_token_id=1, sep_token_id=2)
        ),
        4,
    ),
    "windows of an encoder": (
        lambda: t.LEDForConditionalGeneration(
            t.LEDConfig(
                **SEQ2SEQ, attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
            )
        ),
        4,
    ),
    "chunks": (
        lambda: t.ReformerModelWithLMHead(
            t.ReformerConfig(
                vocab_size=40, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=24,
                attn_layers=["local", "local"], axial_pos_embds=False, max_position_embeddings=64,
                local_attn_chunk_length=4, is_decoder=True,
            )
        ),
        4,
    ),
    "blocks": (
        lambda: t.BigBirdForSequenceClassification(
            t.BigBirdConfig(**SMALL, block_size=2, num_random_blocks=1, sep_token_id=2)
        ),
        1,
    ),
    "global blocks": (
        lambda: t.LongT5ForConditionalGeneration(
            t.LongT5Config(
                **T5, local_radius=3, global_block_size=3, encoder_attention_type="transient-global",
                decoder_start_token_id=0,
            )
        ),
        1,
    ),
    "pooled": (lambda: t.FunnelForSequenceClassification(t.FunnelConfig(**FUNNEL, d_inner=24)), 1),
    "pooled and spread again": (lambda: t.FunnelModel(t.FunnelConfig(**FUNNEL, d_inner=24)), 1),
    "tokens before examples": (
        lambda: t.XLNetForSequenceClassification(
            t.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=5)
        ),
        1,
    ),
    "no mask at all": (
        lambda: t.FNetForSequenceClassification(
            t.FNetConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=24, max_position_embeddings=64
            )
        ),
        1,
    ),
    "convolved": (
        lambda: t.ConvBertForSequenceClassification(
            t.ConvBertConfig(**SMALL, embedding_size=16, conv_kernel_size=3, head_ratio=1)
        ),
        1,
    ),
    "state space": (
        lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)),
        1,
    ),
    "routed": (
        lambda: t.SwitchTransformersForConditionalGeneration(
            t.SwitchTransformersConfig(
                **T5, num_experts=4, decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
            )
        ),
        1,
    ),
    "shared by layers": (
        lambda: t.ZambaForCausalLM(
            t.ZambaConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2,
                intermediate_size=24, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
                n_mamba_heads=2, pad_token_id=0,
            )
        ),
        1,
    ),
}  # fmt: skip


def saved(make: Callable[[], Any], folder: Path) -> tuple[Any, Any]:
    """The model, none of whose parameters is zero, and its checkpoint."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, open_checkpoint(folder)


def inputs_of(model: nn.Module, examples: list[Any], window: int = 1) -> dict[int, Tensor]:
    """(n, d) float64: what each linear weight was multiplied with, by the weight's id, without the model's padding."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    length = [0]

    def see(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if name.startswith("led.encoder") or not model.config.is_encoder_decoder:
            for axis, size in enumerate(x.shape[:-1]):
                if size == window * math.ceil(length[0] / window):
                    x = x.narrow(axis, 0, length[0])
        found[id(module.weight)].append(x.reshape(-1, x.shape[-1]).double())

    handles = [
        module.register_forward_pre_hook(lambda m, a, k, n=name: see(n, m, a, k), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for example in examples:
            length[0] = len(example["input_ids"])
            model(**alone(model, example))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(rows) for key, rows in found.items()}


def check(model: nn.Module, header: Any, tensors: dict[str, Tensor], truth: dict[int, Tensor]) -> set[int]:
    """Compare each linear module's Gram matrix, mean and rows; the ids of the weights that have some."""
    seen = set()
    for layer in header.layers:
        module = dict(model.named_modules()).get(layer.module)
        if layer.input is None or not isinstance(module, nn.Linear) or id(module.weight) not in truth:
            continue
        seen.add(id(module.weight))
        x = truth[id(module.weight)]
        gram = unpack_upper(tensors[f"gram.{layer.input}"]).double()
        expected = x.T @ x / len(x)
        assert layer.rows == len(x), layer.module
        assert (gram - expected).abs().max() <= 5e-6 * expected.abs().max(), layer.module
        assert (tensors[f"mean.{layer.input}"] - x.mean(0)).abs().max() <= 5e-6 * x.abs().max(), layer.module
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_what_padded_batches_give_is_what_examples_alone_give(tmp_path: Path, name: str) -> None:
    make, window = MODELS[name]
    model, checkpoint = saved(make, tmp_path)
    examples = make_examples(model, 9, seed=3)
    truth = inputs_of(model, examples, window)
    for size in (4, 9):
        header, tensors = collect_statistics(model, checkpoint, batched(model, examples, size))
        assert check(model, header, tensors, truth) == truth.keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
        lambda: t.MBartForConditionalGeneration(t.MBartConfig(**SEQ2SEQ, max_position_embeddings=64)),
        lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
                max_position_embeddings=64, word_embed_proj_dim=8,
            )
        ),
        lambda: t.PegasusForConditionalGeneration(t.PegasusConfig(**SEQ2SEQ, max_position_embeddings=64)),
        lambda: t.MarianMTModel(
            t.MarianConfig(**SEQ2SEQ, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=0)
        ),
    ],
)  # fmt: skip
def test_embeddings_whose_forward_takes_no_ids_count_what_they_look_up(tmp_path: Path, make: Any) -> None:
    model, checkpoint = saved(make, tmp_path)
    examples = make_examples(model, 7)
    counts: dict[str, Tensor] = {}
    plain = torch.nn.functional.embedding
    tables = {
        module.weight.data_ptr(): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }

    def lookup(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = tables[weight.data_ptr()]
        counts[name] = counts.get(name, 0) + torch.bincount(ids.flatten(), minlength=len(weight))
        return plain(ids, weight, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "embedding", lookup)
        for example in examples:
            model(**alone(model, example))
    header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 3))
    ours: dict[str, Tensor] = {}
    for layer in header.layers:
        if layer.kind == "embedding":
            name = tables[model.get_submodule(layer.module).weight.data_ptr()]
            ours[name] = ours.get(name, 0) + tensors[f"count.{layer.module}"]
    computed = {name for name in counts if "positions" in name and f"{name}.weight" not in checkpoint.tensors}
    assert ours and ours.keys() == counts.keys() - computed  # Marian's positions are a formula, and not on disk
    for name, found in ours.items():
        assert torch.equal(found, counts[name]), name


def test_one_weight_in_several_places_is_one_layer(tmp_path: Path) -> None:
    model, checkpoint = saved(MODELS["shared by layers"][0], tmp_path)
    header, _ = collect_statistics(model, checkpoint, batched(model, make_examples(model, 5), 4))
    weights = [layer.weight for layer in header.layers if layer.input]
    assert len(weights) == len(set(weights))
    shared = [layer for layer in header.layers if "shared_transf.self_attn.q_proj" in layer.weight]
    assert len(shared) == 1 and not shared[0].tied and shared[0].rows == 2 * header.tokens


class Blind(nn.Module):
    """A model none of whose layers is called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


def test_no_layer_at_all_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Blind()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StatisticsError, match="no layer"):
        collect_statistics(model, open_checkpoint(tmp_path), [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}])
