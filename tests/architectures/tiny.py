"""Tiny models of transformers' architectures: two layers, width 32, a vocabulary of 48, random weights.

One table of small sizes is applied to every attribute that a configuration has, nested ones too; :data:`SETTINGS` adds
what an architecture wants beside. What this version of transformers cannot build, save and open is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

#: What a model is called with. Models of pictures among text are called with text alone.
Inputs = Literal["text", "seq2seq", "image", "image and text", "waveform", "spectrogram"]

VOCABULARY, FIRST_WORD = 48, 10  # ids below the first word are special tokens
EXAMPLES, LENGTH = 4, 16
SAMPLES = 800  # of a waveform
IMAGE, PATCH = 16, 8
WIDTH = 32  # of hidden states

#: Every attribute that a configuration has under one of these names gets this value.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("width", "projection_dim", "out_hidden_size", "word_embed_proj_dim", "residual_dim"), WIDTH),
    **dict.fromkeys(("hidden_dim", "intermediate_size", "ffn_hidden_size", "d_ff", "d_inner", "ffn_dim", "dff"), 40),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "max_2d_position_embeddings"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 28),
    **dict.fromkeys(("decoder_start_token_id", "bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "forced_eos_token_id"), 2),
    **dict.fromkeys(("forced_bos_token_id", "begin_suppress_tokens", "suppress_tokens"), None),
    "pad_token_id": 0,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_mel_bins": 16,
}

#: The classes by what they are called with.
CLASSES: dict[Inputs, str] = {
    "text": """
        BertModel BertForMaskedLM BertForPreTraining BertForSequenceClassification BertForTokenClassification
        BertForQuestionAnswering BertGenerationDecoder RobertaForMaskedLM RobertaForSequenceClassification
        RobertaPreLayerNormForMaskedLM XLMRobertaForTokenClassification XLMRobertaXLForMaskedLM CamembertForMaskedLM
        DistilBertForMaskedLM DistilBertForSequenceClassification AlbertForMaskedLM AlbertForSequenceClassification
        DebertaForMaskedLM DebertaForSequenceClassification DebertaV2ForMaskedLM DebertaV2ForSequenceClassification
        ElectraForMaskedLM ElectraForPreTraining ElectraForSequenceClassification MPNetForMaskedLM
        MPNetForSequenceClassification XLNetLMHeadModel XLNetForSequenceClassification FlaubertWithLMHeadModel
        FlaubertForSequenceClassification XLMForSequenceClassification FunnelForMaskedLM
        FunnelForSequenceClassification LongformerForMaskedLM LongformerForSequenceClassification BigBirdForMaskedLM
        NystromformerForMaskedLM RemBertForMaskedLM EsmForMaskedLM SqueezeBertForMaskedLM ModernBertForMaskedLM
        ModernBertForSequenceClassification NomicBertModel EuroBertForMaskedLM ConvBertForMaskedLM FNetForMaskedLM
        IBertForMaskedLM MobileBertForMaskedLM LukeForMaskedLM MegatronBertForMaskedLM ErnieForMaskedLM
        RoFormerForMaskedLM MraForMaskedLM YosoForMaskedLM RoCBertForMaskedLM XmodForMaskedLM Data2VecTextForMaskedLM
        CanineForSequenceClassification SplinterForQuestionAnswering GteModel JinaEmbeddingsV3Model DPRQuestionEncoder
        LayoutLMForMaskedLM

        GPT2LMHeadModel GPT2ForSequenceClassification OpenAIGPTLMHeadModel GPTNeoForCausalLM GPTJForCausalLM
        GPTNeoXForCausalLM GPTBigCodeForCausalLM OPTForCausalLM BloomForCausalLM FalconForCausalLM CodeGenForCausalLM
        MptForCausalLM CTRLLMHeadModel XGLMForCausalLM BioGptForCausalLM LlamaModel LlamaForCausalLM
        LlamaForSequenceClassification MistralForCausalLM MinistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
        GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM PhiForCausalLM
        Phi3ForCausalLM StableLmForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM Starcoder2ForCausalLM
        CohereForCausalLM Cohere2ForCausalLM GraniteForCausalLM GlmForCausalLM Glm4ForCausalLM Exaone4ForCausalLM
        SmolLM3ForCausalLM Ernie4_5ForCausalLM HeliumForCausalLM NemotronForCausalLM PersimmonForCausalLM
        SeedOssForCausalLM ArceeForCausalLM ApertusForCausalLM BitNetForCausalLM DiffLlamaForCausalLM
        HunYuanDenseV1ForCausalLM MiniCPM3ForCausalLM ModernBertDecoderForCausalLM NanoChatForCausalLM
        VaultGemmaForCausalLM YoutuForCausalLM CwmForCausalLM

        MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM
        GptOssForCausalLM OlmoeForCausalLM PhimoeForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM
        GraniteMoeHybridForCausalLM JetMoeForCausalLM DbrxForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
        Ernie4_5_MoeForCausalLM HunYuanMoEV1ForCausalLM Llama4ForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM
        JambaForCausalLM FlexOlmoForCausalLM Dots1ForCausalLM AfmoeForCausalLM LongcatFlashForCausalLM
        Lfm2MoeForCausalLM SolarOpenForCausalLM ExaoneMoeForCausalLM GlmMoeDsaForCausalLM

        MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM ZambaForCausalLM Zamba2ForCausalLM BambaForCausalLM
        RecurrentGemmaForCausalLM RwkvForCausalLM xLSTMForCausalLM Qwen3NextForCausalLM Lfm2ForCausalLM
        FalconH1ForCausalLM NemotronHForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM OlmoHybridForCausalLM

        LlavaForConditionalGeneration LlavaNextForConditionalGeneration Qwen2VLForConditionalGeneration
        Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
        Gemma3ForConditionalGeneration Gemma4ForConditionalGeneration PaliGemmaForConditionalGeneration
        Idefics2ForConditionalGeneration Idefics3ForConditionalGeneration SmolVLMForConditionalGeneration
        InternVLForConditionalGeneration Mistral3ForConditionalGeneration AyaVisionForConditionalGeneration
        Llama4ForConditionalGeneration Glm4vForConditionalGeneration MllamaForConditionalGeneration
    """,
    "seq2seq": """
        T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration
        LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration NllbMoeForConditionalGeneration
        BartForConditionalGeneration MBartForConditionalGeneration PegasusForConditionalGeneration
        PegasusXForConditionalGeneration MarianMTModel BlenderbotForConditionalGeneration
        BlenderbotSmallForConditionalGeneration LEDForConditionalGeneration M2M100ForConditionalGeneration
        ProphetNetForConditionalGeneration PLBartForConditionalGeneration MvpForConditionalGeneration
        BigBirdPegasusForConditionalGeneration FSMTForConditionalGeneration T5GemmaForConditionalGeneration
    """,
    "image": """
        ViTForImageClassification DeiTForImageClassification BeitForImageClassification SwinForImageClassification
        Swinv2ForImageClassification Dinov2ForImageClassification DINOv3ViTModel ConvNextForImageClassification
        ConvNextV2ForImageClassification ResNetForImageClassification SegformerForImageClassification
        ViTMAEForPreTraining MobileNetV2ForImageClassification RegNetForImageClassification CLIPVisionModel
        SiglipVisionModel PoolFormerForImageClassification IJepaForImageClassification FocalNetForImageClassification
        PvtForImageClassification
    """,
    "image and text": """
        CLIPModel SiglipModel AltCLIPModel ChineseCLIPModel BlipForImageTextRetrieval BlipForConditionalGeneration
        ViltModel GitForCausalLM
    """,
    "waveform": """
        Wav2Vec2ForCTC Wav2Vec2ForSequenceClassification HubertForCTC WavLMForCTC UniSpeechForCTC SEWForCTC
        Data2VecAudioForCTC
    """,
    "spectrogram": """
        WhisperForConditionalGeneration Speech2TextForConditionalGeneration
    """,
}

_MLA = {"num_key_value_heads": 4}  # latent attention has no groups of heads
_MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}}
_QWEN_VISION = {"embed_dim": 32, "hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2}
_QWEN3_VISION = {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_DELTA_RULE = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_key_value_heads": 4,
    "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_d_state": 8,
}  # fmt: skip
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
_PYRAMID = {**_STAGES, "num_encoder_blocks": 2, "strides": [2, 2]}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 2}
_WAVE = {
    "conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [4, 4], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
}  # fmt: skip

#: What an architecture wants beside :data:`SMALL`; a mapping goes to the nested configuration of that name.
SETTINGS: dict[str, Mapping[str, Any]] = {
    "BambaForCausalLM": {**_MAMBA, "attn_layer_indices": [1]},
    "CanineForSequenceClassification": {"num_hash_buckets": 16},
    "ConvNextForImageClassification": {**_STAGES, "num_stages": 2},
    "ConvNextV2ForImageClassification": {**_STAGES, "num_stages": 2},
    "Data2VecAudioForCTC": {**_WAVE, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 24},
    },
    "DeepseekV2ForCausalLM": _MLA,
    "DeepseekV3ForCausalLM": _MLA,
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "FalconH1ForCausalLM": {**_MAMBA, "mamba_d_ssm": 64},
    "FocalNetForImageClassification": {
        **_STAGES, "embed_dim": 16, "patch_size": 2, "focal_levels": [1, 1], "focal_windows": [3, 3],
    },
    "FunnelForMaskedLM": {"block_sizes": [1, 1]},
    "FunnelForSequenceClassification": {"block_sizes": [1, 1]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 4, "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": None,
        "intermediate_size": [40] * 4,
    },
    "Gemma4ForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16, "hidden_size_per_layer_input": 8,
    },
    "Gemma4ForConditionalGeneration": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
        },
        "vision_config": {"position_embedding_size": 16, "global_head_dim": 8},
    },
    "Glm4MoeLiteForCausalLM": _MLA,
    "Glm4vForConditionalGeneration": _MROPE,
    "GlmMoeDsaForCausalLM": {**_MLA, "mlp_layer_types": ["dense", "sparse"]},
    "GraniteMoeHybridForCausalLM": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "HubertForCTC": _WAVE,
    "Idefics2ForConditionalGeneration": {
        "perceiver_config": {
            "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
        },
    },
    "JambaForCausalLM": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "JetMoeForCausalLM": {"kv_channels": 8},
    "LEDForConditionalGeneration": {
        "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Llama4ForConditionalGeneration": {
        "vision_config": {
            "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128,
        },
    },
    "LongcatFlashForCausalLM": {**_MLA, "zero_expert_num": 1},
    "LongformerForMaskedLM": {"attention_window": 4},
    "LongformerForSequenceClassification": {"attention_window": 4},
    "LukeForMaskedLM": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "MiniCPM3ForCausalLM": _MLA,
    "MllamaForConditionalGeneration": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        },
    },
    "MobileBertForMaskedLM": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4},
    "NemotronHForCausalLM": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 28, "num_hidden_layers": 4,
    },
    "OlmoHybridForCausalLM": _DELTA_RULE,
    "PoolFormerForImageClassification": {**_PYRAMID, "patch_sizes": [3, 3], "padding": [1, 1], "mlp_ratio": 2.0},
    "PvtForImageClassification": {
        **_PYRAMID, "num_attention_heads": [2, 4], "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2],
        "strides": [4, 2], "mlp_ratios": [2, 2],
    },
    "Qwen2VLForConditionalGeneration": {"vision_config": _QWEN_VISION, **_MROPE},
    "Qwen2_5_VLForConditionalGeneration": {
        "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}, **_MROPE,
    },
    "Qwen3NextForCausalLM": _DELTA_RULE,
    "Qwen3VLForConditionalGeneration": {"vision_config": _QWEN3_VISION},
    "Qwen3VLMoeForConditionalGeneration": {"vision_config": _QWEN3_VISION},
    "Qwen3_5ForCausalLM": _DELTA_RULE,
    "Qwen3_5MoeForCausalLM": _DELTA_RULE,
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "RegNetForImageClassification": {**_STAGES, "embedding_size": 8, "groups_width": 8},
    "RemBertForMaskedLM": {"input_embedding_size": 16, "output_embedding_size": 24},
    "ResNetForImageClassification": {**_STAGES, "embedding_size": 8},
    "RwkvForCausalLM": {"context_length": 64},
    "SEWForCTC": _WAVE,
    "SegformerForImageClassification": {
        **_PYRAMID, "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "patch_sizes": [3, 3], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    },
    "Speech2TextForConditionalGeneration": {"conv_channels": 16, "input_feat_per_channel": 16},
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "UniSpeechForCTC": _WAVE,
    "ViTMAEForPreTraining": {
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 24,
        "decoder_num_attention_heads": 2,
    },
    "Wav2Vec2ForCTC": _WAVE,
    "Wav2Vec2ForSequenceClassification": _WAVE,
    "WavLMForCTC": _WAVE,
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "YoutuForCausalLM": _MLA,
    "Zamba2ForCausalLM": {**_ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "adapter_rank": 4},
    "ZambaForCausalLM": {**_ZAMBA, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    "xLSTMForCausalLM": {"chunk_size": 16, "use_cache": False, "embedding_dim": 32, "num_blocks": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one class.

    Attributes:
        model_class: its name in transformers.
        inputs: what it is called with.
        settings: of its configuration, beside :data:`SMALL`.
    """

    model_class: str
    inputs: Inputs
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        """The configuration."""
        return small(getattr(transformers, self.model_class).config_class, self.settings)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model, in float32 and eval mode; norms and biases are random, too."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model.eval()

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the model as a user would."""
        self.build(seed).save_pretrained(folder)
        return folder

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """What the model is called with: examples of different length, padded on the right."""
        return batch(self.config(), self.inputs, seed)


def small(config_class: type[PreTrainedConfig], settings: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration with small sizes wherever it has them, and these settings."""
    settings = dict(settings or {})
    default = config_class()
    present = default.to_dict()
    values = {name: value for name, value in SMALL.items() if name in present and not _listed(name, present[name])}
    for name, nested in config_class.sub_configs.items():
        usual = getattr(default, name, None)
        kind = type(usual) if isinstance(usual, PreTrainedConfig) else nested
        if hasattr(kind, "to_dict"):
            values[name] = small(kind, settings.pop(name, {})).to_dict()
    return config_class(**(values | settings))


