"""Image classifiers and backbones of transformers."""

from __future__ import annotations

import torch

from penjing.testing.networks.base import Made, entry
from penjing.testing.networks.small import SMALL, Pick, images, make

PATCHES = {"image_size": 16, "patch_size": 8}


@entry("image", quick=True)
def resnet() -> Made:
    return images(make("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]))


@entry("image")
def resnet_bottleneck() -> Made:
    sizes = {"hidden_sizes": [16, 32, 48], "depths": [1, 2, 1]}
    return images(make("ResNetForImageClassification", embedding_size=8, layer_type="bottleneck", **sizes), 32)


@entry("image", quick=True)
def mobilenet_v1() -> Made:
    return images(make("MobileNetV1ForImageClassification", depth_multiplier=0.25, min_depth=4), 32)


@entry("image", quick=True)
def mobilenet_v2() -> Made:
    sizes = {"depth_multiplier": 0.2, "min_depth": 4, "depth_divisible_by": 4}
    return images(make("MobileNetV2ForImageClassification", **sizes), 32)


@entry("image", quick=True)
def regnet() -> Made:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4}
    return images(make("RegNetForImageClassification", layer_type="y", **sizes))


@entry("image", quick=True)
def convnext() -> Made:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    return images(make("ConvNextForImageClassification", layer_scale_init_value=0.5, **sizes))


@entry("image", quick=True)
def convnext_v2() -> Made:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    return images(make("ConvNextV2ForImageClassification", **sizes))


@entry("image", quick=True)
def efficientnet() -> Made:
    sizes = {
        "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "in_channels": [16, 8, 8],
        "out_channels": [8, 8, 16], "kernel_sizes": [3, 3, 3], "strides": [1, 2, 1], "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 4, 4], "depthwise_padding": [],
    }  # fmt: skip
    return images(make("EfficientNetForImageClassification", **sizes))


@entry("image", quick=True)
def bit() -> Made:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
    return images(make("BitForImageClassification", layer_type="preactivation", **sizes))


@entry("image")
def hgnet_v2() -> Made:
    stages = {
        "stem_channels": [3, 8, 8], "hidden_sizes": [16, 24], "depths": [1, 1], "stage_in_channels": [8, 16],
        "stage_mid_channels": [8, 8], "stage_out_channels": [16, 24], "stage_num_blocks": [1, 2],
        "stage_numb_of_layers": [2, 2], "stage_downsample": [False, True], "stage_light_block": [False, True],
        "stage_kernel_size": [3, 3], "stem_strides": [2, 1, 1, 1, 1], "embedding_size": 8,
    }  # fmt: skip
    return images(make("HGNetV2ForImageClassification", **stages), 32)


@entry("image", quick=True)
def vit() -> Made:
    return images(make("ViTForImageClassification", **PATCHES, **SMALL))


@entry("image", quick=True)
def deit() -> Made:
    return images(make("DeiTForImageClassification", **PATCHES, **SMALL))


@entry("image")
def deit_distilled() -> Made:
    return images(make("DeiTForImageClassificationWithTeacher", **PATCHES, **SMALL))


@entry("image")
def beit() -> Made:
    bias = {"use_relative_position_bias": True, "layer_scale_init_value": 0.5}
    return images(make("BeitForImageClassification", **PATCHES, **SMALL, **bias))


@entry("image")
def data2vec_vision() -> Made:
    return images(make("Data2VecVisionForImageClassification", layer_scale_init_value=0.5, **PATCHES, **SMALL))


@entry("image")
def dinov2() -> Made:
    return images(make("Dinov2ForImageClassification", mlp_ratio=2, layerscale_value=0.5, **PATCHES, **SMALL))


@entry("image")
def dinov2_registers() -> Made:
    sizes = {"mlp_ratio": 2, "num_register_tokens": 2, "use_swiglu_ffn": True}
    return images(make("Dinov2WithRegistersForImageClassification", **sizes, **PATCHES, **SMALL))


@entry("image")
def dinov3() -> Made:
    return images(make("DINOv3ViTModel", **PATCHES, **SMALL), outputs="last_hidden_state")


@entry("image")
def vit_mae() -> Made:
    decoder = {
        "decoder_num_attention_heads": 2, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 16, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    model = Pick(make("ViTMAEForPreTraining", **decoder, **SMALL), ("pixel_values", "noise"), "logits")
    return model, (torch.randn(2, 3, 16, 16), torch.rand(2, 16))


@entry("image")
def vit_msn() -> Made:
    return images(make("ViTMSNForImageClassification", **PATCHES, **SMALL))


@entry("image", quick=True)
def swin() -> Made:
    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    return images(make("SwinForImageClassification", image_size=16, patch_size=2, **sizes))


@entry("image")
def swin_v2() -> Made:
    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    return images(make("Swinv2ForImageClassification", image_size=16, patch_size=2, **sizes))


@entry("image")
def levit() -> Made:
    sizes = {
        "image_size": 32, "hidden_sizes": [16, 24], "num_attention_heads": [2, 3], "depths": [1, 1],
        "key_dim": [4, 4], "attention_ratio": [2, 2], "mlp_ratio": [2, 2], "kernel_size": 3, "stride": 2, "padding": 1,
        "down_ops": [["Subsample", 4, 4, 4, 2, 2], [""]],
    }  # fmt: skip
    return images(make("LevitForImageClassification", **sizes), 32)


@entry("image")
def pvt() -> Made:
    sizes = {
        "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    }  # fmt: skip
    return images(make("PvtForImageClassification", **sizes), 32)


@entry("image")
def pvt_v2() -> Made:
    sizes = {
        "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    }  # fmt: skip
    return images(make("PvtV2ForImageClassification", **sizes), 32)


@entry("image")
def poolformer() -> Made:
    sizes = {
        "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2],
        "padding": [2, 1], "mlp_ratio": 2.0, "layer_scale_init_value": 0.5,
    }  # fmt: skip
    return images(make("PoolFormerForImageClassification", **sizes), 32)


@entry("image")
def cvt() -> Made:
    sizes = {
        "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [8, 16],
        "num_heads": [1, 2], "depth": [1, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0],
        "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
        "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2],
        "padding_q": [1, 1], "stride_q": [1, 1],
    }  # fmt: skip
    return images(make("CvtForImageClassification", **sizes), 32)


@entry("image")
def mobilevit() -> Made:
    sizes = {
        "image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_attention_heads": 4, "mlp_ratio": 2.0, "expand_ratio": 2.0,
    }  # fmt: skip
    return images(make("MobileViTForImageClassification", **sizes), 64)


@entry("image")
def mobilevit_v2() -> Made:
    sizes = {
        "image_size": 64,
        "width_multiplier": 0.25,
        "base_attn_unit_dims": [32, 32, 32],
        "n_attn_blocks": [1, 1, 1],
    }
    return images(make("MobileViTV2ForImageClassification", ffn_multiplier=2, **sizes), 64)


@entry("image")
def swiftformer() -> Made:
    sizes = {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "mlp_ratio": 2}
    return images(make("SwiftFormerForImageClassification", **sizes), 64)


@entry("image")
def focalnet() -> Made:
    sizes = {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [8, 16]}
    return images(make("FocalNetForImageClassification", image_size=16, patch_size=4, **sizes))


@entry("image")
def hiera() -> Made:
    sizes = {
        "embed_dim": 8, "image_size": [32, 32], "patch_kernel": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
        "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "num_query_pool": 1, "query_stride": [2, 2],
        "masked_unit_size": [4, 4], "masked_unit_attention": [True, False],
    }  # fmt: skip
    return images(make("HieraForImageClassification", **sizes), 32)


@entry("image")
def imagegpt() -> Made:
    sizes = {"vocab_size": 41, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    model = Pick(make("ImageGPTForImageClassification", **sizes), "input_ids", "logits", use_cache=False)
    return model, (torch.randint(0, 40, (2, 9)),)


@entry("image")
def ijepa() -> Made:
    return images(make("IJepaForImageClassification", **PATCHES, **SMALL))


@entry("image", quick=True)
def textnet() -> Made:
    sizes = {
        "stem_num_channels": 3, "stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 24],
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
        "conv_layer_strides": [[2], [1], [1], [2]],
    }  # fmt: skip
    return images(make("TextNetForImageClassification", **sizes), 32)
