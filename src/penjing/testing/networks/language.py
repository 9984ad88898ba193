"""Encoders, decoders and both together for text, from transformers."""

from __future__ import annotations

import torch

from penjing.testing.networks.base import Made, entry
from penjing.testing.networks.small import SMALL, WORDS, Pick, make, pairs, words

BERT = {**WORDS, **SMALL}
BART = {
    **WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 1,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}


# encoders -------------------------------------------------------------------------------------------------------------
@entry("text", quick=True)
def bert() -> Made:
    return words(make("BertForSequenceClassification", **BERT))


@entry("text", quick=True)
def distilbert() -> Made:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    return words(make("DistilBertForSequenceClassification", **WORDS, **sizes))


@entry("text")
def roberta() -> Made:
    return words(make("RobertaForSequenceClassification", **BERT))


@entry("text")
def roberta_prelayernorm() -> Made:
    return words(make("RobertaPreLayerNormForSequenceClassification", **BERT))


@entry("text", quick=True)
def albert() -> Made:
    return words(make("AlbertForSequenceClassification", embedding_size=8, **BERT))


@entry("text")
def electra() -> Made:
    return words(make("ElectraForPreTraining", embedding_size=8, **BERT))


@entry("text")
def deberta() -> Made:
    sizes = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    return words(make("DebertaForSequenceClassification", **sizes, **BERT))


@entry("text")
def deberta_v2() -> Made:
    sizes = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "share_att_key": True}
    return words(make("DebertaV2ForSequenceClassification", **sizes, **BERT))


@entry("text")
def mpnet() -> Made:
    return words(make("MPNetForSequenceClassification", **BERT))


@entry("text")
def funnel() -> Made:
    sizes = {"vocab_size": 40, "block_sizes": [1, 1], "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 24}
    return words(make("FunnelForSequenceClassification", num_decoder_layers=1, **sizes), 8)


@entry("text")
def big_bird() -> Made:
    return words(make("BigBirdForSequenceClassification", attention_type="original_full", **BERT))


@entry("text")
def longformer() -> Made:
    return words(make("LongformerForSequenceClassification", attention_window=4, **BERT), 8)


@entry("text")
def xlnet() -> Made:
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}
    return words(make("XLNetForSequenceClassification", **sizes), use_mems=False)


@entry("text")
def mobilebert() -> Made:
    sizes = SMALL | {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2}
    return words(make("MobileBertForSequenceClassification", **WORDS, **sizes))


@entry("text")
def squeezebert() -> Made:
    groups = {f"{part}_groups": 2 for part in ("q", "k", "v", "post_attention", "intermediate", "output")}
    return words(make("SqueezeBertForSequenceClassification", embedding_size=16, **groups, **BERT))


@entry("text")
def convbert() -> Made:
    return words(make("ConvBertForSequenceClassification", embedding_size=8, head_ratio=2, conv_kernel_size=3, **BERT))


@entry("text")
def fnet() -> Made:
    return words(make("FNetForSequenceClassification", **BERT))


@entry("text")
def nystromformer() -> Made:
    return words(make("NystromformerForSequenceClassification", num_landmarks=2, segment_means_seq_len=6, **BERT))


@entry("text")
def roformer() -> Made:
    return words(make("RoFormerForSequenceClassification", embedding_size=8, **BERT))


@entry("text")
def modernbert() -> Made:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    return words(make("ModernBertForSequenceClassification", global_attn_every_n_layers=2, **tokens, **BERT))


@entry("text")
def esm() -> Made:
    return words(make("EsmForSequenceClassification", pad_token_id=1, mask_token_id=0, **BERT))


@entry("text")
def canine() -> Made:
    sizes = {"downsampling_rate": 2, "local_transformer_stride": 4, "num_hash_buckets": 20, "num_hash_functions": 2}
    return words(make("CanineForSequenceClassification", **sizes, **BERT), 8)


@entry("text")
def perceiver() -> Made:
    sizes = {
        "num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 6,
    }  # fmt: skip
    model = Pick(make("PerceiverForMaskedLM", **sizes), "inputs", "logits")
    return model, (torch.randint(2, 40, (2, 6)),)


# decoders -------------------------------------------------------------------------------------------------------------
@entry("text", quick=True)
def gpt2() -> Made:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return words(make("GPT2LMHeadModel", **sizes), use_cache=False)


@entry("text")
def gpt_neo() -> Made:
    sizes = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4, "num_heads": 4}
    return words(make("GPTNeoForCausalLM", hidden_size=16, intermediate_size=24, **WORDS, **sizes), use_cache=False)


@entry("text")
def gpt_neox() -> Made:
    return words(make("GPTNeoXForCausalLM", **BERT), use_cache=False)


@entry("text")
def gptj() -> Made:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2}
    return words(make("GPTJForCausalLM", **sizes), use_cache=False)


