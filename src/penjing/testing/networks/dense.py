"""Detection, segmentation, depth, and other networks of transformers that answer for every position."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from penjing.testing.networks.base import Made, entry
from penjing.testing.networks.small import SMALL, Pick, images, make, still

SMALL_DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
}  # fmt: skip


def resnet_backbone(*stages: str) -> Any:
    """A small ResNet that gives the named stages."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetConfig(out_features=list(stages), **sizes)


def swin_backbone() -> Any:
    """A small Swin that gives all its stages."""
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return still(transformers.SwinConfig(image_size=64, patch_size=4, out_features=stages, **sizes))


@entry("detection")
def detr() -> Made:
    backbone = {"backbone_config": resnet_backbone("stage4"), "use_timm_backbone": False, "backbone": None}
    return images(make("DetrForObjectDetection", **backbone, **SMALL_DETR), 64, ("logits", "pred_boxes"))


@entry("detection")
def conditional_detr() -> Made:
    backbone = {"backbone_config": resnet_backbone("stage4"), "use_timm_backbone": False, "backbone": None}
    return images(make("ConditionalDetrForObjectDetection", **backbone, **SMALL_DETR), 64, ("logits", "pred_boxes"))


@entry("detection")
def table_transformer() -> Made:
    backbone = {"backbone_config": resnet_backbone("stage4"), "use_timm_backbone": False, "backbone": None}
    return images(make("TableTransformerForObjectDetection", **backbone, **SMALL_DETR), 64, ("logits", "pred_boxes"))


@entry("detection")
def deformable_detr() -> Made:
    backbone = {
        "backbone_config": resnet_backbone("stage2", "stage3", "stage4"), "use_timm_backbone": False, "backbone": None,
    }  # fmt: skip
    sizes = SMALL_DETR | {"d_model": 32, "decoder_layers": 2}  # its norms have 32 groups
    model = make("DeformableDetrForObjectDetection", num_feature_levels=4, **backbone, **sizes)
    return images(model, 64, ("logits", "pred_boxes"))


@entry("detection")
def yolos() -> Made:
    sizes = {"image_size": [16, 16], "patch_size": 8, "num_detection_tokens": 4}
    return images(make("YolosForObjectDetection", **sizes, **SMALL), 16, ("logits", "pred_boxes"))


@entry("detection")
def rt_detr() -> Made:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"], depth_multiplier=1.0,
    )  # fmt: skip
    sizes = {
        "encoder_hidden_dim": 16, "encoder_in_channels": [16, 24, 32], "encoder_ffn_dim": 24, "d_model": 16,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "decoder_layers": 1,
        "num_queries": 5, "decoder_in_channels": [16, 16, 16], "num_denoising": 0, "decoder_n_points": 2,
        "anchor_image_size": [64, 64],
    }  # fmt: skip
    return images(make("RTDetrForObjectDetection", backbone_config=backbone, **sizes), 64, ("logits", "pred_boxes"))


@entry("segmentation", quick=True)
def segformer() -> Made:
    sizes = {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3],
        "strides": [2, 2], "num_attention_heads": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
    }  # fmt: skip
    return images(make("SegformerForSemanticSegmentation", **sizes))


@entry("segmentation")
def upernet() -> Made:
    backbone = still(
        transformers.ConvNextConfig(
            hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_scale_init_value=0.5,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
    )  # fmt: skip
    sizes = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_channels": 8, "auxiliary_in_channels": 16}
    return images(make("UperNetForSemanticSegmentation", backbone_config=backbone, **sizes), 64, "logits")


@entry("segmentation")
def maskformer() -> Made:
    decoder = still(
        transformers.DetrConfig(
            use_timm_backbone=False, backbone_config=resnet_backbone("stage4"), backbone=None, **SMALL_DETR
        )
    )
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}  # its norms have 32 groups
    model = make("MaskFormerForInstanceSegmentation", backbone_config=swin_backbone(), decoder_config=decoder, **sizes)
    return images(model, 64, ("class_queries_logits", "masks_queries_logits"))


