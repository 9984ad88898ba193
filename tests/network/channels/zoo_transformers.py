"""Families from transformers, in miniature."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from zoo_base import entry


class Pick(nn.Module):
    """One tensor out of what a transformers model gives."""

    def __init__(self, model: nn.Module, argument: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.argument, self.fixed = model, argument, fixed

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.argument: x}, **self.fixed)[0]


def images(model: nn.Module, size: int = 16) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Pick(model, "pixel_values"), (torch.randn(2, 3, size, size),)


def words(model: nn.Module, **fixed: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Pick(model, "input_ids", **fixed), (torch.randint(2, 40, (2, 6)),)


# transformers ---------------------------------------------------------------------------------------------------------
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@entry
def resnet():
    return images(
        hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
        )
    )


@entry
def mobilenet_v1():
    return images(
        hf.MobileNetV1ForImageClassification(
            hf.MobileNetV1Config(depth_multiplier=0.25, min_depth=4, num_labels=3, classifier_dropout_prob=0.0)
        ),
        32,
    )


@entry
def mobilenet_v2():
    return images(
        hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(
                depth_multiplier=0.2, min_depth=4, depth_divisible_by=4, num_labels=3, classifier_dropout_prob=0.0
            )
        ),
        32,
    )


@entry
def regnet():
    return images(
        hf.RegNetForImageClassification(
            hf.RegNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4, layer_type="y", num_labels=3
            )
        )
    )


@entry
def convnext():
    return images(
        hf.ConvNextForImageClassification(
            hf.ConvNextConfig(
                hidden_sizes=[8, 16],
                depths=[1, 1],
                num_stages=2,
                patch_size=2,
                layer_scale_init_value=0.5,
                num_labels=3,
            )
        )
    )


@entry
def convnext_v2():
    return images(
        hf.ConvNextV2ForImageClassification(
            hf.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
        )
    )


@entry
def efficientnet():
    return images(
        hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(
                width_coefficient=0.25,
                depth_coefficient=0.1,
                hidden_dim=320,
                in_channels=[16, 8, 8],
                out_channels=[8, 8, 16],
                kernel_sizes=[3, 3, 3],
                strides=[1, 2, 1],
                num_block_repeats=[1, 1, 1],
                expand_ratios=[1, 4, 4],
                depthwise_padding=[],
                dropout_rate=0.0,
                drop_connect_rate=0.0,
                num_labels=3,
            )
        )
    )


@entry
def vit():
    return images(
        hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL, **STILL))
    )


@entry
def deit():
    return images(
        hf.DeiTForImageClassification(hf.DeiTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL, **STILL))
    )


@entry
def swin():
    return images(
        hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16,
                patch_size=2,
                embed_dim=8,
                depths=[2, 1],
                num_heads=[2, 4],
                window_size=4,
                drop_path_rate=0.0,
                num_labels=3,
            )
        )
    )


@entry
def segformer():
    return images(
        hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 1],
                sr_ratios=[2, 1],
                hidden_sizes=[8, 16],
                patch_sizes=[3, 3],
                strides=[2, 2],
                num_attention_heads=[2, 2],
                mlp_ratios=[2, 2],
                decoder_hidden_size=16,
                drop_path_rate=0.0,
                classifier_dropout_prob=0.0,
                num_labels=3,
                **STILL,
            )
        )
    )


@entry
def bert():
    return words(
        hf.BertForSequenceClassification(
            hf.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **SMALL, **STILL)
        )
    )


@entry
def distilbert():
    return words(
        hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=40,
                max_position_embeddings=16,
                dim=16,
                n_layers=2,
                n_heads=4,
                hidden_dim=24,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
                num_labels=3,
            )
        )
    )


@entry
def gpt2():
    return words(
        hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=40,
                n_positions=16,
                n_embd=16,
                n_layer=2,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        use_cache=False,
    )


@entry
def llama():
    return words(hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, num_key_value_heads=2, **SMALL)), use_cache=False)


@entry
def qwen3():
    return words(
        hf.Qwen3ForCausalLM(hf.Qwen3Config(vocab_size=40, num_key_value_heads=2, head_dim=4, **SMALL)), use_cache=False
    )


@entry
def t5_encoder():
    return words(
        hf.T5EncoderModel(
            hf.T5Config(
                vocab_size=40,
                d_model=16,
                d_kv=4,
                d_ff=24,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
    )


@entry
def clip_vision():
    return images(
        hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=6, **SMALL))
    )


@entry
def wav2vec2():
    model = hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            vocab_size=20,
            conv_dim=[8, 16],
            conv_stride=[4, 2],
            conv_kernel=[6, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
            apply_spec_augment=False,
            final_dropout=0.0,
            classifier_proj_size=8,
            num_labels=3,
            **SMALL,
        )
    )
    return Pick(model.eval(), "input_values"), (torch.randn(2, 96),)


@entry
def bloom():
    return words(
        hf.BloomForCausalLM(
            hf.BloomConfig(
                vocab_size=40, hidden_size=16, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
            )
        ),
        use_cache=False,
    )


@entry
def gemma3():
    return words(
        hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(vocab_size=40, head_dim=4, num_key_value_heads=1, **SMALL)),
        use_cache=False,
    )


@entry
def bit():
    config = hf.BitConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, layer_type="preactivation", num_labels=3
    )
    return images(hf.BitForImageClassification(config))
