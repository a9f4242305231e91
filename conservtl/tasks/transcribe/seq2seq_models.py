"""Recognizers from sequence to sequence: transformers' Whisper and Speech2Text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import DataError, SpecError, counted
from conservtl.extras import require
from conservtl.functions import IGNORED
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.masked_layers import mask_layers
from conservtl.tasks.transcribe.pretrained_tokens import DecoderTokens
from conservtl.tasks.transcribe.recognizers import Decoded
from conservtl.tasks.transcribe.waveform_models import of_transformers

__all__ = ["SEQ2SEQ", "TransformersSeq2Seq", "build_seq2seq"]

SEQ2SEQ = {"whisper": "whisper", "speech_to_text": "fbank"}
"""Types of AutoModelForSpeechSeq2Seq -> kind of their features."""

_FRAMES = 100  # of Whisper's features in a second; its encoder keeps every second one
_POSITIONS = 16  # at once
_BANDS = {"whisper": "num_mel_bins", "speech_to_text": "input_feat_per_channel"}


class TransformersSeq2Seq(nn.Module):
    """An encoder and a decoder of transformers, trained by the tokens before.

    Args:
        network: of ``AutoModelForSpeechSeq2Seq``.
        tokens: by which its decoder begins and ends.
    """

    keeps_encoded: ClassVar[bool] = True

    def __init__(self, network: Any, tokens: DecoderTokens) -> None:
        super().__init__()
        self.network, self.tokens = network, tokens
        self._is_whisper = network.config.model_type == "whisper"
        if not self._is_whisper:
            mask_layers(network.model.encoder.conv, nn.Conv1d)

    def teacher(self, labels: Tensor) -> dict[str, Tensor]:
        """Return ``decoder_input_ids``, the beginning and the texts, and ``decoder_attention_mask``.

        Raises:
            DataError: a text is longer than the decoder has positions for.
        """
        start = torch.tensor(self.tokens.start, device=labels.device).expand(len(labels), -1)
        ids = torch.cat([start, torch.where(labels < 0, self._padding, labels)], 1)
        if (most := self._positions - start.shape[1]) < labels.shape[1]:
            raise DataError(
                f"a text must have at most {counted(most, 'token')}, for which the decoder has positions; received "
                f"{labels.shape[1]}. Leave the utterance out, or cut it."
            )
        return {"decoder_input_ids": ids, "decoder_attention_mask": F.pad(labels >= 0, (start.shape[1], 0), value=True)}

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        keep_encoded: bool = False,
    ) -> Decoded:
        """Return logits of each next token behind the beginning, and which positions count.

        Args:
            inputs: (N, frames, bands).
            lengths: (N,) frames that are no padding; Whisper takes silence for speech, as it was trained.
            decoder_input_ids: (N, start + tokens); None: the beginning alone.
            decoder_attention_mask: their mask; the decoder needs none, for it sees the tokens before alone.
            keep_encoded: whether to return the encoder's outputs too, for ``generate``.
        """
        start = len(self.tokens.start)
        if decoder_input_ids is None:
            decoder_input_ids = torch.tensor(self.tokens.start, device=inputs.device).expand(len(inputs), -1)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids, dtype=torch.bool)
        arguments = self._arguments(inputs, lengths)
        found = self.network(**arguments, decoder_input_ids=decoder_input_ids, use_cache=False)
        encoded = found.encoder_last_hidden_state if keep_encoded else None
        return Decoded(found.logits[:, start - 1 :], decoder_attention_mask[:, start - 1 :], encoded=encoded)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor,
        lengths: Tensor,
        encoded: Tensor | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the most probable text that transformers' ``generate`` finds.

        Args:
            inputs: (N, frames, bands).
            lengths: (N,).
            encoded: outputs of the encoder, (N, positions, width); None: it is run.
            beams: hypotheses that are kept at each token; 1: the most probable next token again and again.
            length_penalty: exponent of the length by which the log probability of a hypothesis is divided.

        Returns:
            (N, tokens), -100 behind the end, and the mean posterior of the tokens of each text, (N,).
        """
        arguments = self._arguments(inputs, lengths)
        if encoded is None:
            encoded = self.network.get_encoder()(**arguments)[0]
        valid = arguments.get("attention_mask", encoded.new_ones(encoded.shape[:2], dtype=torch.long))
        library, by = require("transformers", "transformers"), self.tokens
        config = library.GenerationConfig(
            num_beams=beams,
            length_penalty=length_penalty,
            early_stopping="never" if beams > 1 else False,  # else a search may end before its best text
            max_length=self._positions,
            suppress_tokens=list(by.silent) or None,
            decoder_start_token_id=by.start[0],
            bos_token_id=by.start[0],
            eos_token_id=by.end,
            pad_token_id=self._padding,
        )
        start = torch.tensor(by.start, device=inputs.device).expand(len(inputs), -1)
        # The method of all models: Whisper's own cuts recordings and writes marks of time.
        ids = library.GenerationMixin.generate(
            self.network, generation_config=config, decoder_input_ids=start, **_known(encoded, valid)
        )
        text = ids[:, len(by.start) :]
        written = (text == by.end).cumsum(1) == 0
        heard = text.masked_fill(~written, IGNORED)[:, : int(written.sum(1).max())]
        return heard, self._posteriors(heard, _known(encoded, valid))

    def _posteriors(self, heard: Tensor, encoded: dict[str, Any]) -> Tensor:
        """Return the mean posterior of the tokens of each text among all that may be written, (N,)."""
        if not heard.shape[1]:
            return torch.zeros(len(heard), device=heard.device)
        ids = self.teacher(heard)["decoder_input_ids"]
        states = self.network.base_model(decoder_input_ids=ids, use_cache=False, **encoded)[0]
        silent = torch.tensor(self.tokens.silent, dtype=torch.long, device=heard.device)
        before, parts = len(self.tokens.start) - 1, []
        # A few positions at a time: scores of all tokens at all positions of a long text would fill the memory.
        for place in range(0, heard.shape[1], _POSITIONS):
            tokens = heard[:, place : place + _POSITIONS]
            state = states[:, before + place : before + place + tokens.shape[1]]
            scores = self.network.get_output_embeddings()(state).float().index_fill(2, silent, -torch.inf).softmax(-1)
            parts.append(scores.gather(2, tokens.clamp_min(0).unsqueeze(2)).squeeze(2).masked_fill(tokens < 0, 0.0))
        each = torch.cat(parts, 1)
        mean: Tensor = each.sum(1) / (heard >= 0).sum(1).clamp_min(1)
        return mean

    def _arguments(self, inputs: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the encoder."""
        if self._is_whisper:
            return {"input_features": inputs.transpose(1, 2)}
        frames = lengths
        for conv in self.network.model.encoder.conv.conv_layers:
            conv.lengths = frames
            frames = (frames - 1) // conv.stride[0] + 1
        valid = torch.arange(inputs.shape[1], device=inputs.device) < lengths.to(inputs.device).unsqueeze(1)
        return {"input_features": inputs, "attention_mask": valid.long()}

    @property
    def _padding(self) -> int:
        return self.tokens.end if self.tokens.pad is None else self.tokens.pad

    @property
    def _positions(self) -> int:
        return int(self.network.config.max_target_positions)


def _known(encoded: Tensor, valid: Tensor) -> dict[str, Any]:
    """Return the arguments of a network whose encoder has run; ``generate`` changes them in place."""
    outputs = require("transformers.modeling_outputs", "transformers").BaseModelOutput(encoded)
    return {"encoder_outputs": outputs, "attention_mask": valid}


def build_seq2seq(kind: str, args: dict[str, Any], features: Features, tokens: Any, outputs: int) -> nn.Module:
    """Return a recognizer of transformers from sequence to sequence, by its type, with random weights.

    Layers are not dropped at random unless ``args`` say so.

    Raises:
        SpecError: an argument is none of its configuration's, or does not fit.
    """
    by = tokens.decoder()
    decided = {
        "vocab_size": outputs,
        _BANDS[kind]: features.n_mels,
        "decoder_start_token_id": by.start[0],
        "bos_token_id": by.start[0],
        "eos_token_id": by.end,
        "pad_token_id": by.end if by.pad is None else by.pad,
    }
    if kind == "whisper":
        decided["max_source_positions"] = round(features.seconds * _FRAMES) // 2
    for name in decided.keys() & args.keys():
        if args[name] != decided[name]:
            raise SpecError(
                f"model.args.{name} must be {decided[name]}, as data says; received {args[name]}. Leave it out."
            )
    network = of_transformers("AutoModelForSpeechSeq2Seq", kind, args, args | decided)
    if kind == "speech_to_text" and by.pad is None:  # no token is padding: each gets its position
        network.model.decoder.embed_positions.padding_idx = -1
    return TransformersSeq2Seq(network, by)