@entry("segmentation")
def mask2former() -> Made:
    sizes = {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 24,
        "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 24, "num_queries": 5,
    }  # fmt: skip
    model = make("Mask2FormerForUniversalSegmentation", backbone_config=swin_backbone(), **sizes)
    return images(model, 64, ("class_queries_logits", "masks_queries_logits"))


@entry("segmentation")
def beit_segmentation() -> Made:
    sizes = SMALL | {"num_hidden_layers": 4, "image_size": 32, "patch_size": 8, "out_indices": [0, 1, 2, 3]}
    return images(make("BeitForSemanticSegmentation", pool_scales=[1, 2], **sizes), 32, "logits")


@entry("segmentation")
def mobilevit_deeplab() -> Made:
    sizes = {
        "image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_attention_heads": 4, "mlp_ratio": 2.0, "expand_ratio": 2.0, "aspp_out_channels": 16,
        "atrous_rates": [2, 3, 4], "output_stride": 16,
    }  # fmt: skip
    return images(make("MobileViTForSemanticSegmentation", **sizes), 64)


@entry("segmentation")
def clipseg() -> Made:
    text = {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, **SMALL}
    vision = SMALL | {"num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
    sizes = {
        "projection_dim": 16, "reduce_dim": 8, "extract_layers": [0, 1, 2], "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }  # fmt: skip
    model = make("CLIPSegForImageSegmentation", text_config=text, vision_config=vision, **sizes)
    return Pick(model, ("input_ids", "pixel_values"), "logits"), (
        torch.randint(2, 39, (2, 6)),
        torch.randn(2, 3, 16, 16),
    )


@entry("depth")
def dpt() -> Made:
    sizes = SMALL | {"num_hidden_layers": 4, "image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    neck = {"neck_hidden_sizes": [8, 8, 12, 12], "fusion_hidden_size": 8}
    return images(make("DPTForDepthEstimation", is_hybrid=False, **neck, **sizes), 32)


@entry("depth")
def depth_anything() -> Made:
    backbone = transformers.Dinov2Config(
        image_size=28, patch_size=14, mlp_ratio=2, out_indices=[1, 2, 3, 4], apply_layernorm=True,
        reshape_hidden_states=False, **(SMALL | {"num_hidden_layers": 4}),
    )  # fmt: skip
    sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 12, 12], "fusion_hidden_size": 8}
    return images(make("DepthAnythingForDepthEstimation", backbone_config=still(backbone), patch_size=14, **sizes), 28)


@entry("depth")
def glpn() -> Made:
    sizes = {
        "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "sr_ratios": [4, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16],
        "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2], "num_attention_heads": [1, 2, 2, 2],
        "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 8,
    }  # fmt: skip
    return images(make("GLPNForDepthEstimation", **sizes), 64)


@entry("image to image")
def swin2sr() -> Made:
    sizes = {
        "image_size": 16,
        "patch_size": 1,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    return images(
        make("Swin2SRForImageSuperResolution", upscale=2, upsampler="pixelshuffle", **sizes), 16, "reconstruction"
    )


@entry("image to image")
def vitpose() -> Made:
    backbone = {
        "model_type": "vitpose_backbone", "image_size": [32, 32], "patch_size": [8, 8], "out_indices": [2], **SMALL,
    }  # fmt: skip
    config = transformers.VitPoseBackboneConfig(**{k: v for k, v in backbone.items() if k != "model_type"})
    return images(make("VitPoseForPoseEstimation", backbone_config=still(config), num_labels=5), 32, "heatmaps")


@entry("segmentation")
def sam_encoder() -> Made:
    sizes = {
        "output_channels": 8, "image_size": 32, "patch_size": 8, "mlp_dim": 24, "window_size": 2,
        "global_attn_indexes": [1], "num_pos_feats": 4,
    }  # fmt: skip
    return images(make("SamVisionModel", **sizes, **SMALL), 32)