@entry("text")
def codegen() -> Made:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2}
    return words(make("CodeGenForCausalLM", **sizes), use_cache=False)


@entry("text")
def opt() -> Made:
    sizes = {**WORDS, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 4}
    return words(make("OPTForCausalLM", word_embed_proj_dim=8, **sizes), use_cache=False)


@entry("text", quick=True)
def bloom() -> Made:
    return words(make("BloomForCausalLM", vocab_size=40, hidden_size=16, n_layer=2, n_head=4), use_cache=False)


@entry("text", quick=True)
def llama() -> Made:
    return words(make("LlamaForCausalLM", vocab_size=40, num_key_value_heads=2, **SMALL), use_cache=False)


@entry("text")
def mistral() -> Made:
    sizes = {"num_key_value_heads": 2, "sliding_window": 4, "head_dim": 4}
    return words(make("MistralForCausalLM", **sizes, **BERT), use_cache=False)


@entry("text")
def qwen2() -> Made:
    return words(make("Qwen2ForCausalLM", num_key_value_heads=2, **BERT), use_cache=False)


@entry("text", quick=True)
def qwen3() -> Made:
    return words(make("Qwen3ForCausalLM", vocab_size=40, num_key_value_heads=2, head_dim=4, **SMALL), use_cache=False)


@entry("text")
def gemma() -> Made:
    return words(make("GemmaForCausalLM", num_key_value_heads=1, head_dim=4, **BERT), use_cache=False)


@entry("text")
def gemma2() -> Made:
    return words(
        make("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=4, sliding_window=4, **BERT), use_cache=False
    )


@entry("text", quick=True)
def gemma3() -> Made:
    return words(make("Gemma3ForCausalLM", vocab_size=40, head_dim=4, num_key_value_heads=1, **SMALL), use_cache=False)


@entry("text")
def phi() -> Made:
    return words(make("PhiForCausalLM", **BERT), use_cache=False)


@entry("text")
def phi3() -> Made:
    return words(make("Phi3ForCausalLM", num_key_value_heads=2, pad_token_id=0, **BERT), use_cache=False)


@entry("text")
def falcon() -> Made:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return words(make("FalconForCausalLM", multi_query=True, **sizes), use_cache=False)


@entry("text")
def olmo2() -> Made:
    return words(make("Olmo2ForCausalLM", num_key_value_heads=2, **BERT), use_cache=False)


@entry("text")
def stablelm() -> Made:
    return words(make("StableLmForCausalLM", num_key_value_heads=2, **BERT), use_cache=False)


@entry("text")
def cohere() -> Made:
    return words(make("CohereForCausalLM", num_key_value_heads=2, **BERT), use_cache=False)


@entry("text")
def mixtral() -> Made:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return words(make("MixtralForCausalLM", **experts, **BERT), use_cache=False)


@entry("text")
def mamba() -> Made:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    return words(make("MambaForCausalLM", **sizes), use_cache=False)


@entry("text")
def mamba2() -> Made:
    sizes = {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4, "hidden_size": 16}
    return words(make("Mamba2ForCausalLM", vocab_size=40, num_hidden_layers=2, **sizes), 8, use_cache=False)


@entry("text")
def rwkv() -> Made:
    sizes = {"vocab_size": 40, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    return words(make("RwkvForCausalLM", intermediate_size=24, **sizes), use_cache=False)


@entry("text")
def recurrent_gemma() -> Made:
    sizes = {"lru_width": 16, "num_key_value_heads": 1, "attention_window_size": 8, "head_dim": 4}
    return words(make("RecurrentGemmaForCausalLM", **sizes, **(BERT | {"num_hidden_layers": 3})), use_cache=False)


# both -----------------------------------------------------------------------------------------------------------------
@entry("text", quick=True)
def t5_encoder() -> Made:
    return words(make("T5EncoderModel", feed_forward_proj="gated-gelu", **T5))


@entry("text")
def t5() -> Made:
    return pairs(make("T5ForConditionalGeneration", decoder_start_token_id=0, **T5))


@entry("text")
def longt5() -> Made:
    return words(make("LongT5EncoderModel", local_radius=2, **T5), 8)


@entry("text")
def bart() -> Made:
    return pairs(make("BartForConditionalGeneration", **BART))


@entry("text")
def mbart() -> Made:
    return pairs(make("MBartForConditionalGeneration", **BART))


@entry("text")
def pegasus() -> Made:
    return pairs(make("PegasusForConditionalGeneration", **BART))


@entry("text")
def marian() -> Made:
    return pairs(make("MarianMTModel", **BART))


@entry("text")
def prophetnet() -> Made:
    sizes = {
        "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_buckets": 8,
    }  # fmt: skip
    return pairs(make("ProphetNetForConditionalGeneration", **WORDS, **sizes))
