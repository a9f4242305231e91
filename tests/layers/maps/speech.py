"""Networks for speech and sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .text import BART, model

Built = tuple[nn.Module, Any]

WAVE = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 6,
}


def sound() -> torch.Tensor:
    return torch.zeros(2, 4000)


def frames(features: int = 80, count: int = 40) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(2, count, features)


def whisper_inputs() -> dict[str, torch.Tensor]:
    return {"input_features": torch.zeros(2, 8, 32), "decoder_input_ids": torch.zeros(2, 4, dtype=torch.long)}


def speech_to_text_inputs() -> dict[str, torch.Tensor]:
    return {"input_features": torch.zeros(2, 32, 8), "decoder_input_ids": torch.zeros(2, 4, dtype=torch.long)}


WHISPER = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


def audio(build: Callable[[Any], nn.Module], inputs: Callable[[], Any]) -> Callable[[], Built]:
    def made() -> Built:
        import torchaudio

        return build(torchaudio.models), inputs()

    return made


WAVE_AUDIO = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(8, 10, 5), (8, 3, 2), (8, 2, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 8,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 4,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 16,
    "encoder_ff_interm_dropout": 0.1,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.1,
}
WAVLM_AUDIO = dict(WAVE_AUDIO.items()) | {"encoder_num_buckets": 8, "encoder_max_distance": 16}


def lengths(*shape: int) -> Callable[[], Any]:
    return lambda: (torch.zeros(shape), torch.tensor([shape[1]] * shape[0]))


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "torchaudio.Conformer": audio(lambda m: m.Conformer(8, 2, 16, 3, 5), lengths(2, 20, 8)),
    "torchaudio.Emformer": audio(lambda m: m.Emformer(8, 2, 16, 3, 4, right_context_length=1), lengths(2, 9, 8)),
    "torchaudio.DeepSpeech": audio(lambda m: m.DeepSpeech(8, 16, 5), lambda: torch.zeros(2, 1, 20, 8)),
    "torchaudio.Wav2Letter": audio(lambda m: m.Wav2Letter(num_classes=5), lambda: torch.zeros(2, 1, 4000)),
    "torchaudio.wav2vec2_model": audio(lambda m: m.wav2vec2_model(**WAVE_AUDIO, aux_num_out=5), sound),
    "torchaudio.wavlm_model": audio(lambda m: m.wavlm_model(**WAVLM_AUDIO, aux_num_out=5), sound),
    "torchaudio.ConvTasNet": audio(lambda m: m.ConvTasNet(2, 16, 8, 3, 8, 16, 2, 2), lambda: torch.zeros(2, 1, 1000)),
    "torchaudio.Tacotron2": audio(
        lambda m: m.Tacotron2(n_mels=8, symbol_embedding_dim=16, encoder_embedding_dim=16),
        lambda: (
            torch.zeros(2, 6, dtype=torch.long),
            torch.tensor([6, 6]),
            torch.zeros(2, 8, 5),
            torch.tensor([5, 5], device="cpu"),
        ),
    ),
    "transformers.ASTForAudioClassification": model(
        "ASTForAudioClassification",
        "ASTConfig",
        frames(32, 32),
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=32,
        num_mel_bins=32,
    ),
    "transformers.Data2VecAudioForCTC": model(
        "Data2VecAudioForCTC",
        "Data2VecAudioConfig",
        sound,
        **dict(WAVE.items()) | {"conv_pos_kernel_size": 5},
    ),
    "transformers.HubertForCTC": model("HubertForCTC", "HubertConfig", sound, **WAVE),
    "transformers.HubertForSequenceClassification": model(
        "HubertForSequenceClassification", "HubertConfig", sound, **WAVE, classifier_proj_size=8
    ),
    "transformers.SEWForCTC": model("SEWForCTC", "SEWConfig", sound, **WAVE, squeeze_factor=2),
    "transformers.SEWDForCTC": model(
        "SEWDForCTC", "SEWDConfig", sound, **WAVE, squeeze_factor=2, max_position_embeddings=64, position_buckets=8
    ),
    "transformers.Speech2TextForConditionalGeneration": model(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        speech_to_text_inputs,
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=16,
        num_conv_layers=2,
    ),
    "transformers.SpeechT5ForSpeechToText": model(
        "SpeechT5ForSpeechToText",
        "SpeechT5Config",
        lambda: {"input_values": sound(), "decoder_input_ids": torch.zeros(2, 4, dtype=torch.long)},
        vocab_size=20,
        hidden_size=8,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=3,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        max_speech_positions=32,
        max_text_positions=16,
    ),
    "transformers.UniSpeechSatForSequenceClassification": model(
        "UniSpeechSatForSequenceClassification", "UniSpeechSatConfig", sound, **WAVE, classifier_proj_size=8
    ),
    "transformers.Wav2Vec2ForCTC": model("Wav2Vec2ForCTC", "Wav2Vec2Config", sound, **WAVE),
    "transformers.Wav2Vec2Model": model("Wav2Vec2Model", "Wav2Vec2Config", sound, **WAVE),
    "transformers.Wav2Vec2ForSequenceClassification": model(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        sound,
        **WAVE,
        classifier_proj_size=8,
        use_weighted_layer_sum=True,
    ),
    "transformers.Wav2Vec2BertForCTC": model(
        "Wav2Vec2BertForCTC",
        "Wav2Vec2BertConfig",
        frames(16, 20),
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        feature_projection_input_dim=16,
        vocab_size=6,
        add_adapter=True,
        output_hidden_size=8,
    ),
    "transformers.Wav2Vec2ConformerForCTC": model(
        "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", sound, **WAVE, conv_depthwise_kernel_size=3
    ),
    "transformers.WavLMForCTC": model("WavLMForCTC", "WavLMConfig", sound, **WAVE),
    "transformers.WavLMForXVector": model(
        "WavLMForXVector",
        "WavLMConfig",
        sound,
        **WAVE,
        tdnn_dim=(8, 8, 8),
        tdnn_kernel=(3, 3, 1),
        tdnn_dilation=(1, 2, 1),
        xvector_output_dim=8,
    ),
    "transformers.WhisperForConditionalGeneration": model(
        "WhisperForConditionalGeneration", "WhisperConfig", whisper_inputs, **WHISPER
    ),
    "transformers.WhisperForAudioClassification": model(
        "WhisperForAudioClassification",
        "WhisperConfig",
        lambda: torch.zeros(2, 8, 32),
        **WHISPER,
        classifier_proj_size=8,
    ),
}
