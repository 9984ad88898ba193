"""Pictures, sound and text together, video, and time series, from transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penjing.testing.networks.base import Made, entry
from penjing.testing.networks.small import SMALL, WORDS, Pick, images, make

TEXT = {**WORDS, "eos_token_id": 39, "bos_token_id": 0, "pad_token_id": 1, **SMALL}
EYES = {"image_size": 16, "patch_size": 8, **SMALL}
EMBEDS = ("text_embeds", "image_embeds")


def sentence() -> torch.Tensor:
    return torch.cat([torch.randint(2, 39, (2, 5)), torch.full((2, 1), 39)], 1)


def picture(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


# multi-modal ----------------------------------------------------------------------------------------------------------
@entry("multi-modal", quick=True)
def clip_vision() -> Made:
    return images(make("CLIPVisionModelWithProjection", projection_dim=6, **EYES))


@entry("multi-modal")
def clip() -> Made:
    model = make("CLIPModel", text_config=TEXT, vision_config=EYES, projection_dim=6)
    return Pick(model, ("input_ids", "pixel_values"), EMBEDS), (sentence(), picture())


@entry("multi-modal")
def siglip() -> Made:
    text = TEXT | {"projection_size": 16}
    model = make("SiglipModel", text_config=text, vision_config=EYES)
    return Pick(model, ("input_ids", "pixel_values"), EMBEDS), (sentence(), picture())


@entry("multi-modal")
def align() -> Made:
    vision = {
        "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 16,
        "in_channels": [16, 8], "out_channels": [8, 16], "kernel_sizes": [3, 3], "strides": [1, 2],
        "num_block_repeats": [1, 1], "expand_ratios": [1, 4], "depthwise_padding": [],
    }  # fmt: skip
    model = make("AlignModel", text_config=TEXT, vision_config=vision, projection_dim=8)
    return Pick(model, ("input_ids", "pixel_values"), EMBEDS), (sentence(), picture(32))


@entry("multi-modal")
def altclip_vision() -> Made:
    return images(make("AltCLIPVisionModel", **EYES), outputs="pooler_output")


@entry("multi-modal")
def chinese_clip() -> Made:
    model = make("ChineseCLIPModel", text_config=TEXT, vision_config=EYES, projection_dim=6)
    return Pick(model, ("input_ids", "pixel_values"), EMBEDS), (sentence(), picture())


@entry("multi-modal")
def owlvit() -> Made:
    model = make("OwlViTForObjectDetection", text_config=TEXT, vision_config=EYES, projection_dim=16)
    return Pick(model, ("input_ids", "pixel_values"), ("logits", "pred_boxes")), (sentence(), picture())


@entry("multi-modal")
def groupvit_vision() -> Made:
    sizes = SMALL | {
        "image_size": 16, "patch_size": 4, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [3, 2],
        "hidden_size": 16,
    }  # fmt: skip
    return images(make("GroupViTVisionModel", **sizes), outputs="pooler_output")


@entry("multi-modal")
def blip() -> Made:
    model = make("BlipForImageTextRetrieval", text_config=TEXT, vision_config=EYES, image_text_hidden_size=8)
    return Pick(model, ("input_ids", "pixel_values"), "itm_score"), (sentence(), picture())


@entry("multi-modal")
def blip2_qformer() -> Made:
    model = make("Blip2QFormerModel", encoder_hidden_size=12, **(SMALL | {"vocab_size": 40}))
    return Pick(model, ("query_embeds", "encoder_hidden_states"), "last_hidden_state"), (
        torch.randn(2, 3, 16),
        torch.randn(2, 5, 12),
    )


@entry("multi-modal")
def vilt() -> Made:
    model = make("ViltForImagesAndTextClassification", num_images=1, modality_type_vocab_size=2, **TEXT | EYES)
    return Pick(model, ("input_ids", "pixel_values"), "logits"), (sentence(), torch.randn(2, 1, 3, 16, 16))


@entry("multi-modal")
def visual_bert() -> Made:
    model = make("VisualBertModel", visual_embedding_dim=12, **TEXT)
    return Pick(model, ("input_ids", "visual_embeds"), "pooler_output"), (sentence(), torch.randn(2, 3, 12))


@entry("multi-modal")
def lxmert() -> Made:
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "l_layers": 1,
        "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12,
    }  # fmt: skip
    model = make("LxmertModel", **sizes)
    arguments = ("input_ids", "visual_feats", "visual_pos")
    inputs = sentence(), torch.randn(2, 3, 12), torch.rand(2, 3, 4)
    return Pick(model, arguments, ("language_output", "vision_output", "pooled_output")), inputs


class Boxed(nn.Module):
    """Any four numbers make a box whose right is not left of its left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, corners: Tensor) -> Tensor:
        result: Tensor = self.model(ids, corners.sort(-1).values)
        return result


@entry("multi-modal")
def layoutlm() -> Made:
    model = make("LayoutLMForTokenClassification", max_2d_position_embeddings=20, **TEXT)
    return Boxed(Pick(model, ("input_ids", "bbox"), "logits")), (sentence(), torch.randint(0, 9, (2, 6, 4)))


