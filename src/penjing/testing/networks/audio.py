"""Sound and speech, from transformers."""

from __future__ import annotations

import torch

from penjing.testing.networks.base import Made, entry
from penjing.testing.networks.small import SMALL, Pick, make

WAVES = {
    "conv_dim": [8, 16], "conv_stride": [4, 2], "conv_kernel": [6, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
    "apply_spec_augment": False, "classifier_proj_size": 8, "vocab_size": 20, **SMALL,
}  # fmt: skip


def waves(kind: str, **settings: object) -> Made:
    """A model that reads two short sounds."""
    return Pick(make(kind, **(WAVES | settings)), "input_values"), (torch.randn(2, 96),)


@entry("audio", quick=True)
def wav2vec2() -> Made:
    return waves("Wav2Vec2ForSequenceClassification")


@entry("audio")
def wav2vec2_conformer() -> Made:
    return waves("Wav2Vec2ConformerForCTC", conv_depthwise_kernel_size=3, position_embeddings_type="rotary")


@entry("audio")
def hubert() -> Made:
    return waves("HubertForSequenceClassification")


@entry("audio")
def hubert_stable() -> Made:
    return waves("HubertForCTC", do_stable_layer_norm=True, feat_extract_norm="layer")


@entry("audio")
def wavlm() -> Made:
    return waves("WavLMForSequenceClassification", num_buckets=8, max_bucket_distance=16)


@entry("audio")
def unispeech() -> Made:
    return waves("UniSpeechForSequenceClassification")


@entry("audio")
def data2vec_audio() -> Made:
    return waves("Data2VecAudioForSequenceClassification", conv_pos_kernel_size=5, num_conv_pos_embeddings=2)


@entry("audio")
def sew() -> Made:
    return waves("SEWForSequenceClassification", squeeze_factor=2)


@entry("audio")
def sew_d() -> Made:
    return waves("SEWDForSequenceClassification", squeeze_factor=2, position_buckets=4, max_position_embeddings=16)


@entry("audio")
def ast() -> Made:
    sizes = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
    return Pick(make("ASTForAudioClassification", **sizes, **SMALL), "input_values"), (torch.randn(2, 16, 8),)


@entry("audio")
def whisper() -> Made:
    sizes = {
        "vocab_size": 40, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "decoder_start_token_id": 1,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = make("WhisperForConditionalGeneration", **sizes)
    arguments = ("input_features", "decoder_input_ids")
    return Pick(model, arguments, use_cache=False), (torch.randn(2, 8, 16), torch.randint(3, 40, (2, 4)))


@entry("audio")
def whisper_classifier() -> Made:
    sizes = {
        "vocab_size": 40, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 24, "max_source_positions": 8, "classifier_proj_size": 8, "pad_token_id": 0,
    }  # fmt: skip
    return Pick(make("WhisperForAudioClassification", **sizes), "input_features"), (torch.randn(2, 8, 16),)


@entry("audio")
def moonshine() -> Made:
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
    }  # fmt: skip
    model = make("MoonshineForConditionalGeneration", **sizes)
    return Pick(model, ("input_values", "decoder_input_ids"), "logits", use_cache=False), (
        torch.randn(2, 2000),
        torch.randint(3, 40, (2, 4)),
    )


@entry("audio")
def speech_to_text() -> Made:
    sizes = {
        "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "conv_channels": 16,
        "input_feat_per_channel": 8, "max_source_positions": 16, "max_target_positions": 16,
    }  # fmt: skip
    model = make("Speech2TextForConditionalGeneration", **sizes)
    arguments = ("input_features", "decoder_input_ids")
    return Pick(model, arguments, use_cache=False), (torch.randn(2, 16, 8), torch.randint(3, 40, (2, 4)))


SPEECHT5 = {
    "vocab_size": 40, "hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
    "speech_decoder_postnet_units": 8, "speech_decoder_prenet_units": 8, "reduction_factor": 1,
    "conv_dim": [8, 16], "conv_stride": [4, 2], "conv_kernel": [6, 3], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "speaker_embedding_dim": 8,
    "encoder_max_relative_position": 4, "max_text_positions": 16, "max_speech_positions": 40,
}  # fmt: skip


@entry("audio")
def speecht5_recognition() -> Made:
    model = make("SpeechT5ForSpeechToText", **SPEECHT5)
    arguments = ("input_values", "decoder_input_ids")
    return Pick(model, arguments, use_cache=False), (torch.randn(2, 96), torch.randint(3, 40, (2, 4)))


@entry("audio")
def speecht5_vocoder() -> Made:
    sizes = {
        "model_in_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3], [1, 3]],
    }  # fmt: skip
    return make("SpeechT5HifiGan", **sizes), (torch.randn(2, 12, 8),)


@entry("audio")
def univnet() -> Made:
    sizes = {
        "model_in_channels": 8, "model_hidden_channels": 8, "num_mel_bins": 8, "resblock_kernel_sizes": [3],
        "resblock_stride_sizes": [2], "resblock_dilation_sizes": [[1, 3]], "kernel_predictor_hidden_channels": 8,
        "kernel_predictor_num_blocks": 1,
    }  # fmt: skip
    model = Pick(make("UnivNetModel", **sizes), ("input_features", "noise_sequence"), "waveforms")
    return model, (torch.randn(2, 6, 8), torch.randn(2, 6, 8))


@entry("audio")
def encodec_encoder() -> Made:
    sizes = {"num_filters": 4, "upsampling_ratios": [4, 2], "hidden_size": 8, "num_lstm_layers": 1, "codebook_dim": 8}
    model: torch.nn.Module = make("EncodecModel", codebook_size=16, target_bandwidths=[1.5], **sizes)
    return model.get_submodule("encoder"), (torch.randn(2, 1, 64),)


@entry("audio")
def encodec_decoder() -> Made:
    sizes = {"num_filters": 4, "upsampling_ratios": [4, 2], "hidden_size": 8, "num_lstm_layers": 1, "codebook_dim": 8}
    model: torch.nn.Module = make("EncodecModel", codebook_size=16, target_bandwidths=[1.5], **sizes)
    return model.get_submodule("decoder"), (torch.randn(2, 8, 8),)


@entry("audio")
def dac_encoder() -> Made:
    sizes = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 2], "decoder_hidden_size": 16, "hidden_size": 16}
    return make("DacModel", codebook_size=16, **sizes).get_submodule("encoder"), (torch.randn(2, 1, 64),)


@entry("audio")
def dac_decoder() -> Made:
    sizes = {"encoder_hidden_size": 4, "upsampling_ratios": [2, 2], "decoder_hidden_size": 16, "hidden_size": 16}
    return make("DacModel", codebook_size=16, **sizes).get_submodule("decoder"), (torch.randn(2, 16, 8),)


@entry("audio")
def clap_audio() -> Made:
    sizes = {
        "spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4,
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
        "projection_dim": 8, "num_hidden_layers": 2, "aff_block_r": 2,
    }  # fmt: skip
    model = make("ClapAudioModelWithProjection", **sizes)
    return Pick(model, "input_features", "audio_embeds"), (torch.randn(2, 1, 40, 8),)


@entry("audio")
def vits_text_encoder() -> Made:
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24,
        "flow_size": 16, "spectrogram_bins": 9, "window_size": 2,
    }  # fmt: skip
    model = make("VitsModel", **sizes).get_submodule("text_encoder")
    inputs = torch.randint(2, 40, (2, 6)), torch.ones(2, 6, 1)
    return Pick(model, ("input_ids", "padding_mask"), "last_hidden_state"), inputs
