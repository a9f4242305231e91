"""Networks for text, and for text with images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
SHORT = SMALL | {"max_position_embeddings": 16}
DECODER = SHORT | {"num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
BART = {
    "vocab_size": 20,
    "d_model": 8,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


def tokens(count: int = 4) -> torch.Tensor:
    return torch.zeros(2, count, dtype=torch.long)


def model(name: str, config: str, /, inputs: Callable[[], Any] = tokens, **settings: Any) -> Callable[[], Built]:
    """Return a function that builds a model of transformers by the names of its class and configuration."""

    def build() -> Built:
        import transformers

        made = getattr(transformers, config)(**settings)
        return getattr(transformers, name)(made), inputs()

    return build


def pair() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens()}


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "transformers.AlbertForSequenceClassification": model(
        "AlbertForSequenceClassification", "AlbertConfig", **SHORT, embedding_size=4
    ),
    "transformers.AlbertForMaskedLM": model("AlbertForMaskedLM", "AlbertConfig", **SHORT, embedding_size=4),
    "transformers.BartForConditionalGeneration": model("BartForConditionalGeneration", "BartConfig", **BART),
    "transformers.BartForSequenceClassification": model(
        "BartForSequenceClassification", "BartConfig", lambda: torch.tensor([[0, 5, 2], [0, 6, 2]]), **BART
    ),
    "transformers.BertModel": model("BertModel", "BertConfig", **SHORT),
    "transformers.BertForSequenceClassification": model("BertForSequenceClassification", "BertConfig", **SHORT),
    "transformers.BertForMaskedLM": model("BertForMaskedLM", "BertConfig", **SHORT),
    "transformers.BertForPreTraining": model("BertForPreTraining", "BertConfig", **SHORT),
    "transformers.BertForTokenClassification": model("BertForTokenClassification", "BertConfig", **SHORT),
    "transformers.BloomForCausalLM": model(
        "BloomForCausalLM", "BloomConfig", vocab_size=20, hidden_size=8, n_layer=3, n_head=2
    ),
    "transformers.DebertaForSequenceClassification": model(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        **SHORT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "transformers.DebertaV2ForSequenceClassification": model(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **SHORT,
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        conv_kernel_size=3,
    ),
    "transformers.DistilBertForSequenceClassification": model(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=20,
        dim=8,
        n_layers=3,
        n_heads=2,
        hidden_dim=16,
        max_position_embeddings=16,
    ),
    "transformers.ElectraForSequenceClassification": model(
        "ElectraForSequenceClassification", "ElectraConfig", **SHORT, embedding_size=4
    ),
    "transformers.ElectraForPreTraining": model("ElectraForPreTraining", "ElectraConfig", **SHORT, embedding_size=4),
    "transformers.FalconForCausalLM": model("FalconForCausalLM", "FalconConfig", **SMALL),
    "transformers.FNetForSequenceClassification": model(
        "FNetForSequenceClassification",
        "FNetConfig",
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=3,
        intermediate_size=16,
        max_position_embeddings=16,
    ),
    "transformers.FunnelForSequenceClassification": model(
        "FunnelForSequenceClassification",
        "FunnelConfig",
        vocab_size=20,
        block_sizes=[2, 2],
        d_model=8,
        n_head=2,
        d_head=4,
        d_inner=16,
    ),
    "transformers.GemmaForCausalLM": model("GemmaForCausalLM", "GemmaConfig", **DECODER),
    "transformers.GPT2LMHeadModel": model(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=20, n_positions=16, n_embd=8, n_layer=3, n_head=2
    ),
    "transformers.GPT2ForSequenceClassification": model(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        lambda: tokens()[:1],
        vocab_size=20,
        n_positions=16,
        n_embd=8,
        n_layer=3,
        n_head=2,
    ),
    "transformers.GPTNeoXForCausalLM": model("GPTNeoXForCausalLM", "GPTNeoXConfig", **SHORT),
    "transformers.LlamaForCausalLM": model("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "transformers.LlamaForSequenceClassification": model(
        "LlamaForSequenceClassification", "LlamaConfig", lambda: torch.tensor([[3, 5, 2]]), **DECODER
    ),
    "transformers.MambaForCausalLM": model(
        "MambaForCausalLM", "MambaConfig", vocab_size=20, hidden_size=8, num_hidden_layers=3, state_size=4
    ),
    "transformers.MarianMTModel": model(
        "MarianMTModel", "MarianConfig", pair, **BART, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1
    ),
    "transformers.MistralForCausalLM": model("MistralForCausalLM", "MistralConfig", **DECODER),
    "transformers.MixtralForCausalLM": model("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4),
    "transformers.MobileBertForSequenceClassification": model(
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        **SHORT,
        embedding_size=8,
        intra_bottleneck_size=8,
        num_feedforward_networks=2,
    ),
    "transformers.ModernBertForSequenceClassification": model(
        "ModernBertForSequenceClassification", "ModernBertConfig", **SHORT, pad_token_id=0
    ),
    "transformers.MPNetForSequenceClassification": model("MPNetForSequenceClassification", "MPNetConfig", **SHORT),
    "transformers.OPTForCausalLM": model(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=3,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
    ),
    "transformers.PegasusForConditionalGeneration": model(
        "PegasusForConditionalGeneration", "PegasusConfig", pair, **BART
    ),
    "transformers.PhiForCausalLM": model("PhiForCausalLM", "PhiConfig", **SHORT),
    "transformers.Phi3ForCausalLM": model("Phi3ForCausalLM", "Phi3Config", **SHORT, pad_token_id=0),
    "transformers.Qwen2ForCausalLM": model("Qwen2ForCausalLM", "Qwen2Config", **SHORT, num_key_value_heads=1),
    "transformers.Qwen2MoeForCausalLM": model(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **SHORT,
        **EXPERTS,
        num_key_value_heads=1,
        num_experts=4,
        shared_expert_intermediate_size=8,
    ),
    "transformers.Qwen3ForCausalLM": model("Qwen3ForCausalLM", "Qwen3Config", **DECODER),
    "transformers.RobertaForMaskedLM": model("RobertaForMaskedLM", "RobertaConfig", **SHORT),
    "transformers.RobertaForSequenceClassification": model(
        "RobertaForSequenceClassification", "RobertaConfig", **SHORT
    ),
    "transformers.RwkvForCausalLM": model(
        "RwkvForCausalLM",
        "RwkvConfig",
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=3,
        attention_hidden_size=8,
        intermediate_size=16,
    ),
    "transformers.T5ForConditionalGeneration": model("T5ForConditionalGeneration", "T5Config", pair, **T5),
    "transformers.T5EncoderModel": model("T5EncoderModel", "T5Config", **T5),
    "transformers.XLMRobertaForTokenClassification": model(
        "XLMRobertaForTokenClassification", "XLMRobertaConfig", **SHORT
    ),
    "transformers.XLNetForSequenceClassification": model(
        "XLNetForSequenceClassification", "XLNetConfig", vocab_size=20, d_model=8, n_layer=3, n_head=2, d_inner=16
    ),
    "transformers.EncoderDecoder": model(
        "BertLMHeadModel", "BertConfig", **SHORT, is_decoder=True, add_cross_attention=True
    ),
}