@entry("multi-modal")
def git() -> Made:
    model = make("GitForCausalLM", vision_config=EYES, **TEXT)
    return Pick(model, ("input_ids", "pixel_values"), "logits", use_cache=False), (sentence(), picture())


@entry("multi-modal")
def trocr_decoder() -> Made:
    sizes = {
        "vocab_size": 40, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 24,
        "max_position_embeddings": 16, "is_decoder": True, "cross_attention_hidden_size": 16,
    }  # fmt: skip
    model = Pick(make("TrOCRForCausalLM", **sizes), ("input_ids", "encoder_hidden_states"), "logits", use_cache=False)
    return model, (sentence(), torch.randn(2, 4, 16))


@entry("multi-modal")
def llava() -> Made:
    text = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **EYES}
    sizes = {"image_token_index": 38, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    model = make("LlavaForConditionalGeneration", text_config=text, vision_config=vision, **sizes)
    words = torch.cat([torch.full((2, 4), 38), torch.randint(2, 37, (2, 3))], 1)
    return Pick(model, ("input_ids", "pixel_values"), "logits", use_cache=False), (words, picture())


@entry("multi-modal")
def clap() -> Made:
    audio = {
        "spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4,
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
    }  # fmt: skip
    text = TEXT | {"projection_dim": 8}
    model = make("ClapModel", text_config=text, audio_config=audio, projection_dim=8)
    arguments = ("input_ids", "input_features")
    return Pick(model, arguments, ("text_embeds", "audio_embeds")), (sentence(), torch.randn(2, 1, 40, 8))


# video ----------------------------------------------------------------------------------------------------------------
@entry("video")
def timesformer() -> Made:
    model = make("TimesformerForVideoClassification", num_frames=2, **EYES)
    return Pick(model, "pixel_values", "logits"), (torch.randn(2, 2, 3, 16, 16),)


@entry("video")
def videomae() -> Made:
    model = make("VideoMAEForVideoClassification", num_frames=4, tubelet_size=2, **EYES)
    return Pick(model, "pixel_values", "logits"), (torch.randn(2, 4, 3, 16, 16),)


@entry("video")
def vivit() -> Made:
    model = make("VivitForVideoClassification", num_frames=4, tubelet_size=[2, 8, 8], **EYES)
    return Pick(model, "pixel_values", "logits"), (torch.randn(2, 4, 3, 16, 16),)


# time series ----------------------------------------------------------------------------------------------------------
@entry("series")
def patchtst() -> Made:
    sizes = {
        "num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16,
        "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 24, "num_targets": 3,
    }  # fmt: skip
    model = make("PatchTSTForClassification", use_cls_token=True, **sizes)
    return Pick(model, "past_values", "prediction_logits"), (torch.randn(2, 16, 2),)


@entry("series")
def patchtsmixer() -> Made:
    sizes = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2, "d_model": 8}
    model = make("PatchTSMixerForTimeSeriesClassification", num_layers=2, num_targets=3, **sizes)
    return Pick(model, "past_values", "prediction_outputs"), (torch.randn(2, 16, 2),)


SERIES = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "scaling": "mean",
}  # fmt: skip
PAST = (
    "past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features",
)  # fmt: skip


def past() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 10), torch.randn(2, 10, 1), torch.ones(2, 10), torch.randn(2, 4), torch.randn(2, 4, 1)


@entry("series")
def time_series_transformer() -> Made:
    return Pick(make("TimeSeriesTransformerModel", **SERIES), PAST, "last_hidden_state", use_cache=False), past()


@entry("series")
def informer() -> Made:
    return Pick(make("InformerModel", **SERIES), PAST, "last_hidden_state", use_cache=False), past()


@entry("series")
def autoformer() -> Made:
    sizes = SERIES | {"label_length": 4, "moving_average": 3}
    return Pick(make("AutoformerModel", **sizes), PAST, "last_hidden_state", use_cache=False), past()


@entry("series")
def timesfm() -> Made:
    sizes = {
        "patch_length": 4, "context_length": 16, "horizon_length": 4, "head_dim": 4, "quantiles": [0.1, 0.9],
        "freq_size": 3, **SMALL,
    }  # fmt: skip
    model = make("TimesFmModel", **sizes)
    arguments = ("past_values", "past_values_padding", "freq")
    inputs = torch.randn(2, 16), torch.zeros(2, 16), torch.zeros(2, 1, dtype=torch.long)
    return Pick(model, arguments, "last_hidden_state"), inputs


@entry("series")
def decision_transformer() -> Made:
    sizes = {
        "state_dim": 5,
        "act_dim": 3,
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 4,
        "max_ep_len": 10,
        "n_inner": 24,
    }
    arguments = ("states", "actions", "rewards", "returns_to_go", "timesteps", "attention_mask")
    inputs = (
        torch.randn(2, 4, 5), torch.randn(2, 4, 3), torch.randn(2, 4, 1), torch.randn(2, 4, 1),
        torch.randint(0, 10, (2, 4)), torch.ones(2, 4),
    )  # fmt: skip
    return Pick(make("DecisionTransformerModel", **sizes), arguments, "action_preds"), inputs