def _listed(name: str, value: Any) -> bool:
    """Whether an attribute has a value for each stage, which :data:`SMALL` does not know."""
    return isinstance(value, list | tuple) and not name.endswith("token_id")


def batch(config: PreTrainedConfig, inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a kind for a model with this configuration."""
    torch.manual_seed(seed)
    found: dict[str, Tensor] = {}
    if inputs in ("text", "seq2seq", "image and text"):
        found |= _tokens(LENGTH)
    if inputs in ("seq2seq", "spectrogram"):
        found |= {f"decoder_{name}": value for name, value in _tokens(LENGTH - 3, step=3).items()}
    if inputs in ("image", "image and text"):
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", IMAGE)
        found["pixel_values"] = torch.randn(EXAMPLES, getattr(vision, "num_channels", 3), side, side)
    if config.model_type == "vit_mae":  # what is masked would be drawn anew in each pass
        found["noise"] = torch.rand(EXAMPLES, (config.image_size // config.patch_size) ** 2)
    if inputs == "waveform":
        found["input_values"] = torch.randn(EXAMPLES, SAMPLES)
        found["attention_mask"] = _mask(SAMPLES, step=50)
    if inputs == "spectrogram":
        positions, bins = config.max_source_positions, SMALL["num_mel_bins"]
        if config.model_type == "whisper":
            found["input_features"] = torch.randn(EXAMPLES, bins, 2 * positions)
        else:
            found |= {"input_features": torch.randn(EXAMPLES, positions, bins), "attention_mask": _mask(positions, 8)}
    return found


def _tokens(length: int, step: int = 4) -> dict[str, Tensor]:
    mask = _mask(length, step)
    ids = torch.randint(FIRST_WORD, VOCABULARY, mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask}


def _mask(length: int, step: int) -> Tensor:
    """Each example is shorter by ``step`` than the one before."""
    lengths = length - step * torch.arange(EXAMPLES)
    return (torch.arange(length)[None] < lengths[:, None]).long()


TINY: dict[str, Tiny] = {
    name: Tiny(name, inputs, SETTINGS.get(name, {})) for inputs, names in CLASSES.items() for name in names.split()
}
